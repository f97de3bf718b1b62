"""Augmentation of image batches, all images at once. Random numbers come from torch's global generator."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rtl.errors import InputError


def crop_flip(images: Tensor, pad: int = 4) -> Tensor:
    """Each image moved by up to `pad` pixels along both sides, and mirrored left to right with probability ½.

    What comes in from outside is 0, the mean pixel of normalised images.

    Args:
        images: (B, C, H, W), any float dtype.
        pad: pixels.

    Returns:
        The same shape and dtype.

    Raises:
        InputError: other dimensions than four.

    Source: K. He et al., "Deep Residual Learning for Image Recognition", 2015, section 4.2, for CIFAR-10.
    """
    if images.dim() != 4:
        raise InputError(f"augment is 'crop_flip', which needs images (B, C, H, W), but inputs are {images.dim()}-d")
    batch, channels, height, width = images.shape
    top, left = torch.randint(0, 2 * pad + 1, (2, batch), device=images.device)
    mirrored = torch.randint(0, 2, (batch, 1), device=images.device, dtype=torch.bool)
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.arange(width, device=images.device)
    columns = torch.where(mirrored, columns.flip(1), columns)
    source = (rows[:, :, None] * (width + 2 * pad) + columns[:, None, :]).view(batch, 1, height * width)
    padded = F.pad(images, (pad, pad, pad, pad)).flatten(2)
    return padded.gather(2, source.expand(-1, channels, -1)).view_as(images)


AUGMENTATIONS: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda inputs: inputs, "crop_flip": crop_flip}
