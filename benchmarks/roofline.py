"""The most one core can do, measured on the spot: multiply-adds a second, and bytes a second from each cache.

peaks.cpp is compiled for this machine and called through ctypes: float32 multiply-adds on registers in many
independent chains, and one pass after another of vector loads (each added to a sum) over a buffer that fits into half
of a cache, or of four times the largest for main memory. The best of many repetitions counts, by the thread's clock.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cases import Case

SOURCE = Path(__file__).parent / "peaks.cpp"
FLAGS = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-tree-vectorize", "-shared", "-fPIC"]
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def measure(seconds: float = 0.3) -> dict[str, Any] | str:
    """Peaks of one core, each measured for about so many seconds; or why they cannot be measured, in words.

    Returns:
        {"flops": float32 operations a second, "bandwidth": {level: bytes a second}, "buffer": {level: bytes read}}
    """
    compiler = os.environ.get("CXX", "g++").split()
    if shutil.which(compiler[0]) is None:
        return f"no C++ compiler ({compiler[0]}; set CXX)"
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "peaks.so"
        subprocess.run([*compiler, *FLAGS, str(SOURCE), "-o", str(library)], check=True)
        peaks = ctypes.CDLL(str(library))
    peaks.multiply_add.restype = peaks.load.restype = ctypes.c_float
    peaks.multiply_add.argtypes = [ctypes.c_long, ctypes.c_float, ctypes.c_float]
    peaks.load.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long]
    peaks.multiply_add_operations.restype = ctypes.c_double
    peaks.load_step.restype = ctypes.c_size_t
    flops = peaks.multiply_add_operations() * _rate(lambda n: peaks.multiply_add(n, 0.5, 0.25), seconds)
    sizes = _cache_sizes()
    buffers = {level: size // 2 for level, size in sizes.items()}
    buffers["DRAM"] = 4 * max(sizes.values())
    step = peaks.load_step()
    bandwidth = {}
    for level, size in buffers.items():
        floats = size // 4 // step * step
        data = np.ones(floats + 16, np.float32)
        begin = data.ctypes.data + -data.ctypes.data % 64
        rate = _rate(lambda n, begin=begin, floats=floats: peaks.load(begin, floats, n), seconds)  # type: ignore[misc]
        bandwidth[level] = 4 * floats * rate
    return {"flops": flops, "bandwidth": bandwidth, "buffer": buffers}


def _cache_sizes() -> dict[str, int]:
    """Bytes of each data cache the first core reaches, as Linux tells; common sizes where it does not."""
    sizes = {}
    for cache in sorted(CACHES.glob("index*")):
        if (cache / "type").read_text().strip() != "Instruction":
            size = (cache / "size").read_text().strip()
            sizes[f"L{(cache / 'level').read_text().strip()}"] = int(size.rstrip("K")) << 10
    return sizes or {"L1": 32 << 10, "L2": 1 << 20, "L3": 16 << 20}


def _rate(run: Callable[[int], object], seconds: float) -> float:
    """Most repetitions a second: in blocks of about 10 ms, for so long."""
    repetitions = 1
    while True:
        start = time.thread_time()
        run(repetitions)
        took = time.thread_time() - start
        if took > 0.01:
            break
        repetitions *= 2
    best = repetitions / took
    for _ in range(max(3, int(seconds / took))):
        start = time.thread_time()
        run(repetitions)
        best = max(best, repetitions / (time.thread_time() - start))
    return best


def work(case: Case) -> tuple[int, int]:
    """(multiplications and additions, bytes of input, weight and output once each) of a case's dense layer."""
    x, weight = (torch.empty(shape, device="meta") for shape in ((case.batch, *case.x), case.weight))
    y = case.dense(x, weight, None, **case.options)
    return 2 * y.numel() * math.prod(case.weight[1:]), 4 * (x.numel() + weight.numel() + y.numel())
