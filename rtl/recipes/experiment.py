"""What all experiments share: methods brought side by side through extraction, retraining and evaluation, resumably."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from rtl import baselines
from rtl.data import Data
from rtl.diagnose import diagnose, similarity
from rtl.errors import InputError
from rtl.evaluate import evaluate
from rtl.extract import Extraction, PrunePlan, extract_all
from rtl.fit import Fit
from rtl.partition import Partition
from rtl.report import insights
from rtl.retrain import retrain
from rtl.run import Artefact, Run
from rtl.tickets import TicketMasks, TicketNetwork, Tickets

Method = Literal["rtl", "imp_single", "imp_multiple", "dense"]
Row = dict[str, Any]
Details = dict[str, Any]
METHODS: tuple[Method, ...] = ("rtl", "imp_single", "imp_multiple", "dense")


@dataclass(frozen=True, eq=False)
class Trial:
    """One method on one data set, from one θ0.

    Args:
        method: imp_multiple retrains the masks of the method rtl's extraction.
        run: the folder of everything that starts at this θ0; each method has one of its own in it.
        model: the network at θ0.
        parts: the subsets it learns from, or all data as one.
        round_fit: training in a round of extraction; rtl's, for imp_multiple.
        retrain_fit: training afterwards.
        test, per, batch_size: as in `rtl.evaluate`.
        variant: what differs from the protocol, as the results' "variant" says it.
        branch: the folder of what follows extraction, for trials of one method on the same masks; "": the method's own.
    """

    method: Method
    run: Run
    model: nn.Module
    parts: Partition
    round_fit: Fit
    retrain_fit: Fit
    test: Data | Partition
    per: Partition | None = None
    batch_size: int = 512
    variant: str = ""
    branch: str = ""

    @property
    def home(self) -> Run:
        """The folder of what follows extraction."""
        own = self.run.child(self.method)
        return own.child(self.branch) if self.branch else own


@dataclass(frozen=True, eq=False)
class Outcome:
    """One trial at one sparsity: its masks, and what evaluation found ("metrics", "per_class", "params", ...)."""

    trial: Trial
    tickets: Tickets
    masks: TicketMasks
    found: dict[str, Any]

    @property
    def samples(self) -> int:
        """Training samples presented, up to this sparsity and in retraining."""
        return int(self.tickets.samples[self.masks.sparsity] + self.found["samples"])

    @property
    def seconds(self) -> float:
        return float(self.tickets.seconds[self.masks.sparsity] + self.found["seconds"])

    @property
    def metrics(self) -> dict[str, float]:
        """What evaluation found, and the mean similarity of tickets where there are several."""
        mean = {"similarity": similarity(self.masks).mean} if len(self.masks.names) > 1 else {}
        return dict(self.found["metrics"]) | mean

    def networks(self) -> list[TicketNetwork]:
        """The retrained network, or one a ticket for IMP multiple."""
        return _networks(self.trial, self.masks)


def run_trials(
    trials: Sequence[Trial], plan: PrunePlan, run: Run, sparsities: Sequence[float] | None = None
) -> list[Outcome]:
    """Run trials, or resume them, all their tickets and networks handed to the same workers.

    Args:
        trials: in the order of the outcomes. Each has a folder of its own: no two share `home`.
        plan: how sparsity grows; the method dense is not pruned.
        run: whose workers and progress are used.
        sparsities: those of the plan's at which networks are retrained; None: all.

    Returns:
        An outcome for each trial and sparsity, ascending.

    Raises:
        InputError: see `extract`, `retrain` and `evaluate`.
    """
    extractions: dict[Path, Extraction] = {}
    for trial in trials:
        own = _extraction_run(trial)
        if own.path not in extractions:
            trial_plan = PrunePlan(until=0.0) if trial.method == "dense" else plan
            extractions[own.path] = Extraction(trial.model, trial.parts, trial_plan, trial.round_fit, own)
    # A single model's chain of rounds is as long as all tickets': first, so that no core waits for it at the end.
    extract_all(sorted(extractions.values(), key=lambda e: len(e.parts)), run)
    tickets = {path: extraction.tickets() for path, extraction in extractions.items()}
    jobs = [
        (trial, found, masks)
        for trial in trials
        for found in [tickets[_extraction_run(trial).path]]
        for masks in found.levels.values()
        if sparsities is None or trial.method == "dense" or masks.sparsity in sparsities
    ]
    work = functools.partial(_retrain_and_evaluate, [(trial, masks) for trial, _, masks in jobs])
    evaluations = run.map(work, range(len(jobs)), label="retrain and evaluate")
    return [Outcome(*job, dict(done.info)) for job, done in zip(jobs, evaluations, strict=True)]


def _extraction_run(trial: Trial) -> Run:
    return trial.run.child("rtl" if trial.method == "imp_multiple" else trial.method)


def _networks(trial: Trial, masks: TicketMasks) -> list[TicketNetwork]:
    """Retrained, or loaded if they are."""
    run = trial.home
    if trial.method == "imp_multiple":
        fit = trial.retrain_fit
        return [baselines.imp_multiple(trial.model, masks, trial.parts, fit, run, name) for name in masks.names]
    return [retrain(trial.model, masks, trial.parts, trial.retrain_fit, run)]


def _retrain_and_evaluate(jobs: Sequence[tuple[Trial, TicketMasks]], _: Run, number: int) -> Artefact:
    trial, masks = jobs[number]

    def compute() -> Artefact:
        networks = _networks(trial, masks)
        net = networks if trial.method == "imp_multiple" else networks[0]
        result = evaluate(net, trial.test, per=trial.per, batch_size=trial.batch_size)
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

    return trial.home.stage(f"evaluate/{masks.sparsity:g}", compute)


def row(outcome: Outcome, protocol: str) -> Row:
    """A row of table.json."""
    return {
        "method": outcome.trial.method,
        "protocol": protocol,
        "variant": outcome.trial.variant,
        "sparsity": outcome.masks.sparsity,
        "seed": outcome.trial.run.seed,
        "params": outcome.found["params"],
        "batch_norm_params": outcome.found["batch_norm_params"],
        "samples": outcome.samples,
        "seconds": outcome.seconds,
        "metrics": outcome.metrics,
    }


def tickets_details(tickets: Tickets) -> Details:
    """Of several tickets the "similarity" matrices by sparsity, and what `rtl.report.insights` finds in their curve."""
    diagnosis = diagnose(tickets)
    levels = {f"{level:g}": values.to_json() for level, values in diagnosis.items()}
    stages = {f"{level:g}": curve for level, curve in tickets.stages.items()}
    return {"similarity": levels} | insights(diagnosis.curve, stages=stages)


def what_differs(config: Any, method: Method, settings: Sequence[str], first: str = "") -> str:
    """What differs from the protocol's own settings for a method, as the results' "variant" says it.

    The results' "protocol" says what a row was made with only together with this.

    Args:
        config: of a recipe.
        method: whose row it is.
        settings: those of the configuration that the method's result depends on.
        first: what stands before them.
    """
    from rtl.recipes import RECIPES

    fields = dataclasses.fields(config)
    own = {f.name: f.default for f in fields}
    if config.recipe in RECIPES:
        base = RECIPES[config.recipe](config.protocol)
        own = {f.name: getattr(base, f.name) for f in fields}
    differs = [first] if first else []
    for name in (f.name for f in fields if f.name in settings):
        value = getattr(config, name)
        if value != own[name]:
            differs.append(f"{name}={_compact(value)}")
    beside = sorted(set(config.sparsities) - set(config.milestones))
    if beside and config.milestones and method != "dense":  # rounds are cut short where the protocol's are not
        differs.append(f"sparsities={_compact(tuple(beside))}")
    return ",".join(differs)


def _compact(value: object) -> str:
    if isinstance(value, tuple):
        return "/".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value)
    return str(value)


def levels(config: Any) -> tuple[float, ...]:
    """The sparsities whose masks a configuration's extraction reports: its own, and the milestones on the way."""
    return tuple({*config.sparsities, *(level for level in config.milestones if level <= max(config.sparsities))})


def check_choices(config: Any, of: Sequence[str] = ("seeds", "methods", "sparsities")) -> None:
    """Raise InputError unless a configuration's settings `of` these names are one or more different values, and its
    methods and θ0 ones there are.
    """
    for name in of:
        values = getattr(config, name)
        if not values or len(set(values)) != len(values):
            raise InputError(f"{name} is {values}, expected one or more different values")
    unknown = sorted(set(config.methods) - set(METHODS))
    if unknown:
        raise InputError(f"methods holds {unknown[0]!r}, expected some of {', '.join(METHODS)}")
    if config.init not in ("kaiming", "torch"):
        raise InputError(f"init is {config.init!r}, expected 'kaiming' or 'torch'")
