"""Routes: which mask each sample of a batch goes through, sorted once a batch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .masks import check_count

__all__ = ["Route"]


class Route:
    """The samples of one batch grouped by mask; made by `Route.build` or `Route.every`, never changed.

    Rows are the samples in sorted order: first those without a mask (index −1), then mask 0's, mask 1's, …, each group
    in the order its samples had. Rows [offsets[g], offsets[g + 1]) are group g, which is mask g − 1.

    Attributes:
        num_masks: K.
        batch: B, samples that come in.
        all_masks: whether every sample goes through every mask: then there are K · batch rows, else `batch`.
        order: int64 (B,), row r is sample order[r]; None if the samples already stand in row order.
        offsets: int64 (K + 2,), where the groups begin and the last one ends.
        index: int64 (rows,), the mask of each row, ascending.
    """

    def __init__(
        self, num_masks: int, batch: int, all_masks: bool, order: Tensor | None, offsets: Tensor, index: Tensor
    ) -> None:
        self.num_masks = num_masks
        self.batch = batch
        self.all_masks = all_masks
        self.order = order
        self.offsets = offsets
        self.index = index
        self.all_masked = False  # or known to have no row without a mask

    @classmethod
    def build(cls, index: Tensor | Sequence[int], num_masks: int) -> Route:
        """Sort a batch by mask: sample b goes through mask index[b]; −1 means no mask, the dense weight.

        Args:
            index: integers (B,) in −1..K−1. Data on a GPU is not checked (that would synchronise) but clamped into
                the range, so that nothing is read out of bounds; RTL_KERNELS_CHECK_INDEX=1 checks it for debugging.
            num_masks: K.

        Raises:
            TypeError: `index` is not of integers, or num_masks is none.
            ValueError: `index` is not of one dimension, or num_masks < 1.
            IndexError: a value lies outside −1..K−1.
        """
        check_count("num_masks", num_masks)
        if num_masks < 1:
            raise ValueError(f"num_masks is {num_masks}, expected at least 1")
        if not isinstance(index, Tensor):
            if not hasattr(index, "__len__"):
                raise TypeError(f"index is a {type(index).__name__}, expected integers (batch,)")
            traced = torch.compiler.is_compiling()  # where the default device is not to be asked for
            try:
                dtype = torch.int64 if len(index) == 0 else None
                values = torch.tensor(index, dtype=dtype, device=None if traced else "cpu")
            except (TypeError, ValueError, RuntimeError) as error:
                raise TypeError(f"index is a {type(index).__name__} of no integers ({error}), expected some") from error
            route = cls.build(values, num_masks)
            return route if traced else route.to(torch.get_default_device())  # checked before it goes there
        if index.dtype == torch.bool or index.is_floating_point() or index.is_complex():
            raise TypeError(f"index has dtype {index.dtype}, expected integers")
        if index.dim() != 1:
            raise ValueError(f"index has shape {tuple(index.shape)}, expected (batch,)")
        order, offsets, ascending = torch.ops.rtl_kernels.route(index.to(torch.int64), num_masks)
        return cls(num_masks, index.shape[0], False, order, offsets, ascending)

    @classmethod
    def every(cls, num_masks: int, batch: int, device: torch.device | str | None = None) -> Route:
        """Every one of `batch` samples through every mask: row k·B + b is sample b through mask k.

        The first masked layer takes B samples and gives K·B rows without copying its input K times; later ones take
        the K·B rows. Wrapped models and the public functions give (K, B, ...).

        Raises:
            TypeError: num_masks or batch is no integer.
            ValueError: num_masks < 1 or batch < 0.
        """
        check_count("num_masks", num_masks)
        check_count("batch", batch)
        if num_masks < 1:
            raise ValueError(f"num_masks is {num_masks}, expected at least 1")
        if batch < 0:
            raise ValueError(f"batch is {batch}, expected 0 or more")
        offsets = torch.arange(-1, num_masks + 1, device=device).clamp(min=0) * batch
        index = torch.arange(num_masks, device=device).repeat_interleave(batch)
        return cls(num_masks, batch, True, None, offsets, index)

    def to(self, device: torch.device | str) -> Route:
        if self.offsets.device == torch.device(device):
            return self
        order = None if self.order is None else self.order.to(device)
        return Route(self.num_masks, self.batch, self.all_masks, order, self.offsets.to(device), self.index.to(device))

    @property
    def rows(self) -> int:
        return self.batch * (self.num_masks if self.all_masks else 1)

    @property
    def segments(self) -> list[tuple[int, int, int]]:
        """(mask, first row, end row) of every group that is not empty, −1 first. Synchronises on a GPU."""
        return segments(self.offsets)

    @property
    def present(self) -> Tensor:
        """bool (K + 1,): which groups have rows, −1 first."""
        return self.offsets[1:] > self.offsets[:-1]

    def sorted(self) -> Route:
        """The same groups for samples that `arrange` has put in row order."""
        if self.order is None:
            return self
        return Route(self.num_masks, self.batch, self.all_masks, None, self.offsets, self.index)

    def arrange(self, x: Tensor) -> Tensor:
        """Samples (B, ...) in the order given -> in row order. A route through every mask leaves them as they are."""
        return x if self.order is None else x.index_select(0, self.order)

    def restore(self, y: Tensor) -> Tensor:
        """Rows (rows, ...) -> (B, ...) in the order the samples had, or (K, B, ...) if every mask sees each sample."""
        if self.all_masks:
            return y.unflatten(0, (self.num_masks, self.batch))
        if self.order is None:
            return y
        position = torch.arange(self.batch, device=self.order.device)
        return y.index_select(0, torch.empty_like(self.order).scatter_(0, self.order, position))

    def repeat_for(self, x: Tensor, name: str = "x") -> int:
        """How often the operators repeat an input's samples: 1, or K if it holds samples that every mask has to see.

        Raises ValueError if x has neither `batch` nor `rows` samples.
        """
        samples = x.shape[0] if x.dim() else 0
        if samples == (self.rows if self.all_masks else self.batch):
            return 1
        if samples == self.batch:
            return self.num_masks
        expected = f"{self.batch} or {self.rows}" if self.all_masks else str(self.batch)
        raise ValueError(f"{name} has shape {tuple(x.shape)}, but its route is for {expected} samples")

    def __repr__(self) -> str:
        return f"Route(num_masks={self.num_masks}, batch={self.batch}, rows={self.rows}, device={self.offsets.device})"


def segments(offsets: Tensor) -> list[tuple[int, int, int]]:
    """(mask, first row, end row) of every group of `offsets` that is not empty, −1 first. Synchronises on a GPU."""
    pairs = itertools.pairwise(offsets.tolist())
    return [(group - 1, start, stop) for group, (start, stop) in enumerate(pairs) if stop > start]
