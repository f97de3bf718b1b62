"""The classification experiments: a ticket a class, IMP single, IMP multiple and dense, from one θ0, over seeds.

A recipe is a function that returns a frozen `Classification`; `run_classification` runs it in a resumable folder.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import rtl.models
from rtl import baselines, examples, route
from rtl.data import Data, cifar10, data_root, digits
from rtl.diagnose import diagnose, similarity
from rtl.errors import InputError
from rtl.evaluate import evaluate, ticket_scores
from rtl.extract import Extraction, PrunePlan, extract_all
from rtl.fit import Fit, masked_copy
from rtl.partition import Partition, by_label, whole
from rtl.predict import Inputs
from rtl.report import insights
from rtl.retrain import retrain
from rtl.run import Artefact, Run
from rtl.tasks import MultiClass, OneVsRest
from rtl.tensorboard import Board
from rtl.tickets import TicketMasks, TicketNetwork, Tickets

Method = Literal["rtl", "imp_single", "imp_multiple", "dense"]
Row = dict[str, Any]
Details = dict[str, Any]
METHODS: tuple[Method, ...] = ("rtl", "imp_single", "imp_multiple", "dense")


@dataclass(frozen=True)
class Classification:
    """Everything a classification run depends on.

    Args:
        recipe: its name.
        protocol: "paper", "quick" (rounds of one epoch) or "reduced" (less data too).
        dataset: "digits" or "cifar10".
        model: a network of `rtl.models`.
        train_files: how many of the data's training files are read (CIFAR has five); None: all.
        seeds: one whole experiment each.
        methods: what is compared.
        sparsities: at which every method is retrained and evaluated.
        remove: weights each round removes: a number, or a fraction of those that survive.
        round_epochs: epochs of a round of extraction, for tickets; multi-class networks, which have no negatives, take
            twice as many, so that all see equally many samples.
        retrain_epochs: likewise of joint retraining.
        batch_size, lr, schedule, batch_norm: as in `rtl.Fit`.
        stop_on_collapse: as in `rtl.PrunePlan`.
    """

    recipe: str
    protocol: str
    dataset: Literal["digits", "cifar10"]
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
    schedule: Literal["sequential", "mixed"] = "sequential"
    batch_norm: Literal["per_ticket", "shared"] = "per_ticket"
    stop_on_collapse: bool = False

    def __post_init__(self) -> None:
        for name in ("seeds", "methods", "sparsities"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise InputError(f"{name} is {values}, expected one or more different values")
        unknown = sorted(set(self.methods) - set(METHODS))
        if unknown:
            raise InputError(f"methods holds {unknown[0]!r}, expected some of {', '.join(METHODS)}")
        _ = self.plan, self.fit("rtl", self.round_epochs), self.fit("rtl", self.retrain_epochs)  # their checks

    @property
    def plan(self) -> PrunePlan:
        return PrunePlan(self.remove, max(self.sparsities), self.sparsities, self.stop_on_collapse)

    def variant(self, method: Method) -> str:
        """What differs from the defaults in a method's training, as the results' "variant" says it."""
        tickets = ("batch_norm", "stop_on_collapse")
        settings = {"rtl": ("schedule", *tickets), "imp_multiple": tickets}.get(method, ())
        defaults = {"schedule": "sequential", "batch_norm": "per_ticket", "stop_on_collapse": False}
        return ",".join(f"{name}={getattr(self, name)}" for name in settings if getattr(self, name) != defaults[name])

    def fit(self, method: Method, epochs: int) -> Fit:
        tickets = method in ("rtl", "imp_multiple")
        return Fit(
            epochs=epochs if tickets else 2 * epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            task=OneVsRest() if tickets else MultiClass(),
            schedule=self.schedule if method == "rtl" else "sequential",
            batch_norm=self.batch_norm if tickets else "shared",
        )


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
    return cifar10(data_root(root), parts=config.train_files)


def _check(config: Classification, train: Data) -> None:
    """Raise InputError, before anything is written, if the data has empty classes or no weight would be left."""
    by_label(train)
    net = masked_copy(new_model(config, train, Run(".")), 1, "shared")
    config.plan.rounds(sum(bank.shape.numel() for bank in net.banks.values()))


def new_model(config: Classification, data: Data, run: Run) -> nn.Module:
    """The network at θ0, which follows from the run's seed and is the same for every method."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed_for("theta0"))
        model: nn.Module = getattr(rtl.models, config.model)(len(data.class_names), data.inputs.shape[1])
    return model


@dataclass(frozen=True, eq=False)
class _Job:
    """One network to retrain and evaluate."""

    config: Classification
    method: Method
    run: Run
    model: nn.Module
    parts: Partition
    masks: TicketMasks

    def key(self, stage: str) -> str:
        return f"{stage}/{self.masks.sparsity:g}"

    def networks(self) -> list[TicketNetwork]:
        """Retrained, or loaded if they are; IMP multiple has one a ticket."""
        fit = self.config.fit(self.method, self.config.retrain_epochs)
        if self.method == "imp_multiple":
            names = self.masks.names
            return [baselines.imp_multiple(self.model, self.masks, self.parts, fit, self.run, name) for name in names]
        return [retrain(self.model, self.masks, self.parts, fit, self.run)]


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
        The rows of table.json, and the details: "per_class" metrics of every row; of the first seed's tickets the
        "similarity" matrices by sparsity, the "curve" of overlaps over all rounds and what
        `rtl.report.insights` finds in it, and "examples" of right and wrong samples by sparsity; and of every seed the
        "routing" of routers beside the oracle (`rtl.route.compare`).

    Raises:
        InputError: see `Run.configure` and the method's own functions.
    """
    _check(config, train)
    parts = by_label(train)
    run.configure(config)
    run.child("data").configure({"train": parts.fingerprint, "test": whole(test).fingerprint})
    runs = {seed: run.child(f"seed-{seed}", seed) for seed in config.seeds}
    models = {seed: new_model(config, train, one) for seed, one in runs.items()}

    if board is not None:
        run.progress.listen(board.event)
    extractions: dict[tuple[int, Method], Extraction] = {}
    for seed, one in runs.items():
        needed: dict[Method, Partition] = {}
        if "rtl" in config.methods or "imp_multiple" in config.methods:
            needed["rtl"] = parts
        if "imp_single" in config.methods:
            needed["imp_single"] = whole(train)
        for method, subsets in needed.items():
            extractions[seed, method] = Extraction(
                models[seed], subsets, config.plan, config.fit(method, config.round_epochs), one.child(method)
            )
    # The single model's chain of rounds is as long as ten tickets': first, so that no core waits for it at the end.
    extract_all(sorted(extractions.values(), key=lambda e: len(e.parts)), run)

    if board is not None:
        for extraction in extractions.values():
            board.tickets(extraction.run.name, extraction.tickets())

    jobs: list[_Job] = []
    found: dict[_Job, Tickets] = {}
    for seed, one in runs.items():
        for method in config.methods:
            if method == "dense":
                extraction = Extraction(
                    models[seed], whole(train), PrunePlan(until=0.0), config.fit(method, 1), one.child(method)
                )
            else:
                extraction = extractions[seed, "rtl" if method == "imp_multiple" else method]
            tickets = extraction.tickets()
            for masks in tickets.levels.values():
                jobs.append(_Job(config, method, one.child(method), models[seed], extraction.parts, masks))
                found[jobs[-1]] = tickets
    work = functools.partial(_retrain_and_evaluate, jobs, test)
    evaluations = run.map(work, range(len(jobs)), label="retrain and evaluate")
    for job in jobs:
        if job.method == "rtl" and job.run.seed == config.seeds[0]:
            folder = run.path / "tickets" / f"{job.masks.sparsity:g}"
            job.networks()[0].save_pretrained(folder)
            Inputs.of(train).save(folder)
            for router in _routers(job, test, job.networks()[0]):
                router.save(folder)
    rows = [_row(job, found[job], done.info) for job, done in zip(jobs, evaluations, strict=True)]
    names = {"class_names": parts.names}
    per_class = [
        {key: row[key] for key in ("method", "sparsity", "seed")} | done.info["per_class"]
        for row, done in zip(rows, evaluations, strict=True)
    ]
    details: Details = names | {"per_class": per_class}
    first = next((job for job in jobs if job.method in ("rtl", "imp_multiple")), None)
    if first is not None:
        diagnosis = diagnose(found[first])
        details["similarity"] = {f"{level:g}": s.to_json() for level, s in diagnosis.items()}
        stages = {f"{level:g}": curve for level, curve in found[first].stages.items()}
        details |= insights(diagnosis.curve, stages=stages)
    routed = [job for job in jobs if job.method == "rtl"]
    if routed:
        found_by = {job: job.run.load(job.key("route")).info for job in routed}
        details["routing"] = [
            {"sparsity": job.masks.sparsity, "seed": job.run.seed, "router": router} | values
            for job, info in found_by.items()
            for router, values in info["routing"].items()
        ]
        details["examples"] = {
            f"{j.masks.sparsity:g}": found_by[j]["examples"] for j in routed if j.run.seed == config.seeds[0]
        }
    if board is not None:
        board.results(rows, details)
    return rows, details


def _retrain_and_evaluate(jobs: Sequence[_Job], test: Data, _: Run, number: int) -> Artefact:
    job = jobs[number]

    def compute() -> Artefact:
        networks = job.networks()
        result = evaluate(networks if job.method == "imp_multiple" else networks[0], test)
        return Artefact(
            info={
                "metrics": result.metrics,
                "per_class": result.per_class,
                "samples": sum(net.samples for net in networks),
                "seconds": sum(net.seconds for net in networks),
                "params": sum(net.params for net in networks),
                "batch_norm_params": sum(net.batch_norm_params for net in networks),
            }
        )

    def route_and_pick() -> Artefact:
        net, own = job.networks()[0], job.parts.apply(test)
        routers = [route.by_confidence(net), route.by_centroid(net, job.parts)]
        chosen = examples.pick(net.names, ticket_scores(net, test), route.numbers(net, own.index))
        return Artefact(
            info={"routing": route.compare(net, routers, own), "examples": examples.with_pictures(chosen, test)}
        )

    if job.method == "rtl":
        job.run.stage(job.key("route"), route_and_pick)
    return job.run.stage(job.key("evaluate"), compute)


def _routers(job: _Job, test: Data, net: TicketNetwork) -> list[route.Router]:
    """Routers to use with a network of tickets, calibrated on all of the test set, which no ticket was trained on."""
    own = job.parts.apply(test)
    return [r.calibrated(net, own) for r in (route.by_confidence(net), route.by_centroid(net, job.parts))]


def _row(job: _Job, tickets: Tickets, evaluation: Mapping[str, Any]) -> Row:
    level = job.masks.sparsity
    metrics = dict(evaluation["metrics"])
    if len(job.masks.names) > 1:
        metrics["similarity"] = similarity(job.masks).mean
    return {
        "method": job.method,
        "protocol": job.config.protocol,
        "variant": job.config.variant(job.method),
        "sparsity": level,
        "seed": job.run.seed,
        "params": evaluation["params"],
        "batch_norm_params": evaluation["batch_norm_params"],
        "samples": tickets.samples[level] + evaluation["samples"],
        "seconds": tickets.seconds[level] + evaluation["seconds"],
        "metrics": metrics,
    }
