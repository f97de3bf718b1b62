"""How networks are trained: one frozen description, and the single optimiser step that every method takes."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import rtl_kernels as rk
from rtl.data.augment import AUGMENTATIONS
from rtl.errors import InputError, expect
from rtl.partition import Partition
from rtl.tasks import OneVsRest, Task

SCHEDULES = ("sequential", "mixed", "pooled")
BATCH_NORMS = ("per_ticket", "shared", "recalibrated")
MASKED = ("update", "gradient")
LR_SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class Fit:
    """Training, the same for every method: by Adam without weight decay, as in the paper.

    Args:
        epochs: passes over each ticket's samples: in a round of extraction, or of joint retraining.
        batch_size: samples an optimiser step sees.
        lr: learning rate.
        task: what tickets learn.
        schedule: of joint retraining. "sequential": one ticket's batch a step, in turn (Algorithm 2 to the letter).
            "mixed": a step sees batch_size / K samples, rounded up, of every ticket at once: an epoch has about as many
            samples as the sequential one, in as many steps or, where numbers do not come out even, in fewer. It needs a
            batch_size of K or more. "pooled": what all tickets draw for an epoch is shuffled together and presented
            once, so that a ticket is seen as often as it has samples, instead of as often as any other.
        batch_norm: of joint retraining. "per_ticket" statistics, "shared" ones, or "recalibrated": trained with shared
            ones, after which each ticket's are measured on one epoch of its own samples, weights as they are. In a
            sequential step, which is one ticket's, all three normalise alike and give the same weights: they differ
            in the statistics kept for later.
        affine_per_ticket: with "per_ticket", scale and shift per ticket too.
        masked: "update": neither a pruned weight nor its optimiser state moves. "gradient": its gradient is zero, and
            the optimiser does with that what it does: momentum from other tickets' steps moves the weight.
        lr_schedule: "constant", or "cosine": from lr to zero over a round of extraction, or over joint retraining.
        augment: "none", or "crop_flip" for images (see `rtl.data.augment.crop_flip`).

    Raises:
        InputError: a value outside what is said here.
    """

    epochs: int = 10
    batch_size: int = 320
    lr: float = 1e-4
    task: Task = field(default_factory=OneVsRest)
    schedule: str = "sequential"
    batch_norm: str = "per_ticket"
    affine_per_ticket: bool = False
    masked: str = "update"
    lr_schedule: str = "constant"
    augment: str = "none"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected an integer of 1 or more")
        if not 0 < self.lr < float("inf"):
            raise InputError(f"lr is {self.lr}, expected a finite number above 0")
        if isinstance(self.task, type) or not hasattr(self.task, "draw"):
            raise InputError(f"task is {self.task!r}, expected a task such as rtl.tasks.MultiClass()")
        choices = {
            "schedule": SCHEDULES,
            "batch_norm": BATCH_NORMS,
            "masked": MASKED,
            "lr_schedule": LR_SCHEDULES,
            "augment": tuple(AUGMENTATIONS),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")
        if self.affine_per_ticket and self.batch_norm != "per_ticket":
            raise InputError(f"affine_per_ticket is True with batch_norm {self.batch_norm!r}, expected 'per_ticket'")

    def rate(self, done: float) -> float:
        """The learning rate when the fraction `done`, 0 to 1, of the training is behind."""
        return self.lr if self.lr_schedule == "constant" else self.lr * (1 + math.cos(math.pi * done)) / 2

    def share(self, tickets: int) -> int:
        """Samples of a ticket in a sequential or mixed step. Raises InputError if a mixed one has none for some."""
        if self.schedule != "mixed":
            return self.batch_size
        if self.batch_size < tickets:
            raise InputError(
                f"batch_size is {self.batch_size}, expected {tickets} or more: with schedule 'mixed' a step holds a "
                f"sample or more of each of {tickets} tickets"
            )
        return -(-self.batch_size // tickets)

    def described(self) -> dict[str, Any]:
        """What joint retraining depends on, as a run is bound to it; the task by name and what it was given."""
        fields = dataclasses.asdict(self)
        given = fields["task"]
        return fields | {"task": {"name": self.task.name, **given} if given else self.task.name}

    def described_for_extraction(self) -> dict[str, Any]:
        """What a round of extraction depends on: of one mask there is no schedule, and statistics are its own."""
        of_many = {"schedule", "batch_norm", "affine_per_ticket", "masked"}
        return {name: value for name, value in self.described().items() if name not in of_many}


def masked_copy(
    model: nn.Module, num_masks: int, batch_norm: str, affine_per_ticket: bool = False
) -> rk.nn.RoutedModel:
    """A copy of `model` with K masks on what it says is prunable (all linear and convolution layers if it is silent).

    `model.prunable(name, module) -> bool` says so, over `model.named_modules()`. Raises InputError if that is nothing,
    or `model` is no module.
    """
    expect("model", model, nn.Module, "a torch.nn.Module")
    scope = getattr(model, "prunable", None)
    try:
        return rk.nn.convert(copy.deepcopy(model), num_masks, scope, batch_norm, affine_per_ticket=affine_per_ticket)
    except ValueError as error:
        raise InputError(f"model is a {type(model).__name__}, which cannot be pruned: {error}") from error


def state(net: rk.nn.RoutedModel) -> dict[str, Tensor]:
    """A copy of everything in a network but its masks: parameters and statistics."""
    return {name: t.clone() for name, t in net.model.state_dict().items() if not name.endswith("mask_words")}


def rewind(net: rk.nn.RoutedModel, theta0: Mapping[str, Tensor]) -> None:
    """Put back what `state` copied, masks as they are: θ ← θ0."""
    own = net.model.state_dict()
    with torch.no_grad():
        for name, tensor in theta0.items():
            own[name].copy_(tensor)


def new_optimizer(net: rk.nn.RoutedModel, fit: Fit) -> torch.optim.Optimizer:
    """Adam, by default one under which neither a pruned weight nor its state moves."""
    adam = torch.optim.Adam(net.parameters(), lr=fit.lr, foreach=True)
    return adam if fit.masked == "gradient" else rk.optim.masked_step(adam, net)


def set_rate(optimizer: torch.optim.Optimizer, fit: Fit, done: float) -> None:
    """Give the optimiser the learning rate of its next step, the fraction `done` of the training being behind."""
    for group in optimizer.param_groups:
        group["lr"] = fit.rate(done)


Batch = Sequence[tuple[int, int, Tensor]]  # of each ticket in a step: mask, ticket, sample positions


def step(net: rk.nn.RoutedModel, optimizer: torch.optim.Optimizer, fit: Fit, parts: Partition, batch: Batch) -> Tensor:
    """One optimiser step through m_k ⊙ θ for the tickets in `batch`; returns the mean loss (a detached scalar).

    Augmentation draws from torch's global generator. With untied weights every ticket's own mean loss is followed, as
    if it were trained alone.
    """
    index = torch.cat([index for _, _, index in batch])
    task = fit.task
    inputs = AUGMENTATIONS[fit.augment](parts.data.batch(index)[0])
    masks = torch.cat([torch.full((len(index),), mask) for mask, _, index in batch])
    tickets = torch.cat([torch.full((len(index),), ticket) for _, ticket, index in batch])
    target = torch.cat([task.target(parts, ticket, index) for _, ticket, index in batch])
    output = net(inputs, masks)
    expect("the model's output", output, Tensor, "a tensor, a row a sample")
    losses = task.losses(output, target, tickets)
    if any(module.untied for module in net.masked_modules().values()):
        loss = torch.stack([part.mean() for part in losses.split([len(b[2]) for b in batch])]).sum()
    else:
        loss = losses.mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return losses.detach().mean()


def split(order: Tensor, batch_size: int) -> list[Tensor]:
    """Batches of an epoch. A last one of a single sample joins the one before it: batch norm has no use for it."""
    batches = list(order.split(batch_size))
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def digest(state: Mapping[str, Tensor]) -> str:
    """A fingerprint of a state dict: SHA-256 over its names, dtypes, shapes and bytes."""
    sha = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
