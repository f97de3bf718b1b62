"""Masked operators: K bit-packed masks over one weight tensor, and a mask index for every sample of a batch."""

from . import nn, optim
from .functional import BackendWarning, Explanation, explain, masked_conv2d, masked_conv_transpose2d, masked_linear
from .masks import MaskBank, jaccard, load_banks, overlap, save_banks
from .routing import Route

__all__ = [
    "BackendWarning",
    "Explanation",
    "MaskBank",
    "Route",
    "explain",
    "jaccard",
    "load_banks",
    "masked_conv2d",
    "masked_conv_transpose2d",
    "masked_linear",
    "nn",
    "optim",
    "overlap",
    "save_banks",
]
