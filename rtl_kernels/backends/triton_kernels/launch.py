"""From a raw operator's arguments to kernel launches. Nothing here imports Triton or looks at a tensor's values.

Each operator takes a `Target`, whose `run` executes one `Launch`: on a GPU by the compiled kernels, in tests by the
interpreter on CPU tensors, ahead of time by writing down what would be compiled. Verified in the last two ways only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import shapes
from .configs import Config, Problem, choose

__all__ = ["OPERATIONS", "Launch", "Target"]

_CHUNK = 1024  # groups whose boundaries are looked at together
_PROGRAMS = 264  # enough for two programs on each of the largest GPUs' processors
_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class Launch:
    """One kernel launch: everything `kernels.<kernel>[grid](**arguments, **constants)` needs.

    Attributes:
        arguments: tensors, integers and None (an absent tensor), as the kernel's parameters of the same names.
        constants: the kernel's compile-time parameters.
        registers: the most a thread may take; None: as the compiler chooses.
    """

    kernel: str
    grid: tuple[int, int]
    arguments: dict[str, Tensor | int | None]
    constants: dict[str, Any]
    warps: int
    stages: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told. Products may be fused with sums, as everywhere: Triton's own default changes."""
        return {
            "num_warps": self.warps,
            "num_stages": self.stages,
            "maxnreg": self.registers,
            "enable_fp_fusion": True,
        }


@dataclass(frozen=True)
class Target:
    """Where launches go, and what they are made for.

    Attributes:
        run: executes one launch.
        architecture: compute capability, 10 · major + minor.
        tf32: whether float32 may be rounded to TF32.
        choose: the configuration for a problem.
    """

    run: Callable[[Launch], None]
    architecture: int
    tf32: bool = False
    choose: Callable[[Problem], Config] = choose

    def config(self, kernel: str, dtype: torch.dtype, outputs: int, pixels: int, pointwise: bool) -> Config:
        arithmetic = "half" if dtype != torch.float32 else "tf32" if self.tf32 else "float32"
        kind = "windows" if not pointwise else "planes" if pixels >= 32 else "rows"
        return self.choose(Problem(kernel, arithmetic, self.architecture, outputs, kind))

    def precision(self, dtype: torch.dtype) -> str:
        return "tf32" if self.tf32 and dtype == torch.float32 else "ieee"


@dataclass(frozen=True)
class _Weight:
    """A weight (conv groups · rows, columns, kh, kw), untied with K before; `data` is None where only dw is wanted."""

    size: Sequence[int]
    data: Tensor | None
    groups: int

    @property
    def untied(self) -> bool:
        return len(self.size) == 5

    @property
    def rows(self) -> int:
        return self.size[-4] // self.groups

    @property
    def columns(self) -> int:
        return self.size[-3]

    @property
    def kernel(self) -> tuple[int, int]:
        return self.size[-2], self.size[-1]

    def arguments(self, words: Tensor) -> dict[str, Any]:
        return {
            "words": words,
            "groups": words.shape[0] + 1,
            "conv_groups": self.groups,
            "conv_rows": self.rows,
            "conv_columns": self.columns,
            "row_words": words.shape[2],
        }


@dataclass(frozen=True)
class _Geometry:
    stride: Sequence[int]
    padding: Sequence[int]  # top, left
    dilation: Sequence[int]

    def pointwise(self, weight: _Weight) -> bool:
        return weight.kernel == (1, 1) and (*self.stride, *self.padding) == (1, 1, 0, 0)

    def arguments(self) -> dict[str, int]:
        return {
            "stride_h": self.stride[0],
            "stride_w": self.stride[1],
            "top": self.padding[0],
            "left": self.padding[1],
            "dilation_h": self.dilation[0],
            "dilation_w": self.dilation[1],
        }


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power(n: int) -> int:
    """The least power of two that is n or more."""
    return 1 << max(0, n - 1).bit_length()


def _strides(name: str, x: Tensor) -> dict[str, int]:
    return {f"{name}_{axis}": x.stride(i) for i, axis in enumerate("nchw")}


def _plane(name: str, x: Tensor) -> tuple[Tensor, dict[str, int]]:
    """x (N, C, H, W), copied if its planes cannot be walked with one stride; and its strides (n, c, p)."""
    if x.shape[2] > 1 and x.shape[3] > 1 and x.stride(2) != x.shape[3] * x.stride(3):
        x = x.contiguous()
    p = x.stride(3) if x.shape[3] > 1 else x.stride(2)
    return x, {f"{name}_n": x.stride(0), f"{name}_c": x.stride(1), f"{name}_p": p}


def _wide(count: int, *tensors: Tensor | None) -> bool:
    """Whether 32 bits are too few to count to `count`, or to reach an element of a tensor."""
    reach = [sum((n - 1) * abs(s) for n, s in zip(t.shape, t.stride(), strict=True)) for t in tensors if t is not None]
    return max(count, *reach) > _LIMIT


def _launch(
    target: Target,
    kernel: str,
    grid: tuple[int, int],
    arguments: dict[str, Any],
    constants: dict[str, Any],
    config: Config,
    registers: int | None = None,
) -> None:
    if max(grid) > _LIMIT or grid[1] > 65535:
        raise ValueError(f"{kernel} would take a grid of {grid} programs, more than a GPU's grid holds")
    if min(grid) > 0:
        most = config.registers if registers is None else registers
        target.run(Launch(kernel, grid, arguments, constants, config.warps, config.stages, most))


_SMALL = Config(0, 0, 0, 4, 1)  # of the kernels that have no product in them


def _live(target: Target, words: Tensor, weight: _Weight, config: Config, transposed: bool) -> Tensor:
    """Which tiles of the reduction hold a bit, for every mask, conv group and tile of outputs: (…, 1 + tiles)."""
    masks, _, row_words = words.shape
    if transposed:
        tiles, entries = _cdiv(weight.columns, config.BLOCK_O), _cdiv(weight.rows, config.BLOCK_K)
    else:
        tile_words = _cdiv(config.BLOCK_K, 32)
        tiles, entries = _cdiv(weight.rows, config.BLOCK_O), _cdiv(row_words, tile_words)
    live = words.new_empty(masks * weight.groups * tiles, entries + 1)
    arguments: dict[str, Any] = {"words": words, "live": live, "rows": weight.rows, "row_words": row_words}
    constants: dict[str, Any] = {"BLOCK_O": config.BLOCK_O}
    if transposed:
        arguments["columns"] = weight.columns
        constants |= {"TAPS": math.prod(weight.kernel), "TILE": config.BLOCK_K}
        constants["CHUNK"] = max(config.BLOCK_K, min(256, _power(weight.rows)))
        _launch(target, "live_rows", (live.shape[0], 1), arguments, constants, _SMALL)
    else:
        constants |= {"TILE_WORDS": tile_words, "CHUNK": max(tile_words, min(128, _power(row_words)))}
        _launch(target, "live_columns", (live.shape[0], 1), arguments, constants, _SMALL)
    return live


def _product(
    target: Target,
    transposed: bool,
    x: Tensor,
    weight: _Weight,
    words: Tensor,
    offsets: Tensor,
    order: Tensor | None,
    repeat: int,
    bias: Tensor | None,
    geometry: _Geometry,
    y: Tensor,
) -> Tensor:
    """y = op(x, m ⊙ w) + bias by `correlate`, or its transpose by `adjoint`; all (N, channels, H, W).

    With repeat > 1 either x is repeated (y has the rows) or y's samples sum over their rows (x has them).
    """
    assert weight.data is not None
    if y.numel() == 0:
        return y
    sums = repeat > 1 and x.shape[0] > y.shape[0]
    rows = max(x.shape[0], y.shape[0])
    kernel = "adjoint" if transposed else "correlate"
    outputs = weight.columns if transposed else weight.rows
    pointwise = geometry.pointwise(weight) and all(t.stride(2) == t.shape[3] * t.stride(3) for t in (x, y))
    if pointwise:
        x, y_plane = x.flatten(2).unsqueeze(2), y.flatten(2).unsqueeze(2)  # one row of pixels: nothing to divide
    else:
        y_plane = y
    height, width = y_plane.shape[2:]
    config = target.config(kernel, x.dtype, outputs, height * width, pointwise)
    # What the grid has to hold: y's plane, or the largest of its phases'.
    step = geometry.stride if transposed else (1, 1)
    pixels = _cdiv(height, step[0]) * _cdiv(width, step[1])
    slots = _cdiv((y.shape[0] if sums else rows) * pixels, config.BLOCK_R) + (0 if sums else words.shape[0] + 1)
    data = weight.data.contiguous()
    words = words.contiguous()
    arguments: dict[str, Any] = {
        "x": x,
        "weight": data,
        "live": _live(target, words, weight, config, transposed),
        "bias": None if bias is None else bias.contiguous(),
        "y": y_plane,
        "offsets": offsets,
        "order": order,
        "samples": y.shape[0] if sums else x.shape[0],
        "weight_mask": data.stride(0) if weight.untied else 0,
        "bias_mask": 0 if bias is None or not weight.untied else bias.shape[1],
        "y_width": width,
        "x_height": x.shape[2],
        "x_width": x.shape[3],
        **weight.arguments(words),
        **geometry.arguments(),
        **_strides("x", x),
    }
    constants: dict[str, Any] = {
        "KH": weight.kernel[0],
        "KW": weight.kernel[1],
        "POINTWISE": pointwise,
        "UNTIED": weight.untied,
        "REPEAT": repeat > 1 and not sums,
        "SUM": sums,
        "PRECISION": target.precision(x.dtype),
        "WIDE": _wide(rows * height * width + 2 * config.BLOCK_R, x, data, words, y_plane),
        "CHUNK": min(_CHUNK, _power(words.shape[0] + 1)),
        "BLOCK_O": config.BLOCK_O,
        "BLOCK_R": config.BLOCK_R,
        "BLOCK_K": config.BLOCK_K,
    }
    if transposed:
        arguments |= {"y_height": height, **_strides("y", y_plane)}
        for axis, s, d in zip("HW", geometry.stride, geometry.dilation, strict=True):
            constants[f"STEP_{axis}"] = s // math.gcd(s, d)
    else:
        plane, strides = _plane("y", y_plane)
        assert plane is y_plane  # y is this module's own, and contiguous
        arguments |= {"pixels": height * width, **strides}
    grid = slots * _cdiv(outputs, config.BLOCK_O) * weight.groups, math.prod(step)
    # Left to itself the compiler spills some of what the loop over masks holds, for the sake of a second block.
    _launch(target, kernel, grid, arguments, constants, config, registers=255 if sums else None)
    return y


def _grad_weight(
    target: Target,
    small: Tensor,
    large: Tensor,
    weight: _Weight,
    words: Tensor,
    offsets: Tensor,
    order: Tensor | None,
    repeat: int,
    geometry: _Geometry,
) -> Tensor:
    """dw of `correlate` from small = dy and large = x, or of `adjoint` from small = x and large = dy."""
    dw = small.new_empty(weight.size)
    rows = max(small.shape[0], large.shape[0])
    if dw.numel() == 0 or rows == 0 or small.shape[2] * small.shape[3] == 0:
        return dw.zero_()
    pointwise = geometry.pointwise(weight) and all(t.stride(2) == t.shape[3] * t.stride(3) for t in (small, large))
    if pointwise:
        small, large = (t.flatten(2).unsqueeze(2) for t in (small, large))
    small, strides = _plane("small", small)
    pixels = small.shape[2] * small.shape[3]
    config = target.config("weight_grad", small.dtype, weight.rows, pixels, pointwise)
    columns = weight.columns * math.prod(weight.kernel)
    masks = words.shape[0] if weight.untied else 1
    programs = _cdiv(weight.rows, config.BLOCK_O) * _cdiv(columns, config.BLOCK_K) * weight.groups * masks
    splits = _splits(programs, rows * pixels, config.BLOCK_R, weight.untied)
    parts = dw if splits == 1 else dw.new_empty((splits, *weight.size), dtype=torch.float32)
    words = words.contiguous()
    arguments = {
        "small": small,
        "large": large,
        "dw": parts,
        "offsets": offsets,
        "order": order,
        "small_samples": small.shape[0],
        "large_samples": large.shape[0],
        "pixels": pixels,
        "small_width": small.shape[3],
        "large_height": large.shape[2],
        "large_width": large.shape[3],
        **weight.arguments(words),
        **geometry.arguments(),
        **strides,
        **_strides("large", large),
    }
    constants = {
        "KH": weight.kernel[0],
        "KW": weight.kernel[1],
        "POINTWISE": pointwise,
        "UNTIED": weight.untied,
        "REPEAT_SMALL": repeat > 1 and small.shape[0] < rows,
        "REPEAT_LARGE": repeat > 1 and large.shape[0] < rows,
        "PRECISION": target.precision(small.dtype),
        "WIDE": _wide(rows * pixels + 2 * splits * config.BLOCK_R, small, large, words, parts),
        "BLOCK_O": config.BLOCK_O,
        "BLOCK_R": config.BLOCK_R,
        "BLOCK_K": config.BLOCK_K,
    }
    _launch(target, "weight_grad", (programs, splits), arguments, constants, config)
    return _sum_splits(target, parts, dw)


def _splits(programs: int, pixels: int, block: int, untied: bool) -> int:
    """Into how many parts, summed in order, the rows are cut where there are too few programs to fill a GPU.

    For an untied weight it must not depend on the rows, of which there may be other groups': a mask's own dw is a
    function of its own rows.
    """
    wanted = _cdiv(_PROGRAMS, programs)
    return min(8, wanted) if untied else max(1, min(64, wanted, pixels // (8 * block)))


def _sum_splits(target: Target, parts: Tensor, out: Tensor) -> Tensor:
    if parts is not out:
        arguments = {"parts": parts, "out": out, "size": out.numel(), "splits": parts.shape[0]}
        _launch(target, "sum_splits", (_cdiv(out.numel(), 1024), 1), arguments, {"BLOCK": 1024}, _SMALL)
    return out


def _grad_bias(target: Target, dy: Tensor, offsets: Tensor, order: Tensor | None, masks: int | None) -> Tensor:
    """db (channels,) = Σ dy over rows and pixels; (masks, channels) from each mask's own rows for untied weights."""
    channels = dy.shape[1]
    db = dy.new_empty((channels,) if masks is None else (masks, channels))
    dy, strides = _plane("dy", dy)
    pixels = dy.shape[2] * dy.shape[3]
    if db.numel() == 0 or dy.numel() == 0:
        return db.zero_()
    config = target.config("bias_grad", dy.dtype, channels, pixels, True)
    programs = _cdiv(channels, config.BLOCK_O) * (masks or 1)
    splits = _splits(programs, dy.shape[0] * pixels, config.BLOCK_R, masks is not None)
    parts = db if splits == 1 else db.new_empty((splits, *db.shape), dtype=torch.float32)
    arguments = {
        "dy": dy,
        "db": parts,
        "offsets": offsets,
        "order": order,
        "groups": offsets.shape[0] - 1,
        "channels": channels,
        "pixels": pixels,
        **strides,
    }
    constants = {
        "UNTIED": masks is not None,
        "WIDE": _wide(dy.shape[0] * pixels + 2 * splits * config.BLOCK_R, dy, parts),
        "BLOCK_O": config.BLOCK_O,
        "BLOCK_R": config.BLOCK_R,
    }
    _launch(target, "bias_grad", (programs, splits), arguments, constants, config)
    return _sum_splits(target, parts, db)


# ---- the raw operators, as in ops.py


def _as_planes(x: Tensor) -> Tensor:
    """(B, ..., I) -> (B, I, 1, inner): a linear layer is a 1×1 convolution over its inner dimensions."""
    inner = math.prod(x.shape[1:-1])
    return x.reshape(x.shape[0], inner, x.shape[-1]).transpose(1, 2).unsqueeze(2)


_LINEAR = _Geometry((1, 1), (0, 0), (1, 1))


def linear(
    target: Target,
    x: Tensor,
    weight: Tensor,
    words: Tensor,
    offsets: Tensor,
    order: Tensor | None,
    repeat: int,
    bias: Tensor | None,
) -> Tensor:
    y = shapes.masked_linear(x, weight, words, offsets, order, repeat, bias)
    w = _Weight((*weight.shape, 1, 1), weight, 1)
    _product(target, False, _as_planes(x), w, words, offsets, order, repeat, bias, _LINEAR, _as_planes(y))
    return y


def linear_grad_input(
    target: Target,
    dy: Tensor,
    weight: Tensor,
    words: Tensor,
    offsets: Tensor,
    order: Tensor | None,
    repeat: int,
) -> Tensor:
    dx = shapes.masked_linear_grad_input(dy, weight, words, offsets, order, repeat)
    w = _Weight((*weight.shape, 1, 1), weight, 1)
    _product(target, True, _as_planes(dy), w, words, offsets, order, repeat, None, _LINEAR, _as_planes(dx))
    return dx


def linear_grad_weight(
    target: Target,
    dy: Tensor,
    x: Tensor,
    words: Tensor,
    offsets: Tensor,
    order: Tensor | None,
    repeat: int,
    weight_size: Sequence[int],
    bias: bool,
) -> tuple[Tensor, Tensor]:
    w = _Weight((*weight_size, 1, 1), None, 1)
    dy, x = _as_planes(dy), _as_planes(x)
    dw = _grad_weight(target, dy, x, w, words, offsets, order, repeat, _LINEAR)
    db = _grad_bias(target, dy, offsets, order, words.shape[0] if w.untied else None) if bias else dy.new_empty(0)
    return dw.view(weight_size), db


def conv2d(
    target: Target,
    x: Tensor,
    weight: Tensor,
    words: Tensor,
    offsets: Tensor,
    order: Tensor | None,
    repeat: int,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    y = shapes.masked_conv2d(x, weight, words, offsets, order, repeat, bias, stride, padding, dilation, groups)
    w, geometry = _Weight(weight.shape, weight, groups), _Geometry(stride, padding[::2], dilation)
    return _product(target, False, x, w, words, offsets, order, repeat, bias, geometry, y)


def conv2d_grad_input(
    target: Target,
    dy: Tensor,
    weight: Tensor,
    words: Tensor,
    offsets: Tensor,
    order: Tensor | None,
    repeat: int,
    x_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    w, geometry = _Weight(weight.shape, weight, groups), _Geometry(stride, padding[::2], dilation)
    return _product(target, True, dy, w, words, offsets, order, repeat, None, geometry, dy.new_empty(x_size))


def conv2d_grad_weight(
    target: Target,
    dy: Tensor,
    x: Tensor,
    words: Tensor,
    offsets: Tensor,
    order: Tensor | None,
    repeat: int,
    weight_size: Sequence[int],
    bias: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    w, geometry = _Weight(weight_size, None, groups), _Geometry(stride, padding[::2], dilation)
    dw = _grad_weight(target, dy, x, w, words, offsets, order, repeat, geometry)
    db = _grad_bias(target, dy, offsets, order, words.shape[0] if w.untied else None) if bias else dy.new_empty(0)
    return dw, db


def conv_transpose2d(
    target: Target,
    x: Tensor,
    weight: Tensor,
    words: Tensor,
    offsets: Tensor,
    order: Tensor | None,
    repeat: int,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
) -> Tensor:
    y = shapes.masked_conv_transpose2d(
        x, weight, words, offsets, order, repeat, bias, stride, padding, output_padding, groups, dilation
    )
    w, geometry = _Weight(weight.shape, weight, groups), _Geometry(stride, padding, dilation)
    return _product(target, True, x, w, words, offsets, order, repeat, bias, geometry, y)


def conv_transpose2d_grad_input(
    target: Target,
    dy: Tensor,
    weight: Tensor,
    words: Tensor,
    offsets: Tensor,
    order: Tensor | None,
    repeat: int,
    x_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
) -> Tensor:
    w, geometry = _Weight(weight.shape, weight, groups), _Geometry(stride, padding, dilation)
    return _product(target, False, dy, w, words, offsets, order, repeat, None, geometry, dy.new_empty(x_size))


def conv_transpose2d_grad_weight(
    target: Target,
    dy: Tensor,
    x: Tensor,
    words: Tensor,
    offsets: Tensor,
    order: Tensor | None,
    repeat: int,
    weight_size: Sequence[int],
    bias: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
) -> tuple[Tensor, Tensor]:
    w, geometry = _Weight(weight_size, None, groups), _Geometry(stride, padding, dilation)
    dw = _grad_weight(target, x, dy, w, words, offsets, order, repeat, geometry)
    db = _grad_bias(target, dy, offsets, order, words.shape[0] if w.untied else None) if bias else dy.new_empty(0)
    return dw, db


OPERATIONS: dict[str, Callable[..., Any]] = {
    "masked_linear": linear,
    "masked_linear_grad_input": linear_grad_input,
    "masked_linear_grad_weight": linear_grad_weight,
    "masked_conv2d": conv2d,
    "masked_conv2d_grad_input": conv2d_grad_input,
    "masked_conv2d_grad_weight": conv2d_grad_weight,
    "masked_conv_transpose2d": conv_transpose2d,
    "masked_conv_transpose2d_grad_input": conv_transpose2d_grad_input,
    "masked_conv_transpose2d_grad_weight": conv_transpose2d_grad_weight,
}
