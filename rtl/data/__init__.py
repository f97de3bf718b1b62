"""Data in memory, and readers for it."""

from rtl.data.base import Data, data_root, from_dataset
from rtl.data.cifar import cifar10, cifar100
from rtl.data.digits import digits

__all__ = ["Data", "cifar10", "cifar100", "data_root", "digits", "from_dataset"]
