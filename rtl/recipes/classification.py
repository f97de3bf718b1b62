"""The classification experiments: a ticket a class, IMP single, IMP multiple and dense, from one θ0, over seeds.

A recipe is a function that returns a frozen `Classification`; `run_classification` runs it in a resumable folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

import rtl.models
from rtl.data import Data, cifar10, data_root, digits
from rtl.diagnose import diagnose
from rtl.errors import InputError
from rtl.extract import PrunePlan
from rtl.fit import Fit, masked_copy
from rtl.partition import by_label, whole
from rtl.recipes.experiment import METHODS, Details, Method, Row, Trial, check_choices, row, run_trials, variant
from rtl.run import Run
from rtl.tasks import MultiClass, OneVsRest

__all__ = ["METHODS", "Classification", "load", "new_model", "run_classification"]


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

    def __post_init__(self) -> None:
        check_choices(self)
        _ = self.plan, self.fit("rtl", self.round_epochs), self.fit("rtl", self.retrain_epochs)  # their checks

    @property
    def plan(self) -> PrunePlan:
        return PrunePlan(self.remove, max(self.sparsities), self.sparsities)

    def variant(self, method: Method) -> str:
        """What differs from the defaults in a method's training, as the results' "variant" says it."""
        return variant(self, method)

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


def run_classification(config: Classification, run: Run, train: Data, test: Data) -> tuple[list[Row], Details]:
    """Run the experiment, or resume it.

    Args:
        config: the recipe.
        run: its folder. Refused if it holds another configuration.
        train, test: what `load` gives.

    The first seed's networks of tickets are left in `tickets/SPARSITY`, as `TicketNetwork.from_pretrained` reads them.

    Returns:
        The rows of table.json, and the details: "per_class" metrics of every row, and the "similarity" matrices of the
        first seed's tickets by sparsity.

    Raises:
        InputError: see `Run.configure` and the method's own functions.
    """
    _check(config, train)
    parts = by_label(train)
    run.configure(config)
    run.child("data").configure({"train": parts.fingerprint, "test": whole(test).fingerprint})
    runs = {seed: run.child(f"seed-{seed}", seed) for seed in config.seeds}
    models = {seed: new_model(config, train, one) for seed, one in runs.items()}
    trials = [
        Trial(
            method,
            runs[seed],
            models[seed],
            parts if method in ("rtl", "imp_multiple") else whole(train),
            config.fit("rtl" if method == "imp_multiple" else method, 1 if method == "dense" else config.round_epochs),
            config.fit(method, config.retrain_epochs),
            test,
        )
        for seed in config.seeds
        for method in config.methods
    ]
    outcomes = run_trials(trials, config.plan, run)
    for outcome in outcomes:
        if outcome.trial.method == "rtl" and outcome.trial.run.seed == config.seeds[0]:
            outcome.networks()[0].save_pretrained(run.path / "tickets" / f"{outcome.masks.sparsity:g}")
    rows = [row(outcome, config.protocol, config.variant(outcome.trial.method)) for outcome in outcomes]
    names = {"class_names": parts.names}
    per_class = [
        {key: one[key] for key in ("method", "sparsity", "seed")} | outcome.found["per_class"]
        for one, outcome in zip(rows, outcomes, strict=True)
    ]
    details: Details = names | {"per_class": per_class}
    first = next((outcome for outcome in outcomes if outcome.trial.method in ("rtl", "imp_multiple")), None)
    if first is not None:
        details["similarity"] = {f"{level:g}": s.to_json() for level, s in diagnose(first.tickets).items()}
    return rows, details
