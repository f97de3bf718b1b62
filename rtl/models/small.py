"""Two small networks, and the pieces that the convolutional networks share."""

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from rtl.errors import InputError


class SmallConv(nn.Module):
    """Four 3×3 convolutions, in→16→32→32→64 channels, the second and the fourth of stride 2, for 8×8 images.

    Each is followed by batch norm and ReLU; then the mean over the plane, and a linear layer 64→num_classes.
    Prunable are the weights of the four convolutions, 144·in_channels + 32,256: 32,400 for grey images. Batch norm and
    the linear layer stay dense.
    """

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.recipe = {"name": "small_conv", "arguments": {"num_classes": num_classes, "in_channels": in_channels}}
        self.features = nn.Sequential(
            conv_bn(in_channels, 16, kernel=3),
            conv_bn(16, 32, kernel=3, stride=2),
            conv_bn(32, 32, kernel=3),
            conv_bn(32, 64, kernel=3, stride=2),
        )
        self.classifier = nn.Linear(64, num_classes)
        kaiming_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_channels, 8, 8) to logits (B, num_classes). Other sizes work too."""
        return self.classifier(self.features(x).mean(dim=(2, 3)))

    def prunable(self, name: str, module: nn.Module) -> bool:
        """Whether the module of this name, as in `named_modules()`, has weights that tickets choose from."""
        return isinstance(module, nn.Conv2d)


class MLP(nn.Module):
    """Linear layers with a ReLU between each two. Every layer's weight is prunable."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        fan_in, *hidden, fan_out = widths
        arguments = {"in_features": fan_in, "hidden": hidden, "out_features": fan_out}
        self.recipe = {"name": "mlp", "arguments": arguments}
        layers: list[nn.Module] = []
        for columns, rows in pairwise(widths):
            layers += [nn.Linear(columns, rows), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])
        kaiming_(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., in_features) to (B, ..., out_features)."""
        return self.layers(x)

    def prunable(self, name: str, module: nn.Module) -> bool:
        """Whether the module of this name, as in `named_modules()`, has weights that tickets choose from."""
        return isinstance(module, nn.Linear)


def small_conv(num_classes: int = 10, in_channels: int = 1) -> SmallConv:
    """A network of 32,400 prunable weights (grey images) for 8×8 images such as the digits; see `SmallConv`."""
    check_size("num_classes", num_classes)
    check_size("in_channels", in_channels)
    return SmallConv(num_classes, in_channels)


def mlp(in_features: int, hidden: Sequence[int], out_features: int) -> MLP:
    """Linear layers of the widths in_features, hidden..., out_features; see `MLP`. Empty `hidden`: one layer."""
    check_size("in_features", in_features)
    for width in hidden:
        check_size("hidden", width)
    check_size("out_features", out_features)
    return MLP([in_features, *hidden, out_features])


def check_size(argument: str, value: int) -> None:
    """Raises InputError for a size below 1."""
    if value < 1:
        raise InputError(f"{argument} holds {value}, but sizes are 1 or more")


def conv_bn(
    in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1, groups: int = 1, relu: bool = True
) -> nn.Sequential:
    """A convolution without bias that keeps the plane's size (at stride 1), its batch norm, and ReLU if wanted."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    norm = nn.BatchNorm2d(out_channels)
    return nn.Sequential(conv, norm, nn.ReLU()) if relu else nn.Sequential(conv, norm)


def draw_as_torch_(model: nn.Module) -> None:
    """Draws every convolution and linear layer anew as torch does: weights and biases uniform in ±1 / √fan-in.

    That is Kaiming's with a = √5; of a transposed convolution torch takes the outputs for the fan-in.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            module.reset_parameters()


def kaiming_(model: nn.Module) -> None:
    """Draws every weight of a convolution or linear layer from N(0, 2 / fan-in); their biases become 0.

    Fan-in, so that a depthwise filter is counted as the 9 or 25 weights it sums over, and a transposed convolution as
    those that meet in one output (the stride leaves out the others). Magnitudes are compared between
    layers when tickets are pruned, so this choice is part of the method. K. He et al., arXiv 1502.01852.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            if isinstance(module, nn.ConvTranspose2d):  # its weight is (in, out, ...)
                fan_in = module.weight[:, 0].numel() / math.prod(module.stride)
            else:
                fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_in))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
