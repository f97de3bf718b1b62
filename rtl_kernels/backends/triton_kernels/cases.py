"""Launches that stand for every configuration of the table: what the static report compiles and the roofline counts.

Made on the meta device: the operators run on shapes alone and their launches are written down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import launch
from .configs import Config, Problem, choose
from .launch import Launch, Target

__all__ = ["ARITHMETIC", "LAYERS", "VARIANTS", "Layer", "problems", "record"]

# name: (dtype, whether float32 is rounded to TF32)
ARITHMETIC = {
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "float16": (torch.float16, False),
    "bfloat16": (torch.bfloat16, False),
}


@dataclass(frozen=True)
class Layer:
    """A layer and the batch it meets. `size` is the input plane, () for a linear layer.

    Attributes:
        untied, order, every, bias: what the launches specialise on.
    """

    name: str
    outputs: int
    inputs: int
    batch: int
    size: tuple[int, ...] = ()
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    masks: int = 8
    untied: bool = False
    order: bool = True
    every: bool = False
    bias: bool = True

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def plane(self) -> tuple[int, int]:
        """Of the output; (1, 1) for a linear layer."""
        if not self.size:
            return 1, 1
        height, width = ((n + 2 * self.padding - self.kernel) // self.stride + 1 for n in self.size)
        return height, width

    @property
    def rows(self) -> int:
        return self.batch * (self.masks if self.every else 1)


# Every cell of the table for each kernel: outputs up to 32 or more; rows, planes, windows.
LAYERS = (
    Layer("linear 32→32", 32, 32, 256),
    Layer("linear 2048→2048", 2048, 2048, 256),
    Layer("conv 1×1 32→32", 32, 32, 64, (16, 16)),
    Layer("conv 1×1 256→256", 256, 256, 64, (16, 16)),
    Layer("conv 3×3 32→32", 32, 32, 64, (32, 32), 3),
    Layer("conv 3×3 64→64", 64, 64, 64, (32, 32), 3),
)
# What else a launch specialises on.
VARIANTS = (
    Layer("conv 3×3 64→128, stride 2", 128, 64, 64, (32, 32), 3, 2),
    Layer("linear 509→251", 251, 509, 250, order=False),
    Layer("linear 256→256, untied", 256, 256, 256, untied=True),
    Layer("linear 256→256, every mask", 256, 256, 64, order=False, every=True, bias=False),
    Layer("conv 3×3 13→75, untied", 75, 13, 64, (13, 13), 3, untied=True),
    Layer("conv 3×3 64→64, every mask", 64, 64, 16, (32, 32), 3, order=False, every=True),
    Layer("depthwise 3×3 128", 128, 128, 64, (16, 16), 3, groups=128),
)


def record(
    layer: Layer,
    arithmetic: str,
    architecture: int,
    choose: Callable[[Problem], Config] = choose,
    device: str = "meta",
) -> list[Launch]:
    """Every launch of a layer's forward, dX and dW, in order; on tensors with samples shared out evenly and every bit
    set if `device` is not meta."""
    dtype, tf32 = ARITHMETIC[arithmetic]
    launches: list[Launch] = []
    target = Target(launches.append, architecture, tf32, choose)
    shape: tuple[int, ...] = (layer.outputs, layer.inputs // layer.groups)
    shape += (layer.kernel, layer.kernel) if layer.size else ()
    row_bits = shape[1] * (layer.kernel**2 if layer.size else 1)

    def zeros(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=device)

    lead = (layer.masks,) if layer.untied else ()
    x, weight = zeros(layer.batch, layer.inputs, *layer.size), zeros(*lead, *shape)
    words = zeros(layer.masks, layer.outputs, -(-row_bits // 32), dtype=torch.int32)
    offsets = zeros(layer.masks + 2, dtype=torch.int64)
    order = zeros(layer.batch, dtype=torch.int64) if layer.order else None
    if device != "meta":
        words -= 1
        offsets[1:] = torch.arange(layer.masks + 1, device=device) * layer.rows // layer.masks
        if order is not None:
            order += torch.arange(layer.batch, device=device)
    routing = words, offsets, order, layer.masks if layer.every else 1
    bias = zeros(*lead, layer.outputs) if layer.bias else None
    if layer.size:
        pad, stride = layer.padding, [layer.stride] * 2
        geometry = stride, [pad] * 4, [1, 1], layer.groups
        dy = launch.conv2d(target, x, weight, *routing, bias, *geometry)
        launch.conv2d_grad_input(target, dy, weight, *routing, x.shape, *geometry)
        launch.conv2d_grad_weight(target, dy, x, *routing, weight.shape, layer.bias, *geometry)
    else:
        dy = launch.linear(target, x, weight, *routing, bias)
        launch.linear_grad_input(target, dy, weight, *routing)
        launch.linear_grad_weight(target, dy, x, *routing, weight.shape, layer.bias)
    return launches


def problems(architecture: int) -> Iterator[Problem]:
    """One problem for every cell of the table."""
    for kernel in ("correlate", "adjoint", "weight_grad"):
        for arithmetic in ("half", "tf32", "float32"):
            for outputs in (32, 64):
                for kind in ("rows", "planes", "windows"):
                    yield Problem(kernel, arithmetic, architecture, outputs, kind)
