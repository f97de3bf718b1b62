"""What tickets share, round after round: exact counts, from which every similarity and both baselines follow.

Density alone moves Jaccard similarity, so each value stands between what two masks of the same sizes would have if
they were drawn independently of one another in every layer, and if they were as alike as their sizes allow:

    independent   Σ_l n_l a_l b_l / Σ_l n_l (a_l + b_l − a_l b_l)      a_l, b_l: densities of the two masks in layer l
    identical     Σ_l n_l min(a_l, b_l) / Σ_l n_l max(a_l, b_l)        n_l: weights of layer l
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import rtl_kernels as rk


@dataclass(frozen=True, eq=False)
class Curve:
    """Overlaps of K tickets over R rounds, from dense to sparse.

    Attributes:
        names: of the K tickets.
        sizes: weights of each prunable layer, in the model's order.
        overlaps: by layer, |m_i ∧ m_j| after each round, int64 (R, K, K); the diagonal holds the masks' own sizes.

    `layer` of every method: one layer's name, or None for all prunable weights together.
    """

    names: tuple[str, ...]
    sizes: Mapping[str, int]
    overlaps: Mapping[str, Tensor]

    @classmethod
    def of(cls, names: Sequence[str], rounds: Sequence[Mapping[str, rk.MaskBank]]) -> Curve:
        """The curve of masks: for each round a bank of K masks for every layer. ValueError if there is no round."""
        if not rounds:
            raise ValueError("rounds is empty, expected the masks of one round or more")
        sizes = {layer: bank.shape.numel() for layer, bank in rounds[0].items()}
        return cls(
            tuple(names), sizes, {layer: torch.stack([banks[layer].overlap() for banks in rounds]) for layer in sizes}
        )

    def __len__(self) -> int:
        """Rounds."""
        return len(next(iter(self.overlaps.values())))

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(self.sizes)

    def overlap(self, layer: str | None = None) -> Tensor:
        """|m_i ∧ m_j|, int64 (R, K, K)."""
        return torch.stack(list(self.overlaps.values())).sum(0) if layer is None else self.overlaps[layer]

    def density(self, layer: str | None = None) -> Tensor:
        """Fraction of weights each ticket keeps, float64 (R, K)."""
        size = sum(self.sizes.values()) if layer is None else self.sizes[layer]
        return self.overlap(layer).diagonal(dim1=1, dim2=2).double() / size

    @property
    def sparsity(self) -> Tensor:
        """Of each ticket over all prunable weights, float64 (R, K)."""
        return 1 - self.density()

    def jaccard(self, layer: str | None = None) -> Tensor:
        """Mask similarity, float64 (R, K, K); two empty masks are equal, so theirs is 1."""
        both = self.overlap(layer)
        own = both.diagonal(dim1=1, dim2=2)
        return _ratio(both, own[:, :, None] + own[:, None, :] - both)

    def independent(self, layer: str | None = None) -> Tensor:
        """What masks of these sizes, drawn independently in every layer, have on average, float64 (R, K, K)."""
        both, either = [], []
        for name in self.layers if layer is None else (layer,):
            kept = self.density(name)
            product = kept[:, :, None] * kept[:, None, :]
            both.append(self.sizes[name] * product)
            either.append(self.sizes[name] * (kept[:, :, None] + kept[:, None, :] - product))
        return _ratio(torch.stack(both).sum(0), torch.stack(either).sum(0))

    def identical(self, layer: str | None = None) -> Tensor:
        """The most that masks of these sizes can have, float64 (R, K, K): 1 where sizes are equal in every layer."""
        low, high = [], []
        for name in self.layers if layer is None else (layer,):
            own = self.overlap(name).diagonal(dim1=1, dim2=2)
            low.append(torch.minimum(own[:, :, None], own[:, None, :]))
            high.append(torch.maximum(own[:, :, None], own[:, None, :]))
        return _ratio(torch.stack(low).sum(0), torch.stack(high).sum(0))

    def to_json(self) -> dict[str, Any]:
        """Plain values, which `from_json` reads back: of each symmetric matrix the rows up to the diagonal, flat."""
        lower = torch.tril_indices(len(self.names), len(self.names))
        overlaps = {layer: counts[:, lower[0], lower[1]].tolist() for layer, counts in self.overlaps.items()}
        return {"names": list(self.names), "sizes": dict(self.sizes), "overlaps": overlaps}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Curve:
        """The inverse of `to_json`."""
        names = tuple(values["names"])
        i, j = torch.tril_indices(len(names), len(names))
        overlaps = {}
        for layer, counts in values["overlaps"].items():
            matrix = torch.zeros(len(counts), len(names), len(names), dtype=torch.int64)
            matrix[:, i, j] = matrix[:, j, i] = torch.tensor(counts, dtype=torch.int64)
            overlaps[layer] = matrix
        return cls(names, dict(values["sizes"]), overlaps)


def mean_to_others(matrix: Tensor) -> Tensor:
    """Mean of each row without its diagonal, (..., K, K) -> (..., K); NaN for K = 1."""
    return (matrix.sum(-1) - matrix.diagonal(dim1=-2, dim2=-1)) / (matrix.shape[-1] - 1)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole == 0, 1.0, part.double() / whole.clamp(min=1e-300 if whole.is_floating_point() else 1))
