"""Small recordings that the tests of speech share."""

import numpy as np
import pytest

from rtl.data.speech import RATE

sf = pytest.importorskip("soundfile", reason="needs the extra 'speech'")
RNG = np.random.default_rng(0)


def tone(seconds=1.0, rate=RATE, hertz=440.0, level=0.3):
    return (level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def noise(seconds=1.0, rate=RATE, level=0.05):
    return (level * RNG.standard_normal(round(seconds * rate))).astype(np.float32)


def write(file, samples, rate=RATE, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    sf.write(file, samples, rate, **options)
    return file
