"""Banks of bit-packed binary masks over one weight tensor.

A bank holds K masks of a weight's shape as `words`, an int32 tensor (K, shape[0], ceil(prod(shape[1:]) / 32)): bit j of
word w of row o is the mask's value at flat position 32·w + j of row o, least significant bit first, padding bits zero.
It takes 1/32 of what float32 masks would, and every kernel reads it as it is.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["MaskBank", "jaccard", "load_banks", "overlap", "save_banks"]

WORD_BITS = 32


def pack_bits(bits: Tensor) -> Tensor:
    """bool (..., N) -> int32 (..., ceil(N / 32)), least significant bit first, padding bits zero."""
    pad = -bits.shape[-1] % WORD_BITS
    bits = torch.nn.functional.pad(bits, (0, pad)).unflatten(-1, (-1, WORD_BITS))
    shifts = torch.arange(WORD_BITS, dtype=torch.int32, device=bits.device)
    return (bits.to(torch.int32) << shifts).sum(-1, dtype=torch.int32)


def unpack_bits(words: Tensor, length: int) -> Tensor:
    """int32 (..., W) -> bool (..., length), the inverse of `pack_bits`."""
    shifts = torch.arange(WORD_BITS, dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & 1).bool().flatten(-2)[..., :length]


def popcount(words: Tensor) -> Tensor:
    """Set bits of each int32 word, as int32 of the same shape (the parallel sums of Hacker's Delight, 5-1)."""
    # The shifts are arithmetic, so each one is followed by a mask that clears the copies of the sign.
    w = words - ((words >> 1) & 0x55555555)
    w = (w & 0x33333333) + ((w >> 2) & 0x33333333)
    w = (w + (w >> 4)) & 0x0F0F0F0F
    return (w * 0x01010101) >> 24


class MaskBank:
    """K bit-packed masks over one weight tensor of shape `shape` (without K, also for untied weights).

    Args:
        words: int32 (K, shape[0], ceil(prod(shape[1:]) / 32)), padding bits zero. Kept, not copied: writing bits in
            place changes the bank.
        shape: the weight's shape; for a transposed convolution shape[0] is the number of input channels.

    Raises:
        TypeError: `words` is not an int32 tensor.
        ValueError: the shapes do not fit, K = 0, or a padding bit is set (checked on the CPU; on a GPU it would
            synchronise).
    """

    def __init__(self, words: Tensor, shape: Sequence[int]) -> None:
        shape = torch.Size(shape)
        if not isinstance(words, Tensor) or words.dtype != torch.int32:
            raise TypeError(f"words is {_describe(words)}, expected an int32 tensor")
        expected = words_shape(words.shape[0] if words.dim() else 0, shape)
        if words.dim() != 3 or words.shape != expected or words.shape[0] == 0:
            raise ValueError(
                f"words has shape {tuple(words.shape)}, but masks over a weight of shape {tuple(shape)} take "
                f"(K, {expected[1]}, {expected[2]}) with K >= 1"
            )
        if words.device.type == "cpu" and has_padding_bits(words, shape):
            raise ValueError(f"words has bits set behind the {row_bits(shape)} of a row, expected zeros there")
        self.words = words
        self.shape = shape

    @classmethod
    def unchecked(cls, words: Tensor, shape: torch.Size) -> MaskBank:
        """The bank of words that are known to be right, such as a module's: it looks at no bit."""
        bank = cls.__new__(cls)
        bank.words, bank.shape = words, shape
        return bank

    @classmethod
    def from_dense(cls, masks: Tensor) -> MaskBank:
        """Pack dense masks: bool (K, *weight.shape) -> a bank of K masks.

        Raises:
            TypeError: `masks` is not a bool tensor.
            ValueError: there is no mask, or a mask has no dimension.
        """
        if not isinstance(masks, Tensor) or masks.dtype != torch.bool:
            raise TypeError(f"masks is {_describe(masks)}, expected a bool tensor (K, *weight.shape)")
        if masks.dim() < 2 or masks.shape[0] == 0:
            raise ValueError(f"masks has shape {tuple(masks.shape)}, expected (K, *weight.shape) with K >= 1")
        # One mask at a time: packing widens every bit to an int32 on its way.
        rows = masks.shape[1]
        words = torch.stack([pack_bits(mask.reshape(rows, row_bits(masks.shape[1:]))) for mask in masks])
        return cls(words, masks.shape[1:])

    @classmethod
    def ones(cls, num_masks: int, shape: Sequence[int], device: torch.device | str | None = None) -> MaskBank:
        """K masks that keep every weight of a tensor of shape `shape`.

        Raises TypeError if num_masks is no integer, ValueError if it is < 1.
        """
        check_count("num_masks", num_masks)
        if num_masks < 1:
            raise ValueError(f"num_masks is {num_masks}, expected at least 1")
        shape = torch.Size(shape)
        row = pack_bits(torch.ones(row_bits(shape), dtype=torch.bool, device=device))
        return cls(row.expand(words_shape(num_masks, shape)).contiguous(), shape)

    @property
    def num_masks(self) -> int:
        return self.words.shape[0]

    @property
    def device(self) -> torch.device:
        return self.words.device

    def to(self, device: torch.device | str) -> MaskBank:
        return MaskBank(self.words.to(device), self.shape)

    def dense(self, mask: int) -> Tensor:
        """Mask `mask` as bool of shape `shape`. Raises IndexError unless 0 <= mask < K."""
        self._check(mask)
        return unpack_mask(self.words[mask], self.shape)

    def to_dense(self) -> Tensor:
        """All masks, bool (K, *shape)."""
        return torch.stack([unpack_mask(words, self.shape) for words in self.words])

    def select(self, masks: Sequence[int]) -> MaskBank:
        """A bank of the named masks, in that order (copies).

        Raises:
            IndexError: a mask is not there.
            ValueError: none is named.
        """
        if len(masks) == 0:
            raise ValueError("masks is empty, expected at least one mask")
        for mask in masks:
            self._check(mask)
        return MaskBank(self.words[torch.as_tensor(list(masks), device=self.device)], self.shape)

    def counts(self) -> Tensor:
        """Weights each mask keeps, int64 (K,)."""
        return popcount(self.words).sum((1, 2), dtype=torch.int64)

    def density(self) -> Tensor:
        """Fraction of weights each mask keeps, float64 (K,); 0 for a weight without elements."""
        return self.counts().double() / max(1, math.prod(self.shape))

    def union(self) -> MaskBank:
        """A bank of one mask: the positions any of the K masks keeps."""
        words = self.words
        while len(words) > 1:  # halves onto one another: log K steps
            half = len(words) // 2
            words = torch.cat([words[:half] | words[half : 2 * half], words[2 * half :]])
        return MaskBank(words.clone(), self.shape)

    def overlap(self) -> Tensor:
        """|m_i ∧ m_j|, int64 (K, K); the diagonal holds the masks' own sizes."""
        return torch.stack([popcount(self.words & words).sum((1, 2), dtype=torch.int64) for words in self.words])

    def jaccard(self) -> Tensor:
        """|m_i ∧ m_j| / |m_i ∨ m_j|, float64 (K, K); two empty masks are equal, so theirs is 1."""
        return jaccard([self])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the bank to a safetensors file (whole or not at all)."""
        save_banks({"": self}, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MaskBank:
        """Read a bank that `save` wrote. Raises ValueError if the file holds something else."""
        banks = load_banks(path)
        if list(banks) != [""]:
            raise ValueError(f"path is {str(path)!r}, which holds the banks {sorted(banks)}: use load_banks")
        return banks[""]

    def _check(self, mask: int) -> None:
        if not 0 <= mask < self.num_masks:
            raise IndexError(f"mask is {mask}, but there are {self.num_masks} masks (0..{self.num_masks - 1})")

    def __repr__(self) -> str:
        return f"MaskBank(num_masks={self.num_masks}, shape={tuple(self.shape)}, device={self.device})"


def overlap(banks: Sequence[MaskBank]) -> Tensor:
    """|m_i ∧ m_j| over several layers' banks of the same K masks, int64 (K, K).

    Raises ValueError if there is no bank, or they are of different numbers of masks.
    """
    if len({bank.num_masks for bank in banks}) != 1:
        raise ValueError(f"banks holds banks of {[bank.num_masks for bank in banks]} masks, expected one equal number")
    return torch.stack([bank.overlap() for bank in banks]).sum(0)


def jaccard(banks: Sequence[MaskBank]) -> Tensor:
    """Mask similarity |m_i ∧ m_j| / |m_i ∨ m_j| over several layers' banks of the same K masks, float64 (K, K).

    Two masks that keep nothing are equal: 1. Raises ValueError as `overlap` does.
    """
    both = overlap(banks)
    sizes = both.diagonal()
    either = sizes[:, None] + sizes[None, :] - both
    return torch.where(either == 0, 1.0, both.double() / either.clamp(min=1))


def save_banks(banks: Mapping[str, MaskBank], path: str | os.PathLike[str]) -> None:
    """Write named banks (one a layer) to one safetensors file, under a temporary name that is renamed when whole."""
    path = Path(path)
    shapes = json.dumps({name: list(bank.shape) for name, bank in banks.items()}, sort_keys=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save_file(
            # safetensors refuses tensors that share memory: two layers may have been given one bank.
            {f"{name}.words": bank.words.to("cpu", copy=True).contiguous() for name, bank in banks.items()},
            partial,
            metadata={"mask_shapes": shapes},
        )
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # else a crash of the machine may keep the name and lose what it names
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_banks(path: str | os.PathLike[str]) -> dict[str, MaskBank]:
    """Read what `save_banks` wrote. Raises ValueError if the file holds something else."""
    try:
        with safe_open(path, framework="pt") as file:
            shapes = json.loads(file.metadata()["mask_shapes"])
            return {name: MaskBank(file.get_tensor(f"{name}.words"), shape) for name, shape in shapes.items()}
    except (SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"path is {str(path)!r}, which is not a file of mask banks: {error}") from error


def check_count(name: str, value: object) -> None:
    """Raise TypeError unless `value` can count something: an integer of Python's, numpy's or a tracer's."""
    if not hasattr(value, "__index__"):
        raise TypeError(f"{name} is {value!r}, expected an integer")


def row_bits(shape: Sequence[int]) -> int:
    """Bits in one row of a mask: the elements of everything behind the weight's leading dimension."""
    return math.prod(shape[1:])


def has_padding_bits(words: Tensor, shape: Sequence[int]) -> bool:
    """Whether words (K, rows, W) of masks of `shape` have a bit set behind a row's last."""
    used = row_bits(shape) % WORD_BITS
    # The last word's bits from `used` on: its sign bit included, as the shift is arithmetic.
    return used > 0 and bool((words[..., -1] >> used).any())


def words_shape(num_masks: int, shape: Sequence[int]) -> tuple[int, int, int]:
    """The shape of the words of `num_masks` masks over a weight of shape `shape`."""
    return num_masks, shape[0] if len(shape) else 0, -(-row_bits(shape) // WORD_BITS)


def unpack_mask(words: Tensor, shape: Sequence[int]) -> Tensor:
    """One mask's words (shape[0], W) -> bool of shape `shape`."""
    return unpack_bits(words, row_bits(shape)).reshape(tuple(shape))


def _describe(value: object) -> str:
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}"
