"""Do tickets of related classes share more weights? Spearman's correlation of mask similarity with meaning.

Over the K (K − 1) / 2 pairs of tickets, which are not independent of one another: significance comes from permuting the
tickets' names (Mantel, Cancer Research 27, 1967), all K! ways up to 7 tickets, drawn ones beyond.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rtl.curve import Curve
from rtl.errors import InputError

_EXACT = 7  # tickets


@dataclass(frozen=True, eq=False)
class Alignment:
    """Correlations over R stages (rounds of extraction, or epochs within one) and L layers.

    Attributes:
        names: of the K tickets.
        layers: in the model's order, that of depth.
        sparsity: at each stage, mean over tickets.
        rho: Spearman's correlation, float64 (R, 1 + L): over all layers together, then each; NaN where all pairs of
            masks are equally similar.
        p_value: two-sided, of the permutations, float64 (R, 1 + L).
        permutations: how many.
        semantic: the K × K similarity in meaning. The masks' matrices are the curve's `jaccard()`.
    """

    names: tuple[str, ...]
    layers: tuple[str, ...]
    sparsity: tuple[float, ...]
    rho: Tensor
    p_value: Tensor
    permutations: int
    semantic: Tensor

    def to_json(self) -> dict[str, Any]:
        """Plain values, which `from_json` reads back; NaN becomes null."""

        def plain(values: Tensor) -> list[list[float | None]]:
            return [[None if math.isnan(v) else v for v in row] for row in values.tolist()]

        return {
            "names": list(self.names),
            "layers": list(self.layers),
            "sparsity": list(self.sparsity),
            "rho": plain(self.rho),
            "p_value": plain(self.p_value),
            "permutations": self.permutations,
            "semantic": self.semantic.tolist(),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Alignment:
        """The inverse of `to_json`."""

        def tensor(rows: list[list[float | None]]) -> Tensor:
            return torch.tensor([[math.nan if v is None else v for v in row] for row in rows], dtype=torch.float64)

        return cls(
            tuple(values["names"]),
            tuple(values["layers"]),
            tuple(values["sparsity"]),
            tensor(values["rho"]),
            tensor(values["p_value"]),
            values["permutations"],
            torch.tensor(values["semantic"], dtype=torch.float64),
        )


def alignment(
    curve: Curve, semantic: Tensor, stages: Sequence[int] | None = None, permutations: int = 10_000, seed: int = 0
) -> Alignment:
    """Correlate mask similarity with similarity in meaning, by sparsity or stage of training, and depth.

    Args:
        curve: what the tickets share over sparsity (`rtl.diagnose(tickets).curve`), or over the epochs of one round
            (`tickets.stages[0.5]`).
        semantic: float64 (K, K), symmetric, in the order of the curve's names: see `rtl.semantics`.
        stages: which rounds of the curve; None: all.
        permutations: drawn for the p-value, where not all are taken.
        seed: of the drawing.

    Raises:
        InputError: fewer than 3 tickets, or a matrix that does not fit them.
    """
    k = len(curve.names)
    if k < 3:
        raise InputError(f"curve is of {k} tickets: a correlation over pairs needs 3 or more")
    if semantic.shape != (k, k) or not symmetric(semantic):
        raise InputError(f"semantic has shape {tuple(semantic.shape)}, expected a symmetric ({k}, {k}) matrix")
    rounds = list(range(len(curve)) if stages is None else stages)
    matrices = torch.stack([curve.jaccard(layer)[rounds] for layer in (None, *curve.layers)], 1)  # (R, 1 + L, K, K)
    rho, p_value, count = spearman(matrices.flatten(0, 1), semantic, permutations, seed)
    shape = len(rounds), 1 + len(curve.layers)
    sparsity = tuple(curve.sparsity.mean(1)[rounds].tolist())
    return Alignment(
        curve.names, curve.layers, sparsity, rho.view(shape), p_value.view(shape), count, semantic.to(torch.float64)
    )


def symmetric(matrix: Tensor) -> bool:
    """Whether a square matrix is finite and, up to rounding, symmetric: a product of matrices is no more than that."""
    values = matrix.to(torch.float64)
    return bool(values.isfinite().all()) and torch.allclose(values, values.mT)


def spearman(matrices: Tensor, semantic: Tensor, permutations: int, seed: int) -> tuple[Tensor, Tensor, int]:
    """Of N symmetric matrices (N, K, K) with one (K, K), above the diagonal.

    Returns:
        ρ and two-sided p-values, float64 (N,), NaN where a matrix is constant; and how many permutations there were.
    """
    k = len(semantic)
    if k <= _EXACT:
        orders = torch.tensor(list(itertools.permutations(range(k))))
        identity = 0  # is among them
    else:
        generator = torch.Generator().manual_seed(seed)
        orders = torch.stack([torch.randperm(k, generator=generator) for _ in range(permutations)])
        identity = 1
    i, j = torch.triu_indices(k, k, 1)
    own = _standard_ranks(matrices[:, i, j])  # (N, P)
    other = torch.zeros(k, k, dtype=torch.float64)
    other[i, j] = other[j, i] = _standard_ranks(semantic.to(torch.float64)[i, j][None])[0]
    rho = own @ other[i, j]
    by_chance = own @ other[orders[:, i], orders[:, j]].T  # (N, permutations)
    extreme = (by_chance.abs() >= rho.abs()[:, None] - 1e-12).sum(1)
    p_value = (extreme + identity).double() / (len(orders) + identity)
    return rho, p_value.masked_fill(rho.isnan(), math.nan), len(orders)


def _standard_ranks(values: Tensor) -> Tensor:
    """Ranks in each row, ties at their mean, centred and of length 1: float64 (N, P); NaN for a constant row."""
    from scipy.stats import rankdata

    ranks = torch.from_numpy(rankdata(values.numpy(), axis=1)).to(torch.float64)
    centred = ranks - ranks.mean(1, keepdim=True)
    length = centred.norm(dim=1, keepdim=True)
    return torch.where(length == 0, math.nan, centred / length)
