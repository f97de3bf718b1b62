"""Triton on NVIDIA GPUs: grouped masked matrix products on tensor cores, convolution as an implicit one.

Every operator of reference.py but batch norm, in float32 (exact unless TF32 is asked for), float16 and bfloat16 (sums
in float32), shared and untied. The kernels and their mathematics: triton_kernels/kernels.py. No host synchronisation,
no atomics, nothing tuned at run time (triton_kernels/tune.py is a command); every launch can be captured in a CUDA
graph.

Tested on an H200; for other GPUs verified by compilation, and by Triton's interpreter. Triton is imported by the
first call that launches a kernel, not before.

A row without a mask (−1) that meets untied weights cannot be refused without synchronising: it gives NaN.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops import define
from .triton_kernels import launch
from .triton_kernels.configs import Config, Problem

__all__ = ["name", "operators", "supports"]

name = "triton"

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LEAST_ARCHITECTURE = 80


# Looked for without importing it.
_INSTALLED = importlib.util.find_spec("triton") is not None


def supports(operation: str, x: Tensor, weight: Tensor) -> str | None:
    """Why this backend cannot run an operation (in words), or None if it can."""
    if not _INSTALLED:
        return "Triton is not installed (pip install 'rtl-kernels[triton]')"
    if x.device.type != "cuda":
        return f"x is on {x.device}, and Triton needs a CUDA device"
    if x.dtype not in _DTYPES:
        return f"x has dtype {x.dtype}, and the Triton kernels take float32, float16 and bfloat16"
    if torch.version.hip is not None:
        return "PyTorch is built for ROCm, for which the kernels have not been compiled"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    major, minor = torch.cuda.get_device_capability(x.device)
    if 10 * major + minor < _LEAST_ARCHITECTURE:
        return f"{x.device} has compute capability {major}.{minor}, and the kernels need 8.0"
    return None


@functools.cache
def _choose(device: int) -> Callable[[Problem], Config]:
    """The table, or what has been tuned on this device and kept."""
    import triton

    from .triton_kernels import tune

    known = torch.cuda.get_device_name(device)
    return tune.Tuned(tune.load(tune.path_for(known), known, triton.__version__))


def _run(step: launch.Launch) -> None:
    from .triton_kernels import kernels

    kernel = getattr(kernels, step.kernel)
    kernel[step.grid](**step.arguments, **step.constants, **step.options)


def _implementation(operator: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(operator)
    def implementation(x: Tensor, *args: Any) -> Any:
        with torch.cuda.device(x.device):  # Triton launches on the current device
            major, minor = torch.cuda.get_device_capability(x.device)
            # As torch.set_float32_matmul_precision or torch.backends.cuda.matmul say; exact unless they are changed.
            tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
            return operator(launch.Target(_run, 10 * major + minor, tf32, _choose(x.get_device())), x, *args)

    return implementation


operators = {
    operation: define(operation, name, _implementation(operator), "CUDA")
    for operation, operator in launch.OPERATIONS.items()
}
