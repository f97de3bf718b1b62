"""The speech experiment: a ticket an acoustic scene, that takes the scene's noise from speech."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rtl import models
from rtl.data import Data, data_root
from rtl.data.speech import PEAK, RATE, corpus, mixtures, scenes, soundfile_module
from rtl.errors import InputError
from rtl.evaluate import evaluate, predict
from rtl.extract import PrunePlan
from rtl.fit import Fit, masked_copy
from rtl.models.small import draw_as_torch_
from rtl.partition import Partition, by_metadata, whole
from rtl.recipes.experiment import (
    Details,
    Method,
    Outcome,
    Row,
    Trial,
    check_choices,
    levels,
    row,
    run_trials,
    tickets_details,
    what_differs,
)
from rtl.run import Run, slug, write_atomically
from rtl.tasks import Enhancement
from rtl.tickets import TicketNetwork

HEARD: tuple[Method, ...] = ("rtl", "imp_single")  # in the examples
_DATA = ("clip_seconds", "train_clips", "test_seconds", "test_clips", "snrs", "mix_seed")
_TRAINING = (*_DATA, "init", "retrain_epochs", "batch_size", "lr", "lr_schedule")
_PRUNING = ("milestones", "remove", "round_epochs")
# The settings that a method's result depends on.
DEPENDS_ON: dict[Method, tuple[str, ...]] = {
    "rtl": (*_TRAINING, *_PRUNING, "schedule", "batch_norm"),
    "imp_single": (*_TRAINING, *_PRUNING),
    "imp_multiple": (*_TRAINING, *_PRUNING, "batch_norm"),
    "dense": _TRAINING,
}


@dataclass(frozen=True)
class Speech:
    """Everything a run of the speech experiment depends on, beside the recordings in `--data`.

    Args:
        recipe: its name.
        protocol: "paper", or "reduced" (shorter and fewer clips, larger pruning steps, fewer epochs).
        clip_seconds: of a training clip.
        train_clips: training mixtures of each scene.
        test_seconds: of a test clip.
        test_clips: test mixtures of each scene.
        snrs: signal-to-noise ratios of the mixtures in dB, in turn.
        mix_seed: of the mixtures, which are the same for all seeds.
        seeds: one whole experiment each.
        methods: what is compared.
        sparsities: at which every method is retrained and evaluated.
        milestones: sparsities that a round is cut short at to be exact, besides those, as in `Classification`.
        remove: weights each round removes: a number, or a fraction of those that survive.
        round_epochs: epochs of a round of extraction, the same for every method: there are no negatives.
        retrain_epochs: likewise of retraining.
        batch_size, lr, schedule, batch_norm, lr_schedule: as in `rtl.Fit`.
        init: θ0, as in `Classification`.
    """

    recipe: str
    protocol: str
    clip_seconds: float
    train_clips: int
    test_seconds: float
    test_clips: int
    snrs: tuple[float, ...]
    mix_seed: int
    seeds: tuple[int, ...]
    methods: tuple[Method, ...]
    sparsities: tuple[float, ...]
    remove: int | float
    round_epochs: int
    retrain_epochs: int
    batch_size: int
    lr: float
    milestones: tuple[float, ...] = (0.25, 0.5, 0.75)  # both protocols'
    schedule: Literal["sequential", "mixed", "pooled"] = "sequential"
    batch_norm: Literal["per_ticket", "shared", "recalibrated"] = "per_ticket"
    lr_schedule: Literal["constant", "cosine"] = "constant"
    init: Literal["kaiming", "torch"] = "kaiming"

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("train_clips", "test_clips"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected 1 or more")
        for name in ("clip_seconds", "test_seconds"):
            seconds = getattr(self, name)
            if not math.isfinite(seconds) or round(seconds * RATE) < 1:
                raise InputError(f"{name} is {seconds}, expected a finite number, a sample (1/{RATE} s) or more")
        if not self.snrs or not all(map(math.isfinite, self.snrs)):
            raise InputError(f"snrs is {self.snrs}, expected one finite number or more")
        if self.mix_seed < 0:
            raise InputError(f"mix_seed is {self.mix_seed}, expected 0 or more")
        _ = self.plan, self.fit("rtl", self.round_epochs), self.fit("rtl", self.retrain_epochs)  # their checks

    @property
    def plan(self) -> PrunePlan:
        return PrunePlan(self.remove, max(self.sparsities), levels(self))

    def variant(self, method: Method) -> str:
        """What differs from the protocol's own settings for a method, as the results' "variant" says it."""
        return what_differs(self, method, DEPENDS_ON[method])

    def fit(self, method: Method, epochs: int) -> Fit:
        return Fit(
            epochs=epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            task=Enhancement(),
            schedule=self.schedule if method == "rtl" else "sequential",
            batch_norm=self.batch_norm if method in ("rtl", "imp_multiple") else "shared",
            lr_schedule=self.lr_schedule,
        )


def load_speech(config: Speech, root: Path | None) -> tuple[Data, Data]:
    """(train, test) mixtures of a folder of speech and noise; None: the folder that RTL_DATA names.

    Raises InputError: see `rtl.data.speech`; a package that is missing; a plan that leaves no weight; or a mixed batch
    of fewer clips than there are scenes.
    """
    soundfile_module()
    if importlib.util.find_spec("torchmetrics") is None:
        raise InputError("SI-SNR needs torchmetrics, which is not installed: pip install 'rtl-kernels[speech]'")
    net = masked_copy(models.speech_unet(), 1, "shared")
    config.plan.rounds(sum(bank.shape.numel() for bank in net.banks.values()))
    found = corpus(data_root(root))
    config.fit("rtl", config.retrain_epochs).share(len(scenes(found)))
    return (
        mixtures(found, "train", config.train_clips, config.clip_seconds, config.snrs, config.mix_seed),
        mixtures(found, "test", config.test_clips, config.test_seconds, config.snrs, config.mix_seed),
    )


def run_speech(config: Speech, run: Run, train: Data, test: Data) -> tuple[list[Row], Details]:
    """Run the experiment, or resume it.

    Args:
        config: the recipe.
        run: its folder. Refused if it holds another configuration.
        train, test: what `load_speech` gives.

    The first seed's networks of tickets are left in `tickets/SPARSITY`, as `TicketNetwork.from_pretrained` reads them,
    and what they, and one pruned network, make of each scene's first test clip in `media/SCENE`.

    Returns:
        The rows of table.json, and the details: "per_class", the scenes' figures of every row; "clips", what the
        examples are; and of the first seed's tickets `tickets_details`, and "crossed", by sparsity (see `crossed`).

    Raises:
        InputError: see `Run.configure` and the method's own functions.
    """
    parts = by_metadata(train, "scene")
    heard = parts.apply(test)
    run.configure(config)
    run.child("data").configure({"train": parts.fingerprint, "test": heard.fingerprint})
    trials = []
    for seed in config.seeds:
        here = run.child(f"seed-{seed}", seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(here.seed_for("theta0"))
            model = models.speech_unet()
            if config.init == "torch":
                draw_as_torch_(model)
        for method in config.methods:
            tickets = method in ("rtl", "imp_multiple")
            trials.append(
                Trial(
                    method,
                    here,
                    model,
                    parts if tickets else whole(train),
                    config.fit("rtl" if method == "imp_multiple" else method, config.round_epochs),
                    config.fit(method, config.retrain_epochs),
                    heard if tickets else test,
                    heard,
                    config.batch_size,
                    config.variant(method),
                )
            )
    outcomes = run_trials(trials, config.plan, run, config.sparsities)
    rows, per_class = [], []
    for outcome in outcomes:
        one = row(outcome, config.protocol)
        scene = dict(zip(heard.names, outcome.found["per_class"]["si_snri"], strict=True))
        one["metrics"] |= {f"si_snri.{name}": value for name, value in scene.items()}
        rows.append(one)
        which = {key: one[key] for key in ("method", "protocol", "variant", "sparsity", "seed")}
        per_class.append(which | {"si_snri": scene})
    details: Details = {"class_names": parts.names, "per_class": per_class}
    mine = [outcome for outcome in outcomes if outcome.trial.run.seed == config.seeds[0]]
    for outcome in mine:
        if outcome.trial.method == "rtl":
            level, net = f"{outcome.masks.sparsity:g}", outcome.networks()[0]
            net.save_pretrained(run.path / "tickets" / level)
            details.setdefault("crossed", {})[level] = crossed(net, heard)
    first = next((outcome for outcome in mine if outcome.trial.method in ("rtl", "imp_multiple")), None)
    if first is not None and len(parts) > 1:
        details |= tickets_details(first.tickets)
    for scene_number, name in enumerate(heard.names):
        clip = heard[scene_number][:1]
        details.setdefault("clips", {})[name] = {
            key: test.metadata[key][int(clip)] for key in ("snr", "speech", "noise")
        }
        _write_examples(run, name, test.select(clip), mine)
    return rows, details


def crossed(net: TicketNetwork, test: Partition) -> list[list[float]]:
    """SI-SNRi (dB) of every ticket on every subset, (K, K): what the right ticket is worth."""
    given = (dataclasses.replace(test, index=torch.full_like(test.index, ticket)) for ticket in range(len(test)))
    return [evaluate(net, everything, per=test).per_class["si_snri"] for everything in given]


def _write_examples(run: Run, scene: str, clip: Data, outcomes: Sequence[Outcome]) -> None:
    """One clip as it is, as it should be, and as tickets and one pruned network give it, all at one volume."""
    shown: dict[str, Tensor] = {"noisy": clip.inputs[0], "clean": clip.targets[0]}
    for outcome in outcomes:
        if outcome.trial.method not in HEARD:
            continue
        test = outcome.trial.test
        own = clip if isinstance(test, Data) else test.apply(clip)
        shown[f"{outcome.trial.method}-{outcome.masks.sparsity:g}"] = predict(outcome.networks(), own)[0]
    for name, pcm in _pcm(shown).items():
        write_atomically(run.path / "media" / slug(scene) / f"{name}.wav", pcm)


def _pcm(shown: Mapping[str, Tensor]) -> dict[str, bytes]:
    """WAV files of 16 bits, all turned down alike where the loudest would be clipped."""
    from scipy.io import wavfile

    gain = min(1.0, PEAK / max(float(samples.abs().max()) for samples in shown.values()))
    files = {}
    for name, samples in shown.items():
        buffer = io.BytesIO()
        wavfile.write(buffer, RATE, (samples.numpy() * gain * 32767).round().astype(np.int16))
        files[name] = buffer.getvalue()
    return files
