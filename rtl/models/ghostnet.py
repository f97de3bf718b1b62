"""The backbone of the CIFAR experiments: the first half of GhostNet, with a small head.

K. Han et al., "GhostNet: More Features from Cheap Operations", arXiv 1911.11907. A ghost module computes half of its
channels by a 1×1 convolution and the other half from those, each by a 3×3 filter of its own ("cheap").
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rtl.models.small import check_size, conv_bn, kaiming_


class _Row(NamedTuple):
    """One bottleneck."""

    expansion: int  # channels between the two ghost modules
    out: int
    kernel: int  # of the strided and the shortcut's depthwise convolutions; cheap ones are 3×3 throughout
    stride: int
    squeeze: float  # squeeze-and-excitation's width over `expansion`; 0 for none


_ROWS = (
    _Row(16, 16, 3, 1, 0),
    _Row(48, 24, 3, 2, 0),
    _Row(72, 24, 3, 1, 0),
    _Row(72, 40, 5, 2, 0.25),
    _Row(120, 40, 5, 1, 0.25),
    _Row(240, 80, 3, 2, 0),
    _Row(200, 80, 3, 1, 0),
    _Row(184, 80, 3, 1, 0),
    _Row(184, 80, 3, 1, 0),
)


class _Ghost(nn.Module):
    """`primary` makes one half of the channels from the input, `cheap` the other half from the first."""

    def __init__(self, in_channels: int, out_channels: int, relu: bool) -> None:
        super().__init__()
        half = out_channels // 2
        self.primary = conv_bn(in_channels, half, relu=relu)
        self.cheap = conv_bn(half, half, kernel=3, groups=half, relu=relu)

    def forward(self, x: Tensor) -> Tensor:
        primary = self.primary(x)
        return torch.cat((primary, self.cheap(primary)), dim=1)


class _SqueezeExcite(nn.Module):
    """Scales every channel by a number in [0, 1] computed from the means of all channels."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        reduced = int(channels * ratio + 2) // 4 * 4  # the nearest multiple of 4, as in the original network
        self.reduce = nn.Conv2d(channels, reduced, 1)
        self.expand = nn.Conv2d(reduced, channels, 1)
        self.relu = nn.ReLU()
        self.gate = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean(dim=(2, 3), keepdim=True)
        return x * self.gate(self.expand(self.relu(self.reduce(means))))


class _Bottleneck(nn.Module):
    """Ghost module, depthwise convolution where strided, squeeze-and-excitation, ghost module; plus a shortcut."""

    def __init__(self, in_channels: int, row: _Row) -> None:
        super().__init__()
        wide, kernel, stride = row.expansion, row.kernel, row.stride
        self.expand = _Ghost(in_channels, wide, relu=True)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1:
            self.downsample = conv_bn(wide, wide, kernel, stride, groups=wide, relu=False)
        self.squeeze = _SqueezeExcite(wide, row.squeeze) if row.squeeze else nn.Identity()
        self.project = _Ghost(wide, row.out, relu=False)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != row.out:
            self.shortcut = nn.Sequential(
                conv_bn(in_channels, in_channels, kernel, stride, groups=in_channels, relu=False),
                conv_bn(in_channels, row.out, relu=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.squeeze(self.downsample(self.expand(x)))) + self.shortcut(x)


class GhostNet(nn.Module):
    """GhostNet's stem and first nine bottlenecks, 1×1 convolutions 80→184→128, mean over the plane, classifier.

    Prunable: the weights of every convolution outside squeeze-and-excitation, 125,832 for RGB images. Batch norm,
    squeeze-and-excitation and the classifier stay dense. The last convolution, which no batch norm follows, has a bias.
    """

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.recipe = {"name": "ghostnet", "arguments": {"num_classes": num_classes, "in_channels": in_channels}}
        self.stem = conv_bn(in_channels, 16, kernel=3, stride=2)
        widths = [16, *(row.out for row in _ROWS)]
        self.blocks = nn.Sequential(*(_Bottleneck(width, row) for width, row in zip(widths, _ROWS, strict=False)))
        self.tail = conv_bn(80, 184)
        self.head = nn.Sequential(nn.Conv2d(184, 128, 1), nn.ReLU())
        self.classifier = nn.Linear(128, num_classes)
        kaiming_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_channels, H, W), 32×32 in the experiments, to logits (B, num_classes)."""
        features = self.head(self.tail(self.blocks(self.stem(x))))
        return self.classifier(features.mean(dim=(2, 3)))

    def prunable(self, name: str, module: nn.Module) -> bool:
        """Whether the module of this name, as in `named_modules()`, has weights that tickets choose from."""
        return isinstance(module, nn.Conv2d) and "squeeze" not in name.split(".")


def ghostnet(num_classes: int = 10, in_channels: int = 3) -> GhostNet:
    """The backbone of the CIFAR-10 and CIFAR-100 experiments, Kaiming-initialised; see `GhostNet`.

    Raises InputError for a size below 1. Source: arXiv 2601.22141, experiments 1 and 2.
    """
    check_size("num_classes", num_classes)
    check_size("in_channels", in_channels)
    return GhostNet(num_classes, in_channels)
