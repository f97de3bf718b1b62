"""Mask similarity: Jaccard |m_i ∧ m_j| / |m_i ∨ m_j| between tickets, over all prunable weights and layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import rtl_kernels as rk
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


def mean_to_others(matrix: Tensor) -> Tensor:
    """Mean of each row without its diagonal, (K, K) -> (K,); NaN for K = 1."""
    return (matrix.sum(1) - matrix.diagonal()) / (len(matrix) - 1)


def similarity(masks: TicketMasks) -> Similarity:
    """Mask similarity of tickets at one sparsity."""
    by_layer = {layer: bank.jaccard() for layer, bank in masks.banks.items()}
    return Similarity(masks.names, rk.jaccard(list(masks.banks.values())), by_layer)


def diagnose(tickets: Tickets) -> dict[float, Similarity]:
    """Mask similarity at every reported sparsity, ascending."""
    return {sparsity: similarity(masks) for sparsity, masks in tickets.levels.items()}
