"""The experiments by name. A recipe is a function of a protocol that returns a frozen configuration."""

from __future__ import annotations

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
    return Classification(
        recipe="cifar10",
        protocol=protocol,
        dataset="cifar10",
        model="ghostnet",
        train_files=1 if reduced else None,
        seeds=(0,),
        methods=METHODS,
        sparsities=(0.5, 0.75) if reduced else (0.25, 0.5, 0.75),
        remove=8192 if reduced else 4096,
        round_epochs=10 if protocol == "paper" else 1,
        retrain_epochs=5 if reduced else 10,
        batch_size=320,
        lr=1e-3 if reduced else 1e-4,
    )


RECIPES: dict[str, Callable[..., Classification]] = {"digits": digits, "cifar10": cifar10}


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
