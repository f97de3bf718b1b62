"""The classification experiments: a ticket a class, IMP single, IMP multiple and dense, from one θ0, over seeds.

A recipe is a function that returns a frozen `Classification`; `run_classification` runs it in a resumable folder.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import rtl.models
from rtl import examples, route
from rtl.calibrate import calibrate
from rtl.data import Data, cifar10, cifar100, data_root, digits
from rtl.diagnose import similarity
from rtl.errors import InputError
from rtl.evaluate import evaluate, log_odds, ticket_logits
from rtl.extract import Extraction, PrunePlan, extract_all
from rtl.fit import Fit, masked_copy
from rtl.models.small import draw_as_torch_
from rtl.partition import Partition, by_label, whole
from rtl.predict import Inputs
from rtl.recipes.experiment import Details, Method, Row, check_choices, levels, tickets_details, what_differs
from rtl.recipes.published import clusters
from rtl.retrain import presented, retrain, retrained
from rtl.run import COMPONENT, Artefact, Run, slug
from rtl.tasks import MultiClass, OneVsRest
from rtl.tensorboard import Board
from rtl.tickets import TicketMasks, TicketNetwork, Tickets

_DATA = ("dataset", "model", "train_files", "holdout")
_TRAINING = (*_DATA, "init", "retrain_epochs", "batch_size", "lr", "lr_schedule", "augment")
_PRUNING = ("milestones", "remove", "round_epochs", "scope", "trained")
# The settings that a method's result depends on.
DEPENDS_ON: dict[Method, tuple[str, ...]] = {
    "rtl": (*_TRAINING, *_PRUNING, "start", "stop_on_collapse", "schedule", "batch_norm", "masked"),
    "imp_single": (*_TRAINING, *_PRUNING, "start"),  # a single ticket does not collapse
    "imp_multiple": (*_TRAINING, *_PRUNING, "start", "stop_on_collapse", "batch_norm"),
    "dense": _TRAINING,
}
# Those that the masks themselves depend on.
EXTRACTION = frozenset({*_TRAINING, *_PRUNING, "stop_on_collapse"} - {"retrain_epochs"})


@dataclass(frozen=True)
class Classification:
    """Everything a classification run depends on.

    Args:
        recipe: its name.
        protocol: "paper", "quick" (rounds of one epoch) or "reduced" (less data too).
        dataset: "digits", "cifar10", or "cifar100" with the paper's eight clusters for classes.
        model: a network of `rtl.models`.
        init: θ0. "kaiming": N(0, 2 / fan-in), as `rtl.models` draws it. "torch": convolutions and linear layers as
            torch draws them, uniform with a variance of 1 / (3 fan-in), a sixth; what the paper's numbers need.
        train_files: how many of the data's training files are read (CIFAR has five); None: all.
        seeds: one whole experiment each.
        methods: what is compared.
        sparsities: at which every method is retrained and evaluated.
        milestones: sparsities that a round is cut short at to be exact, besides those: a protocol's own, so that masks
            do not depend on which of its sparsities are asked for.
        remove: weights each round removes: a number, or a fraction of those that survive.
        round_epochs: epochs of a round of extraction, for tickets; multi-class networks, which have no negatives, take
            twice as many, so that all see equally many samples.
        retrain_epochs: likewise of joint retraining.
        batch_size, lr, schedule, batch_norm, masked, lr_schedule, augment: as in `rtl.Fit`.
        scope, trained, stop_on_collapse: as in `rtl.PrunePlan`.
        start: where retraining starts: at "theta0", or at the weights "extracted" with the masks (shared ones: the mean
            of the tickets', see `Extraction.weights_at`).
        holdout: fraction of each class's training samples that no method trains on, to calibrate every method's scores
            with (`rtl.calibrate`); 0: scores as they are. Saved tickets, their routers and examples have theirs as they
            are in any case.
        switches: settings to change one at a time, as NAME=VALUE: each is run beside the rest, in rows of its own, for
            the methods it makes a difference to.
        tag: what the results call these settings as a whole ("tuned"), in front of what else differs.
    """

    recipe: str
    protocol: str
    dataset: Literal["digits", "cifar10", "cifar100"]
    model: Literal["small_conv", "ghostnet"]
    train_files: int | None
    seeds: tuple[int, ...]
    methods: tuple[Method, ...]
    sparsities: tuple[float, ...]
    remove: int | float
    round_epochs: int
    retrain_epochs: int
    batch_size: int
    lr: float
    milestones: tuple[float, ...] = ()
    init: Literal["kaiming", "torch"] = "kaiming"
    schedule: Literal["sequential", "mixed"] = "sequential"
    batch_norm: Literal["per_ticket", "shared", "recalibrated"] = "per_ticket"
    masked: Literal["update", "gradient"] = "update"
    lr_schedule: Literal["constant", "cosine"] = "constant"
    augment: Literal["none", "crop_flip"] = "none"
    scope: Literal["global", "layer"] = "global"
    trained: Literal["masked", "dense"] = "masked"
    stop_on_collapse: bool = False
    start: Literal["theta0", "extracted"] = "theta0"
    holdout: float = 0.0
    switches: tuple[str, ...] = ()
    tag: str = ""

    def __post_init__(self) -> None:
        check_choices(self)
        if not 0 <= self.holdout <= 0.5:
            raise InputError(f"holdout is {self.holdout}, expected a fraction from 0 to 0.5")
        if self.schedule not in ("sequential", "mixed"):
            raise InputError(f"schedule is {self.schedule!r}, expected 'sequential' or 'mixed'")
        if self.start not in ("theta0", "extracted"):
            raise InputError(f"start is {self.start!r}, expected 'theta0' or 'extracted'")
        if self.start == "extracted" and self.stop_on_collapse:
            raise InputError(
                "start is 'extracted' with stop_on_collapse True, expected 'theta0': stopped tickets lack it"
            )
        _ = self.plan, self.fit("rtl", self.round_epochs), self.fit("rtl", self.retrain_epochs)  # their checks
        changed = [self.switched(switch) for switch in self.switches]
        for number, switch in enumerate(self.switches):
            if changed[number] in changed[:number]:
                raise InputError(f"switches is {self.switches}, of which {switch!r} changes what another one does")

    @property
    def plan(self) -> PrunePlan:
        until = max(self.sparsities)
        return PrunePlan(self.remove, until, levels(self), self.stop_on_collapse, self.scope, self.trained)

    def switched(self, switch: str) -> Classification:
        """These settings with one changed, given as NAME=VALUE. Raises InputError if it is none or changes nothing."""
        name, equals, value = switch.partition("=")
        possible = sorted({setting for settings in DEPENDS_ON.values() for setting in settings})
        if not equals or name not in possible or name in (*_DATA, "milestones"):
            raise InputError(f"switches holds {switch!r}, expected NAME=VALUE with a setting such as batch_norm=shared")
        if not COMPONENT.fullmatch(switch):  # it names a folder
            raise InputError(f"switches holds {switch!r}, expected letters, digits and . _ - for the value")
        before = getattr(self, name)
        try:
            if isinstance(before, bool):
                after: Any = {"True": True, "False": False}[value]
            else:
                after = value if isinstance(before, str) else _number(value)
        except (KeyError, ValueError):
            kind = "True or False" if isinstance(before, bool) else "a number"
            raise InputError(f"switches holds {switch!r}, but {name} is {kind}") from None
        if after == before:
            raise InputError(f"switches holds {switch!r}, which {name} is anyway")
        changed: dict[str, Any] = {name: after}
        return dataclasses.replace(self, switches=(), **changed)

    def variant(self, method: Method) -> str:
        """What differs from the protocol's own settings for a method, as the results' "variant" says it."""
        return what_differs(self, method, DEPENDS_ON[method], self.tag)

    def fit(self, method: Method, epochs: int) -> Fit:
        tickets = method in ("rtl", "imp_multiple")
        return Fit(
            epochs=epochs if tickets else 2 * epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            task=OneVsRest() if tickets else MultiClass(),
            schedule=self.schedule if method == "rtl" else "sequential",
            batch_norm=self.batch_norm if tickets else "shared",
            masked=self.masked,
            lr_schedule=self.lr_schedule,
            augment=self.augment,
        )


def _number(text: str) -> int | float:
    """Raises ValueError if it is none."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def load(config: Classification, root: Path | None) -> tuple[Data, Data]:
    """(train, test) of the recipe's data set.

    Args:
        config: the recipe.
        root: the data root, for data sets that need one; None: the environment variable RTL_DATA.

    Raises:
        InputError: the data is not where it should be, or the recipe cannot be run on it.
    """
    train, test = _read(config, root)
    _check(config, train)
    return train, test


def _read(config: Classification, root: Path | None) -> tuple[Data, Data]:
    if config.dataset == "digits":
        if config.train_files is not None:
            raise InputError(f"train_files is {config.train_files}, but the digits are not in files: leave it out")
        return digits()
    if config.dataset == "cifar100":
        train, test = cifar100(data_root(root), parts=config.train_files)
        return _regrouped(train, clusters("cifar100")), _regrouped(test, clusters("cifar100"))
    return cifar10(data_root(root), parts=config.train_files)


def _regrouped(data: Data, groups: Mapping[str, Sequence[str]]) -> Data:
    """The same samples with the groups of their classes for labels."""
    return dataclasses.replace(data, targets=by_label(data, groups).index, class_names=tuple(groups))


def _held_out(train: Data, fraction: float) -> tuple[Data, Data | None]:
    """(what is trained on, what scores are calibrated on): of each class the last samples are held out."""
    if fraction == 0:
        return train, None
    held = torch.zeros(len(train), dtype=torch.bool)
    for label in train.targets.unique():
        own = (train.targets == label).nonzero().flatten()
        if not 1 <= round(fraction * len(own)) < len(own):
            raise InputError(f"holdout is {fraction}, which leaves a class of {len(own)} samples with none on one side")
        held[own[-round(fraction * len(own)) :]] = True
    return train.select((~held).nonzero().flatten()), train.select(held.nonzero().flatten())


def _check(config: Classification, train: Data) -> None:
    """Raise InputError, before anything is written, if a class is empty, a mixed batch would have no sample of some
    class, or no weight would be left.
    """
    tickets = len(by_label(_held_out(train, config.holdout)[0]))
    for one in (config, *map(config.switched, config.switches)):
        one.fit("rtl", one.retrain_epochs).share(tickets)
    net = masked_copy(new_model(config, train, Run(".")), 1, "shared")
    config.plan.rounds(sum(bank.shape.numel() for bank in net.banks.values()))


def new_model(config: Classification, data: Data, run: Run) -> nn.Module:
    """The network at θ0, which follows from the run's seed and is the same for every method."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed_for("theta0"))
        model: nn.Module = getattr(rtl.models, config.model)(len(data.class_names), data.inputs.shape[1])
        if config.init == "torch":
            draw_as_torch_(model)
    return model


@dataclass(frozen=True, eq=False)
class _Job:
    """One row: networks to retrain and evaluate, one, or for IMP multiple one a ticket."""

    config: Classification
    method: Method
    run: Run
    extraction: Extraction
    sparsity: float
    budget: Mapping[int, int]  # samples that RTL's retraining presents to each subset

    def key(self, stage: str) -> str:
        return f"{stage}/{self.sparsity:g}"

    def plans(self) -> list[tuple[str | None, Fit, Run]]:
        """Of each network its ticket (None: all of them), how it is retrained, and where.

        Every method is presented with as many samples as RTL. Joint retraining repeats the batches of small subsets;
        a network that trains alone takes more epochs instead.
        """
        fit, parts = self.config.fit(self.method, self.config.retrain_epochs), self.extraction.parts
        if self.method == "rtl":
            return [(None, fit, self.run)]
        if self.method != "imp_multiple":
            return [(None, _presenting(sum(self.budget.values()), parts, 0, fit), self.run)]
        return [
            (name, _presenting(self.budget[k], parts, k, fit), self.run.child(slug(name)))
            for k, name in enumerate(parts.names)
        ]

    def samples(self, *, done: bool = False) -> int:
        """What retraining presents; `done`: that part of it which an earlier run has finished."""
        parts = self.extraction.parts
        return sum(
            fit.epochs * sum(presented(parts, _subsets(parts, name), fit).values())
            for name, fit, run in self.plans()
            if not done or retrained(run, self.sparsity)
        )

    def networks(self, masks: TicketMasks) -> list[TicketNetwork]:
        """Retrained, or loaded if they are."""
        networks, parts = [], self.extraction.parts
        for name, fit, run in self.plans():
            model = self.extraction.model
            if self.config.start == "extracted":
                model = copy.deepcopy(model)
                ticket = None if name is None else parts.position(name)
                model.load_state_dict(self.extraction.weights_at(self.sparsity, ticket))
            networks.append(retrain(model, masks if name is None else masks.only(name), parts, fit, run))
        return networks


def _subsets(parts: Partition, name: str | None) -> list[int]:
    return list(range(len(parts))) if name is None else [parts.position(name)]


def _presenting(samples: int, parts: Partition, subset: int, fit: Fit) -> Fit:
    """`fit` with as many epochs of one subset as come next to so many samples."""
    epoch = sum(presented(parts, [subset], fit).values())
    return dataclasses.replace(fit, epochs=max(1, round(samples / epoch)))


def run_classification(
    config: Classification, run: Run, train: Data, test: Data, board: Board | None = None
) -> tuple[list[Row], Details]:
    """Run the experiment, or resume it.

    Args:
        config: the recipe.
        run: its folder. Refused if it holds another configuration.
        train, test: what `load` gives.
        board: gets curves and pictures on the way.

    The first seed's networks of tickets are left in `tickets/SPARSITY`, as `TicketNetwork.from_pretrained` reads them.

    Returns:
        The rows of table.json, and the details: "per_class" metrics of every row (and those of its scores before
        calibration); of the first seed's tickets the "similarity" matrices by sparsity, the "curve" of overlaps over
        all rounds and what `rtl.report.insights` finds in it, and "examples" of right and wrong samples by sparsity;
        and of every network of tickets the "routing" of routers beside the oracle (`rtl.route.compare`).

    Raises:
        InputError: see `Run.configure` and the method's own functions.
    """
    _check(config, train)
    run.configure(config)
    run.child("data").configure({"train": by_label(train).fingerprint, "test": whole(test).fingerprint})
    training, held_out = _held_out(train, config.holdout)
    jobs = _jobs(config, run, training)
    extractions = list(dict.fromkeys(job.extraction for job in jobs))
    # The single model's chain of rounds is as long as all tickets': first, so that no core waits for it at the end.
    extractions.sort(key=lambda extraction: (len(extraction.parts), -extraction.samples))
    planned = sum(e.samples for e in extractions) + sum(job.samples() for job in jobs)
    finished = sum(e.finished_samples for e in extractions) + sum(job.samples(done=True) for job in jobs)
    if board is not None:
        run.progress.listen(board.event)
    with run.progress.whole(config.recipe, planned, finished):
        extract_all(extractions, run)
        found = {extraction: extraction.tickets() for extraction in extractions}
        if board is not None:
            for extraction, tickets in found.items():
                board.tickets(extraction.run.name, tickets)
        work = functools.partial(_retrain_and_evaluate, jobs, found, test, held_out)
        evaluations = run.map(work, range(len(jobs)), label="retrain and evaluate")

    def main(job: _Job) -> bool:
        return job.config.switches == config.switches and job.run.seed == config.seeds[0]

    for job in jobs:
        if job.method == "rtl" and main(job):
            folder, net = (
                run.path / "tickets" / f"{job.sparsity:g}",
                job.networks(found[job.extraction].at(job.sparsity))[0],
            )
            net.save_pretrained(folder)
            Inputs.of(train).save(folder)
            for router in _routers(job, test, net):
                router.save(folder)
    rows = [_row(job, found[job.extraction], done.info) for job, done in zip(jobs, evaluations, strict=True)]
    per_class = [
        {key: row[key] for key in ("method", "protocol", "variant", "sparsity", "seed")}
        | done.info["per_class"]
        | ({"uncalibrated": done.info["uncalibrated"]} if held_out is not None else {})
        for row, done in zip(rows, evaluations, strict=True)
    ]
    details: Details = {"class_names": by_label(train).names, "per_class": per_class}
    first = next((job for job in jobs if job.method in ("rtl", "imp_multiple")), None)
    if first is not None:
        details |= tickets_details(found[first.extraction])
    routed = [job for job in jobs if job.method == "rtl"]
    if routed:
        found_by = {job: job.run.load(job.key("route")).info for job in routed}
        details["routing"] = [
            {
                "protocol": config.protocol,
                "variant": job.config.variant("rtl"),
                "sparsity": job.sparsity,
                "seed": job.run.seed,
                "router": router,
            }
            | values
            for job, info in found_by.items()
            for router, values in info["routing"].items()
        ]
        details["examples"] = {f"{job.sparsity:g}": found_by[job]["examples"] for job in routed if main(job)}
    if board is not None:
        board.results(rows, details)
    return rows, details


def _jobs(config: Classification, run: Run, train: Data) -> list[_Job]:
    """Every row, of all seeds and switches; those that share masks share an extraction."""
    parts = by_label(train)
    jobs: list[_Job] = []
    extractions: dict[tuple[str, int, Method], Extraction] = {}
    for seed in config.seeds:
        one = run.child(f"seed-{seed}", seed)
        for switch in ("", *config.switches):
            variant = config.switched(switch) if switch else config
            model = new_model(variant, train, one)
            every = presented(parts, list(range(len(parts))), variant.fit("rtl", 1))
            budget = {k: variant.retrain_epochs * samples for k, samples in every.items()}
            for method in config.methods:
                if switch and variant.variant(method) == config.variant(method):
                    continue  # it makes no difference to this method
                masks_of: Method = "rtl" if method == "imp_multiple" else method
                key = (switch if switch.partition("=")[0] in EXTRACTION else "", seed, masks_of)
                if key not in extractions:
                    plan = PrunePlan(until=0.0) if method == "dense" else variant.plan
                    subsets = parts if masks_of == "rtl" else whole(train)
                    fit, folder = variant.fit(masks_of, variant.round_epochs), _folder(one, key[0]).child(masks_of)
                    extractions[key] = Extraction(model, subsets, plan, fit, folder)
                for level in (0.0,) if method == "dense" else sorted(config.sparsities):
                    own = _folder(one, switch).child(method)
                    jobs.append(_Job(variant, method, own, extractions[key], level, budget))
    return jobs


def _folder(run: Run, switch: str) -> Run:
    return run.child(switch) if switch else run


def _retrain_and_evaluate(
    jobs: Sequence[_Job], found: Mapping[Extraction, Tickets], test: Data, held_out: Data | None, _: Run, number: int
) -> Artefact:
    job = jobs[number]

    def networks() -> list[TicketNetwork]:
        return job.networks(found[job.extraction].at(job.sparsity))

    def score() -> Artefact:
        return Artefact({"logits": ticket_logits(networks()[0], test)})

    # All tickets on all samples, once for everything that is made of it.
    logits = job.run.stage(job.key("scores"), score).tensors["logits"] if job.method == "rtl" else None

    def compute() -> Artefact:
        own = networks()
        nets = own if job.method == "imp_multiple" else own[0]
        result, info = evaluate(nets, test, logits=logits), {}
        if held_out is not None:
            info["uncalibrated"] = result.metrics
            fitted = calibrate(log_odds(nets, held_out), held_out.targets)
            result = evaluate(nets, test, calibration=fitted, logits=logits)
        return Artefact(
            info=info
            | {
                "metrics": result.metrics,
                "per_class": result.per_class,
                "samples": sum(net.samples for net in own),
                "seconds": sum(net.seconds for net in own),
                "params": sum(net.params for net in own),
                "batch_norm_params": sum(net.batch_norm_params for net in own),
            }
        )

    def route_and_pick(logits: Tensor) -> Artefact:
        parts = job.extraction.parts
        net, own = networks()[0], parts.apply(test)
        routers = [route.by_confidence(net), route.by_centroid(net, parts)]
        chosen = examples.pick(net.names, logits.sigmoid(), route.numbers(net, own.index))
        return Artefact(
            info={
                "routing": route.compare(net, routers, own, logits=logits),
                "examples": examples.with_pictures(chosen, test),
            }
        )

    if logits is not None:
        job.run.stage(job.key("route"), functools.partial(route_and_pick, logits))
    return job.run.stage(job.key("evaluate"), compute)


def _routers(job: _Job, test: Data, net: TicketNetwork) -> list[route.Router]:
    """Routers to use with a network of tickets, calibrated on all of the test set, which no ticket was trained on."""
    parts, logits = job.extraction.parts, job.run.load(job.key("scores")).tensors["logits"]
    own = parts.apply(test)
    return [r.calibrated(net, own, logits) for r in (route.by_confidence(net), route.by_centroid(net, parts))]


def _row(job: _Job, tickets: Tickets, evaluation: Mapping[str, Any]) -> Row:
    masks = tickets.at(job.sparsity)
    metrics = dict(evaluation["metrics"])
    if len(masks.names) > 1:
        metrics["similarity"] = similarity(masks).mean
    return {
        "method": job.method,
        "protocol": job.config.protocol,
        "variant": job.config.variant(job.method),
        "sparsity": job.sparsity,
        "seed": job.run.seed,
        "params": evaluation["params"],
        "batch_norm_params": evaluation["batch_norm_params"],
        "samples": tickets.samples[job.sparsity] + evaluation["samples"],
        "seconds": tickets.seconds[job.sparsity] + evaluation["seconds"],
        "metrics": metrics,
    }
