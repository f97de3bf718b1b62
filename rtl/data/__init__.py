"""Data in memory, and readers for it."""

from rtl.data.base import Data, data_root, from_dataset
from rtl.data.cifar import cifar10, cifar100
from rtl.data.digits import digits
from rtl.data.pictures import Picture, picture, pictures, sample_pictures

__all__ = [
    "Data",
    "Picture",
    "cifar10",
    "cifar100",
    "data_root",
    "digits",
    "from_dataset",
    "picture",
    "pictures",
    "sample_pictures",
]
