"""The experiments by name. A recipe is a function of a protocol that returns a frozen configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rtl.errors import InputError
from rtl.recipes.classification import Classification, load, run_classification
from rtl.recipes.experiment import METHODS, Details, Row
from rtl.recipes.inr import Inr, load_pictures, run_inr
from rtl.recipes.speech import Speech, load_speech, run_speech
from rtl.run import Run
from rtl.tensorboard import Board

__all__ = ["RECIPES", "Classification", "Config", "Inr", "Speech", "load_data", "recipe", "run_recipe"]

Config = Classification | Inr | Speech


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
        init="torch",
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
    """CIFAR-10 at 50 % sparsity, each open choice of the method changed by itself; needs the images. Rounds of ten
    epochs are the recipe cifar10's protocol "paper"."""
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
            "init=kaiming",
            "lr=0.001",
            "round_epochs=3",
        ),
    )


def cifar10_tuned(protocol: str = "quick") -> Classification:
    """CIFAR-10 at 50 % sparsity, trained as well as we know, every method alike; needs the images. The single network
    of as many weights as the tickets' union: --methods imp_single --sparsities 0.43, or what that union comes to."""
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


def inr(protocol: str = "reduced") -> Inr:
    """A picture from its pixels' coordinates, a ticket a region (the paper's experiment 3). Images: --image FILE
    (with --mask FILE, or regions are found), a folder of images with masks (--data; RTL_DATA is not looked at), or,
    without either, scikit-learn's photographs."""
    _one_of(protocol, "reduced", "paper")
    reduced = protocol == "reduced"
    return Inr(
        recipe="inr",
        protocol=protocol,
        image=None,
        mask=None,
        images=(),
        longest_side=160 if reduced else None,
        regions=6,
        seeds=(0,),
        methods=("rtl", "imp_single", "dense"),
        sparsities=(0.25, 0.5, 0.75, 0.9),
        remove=13472 if reduced else 4096,
        round_steps=200 if reduced else 10_000,
        retrain_steps=600 if reduced else 10_000,
        batch_size=1024 if reduced else 16_384,  # the paper does not say how many
        lr=0.01,
    )


def speech(protocol: str = "reduced") -> Speech:
    """Speech without the noise behind it, a ticket an acoustic scene (the paper's experiment 4); needs recordings of
    speech and of noise (--data), and pip install 'rtl-kernels[speech]'."""
    _one_of(protocol, "reduced", "paper")
    reduced = protocol == "reduced"
    return Speech(
        recipe="speech",
        protocol=protocol,
        clip_seconds=2.0 if reduced else 10.0,
        train_clips=200 if reduced else 1200,  # of a scene; the paper does not say how many
        test_seconds=3.0 if reduced else 10.0,
        test_clips=20 if reduced else 100,
        snrs=(0.0, 5.0, -5.0),  # the paper does not say which
        mix_seed=0,
        seeds=(0, 1, 2),
        methods=METHODS,
        sparsities=(0.25, 0.5, 0.75),
        remove=9342 if reduced else 4096,
        round_epochs=2 if reduced else 10,
        retrain_epochs=10,
        batch_size=8,  # the paper does not say how many
        lr=5e-3 if reduced else 1e-4,
        lr_schedule="cosine" if reduced else "constant",
    )


RECIPES: dict[str, Callable[..., Config]] = {
    "digits": digits,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "cifar10-switches": cifar10_switches,
    "cifar10-tuned": cifar10_tuned,
    "inr": inr,
    "speech": speech,
}


def load_data(config: Config, root: Path | None) -> Any:
    """What `run_recipe` needs beside a configuration.

    Args:
        config: the recipe.
        root: the data root; None: what the recipe then takes (see its description).

    Raises:
        InputError: the data is not where it should be, or the recipe cannot be run on it.
    """
    if isinstance(config, Inr):
        return load_pictures(config, root)
    return load_speech(config, root) if isinstance(config, Speech) else load(config, root)


def run_recipe(config: Config, run: Run, data: Any, board: Board | None = None) -> tuple[list[Row], Details]:
    """Run a recipe in a folder, or resume it, on what `load_data` gave: the rows of table.json and the details.

    `board` gets curves and pictures on the way.
    """
    if isinstance(config, Classification):
        train, test = data
        return run_classification(config, run, train, test, board)
    if board is not None:
        run.progress.listen(board.event)
    rows, details = run_inr(config, run, data) if isinstance(config, Inr) else run_speech(config, run, *data)
    if board is not None:
        board.results(rows, details)
    return rows, details


def recipe(name: str, protocol: str | None = None) -> Config:
    """The configuration of a recipe under one of its protocols (None: its first).

    Raises InputError for a recipe or protocol that does not exist.
    """
    if name not in RECIPES:
        raise InputError(f"recipe is {name!r}, expected one of {', '.join(RECIPES)}")
    return RECIPES[name]() if protocol is None else RECIPES[name](protocol)


def _one_of(protocol: str, *known: str) -> None:
    if protocol not in known:
        raise InputError(f"protocol is {protocol!r}, expected one of {', '.join(known)}")
