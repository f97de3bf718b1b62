"""What the raw operators (ops.py) return: tensors of the right shape and dtype, not filled.

Each function has its operator's name and arguments; PyTorch calls it to trace, a backend to allocate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are made in: float32 for half precision, else the dtype itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def result(operation: str, x: Tensor, weight: Tensor, repeat: int, geometry: Sequence[Any]) -> tuple[int, ...]:
    """The shape of a forward operation's result."""
    rows = x.shape[0] * repeat
    if operation == "masked_linear":
        return (rows, *x.shape[1:-1], weight.shape[-2])
    if operation == "masked_conv2d":
        stride, padding, dilation, _ = geometry
        return (rows, weight.shape[-4], *conv_size(x.shape[2:], weight.shape[-2:], stride, padding, dilation))
    assert operation == "masked_conv_transpose2d", operation
    size = conv_transpose_size(x.shape[2:], weight.shape[-2:], *geometry)
    return (rows, weight.shape[-3] * geometry[3], *size)


def masked_linear(
    x: Tensor, weight: Tensor, words: Tensor, offsets: Tensor, order: Tensor | None, repeat: int, bias: Tensor | None
) -> Tensor:
    return x.new_empty(result("masked_linear", x, weight, repeat, ()))


def masked_linear_grad_input(
    dy: Tensor, weight: Tensor, words: Tensor, offsets: Tensor, order: Tensor | None, repeat: int
) -> Tensor:
    return dy.new_empty((dy.shape[0] // repeat, *dy.shape[1:-1], weight.shape[-1]))


def _grad_weight(dims: int, out_channels: Callable[[Sequence[int], Sequence[Any]], int]) -> Callable[..., Any]:
    def fake(
        dy: Tensor,
        x: Tensor,
        words: Tensor,
        offsets: Tensor,
        order: Tensor | None,
        repeat: int,
        weight_size: Sequence[int],
        bias: bool,
        *geometry: Any,
    ) -> tuple[Tensor, Tensor]:
        lead = list(weight_size[: len(weight_size) - dims])  # [K] if untied
        db = [*lead, out_channels(weight_size[len(lead) :], geometry)] if bias else [0]
        return x.new_empty(weight_size), x.new_empty(db)

    return fake


def conv_size(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Output (height, width) of a convolution; padding is (top, bottom, left, right)."""
    return [
        (size[i] + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    ]


def conv_transpose_size(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
) -> list[int]:
    """Output (height, width) of a transposed convolution."""
    return [
        (size[i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (kernel[i] - 1) + output_padding[i] + 1
        for i in (0, 1)
    ]


def masked_conv2d(
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
    return x.new_empty(result("masked_conv2d", x, weight, repeat, (stride, padding, dilation, groups)))


def masked_conv_transpose2d(
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
    geometry = (stride, padding, output_padding, groups, dilation)
    return x.new_empty(result("masked_conv_transpose2d", x, weight, repeat, geometry))


def _conv_grad_input(
    dy: Tensor,
    weight: Tensor,
    words: Tensor,
    offsets: Tensor,
    order: Tensor | None,
    repeat: int,
    x_size: Sequence[int],
    *geometry: Any,
) -> Tensor:
    return dy.new_empty(x_size)


def _into(*arguments: Any) -> None:
    """Nothing: the result is written into an argument."""


def subset_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, offsets: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    statistic = x.new_empty((offsets.shape[0] - 2, x.shape[1]), dtype=statistics_dtype(x.dtype))
    return x.new_empty(x.shape), statistic, torch.empty_like(statistic), torch.empty_like(statistic)


def subset_batch_norm_grad(
    dy: Tensor, x: Tensor, weight: Tensor | None, offsets: Tensor, mean: Tensor, inverse_std: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    parameter = mean.new_empty(weight.shape if weight is not None else (0,))
    return x.new_empty(x.shape), parameter, torch.empty_like(parameter)


masked_linear_grad_weight = _grad_weight(2, lambda size, geometry: size[0])
masked_conv2d_grad_weight = _grad_weight(4, lambda size, geometry: size[0])
masked_conv_transpose2d_grad_weight = _grad_weight(4, lambda size, geometry: size[1] * geometry[3])
masked_conv2d_grad_input = masked_conv_transpose2d_grad_input = _conv_grad_input
masked_linear_into = masked_conv2d_into = masked_conv_transpose2d_into = _into
