"""The network of the speech experiment: a U-Net on spectrograms that estimates a complex ratio mask.

Mask and loss: H.-S. Choi et al., "Phase-aware Speech Enhancement with Deep Complex U-Net", arXiv 1903.03107.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rtl.errors import InputError
from rtl.models.small import kaiming_

WINDOW = 1024  # samples; 513 frequencies
HOP = 256
CHANNELS = (2, 12, 12, 12, 24, 48)
QUIETEST = 1e-7  # root mean square, of full scale 1, below which a clip counts as silence


class SpeechUNet(nn.Module):
    """Waveform in, waveform of the same length out.

    The clip is brought to one loudness; the real and imaginary parts of its spectrogram (window 1024, hop 256) go
    through five convolutions 2→12→12→12→24→48 and five transposed ones 48→24, 48→12, 24→12, 24→12, 24→2, whose inputs
    are doubled by the skip connections. Kernels are 3×3, the first and the last 3×5 (frequency × time); all strides are
    2 along time. Batch norm and ELU follow all but the last, which gives the mask: a complex number m for each point of
    the spectrogram, bounded to tanh|m|, that multiplies it.

    Prunable: the ten convolutions' weights, 37,368. Batch norm and the last layer's bias stay dense.
    """

    def __init__(self) -> None:
        super().__init__()
        self.recipe = {"name": "speech_unet", "arguments": {}}
        depth = len(CHANNELS) - 1
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        self.norms = nn.ModuleList()
        for layer in range(depth):
            kernel = (3, 5) if layer == 0 else (3, 3)
            self.down.append(
                nn.Conv2d(CHANNELS[layer], CHANNELS[layer + 1], kernel, (1, 2), (1, kernel[1] // 2), bias=False)
            )
        for layer in reversed(range(depth)):
            kernel = (3, 5) if layer == 0 else (3, 3)
            inputs = CHANNELS[layer + 1] * (1 if layer == depth - 1 else 2)
            padding = (1, kernel[1] // 2)
            self.up.append(nn.ConvTranspose2d(inputs, CHANNELS[layer], kernel, (1, 2), padding, bias=layer == 0))
        for width in (*CHANNELS[1:], *reversed(CHANNELS[1:-1])):
            self.norms.append(nn.BatchNorm2d(width))
        self.register_buffer("window", torch.hann_window(WINDOW), persistent=False)
        kaiming_(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L) float32, full scale 1, of any length L >= 1, to (B, L)."""
        if x.dim() != 2 or x.shape[1] == 0:
            raise InputError(f"x has shape {tuple(x.shape)}, expected (B, L), samples of B clips, L of 1 or more")
        padded = F.pad(x, (0, max(0, WINDOW - x.shape[1])))  # a shorter clip has nothing to reflect at its ends
        loudness = x.square().mean(1, keepdim=True).sqrt()
        silent = loudness < QUIETEST
        window = cast(Tensor, self.window)
        spectrum = torch.stft(
            padded / loudness.masked_fill(silent, 1), WINDOW, HOP, window=window, normalized=True, return_complex=True
        )
        mask = self.mask(torch.stack([spectrum.real, spectrum.imag], 1))
        size = mask.square().sum(1).add(1e-8).sqrt()
        masked = spectrum * torch.complex(mask[:, 0], mask[:, 1]) * (size.tanh() / size)
        y = torch.istft(masked, WINDOW, HOP, window=window, normalized=True, length=padded.shape[1])
        return (y * loudness.masked_fill(silent, 0))[:, : x.shape[1]]

    def mask(self, planes: Tensor) -> Tensor:
        """The mask before it is bounded, from real and imaginary parts: both (B, 2, frequencies, times)."""
        h, skips, sizes = planes, [], []
        for layer, conv in enumerate(self.down):
            sizes.append(h.shape[2:])
            h = F.elu(self.norms[layer](conv(h)))
            skips.append(h)
        for layer, conv in enumerate(self.up):
            if layer:
                h = torch.cat([h, skips[-1 - layer]], 1)
            h = conv(h, cast(Sequence[int], sizes[-1 - layer]))
            if layer < len(self.up) - 1:
                h = F.elu(self.norms[len(self.down) + layer](h))
        return h

    def prunable(self, name: str, module: nn.Module) -> bool:
        """Whether the module of this name, as in `named_modules()`, has weights that tickets choose from."""
        return isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))


def speech_unet() -> SpeechUNet:
    """The network of the speech experiment, Kaiming-initialised; see `SpeechUNet`. Source: arXiv 2601.22141,
    experiment 4."""
    return SpeechUNet()
