"""The network of the picture experiment: where a pixel is -> its colour.

Fourier features: M. Tancik et al., "Fourier Features Let Networks Learn High Frequency Functions", arXiv 2006.10739,
with the octaves of B. Mildenhall et al., "NeRF", arXiv 2003.08934.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from rtl.errors import InputError

OCTAVES = 8
FEATURES = 2 + 2 * 2 * OCTAVES  # the coordinates themselves; sine and cosine of each at each octave
EMBEDDING = 16
WIDTH = 128


class INR(nn.Module):
    """34 Fourier features, ReLU layers 34→128→128→128→128 and a linear one 128→3: 53,888 prunable weights.

    With `num_classes`, the network of the IMP baseline: every pixel carries the number of its region, whose learned
    embedding of 16 numbers is further input of the first layer. The embedding and the 16 columns that read it stay
    dense, so that both networks prune the same weights; at one seed those start equal.
    """

    def __init__(self, num_classes: int, init: Literal["kaiming", "torch"] = "kaiming") -> None:
        super().__init__()
        self.recipe = {"name": "inr", "arguments": {"num_classes": num_classes}}
        self.num_classes = num_classes
        self.first = nn.Linear(FEATURES, WIDTH)
        self.hidden = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.last = nn.Linear(WIDTH, 3)
        # The first layer's fan-in is the baseline's, whose weights tickets start from.
        inputs = FEATURES + EMBEDDING
        for layer in (self.first, *self.hidden, self.last):
            _draw(layer, inputs if layer is self.first else WIDTH, init)
        if num_classes:  # after all that both networks share, so that they draw equal numbers
            self.embedding = nn.Embedding(num_classes, EMBEDDING)
            self.of_class = nn.Linear(EMBEDDING, WIDTH, bias=False)
            _draw(self.of_class, inputs, init)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 2) coordinates in [-1, 1], or (B, 3) with the number of the region behind them, to colours (B, 3)."""
        if x.shape[-1] != (3 if self.num_classes else 2):
            raise InputError(
                f"x has shape {tuple(x.shape)}, expected (B, {3 if self.num_classes else 2}): coordinates"
                + (" and the region's number" if self.num_classes else "")
            )
        h = self.first(fourier_features(x[:, :2]))
        if self.num_classes:
            h = h + self.of_class(self.embedding(x[:, 2].long()))
        for layer in self.hidden:
            h = layer(h.relu())
        return self.last(h.relu())

    def prunable(self, name: str, module: nn.Module) -> bool:
        """Whether the module of this name, as in `named_modules()`, has weights that tickets choose from."""
        return isinstance(module, nn.Linear) and name != "of_class"


def _draw(layer: nn.Linear, fan_in: int, init: str) -> None:
    for parameter in layer.parameters():
        if init == "torch":
            nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        elif parameter is layer.weight:
            nn.init.normal_(parameter, std=math.sqrt(2 / fan_in))
        else:
            nn.init.zeros_(parameter)


def fourier_features(x: Tensor) -> Tensor:
    """(B, 2) -> (B, 34): x, then sin and cos of 2^j·π·x for j = 0..7."""
    angles = (x[:, :, None] * (math.pi * 2 ** torch.arange(OCTAVES, device=x.device))).flatten(1)
    return torch.cat([x, angles.sin(), angles.cos()], 1)


def inr(num_classes: int = 0, init: Literal["kaiming", "torch"] = "kaiming") -> INR:
    """The network of the picture experiment; see `INR`.

    Args:
        num_classes: regions of the baseline's class embedding; 0: none, a network of tickets.
        init: "kaiming": weights from N(0, 2 / fan-in). "torch": as torch draws a linear layer, uniform with a variance
            of 1 / (3 fan-in).

    Raises InputError for a number below 0. Source: arXiv 2601.22141, experiment 3.
    """
    if num_classes < 0:
        raise InputError(f"num_classes is {num_classes}, expected 0 (no class embedding) or more")
    return INR(num_classes, init)
