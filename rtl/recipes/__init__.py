"""The experiments by name. A recipe is a function of a protocol that returns a frozen configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from rtl.errors import InputError
from rtl.recipes.classification import METHODS, Classification

__all__ = ["RECIPES", "Classification", "recipe"]


def digits(protocol: str = "quick") -> Classification:
    """scikit-learn's 1,797 handwritten digits, a ticket a digit: minutes on a laptop, nothing to download."""
    _one_of(protocol, "quick")
    return Classification(
        recipe="digits",
        protocol=protocol,
        dataset="digits",
        model="small_conv",
        train_files=None,
        seeds=(0, 1, 2),
        methods=METHODS,
        sparsities=(0.5, 0.75, 0.9),
        milestones=(0.5, 0.75, 0.9),
        remove=0.25,
        round_epochs=2,
        retrain_epochs=8,
        batch_size=64,
        lr=2e-3,
    )


def cifar10(protocol: str = "reduced") -> Classification:
    """CIFAR-10, a ticket a class, on GhostNet (the paper's experiment 1); needs the images (--data)."""
    _one_of(protocol, "reduced", "quick", "paper")
    reduced = protocol == "reduced"
    sparsities = {"reduced": (0.5, 0.75), "quick": (0.25, 0.5, 0.75, 0.9), "paper": (0.25, 0.5, 0.75)}[protocol]
    return Classification(
        recipe="cifar10",
        protocol=protocol,
        dataset="cifar10",
        model="ghostnet",
        train_files=1 if reduced else None,
        seeds=(0,),
        methods=METHODS,
        sparsities=sparsities,
        milestones=sparsities,
        remove=12288 if reduced else 4096,
        round_epochs=10 if protocol == "paper" else 1,
        retrain_epochs=4 if reduced else 10,
        batch_size=320,
        lr=1e-3 if reduced else 1e-4,
    )


def cifar100(protocol: str = "quick") -> Classification:
    """CIFAR-100, a ticket for each of the paper's eight clusters of classes (its experiment 2); needs the images."""
    _one_of(protocol, "quick", "paper")
    return dataclasses.replace(
        cifar10("paper"),
        recipe="cifar100",
        protocol=protocol,
        dataset="cifar100",
        round_epochs=10 if protocol == "paper" else 1,
        batch_size=256,
    )


def cifar10_switches(protocol: str = "quick") -> Classification:
    """CIFAR-10 at 50 % sparsity, each open choice of the method changed by itself; needs the images."""
    _one_of(protocol, "quick")
    return dataclasses.replace(
        cifar10(protocol),
        recipe="cifar10-switches",
        methods=("rtl",),
        sparsities=(0.5,),
        switches=(
            "batch_norm=shared",
            "batch_norm=recalibrated",
            "schedule=mixed",
            "masked=gradient",
            "start=extracted",
            "scope=layer",
            "trained=dense",
            "round_epochs=3",
            "round_epochs=10",
        ),
    )


def cifar10_tuned(protocol: str = "quick") -> Classification:
    """CIFAR-10 at 50 % sparsity, trained as well as we know, every method alike; needs the images."""
    _one_of(protocol, "quick")
    return dataclasses.replace(
        cifar10(protocol),
        recipe="cifar10-tuned",
        tag="tuned",
        methods=("rtl", "imp_single", "imp_multiple"),
        sparsities=(0.5,),
        milestones=(0.5,),
        remove=15729,  # four rounds
        round_epochs=5,
        retrain_epochs=40,
        lr=2e-3,
        lr_schedule="cosine",
        augment="crop_flip",
        holdout=0.1,
    )


RECIPES: dict[str, Callable[..., Classification]] = {
    "digits": digits,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "cifar10-switches": cifar10_switches,
    "cifar10-tuned": cifar10_tuned,
}


def recipe(name: str, protocol: str | None = None) -> Classification:
    """The configuration of a recipe under one of its protocols (None: its first).

    Raises InputError for a recipe or protocol that does not exist.
    """
    if name not in RECIPES:
        raise InputError(f"recipe is {name!r}, expected one of {', '.join(RECIPES)}")
    return RECIPES[name]() if protocol is None else RECIPES[name](protocol)


def _one_of(protocol: str, *known: str) -> None:
    if protocol not in known:
        raise InputError(f"protocol is {protocol!r}, expected one of {', '.join(known)}")
