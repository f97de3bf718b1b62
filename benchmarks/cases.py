"""The nine shapes every kernel is measured on: linear layers and convolutions as trained networks have them.

Masks are independent and uniform, one mask index a sample, drawn uniformly. Ratios are of the whole public operator
over `F.linear` / `F.conv2d` of the same batch with the dense weight. `SMALL` are calls so small that what is around the
arithmetic decides; `NETWORKS` are whole models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import rtl_kernels as rk

SPARSITIES = (0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True)
class Case:
    """One layer and its batch: `weight` as the layer has it, `x` without the batch."""

    name: str
    weight: tuple[int, ...]
    x: tuple[int, ...]
    batch: int
    masks: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def operator(self) -> Callable[..., Tensor]:
        return rk.masked_linear if len(self.weight) == 2 else rk.masked_conv2d

    @property
    def dense(self) -> Callable[..., Tensor]:
        return F.linear if len(self.weight) == 2 else F.conv2d

    def make(self, sparsity: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, rk.MaskBank, rk.Route]:
        """x, weight, bool masks, their bank and a route."""
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(self.batch, *self.x, generator=g)
        weight = torch.randn(self.weight, generator=g) / (weight_inputs(self.weight) ** 0.5)
        masks = torch.rand((self.masks, *self.weight), generator=g) >= sparsity
        index = torch.randint(self.masks, (self.batch,), generator=g)
        return x, weight, masks, rk.MaskBank.from_dense(masks), rk.Route.build(index, self.masks)


def weight_inputs(shape: tuple[int, ...]) -> int:
    inputs = 1
    for size in shape[1:]:
        inputs *= size
    return inputs


CASES = {
    case.name: case
    for case in (
        Case("linear 256, 512→512, K8", (512, 512), (512,), 256, 8),
        Case("linear 1024, 128→128, K8", (128, 128), (128,), 1024, 8),
        Case("linear 65536, 128→128, K4", (128, 128), (128,), 65536, 4),
        Case("linear 64, 2048→2048, K4", (2048, 2048), (2048,), 64, 4),
        Case("conv 1×1 80→184, 2×2, B320, K10", (184, 80, 1, 1), (80, 2, 2), 320, 10),
        Case("conv 1×1 16→120, 16×16, B320, K10", (120, 16, 1, 1), (16, 16, 16), 320, 10),
        Case("conv 3×3 64→64, 32×32, B64, K4", (64, 64, 3, 3), (64, 32, 32), 64, 4, {"padding": 1}),
        Case("conv 3×3 12→12, 626×513, stride (1,2), B4, K2", (12, 12, 3, 3), (12, 626, 513), 4, 2,
             {"padding": 1, "stride": (1, 2)}),
        Case("depthwise 3×3 C72, 16×16, B320, K10", (72, 1, 3, 3), (72, 16, 16), 320, 10,
             {"padding": 1, "groups": 72}),
    )
}  # fmt: skip

SMALL_SPARSITIES = (0.5,)
SMALL = {
    case.name: case
    for case in (
        Case("linear 2, 8→8, K2", (8, 8), (8,), 2, 2),
        Case("linear 8, 128→128, K4", (128, 128), (128,), 8, 4),
        Case("linear 32, 128→128, K4", (128, 128), (128,), 32, 4),
    )
}


@dataclass(frozen=True)
class Network:
    """A converted model of rtl.models, one batch that mixes all tickets.

    `model` is "ghostnet", on images of size × size pixels, or "inr", on pixels of one image, a row each.
    """

    name: str
    batch_norm: str = "shared"
    batch: int = 320
    tickets: int = 10
    size: int = 32
    model: str = "ghostnet"


NETWORK_SPARSITIES = (0.5, 0.75)
NETWORKS = {
    network.name: network
    for network in (
        Network("GhostNet, B320, K10, batch norm shared", "shared"),
        Network("GhostNet, B320, K10, batch norm per ticket", "per_ticket"),
        Network("INR, B1024, K10", batch=1024, model="inr"),
        Network("INR, B16384, K10", batch=16_384, model="inr"),
    )
}
