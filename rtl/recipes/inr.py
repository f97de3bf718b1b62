"""The picture experiment: a ticket a region of one image, against one pruned network that is told the region.

An image is an experiment of its own; figures are means over images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rtl import models
from rtl.data import Data
from rtl.data.pictures import Picture, picture, pictures, sample_pictures
from rtl.diagnose import similarity
from rtl.errors import InputError
from rtl.evaluate import predict
from rtl.extract import PrunePlan
from rtl.fit import Fit, masked_copy
from rtl.partition import Partition, by_metadata, by_region, whole
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
from rtl.tasks import Pixels, psnr

EPOCH_STEPS = 100  # what progress counts, and the shortest time between checkpoints
Schedule = Literal["sequential", "mixed", "pooled"]
SHOWN = (0.5, 0.75, 0.9)  # sparsities of the pictures
_TRAINING = ("image", "mask", "images", "longest_side", "regions", "init", "retrain_steps", "batch_size", "lr")
_PRUNED = (*_TRAINING, "milestones", "remove", "round_steps")
# The settings that a method's result depends on, beside the schedule of a row.
DEPENDS_ON: dict[Method, tuple[str, ...]] = {
    "rtl": _PRUNED,
    "imp_single": _PRUNED,
    "imp_multiple": _PRUNED,
    "dense": _TRAINING,
}


@dataclass(frozen=True)
class Inr:
    """Everything a run of the picture experiment depends on, beside the images in `--data`.

    Args:
        recipe: its name.
        protocol: "paper", or "reduced" (smaller images, fewer steps and pixels a step, larger pruning steps).
        image: a file of your own; None: the images of --data, or the two photographs of scikit-learn.
        mask: the regions of `image`; None: found by clustering.
        images: names of those to take; empty: all.
        longest_side: pixels that images are reduced to; None: not at all.
        regions: how many are found where there is no mask.
        init: θ0, as in `rtl.models.inr`.
        seeds: one whole experiment each.
        methods: what is compared.
        sparsities: at which every method is retrained and evaluated.
        milestones: sparsities that a round is cut short at to be exact, besides those, as in `Classification`.
        remove: weights each round removes: a number, or a fraction of those that survive.
        round_steps: optimiser steps of a round, the same for each ticket and for a single network: 100 or fewer, or a
            multiple of 100.
        retrain_steps: likewise of retraining.
        batch_size: pixels a step sees. In a round, every region's ticket sees its K-th part of them at a step, so that
            all tickets together are presented with as many pixels as a single network.
        lr: learning rate.
        schedules: of joint retraining, each in rows of its own on the same masks; the first is what is shown. "pooled":
            a step sees pixels of the whole image, as a single network's does; "mixed": equally many of every region;
            "sequential": of one region after another.
    """

    recipe: str
    protocol: str
    image: Path | None
    mask: Path | None
    images: tuple[str, ...]
    longest_side: int | None
    regions: int
    seeds: tuple[int, ...]
    methods: tuple[Method, ...]
    sparsities: tuple[float, ...]
    remove: int | float
    round_steps: int
    retrain_steps: int
    batch_size: int
    lr: float
    init: Literal["kaiming", "torch"] = "kaiming"
    schedules: tuple[Schedule, ...] = ("pooled", "mixed")
    milestones: tuple[float, ...] = (0.25, 0.5, 0.75, 0.9)  # both protocols'

    def __post_init__(self) -> None:
        check_choices(self, ("seeds", "methods", "sparsities", "schedules"))
        if self.mask is not None and self.image is None:
            raise InputError(f"mask is {str(self.mask)!r}, but no image is given: say whose regions these are (image)")
        if self.image is not None and self.images:
            raise InputError(f"image is {str(self.image)!r} and images {self.images}: give one of the two")
        for name in ("round_steps", "retrain_steps"):
            steps = getattr(self, name)
            if steps < 1 or steps % min(steps, EPOCH_STEPS):
                raise InputError(f"{name} is {steps}, expected 1 to {EPOCH_STEPS}, or a multiple of {EPOCH_STEPS}")
        if self.regions < 1:
            raise InputError(f"regions is {self.regions}, expected 1 or more")
        _ = self.plan, [self.fits("rtl", 1, schedule) for schedule in self.schedules]  # their checks

    @property
    def plan(self) -> PrunePlan:
        return PrunePlan(self.remove, max(self.sparsities), levels(self))

    @property
    def recorded(self) -> Inr:
        """These settings without where the files are on this machine: what is in them, a run is bound to apart."""
        image, mask = (None if file is None else Path(Path(file).name) for file in (self.image, self.mask))
        return dataclasses.replace(self, image=image, mask=mask)

    def variant(self, method: Method, schedule: Schedule) -> str:
        """What a row of a method is called: its schedule of joint retraining, and what differs from the protocol."""
        return what_differs(self, method, DEPENDS_ON[method], _branch(method, schedule))

    def fits(self, method: Method, regions: int, schedule: Schedule = "pooled") -> tuple[Fit, Fit]:
        """Training in a round, and afterwards, for an image of so many regions.

        Raises InputError if a step has too few pixels for them.
        """
        share = -(-self.batch_size // regions)  # pixels of each region at a step of all
        if self.batch_size < 2 * regions:
            raise InputError(f"batch_size is {self.batch_size}, expected 2 or more for each of {regions} regions")
        tickets = method in ("rtl", "imp_multiple")
        found: list[Fit] = []
        for steps in (self.round_steps, self.retrain_steps):
            epoch = min(steps, EPOCH_STEPS)
            turns = schedule if method == "rtl" and found else "sequential"
            together = not tickets or turns != "sequential"
            pooled = turns == "pooled"
            found.append(
                Fit(
                    epochs=steps // epoch,
                    batch_size=share * regions if together else share,
                    lr=self.lr,
                    task=Pixels(epoch * (share * regions if pooled or not tickets else share), by_area=pooled),
                    schedule=turns,
                    batch_norm="shared",  # there is none
                )
            )
        return found[0], found[1]


def load_pictures(config: Inr, root: Path | None) -> list[Picture]:
    """The images: the configuration's own, else those of the folder `root`, else the photographs of scikit-learn,
    also where RTL_DATA is set: the recipe is to run without data.

    Raises InputError: see `rtl.data.pictures`; or an image that the recipe cannot be run on.
    """
    if config.image is not None and root is not None:
        raise InputError(f"image is {str(config.image)!r} and the data root {str(root)!r}: give one of the two")
    if config.image is not None:
        found = [picture(config.image, config.mask, config.longest_side)]
    elif root is not None:
        found = pictures(root, config.images, config.longest_side)
    else:
        found = sample_pictures(config.longest_side)
        unknown = sorted(set(config.images) - {one.name for one in found})
        if unknown:
            names = ", ".join(one.name for one in found)
            raise InputError(f"images holds {unknown[0]!r}, but without --data there are {names}")
        found = [one for one in found if one.name in config.images or not config.images]
    for one in found:
        config.fits("rtl", len(regions(config, one)))
    net = masked_copy(models.inr(), 1, "shared")
    config.plan.rounds(sum(bank.shape.numel() for bank in net.banks.values()))
    return found


def regions(config: Inr, one: Picture) -> Partition:
    """The regions of an image: the mask's, else found by colour and position."""
    if "region" in one.data.metadata:
        return by_metadata(one.data, "region")
    return by_region(one.data, config.regions)


def with_region(parts: Partition) -> Partition:
    """All pixels as one subset, each with the number of its region behind its coordinates: the baseline's data."""
    data = parts.data
    inputs = torch.cat([data.inputs, parts.index[:, None].float()], 1)
    return whole(Data(inputs, data.targets, name=data.name))


def run_inr(config: Inr, run: Run, found: Sequence[Picture]) -> tuple[list[Row], Details]:
    """Run the experiment, or resume it.

    Args:
        config: the recipe.
        run: its folder. Refused if it holds another configuration.
        found: what `load_pictures` gives.

    The first seed's tickets for the first image are left in `tickets/SPARSITY`, as `TicketNetwork.from_pretrained`
    reads them, and its pictures of every image in `media/IMAGE`.

    Returns:
        The rows of table.json, means over images, and the details: "per_image" figures of every row, with those of
        each region, and how these follow similarity; `tickets_details` of the first image's tickets.

    Raises:
        InputError: see `Run.configure` and the method's own functions.
    """
    config = config.recorded
    parts = {one.name: regions(config, one) for one in found}
    run.configure(config)
    run.child("data").configure({name: own.fingerprint for name, own in parts.items()})
    trials, images = [], []
    for seed in config.seeds:
        for name, own in parts.items():
            here = run.child(f"seed-{seed}", seed).child(slug(name))
            of_image = _trials(config, here, own)
            trials += of_image
            images += [name] * len(of_image)
    outcomes = run_trials(trials, config.plan, run, config.sparsities)
    image_of = dict(zip(map(id, trials), images, strict=True))
    groups: dict[tuple[int, Method, str, float], list[Outcome]] = {}
    for outcome in outcomes:
        trial = outcome.trial
        key = trial.run.seed, trial.method, trial.variant, outcome.masks.sparsity
        groups.setdefault(key, []).append(outcome)
    rows = [_mean_row(config, group) for group in groups.values()]
    per_image = [
        _per_image(outcome, config.protocol, image_of[id(outcome.trial)])
        for group in groups.values()
        for outcome in group
    ]
    details: Details = {"images": list(parts), "per_image": per_image}
    main = ("", _branch("rtl", config.schedules[0]))
    mine = [o for o in outcomes if o.trial.run.seed == config.seeds[0] and o.trial.branch in main]
    for one in found:
        _write_examples(run, one, [o for o in mine if image_of[id(o.trial)] == one.name])
    for outcome in mine:
        if outcome.trial.method == "rtl" and image_of[id(outcome.trial)] == found[0].name:
            outcome.networks()[0].save_pretrained(run.path / "tickets" / f"{outcome.masks.sparsity:g}")
            if len(outcome.masks.names) > 1:
                details |= tickets_details(outcome.tickets)
    return rows, details


def _trials(config: Inr, run: Run, parts: Partition) -> list[Trial]:
    """One image. Both networks draw equal θ0 for the weights they share: the seed is the same."""
    single = with_region(parts)
    trials = []
    for method in config.methods:
        tickets = method in ("rtl", "imp_multiple")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed_for("theta0"))
            model = models.inr(0 if tickets else len(parts), config.init)
        own = parts if tickets else single
        for schedule in config.schedules if method == "rtl" else config.schedules[:1]:
            fits = config.fits(method, len(parts), schedule)
            names = config.variant(method, schedule), _branch(method, schedule)
            trials.append(Trial(method, run, model, own, *fits, own, parts, 8192, *names))
    return trials


def _branch(method: Method, schedule: Schedule) -> str:
    """How joint retraining by a schedule is called; Algorithm 2's own goes without saying, others have none."""
    return "" if schedule == "sequential" or method != "rtl" else f"schedule={schedule}"


def _mean_row(config: Inr, group: Sequence[Outcome]) -> Row:
    """The row of a method at one sparsity: means over images (PSNR: of all pixels pooled, too), sums of costs."""
    count = len(group)
    mean = row(group[0], config.protocol)
    metrics = {"psnr": sum(o.metrics["psnr"] for o in group) / count}
    pixels = [len(o.trial.parts.data) for o in group]
    errors = [n * 10 ** (-o.metrics["psnr"] / 10) for n, o in zip(pixels, group, strict=True)]
    metrics["psnr.pooled"] = psnr(sum(errors) / sum(pixels))
    similarities = [o.metrics["similarity"] for o in group if "similarity" in o.metrics]
    if similarities:
        metrics["similarity"] = sum(similarities) / len(similarities)
    mean |= {"params": round(sum(o.found["params"] for o in group) / count), "metrics": metrics}
    return mean | {"samples": sum(o.samples for o in group), "seconds": sum(o.seconds for o in group)}


def _per_image(outcome: Outcome, protocol: str, image: str) -> dict[str, Any]:
    trial, per = outcome.trial, outcome.trial.per
    assert per is not None
    found: dict[str, Any] = {
        "image": image,
        "method": trial.method,
        "protocol": protocol,
        "variant": trial.variant,
        "sparsity": outcome.masks.sparsity,
        "seed": trial.run.seed,
        "params": outcome.found["params"],
        "psnr": outcome.found["metrics"]["psnr"],
        "regions": list(per.names),
        "pixels": list(per.counts().values()),
        "psnr_by_region": outcome.found["per_class"]["psnr"],
    }
    if trial.method == "rtl" and len(per) > 1:
        found["similarity_by_region"] = similarity(outcome.masks).per_ticket.tolist()
        found["spearman"] = spearman(found["similarity_by_region"], found["psnr_by_region"])
    return found


def spearman(x: Sequence[float], y: Sequence[float]) -> dict[str, float | None]:
    """Spearman's rank correlation and its p-value; None where they are not defined (fewer than 3 values, all equal)."""
    from scipy.stats import spearmanr

    if len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        return {"rho": None, "p": None}
    found = spearmanr(x, y)
    return {"rho": float(found.statistic), "p": float(found.pvalue)}


def _write_examples(run: Run, one: Picture, outcomes: Sequence[Outcome]) -> None:
    """The picture as it is, and as every method gives it back at the sparsities that are shown."""
    shown: Mapping[str, Tensor] = {"target": one.data.targets} | {
        f"{o.trial.method}-{o.masks.sparsity:g}": predict(o.networks(), o.trial.test, 8192)
        for o in outcomes
        if o.masks.sparsity in SHOWN or o.trial.method == "dense"
    }
    for name, colours in shown.items():
        file = run.path / "media" / slug(one.name) / f"{name}.png"
        write_atomically(file, png(colours, one.height, one.width))


def png(colours: Tensor, height: int, width: int) -> bytes:
    """Pixels row by row, (N, 3) with 1 for white, as a PNG of 8 bits a channel; what is outside [0, 1] is cut off."""
    import io

    from PIL import Image

    pixels = (colours.clamp(0, 1) * 255).round().to(torch.uint8).view(height, width, 3)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, format="png")
    return buffer.getvalue()
