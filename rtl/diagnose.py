"""Mask similarity: Jaccard |m_i ∧ m_j| / |m_i ∨ m_j| between tickets, over all prunable weights and layer by layer.

At the reported sparsities whole, and over every round against what masks of the same sizes would have by chance and at
most (`rtl.curve`), with the collapse alarm on it (`rtl.collapse`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import rtl_kernels as rk
from rtl.collapse import Alarm, alarms
from rtl.curve import Curve, mean_to_others
from rtl.errors import expect
from rtl.tickets import TicketMasks, Tickets


@dataclass(frozen=True, eq=False)
class Similarity:
    """Between the K tickets at one sparsity.

    Attributes:
        matrix: float64 (K, K), over all prunable weights.
        by_layer: the same for each layer, in the model's order (the depth's).
        names: of the K tickets.
    """

    names: tuple[str, ...]
    matrix: Tensor
    by_layer: dict[str, Tensor]

    @property
    def per_ticket(self) -> Tensor:
        """A ticket's score, its mean similarity to the others: float64 (K,); NaN for a single ticket."""
        return mean_to_others(self.matrix)

    @property
    def mean(self) -> float:
        """Mean over pairs of tickets; NaN for a single ticket."""
        return float(self.per_ticket.mean())

    def to_json(self) -> dict[str, Any]:
        """Plain values, which `from_json` reads back."""
        by_layer = {layer: matrix.tolist() for layer, matrix in self.by_layer.items()}
        return {"names": list(self.names), "matrix": self.matrix.tolist(), "by_layer": by_layer}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Similarity:
        """The inverse of `to_json`."""
        by_layer = {layer: torch.tensor(m, dtype=torch.float64) for layer, m in values["by_layer"].items()}
        return cls(tuple(values["names"]), torch.tensor(values["matrix"], dtype=torch.float64), by_layer)


def similarity(masks: TicketMasks) -> Similarity:
    """Mask similarity of tickets at one sparsity."""
    by_layer = {layer: bank.jaccard() for layer, bank in masks.banks.items()}
    return Similarity(masks.names, rk.jaccard(list(masks.banks.values())), by_layer)


@dataclass(frozen=True, eq=False)
class Diagnosis(Mapping[float, Similarity]):
    """A mapping from every reported sparsity, ascending, to the tickets' similarity there.

    Attributes:
        levels: that mapping, plain.
        curve: overlaps over all rounds.
    """

    levels: Mapping[float, Similarity]
    curve: Curve

    def __getitem__(self, sparsity: float) -> Similarity:
        return self.levels[sparsity]

    def __iter__(self) -> Iterator[float]:
        return iter(self.levels)

    def __len__(self) -> int:
        return len(self.levels)

    @cached_property
    def alarms(self) -> list[Alarm]:
        """The collapse alarms over all prunable weights, one a ticket at most; these are what extraction heeds."""
        return alarms(self.curve)

    @cached_property
    def layer_alarms(self) -> list[Alarm]:
        """The same rule's alarms in each layer, which say where it began."""
        return [alarm for layer in self.curve.layers for alarm in alarms(self.curve, layer)]


def diagnose(tickets: Tickets) -> Diagnosis:
    """Mask similarity at every reported sparsity and over the rounds, and where it warns of collapse.

    Tickets that carry no rounds are followed over their reported sparsities, too few for an alarm as a rule.
    """
    expect("tickets", tickets, Tickets, "what rtl.extract gives, at all its sparsities")
    levels = {sparsity: similarity(masks) for sparsity, masks in tickets.levels.items()}
    curve = tickets.curve or Curve.of(tickets.names, [masks.banks for masks in tickets.levels.values()])
    return Diagnosis(levels, curve)
