"""The specification: plain PyTorch, one group of samples at a time. Runs anywhere, on any dtype and device.

With m the mask of group k (all ones for the samples without one), w its weight (θ, or θ_k where weights are untied) and
x, y, dy the group's rows:

    y  = op(x, m ⊙ w) + b
    dx = opᵀ(dy, m ⊙ w)
    dw = Σ_k m_k ⊙ (∂op/∂w)ᵀ(dy_k, x_k)      one sum over all groups; untied weights keep the terms apart
    db = Σ dy

Half precision is widened to float32, computed there, and rounded once at the end. Every group is computed from a fresh
copy of its rows, so what a group gives depends on its own samples only, to the last bit. The group boundaries are read
on the host: on a GPU this synchronises, which the other backends are there to avoid.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import shapes
from ..masks import unpack_mask
from ..ops import define
from ..routing import segments
from ..shapes import statistics_dtype

name = "reference"

ALIGNMENT = 64  # bytes: what torch allocates at, and the most that a CPU kernel's rounding depends on

Padding = Sequence[int]


def supports(operation: str, x: Tensor, weight: Tensor) -> str | None:
    """Why this backend cannot run an operation (in words), or None if it can. The reference runs everything."""
    return None


def _masked(weight: Tensor, words: Tensor, mask: int, untied: bool) -> Tensor:
    """m ⊙ w of one group, in the dtype sums are made in. A pruned weight is +0 whatever stands there."""
    if untied:
        if mask < 0:
            raise ValueError("index holds -1 (no mask), but the weights are untied: expected 0..K-1")
        weight = weight[mask]
    weight = weight.to(statistics_dtype(weight.dtype))
    return weight if mask < 0 else torch.where(unpack_mask(words[mask], weight.shape), weight, 0)


def _wide(x: Tensor) -> Tensor:
    return x.to(statistics_dtype(x.dtype))


def _take(x: Tensor, order: Tensor | None, repeat: int, start: int, stop: int) -> Tensor:
    """Rows start..stop of x, widened, copied unless aligned: a slice's alignment depends on the groups before it."""
    if order is not None:
        return _wide(x.index_select(0, order[start:stop]))
    rows = x if repeat > 1 else x[start:stop]
    return _wide(rows if rows.data_ptr() % ALIGNMENT == 0 else rows.clone())


def _put(y: Tensor, rows: Tensor, order: Tensor | None, start: int, stop: int) -> None:
    """Write rows start..stop of y, rounding to its dtype."""
    if order is not None:
        y[order[start:stop]] = rows.to(y.dtype)
    else:
        y[start:stop] = rows


def _no_autocast(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast acts on the public function's arguments; the sums inside stay in the precision stated above."""

    @wraps(implementation)
    def run(x: Tensor, *args: Any) -> Any:
        kind = x.device.type
        off = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()
        with off:
            return implementation(x, *args)

    return run


Op = Callable[[Tensor, Tensor, Tensor | None], Tensor]
OpGradInput = Callable[[Tensor, Tensor, Sequence[int]], Tensor]
OpGradWeight = Callable[[Tensor, Tensor, Sequence[int]], Tensor]


def _forward(
    x: Tensor,
    weight: Tensor,
    words: Tensor,
    offsets: Tensor,
    order: Tensor | None,
    repeat: int,
    bias: Tensor | None,
    untied: bool,
    y: Tensor,
    op: Op,
) -> Tensor:
    for mask, start, stop in segments(offsets):
        w = _masked(weight, words, mask, untied)
        b = None if bias is None else _wide(bias[mask] if untied else bias)
        _put(y, op(_take(x, order, repeat, start, stop), w, b), order, start, stop)
    return y


def _grad_input(
    dy: Tensor,
    weight: Tensor,
    words: Tensor,
    offsets: Tensor,
    order: Tensor | None,
    repeat: int,
    untied: bool,
    x_size: Sequence[int],
    op: OpGradInput,
) -> Tensor:
    # With repeat > 1 a sample's gradient is the sum over its rows, made in the wide dtype, masks in ascending order.
    dx = dy.new_zeros(x_size, dtype=statistics_dtype(dy.dtype) if repeat > 1 else dy.dtype)
    for mask, start, stop in segments(offsets):
        w = _masked(weight, words, mask, untied)
        rows = op(_take(dy, order, 1, start, stop), w, [stop - start, *x_size[1:]])
        if repeat > 1:
            dx += rows
        else:
            _put(dx, rows, order, start, stop)
    return dx.to(dy.dtype)


def _grad_weight(
    dy: Tensor,
    x: Tensor,
    words: Tensor,
    offsets: Tensor,
    order: Tensor | None,
    repeat: int,
    untied: bool,
    weight_size: Sequence[int],
    bias: bool,
    channel: int,
    op: OpGradWeight,
) -> tuple[Tensor, Tensor]:
    size = list(weight_size[1:] if untied else weight_size)
    dw = x.new_zeros(weight_size, dtype=statistics_dtype(x.dtype))
    db_size = ([words.shape[0]] if untied else []) + [dy.shape[channel]]
    db = x.new_zeros(db_size if bias else [0], dtype=statistics_dtype(x.dtype))
    for mask, start, stop in segments(offsets):
        dy_k = _take(dy, order, 1, start, stop)
        g = op(dy_k, _take(x, order, repeat, start, stop), size)
        if mask >= 0:
            g = torch.where(unpack_mask(words[mask], size), g, 0)
        (dw[mask] if untied else dw).add_(g)
        if bias:
            (db[mask] if untied else db).add_(dy_k.movedim(channel, -1).flatten(0, -2).sum(0))
    return dw.to(x.dtype), db.to(x.dtype)


# ---- y = x (m ⊙ w)ᵀ + b


@_no_autocast
def _linear(
    x: Tensor, weight: Tensor, words: Tensor, offsets: Tensor, order: Tensor | None, repeat: int, bias: Tensor | None
) -> Tensor:
    y = shapes.masked_linear(x, weight, words, offsets, order, repeat, bias)
    return _forward(x, weight, words, offsets, order, repeat, bias, weight.dim() == 3, y, F.linear)


@_no_autocast
def _linear_grad_input(
    dy: Tensor, weight: Tensor, words: Tensor, offsets: Tensor, order: Tensor | None, repeat: int
) -> Tensor:
    x_size = [dy.shape[0] // repeat, *dy.shape[1:-1], weight.shape[-1]]
    return _grad_input(dy, weight, words, offsets, order, repeat, weight.dim() == 3, x_size, lambda dy, w, size: dy @ w)


@_no_autocast
def _linear_grad_weight(
    dy: Tensor,
    x: Tensor,
    words: Tensor,
    offsets: Tensor,
    order: Tensor | None,
    repeat: int,
    weight_size: Sequence[int],
    bias: bool,
) -> tuple[Tensor, Tensor]:
    def op(dy: Tensor, x: Tensor, size: Sequence[int]) -> Tensor:
        return dy.flatten(0, -2).T @ x.flatten(0, -2)

    untied = len(weight_size) == 3
    return _grad_weight(dy, x, words, offsets, order, repeat, untied, weight_size, bias, -1, op)


# ---- y = x ∗ (m ⊙ w) + b, and its transpose


def _pad(x: Tensor, padding: Padding) -> Tensor:
    """Zeros around (N, C, H, W); padding is (top, bottom, left, right)."""
    top, bottom, left, right = padding
    return F.pad(x, (left, right, top, bottom)) if any(padding) else x


def _unpad(x: Tensor, padding: Padding) -> Tensor:
    top, bottom, left, right = padding
    return x[:, :, top : x.shape[2] - bottom, left : x.shape[3] - right]


def _padded(size: Sequence[int], padding: Padding) -> list[int]:
    top, bottom, left, right = padding
    return [*size[:2], size[2] + top + bottom, size[3] + left + right]


def _split(padding: Padding) -> tuple[list[int], Padding]:
    """(what the convolution pads itself, what has to be padded for it): only equal sides can be left to it."""
    top, bottom, left, right = padding
    return ([top, left], [0, 0, 0, 0]) if top == bottom and left == right else ([0, 0], padding)


def _adjoint(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    wanted: tuple[bool, bool],
) -> Tensor:
    """dx or dw of torch's convolution; the operand whose gradient is wanted lends only its shape."""
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy, x, w, None, stride, padding, dilation, transposed, output_padding, groups, [*wanted, False]
    )
    return dx if wanted[0] else dw


@_no_autocast
def _conv2d(
    x: Tensor,
    weight: Tensor,
    words: Tensor,
    offsets: Tensor,
    order: Tensor | None,
    repeat: int,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    inner, outer = _split(padding)

    def op(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return F.conv2d(_pad(x, outer), w, b, stride, inner, dilation, groups)

    y = shapes.masked_conv2d(x, weight, words, offsets, order, repeat, bias, stride, padding, dilation, groups)
    return _forward(x, weight, words, offsets, order, repeat, bias, weight.dim() == 5, y, op)


@_no_autocast
def _conv2d_grad_input(
    dy: Tensor,
    weight: Tensor,
    words: Tensor,
    offsets: Tensor,
    order: Tensor | None,
    repeat: int,
    x_size: Sequence[int],
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    inner, outer = _split(padding)

    def op(dy: Tensor, w: Tensor, size: Sequence[int]) -> Tensor:
        x = dy.new_empty(_padded(size, outer))
        dx = _adjoint(dy, x, w, stride, inner, dilation, False, [0, 0], groups, (True, False))
        return _unpad(dx, outer)

    return _grad_input(dy, weight, words, offsets, order, repeat, weight.dim() == 5, x_size, op)


@_no_autocast
def _conv2d_grad_weight(
    dy: Tensor,
    x: Tensor,
    words: Tensor,
    offsets: Tensor,
    order: Tensor | None,
    repeat: int,
    weight_size: Sequence[int],
    bias: bool,
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    inner, outer = _split(padding)

    def op(dy: Tensor, x: Tensor, size: Sequence[int]) -> Tensor:
        w = x.new_empty(size)
        return _adjoint(dy, _pad(x, outer), w, stride, inner, dilation, False, [0, 0], groups, (False, True))

    untied = len(weight_size) == 5
    return _grad_weight(dy, x, words, offsets, order, repeat, untied, weight_size, bias, 1, op)


@_no_autocast
def _conv_transpose2d(
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
    def op(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return F.conv_transpose2d(x, w, b, stride, padding, output_padding, groups, dilation)

    geometry = stride, padding, output_padding, groups, dilation
    y = shapes.masked_conv_transpose2d(x, weight, words, offsets, order, repeat, bias, *geometry)
    return _forward(x, weight, words, offsets, order, repeat, bias, weight.dim() == 5, y, op)


@_no_autocast
def _conv_transpose2d_grad_input(
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
    def op(dy: Tensor, w: Tensor, size: Sequence[int]) -> Tensor:
        x = dy.new_empty(size)
        return _adjoint(dy, x, w, stride, padding, dilation, True, output_padding, groups, (True, False))

    return _grad_input(dy, weight, words, offsets, order, repeat, weight.dim() == 5, x_size, op)


@_no_autocast
def _conv_transpose2d_grad_weight(
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
    def op(dy: Tensor, x: Tensor, size: Sequence[int]) -> Tensor:
        w = x.new_empty(size)
        return _adjoint(dy, x, w, stride, padding, dilation, True, output_padding, groups, (False, True))

    untied = len(weight_size) == 5
    return _grad_weight(dy, x, words, offsets, order, repeat, untied, weight_size, bias, 1, op)


# ---- batch normalisation with one set of statistics a group


@_no_autocast
def _subset_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, offsets: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, and per group mean, variance (unbiased, as running statistics take it) and 1/√(biased variance + ε).

    The statistics of a group without rows are zeros.
    """
    per_ticket = weight is not None and weight.dim() == 2
    y = x.new_empty(x.shape)
    mean = x.new_zeros((offsets.shape[0] - 2, x.shape[1]), dtype=statistics_dtype(x.dtype))
    variance, inverse_std = torch.zeros_like(mean), torch.zeros_like(mean)
    for mask, start, stop in segments(offsets):
        if mask < 0:
            raise ValueError("index holds -1 (no mask), which per-ticket batch norm has no meaning for")
        rows = _take(x, None, 1, start, stop)
        if rows.numel() == x.shape[1]:
            raise ValueError(
                f"x has one value a channel for mask {mask} (shape {tuple(rows.shape)}): expected more in training"
            )
        w, b = (None if p is None else _wide(p[mask] if per_ticket else p) for p in (weight, bias))
        # With momentum 1 the running statistics that torch updates are the batch's own.
        y[start:stop], _, inverse_std[mask] = torch.native_batch_norm(
            rows, w, b, mean[mask], variance[mask], True, 1.0, eps
        )
    return y, mean, variance, inverse_std


@_no_autocast
def _subset_batch_norm_grad(
    dy: Tensor, x: Tensor, weight: Tensor | None, offsets: Tensor, mean: Tensor, inverse_std: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    per_ticket = weight is not None and weight.dim() == 2
    dx = x.new_empty(x.shape)
    dw = mean.new_zeros(weight.shape if weight is not None else (0,))
    db = torch.zeros_like(dw)
    for mask, start, stop in segments(offsets):
        w = None if weight is None else _wide(weight[mask] if per_ticket else weight)
        dx[start:stop], dw_k, db_k = torch.ops.aten.native_batch_norm_backward(
            _take(dy, None, 1, start, stop),
            _take(x, None, 1, start, stop),
            w,
            None,
            None,
            mean[mask],
            inverse_std[mask],
            True,
            eps,
            [True, weight is not None, weight is not None],
        )
        if weight is not None:
            (dw[mask] if per_ticket else dw).add_(dw_k)
            (db[mask] if per_ticket else db).add_(db_k)
    return dx, dw, db


_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "masked_linear": _linear,
    "masked_linear_grad_input": _linear_grad_input,
    "masked_linear_grad_weight": _linear_grad_weight,
    "masked_conv2d": _conv2d,
    "masked_conv2d_grad_input": _conv2d_grad_input,
    "masked_conv2d_grad_weight": _conv2d_grad_weight,
    "masked_conv_transpose2d": _conv_transpose2d,
    "masked_conv_transpose2d_grad_input": _conv_transpose2d_grad_input,
    "masked_conv_transpose2d_grad_weight": _conv_transpose2d_grad_weight,
    "subset_batch_norm": _subset_batch_norm,
    "subset_batch_norm_grad": _subset_batch_norm_grad,
}
operators = {
    operation: define(operation, name, implementation, "CompositeExplicitAutograd")
    for operation, implementation in _IMPLEMENTATIONS.items()
}
