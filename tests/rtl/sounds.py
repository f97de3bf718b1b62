"""Small recordings that the tests of speech share."""

import numpy as np
import pytest
import torch

from rtl.data.speech import RATE

sf = pytest.importorskip("soundfile", reason="needs the extra 'speech'")


def tone(seconds=1.0, rate=RATE, hertz=440.0, level=0.3):
    return (level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def noise(seconds=1.0, rate=RATE, level=0.05):
    return level * torch.randn(round(seconds * rate)).numpy()


def write(file, samples, rate=RATE, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    sf.write(file, samples, rate, **options)
    return file
