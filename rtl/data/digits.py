"""Scikit-learn's handwritten digits: real data that needs no download."""

import numpy as np
import torch

from rtl.data.base import Data
from rtl.errors import InputError


def digits(test_fraction: float = 0.2, seed: int = 0) -> tuple[Data, Data]:
    """1,797 digits of 8×8 pixels as (train, test), split with every class in proportion.

    Args:
        test_fraction: of the samples that are for testing, 0.01 to 0.99.
        seed: of the split.

    Returns:
        Inputs (N, 1, 8, 8) float32 in [0, 1], targets (N,) int64, class names "0" to "9". Both carry the mean and the
        standard deviation of the train pixels.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998, in `sklearn.datasets`.
    """
    if not 0.01 <= test_fraction <= 0.99:
        raise InputError(f"test_fraction is {test_fraction}, but it has to be 0.01 to 0.99, so that both parts fill")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    source = load_digits()
    inputs = torch.from_numpy(source.images / 16).to(torch.float32).unsqueeze(1)
    targets = torch.from_numpy(source.target).to(torch.int64)
    parts = train_test_split(
        np.arange(len(targets)), test_size=test_fraction, stratify=source.target, random_state=seed
    )
    train, test = (torch.from_numpy(np.sort(part)) for part in parts)
    pixels = inputs[train].double().numpy()  # torch's sums depend on the number of threads, and runs on their digest
    mean, std = (float(pixels.mean()),), (float(pixels.std()),)
    names = tuple(str(name) for name in source.target_names)
    whole = Data(inputs, targets, names, mean=mean, std=std, name="digits")
    return whole.select(train), whole.select(test)
