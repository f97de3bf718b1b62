"""What a ticket learns: which samples one epoch draws for it, their targets, and the loss.

A task is stateless. `draw` gives the sample positions of one epoch, `target` what they should give, `losses` one loss a
sample from the model's output; `ticket` is always a position in the partition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rtl.errors import InputError
from rtl.partition import Partition


class Task(Protocol):
    """What extraction, retraining and evaluation ask of a task."""

    @property
    def name(self) -> str: ...

    def draw(self, parts: Partition, ticket: int, generator: torch.Generator) -> Tensor:
        """Positions in `parts.data` of one epoch's samples, int64 (n,), in the order they are presented."""

    def target(self, parts: Partition, ticket: int, index: Tensor) -> Tensor:
        """Targets (n, ...) of the samples at `index` for one ticket."""

    def losses(self, output: Tensor, target: Tensor, ticket: Tensor) -> Tensor:
        """One loss for each row, float (n,). `output` is the model's (n, ...), `ticket` int64 (n,)."""


@dataclass(frozen=True)
class OneVsRest:
    """Ticket k tells its subset from the rest: logit k of the model, binary cross-entropy, as many negatives as
    positives, drawn afresh every epoch from the other subsets (all of them, where there are fewer).
    """

    name = "one_vs_rest"

    def draw(self, parts: Partition, ticket: int, generator: torch.Generator) -> Tensor:
        positives = parts[ticket]
        others = ((parts.index >= 0) & (parts.index != ticket)).nonzero().flatten()
        if len(others) == 0:
            raise InputError(
                f"parts has no samples outside {parts.names[ticket]!r}: one-vs-rest needs two subsets or more, "
                "use rtl.tasks.MultiClass() for one"
            )
        negatives = others[torch.randperm(len(others), generator=generator)[: len(positives)]]
        both = torch.cat([positives, negatives])
        return both[torch.randperm(len(both), generator=generator)]

    def target(self, parts: Partition, ticket: int, index: Tensor) -> Tensor:
        return (parts.index[index] == ticket).float()

    def losses(self, output: Tensor, target: Tensor, ticket: Tensor) -> Tensor:
        logit = output.gather(1, ticket[:, None]).squeeze(1)
        return F.binary_cross_entropy_with_logits(logit, target, reduction="none")


@dataclass(frozen=True)
class MultiClass:
    """Cross-entropy on the data's own labels, over the samples of the ticket's subset."""

    name = "multi_class"

    def draw(self, parts: Partition, ticket: int, generator: torch.Generator) -> Tensor:
        return _shuffled(parts[ticket], generator)

    def target(self, parts: Partition, ticket: int, index: Tensor) -> Tensor:
        return parts.data.targets[index]

    def losses(self, output: Tensor, target: Tensor, ticket: Tensor) -> Tensor:
        return F.cross_entropy(output, target, reduction="none")


@dataclass(frozen=True)
class Regression:
    """Squared error on the data's float targets, over the ticket's subset; a sample's loss is its mean."""

    name = "regression"

    def draw(self, parts: Partition, ticket: int, generator: torch.Generator) -> Tensor:
        return _shuffled(parts[ticket], generator)

    def target(self, parts: Partition, ticket: int, index: Tensor) -> Tensor:
        return parts.data.targets[index]

    def losses(self, output: Tensor, target: Tensor, ticket: Tensor) -> Tensor:
        if output.shape != target.shape:
            raise InputError(f"targets have shape {tuple(target.shape)}, but the model gives {tuple(output.shape)}")
        return (output - target).square().flatten(1).mean(1)


TASKS: dict[str, Task] = {task.name: task for task in (OneVsRest(), MultiClass(), Regression())}


def _shuffled(index: Tensor, generator: torch.Generator) -> Tensor:
    return index[torch.randperm(len(index), generator=generator)]
