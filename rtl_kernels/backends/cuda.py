"""CUDA C++ on NVIDIA GPUs (csrc/cuda): linear layers of any batch, and convolutions of one channel a filter.

What runs where, for forward, dX, dW and db alike, in float32 (exact unless TF32 is asked for), float16 and bfloat16:

* `masked_linear`: a mask with 1 to 16 rows goes through kernels that read the weight once, where the mask keeps
  something; one with more through a grouped product on tensor cores (mma.sync; exact float32 without them). Each
  group's own size decides, on the device: a choice by the batch would change one group's bits with another's rows.
* `masked_conv2d` with one input channel a filter (depthwise, any multiplier), and `masked_conv_transpose2d` with one
  output channel a group, which is the same with its roles exchanged: kernels of their own.
* All other convolutions are refused: Triton runs them, as implicit matrix products.

No host synchronisation, no atomics; every launch can be captured in a CUDA graph. Tested on an H200; for other GPUs
verified by compilation, and by running the same sources on the CPU by an emulator (tests/simt), through these operators
too.

A row without a mask (−1) that meets untied weights cannot be refused without synchronising: it gives NaN.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ops import define

__all__ = ["name", "operators", "supports"]

name = "cuda"

operators = tuple(
    f"{operation}{gradient}"
    for operation in ("masked_linear", "masked_conv2d", "masked_conv_transpose2d")
    for gradient in ("", "_grad_input", "_grad_weight")
)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MOST_TAPS = 2048  # weights a filter: kDepthwiseTaps in csrc/cuda/launch.h


def _load() -> tuple[str | None, tuple[int, ...]]:
    """Load the compiled library: why it cannot be, or None; and the architectures it was compiled for."""
    built = sorted(Path(__file__).parent.parent.glob("_cuda*.so"))
    if not built:
        return "the extension is not built (reinstall with nvcc: pip install --no-build-isolation .)", ()
    if torch.version.cuda is None:
        return "PyTorch is built without CUDA", ()
    try:
        torch.ops.load_library(str(built[0]))
        listed = ctypes.c_char * 64
        text = listed.in_dll(ctypes.CDLL(str(built[0])), "rtl_cuda_architectures").value.decode()
    except (OSError, ValueError) as error:
        return f"{built[0].name} cannot be loaded: {error}", ()
    return None, tuple(int(architecture) for architecture in text.split(","))


def register(backend: str, key: str) -> None:
    """Define the operators of a loaded library under dispatch key `key`."""
    for operation in operators:
        implementation = None
        if operation.startswith("masked_linear"):
            implementation = _with_precision(getattr(torch.ops.rtl_kernels, f"{operation}_{backend}_as").default)
        define(operation, backend, implementation, key)


def _with_precision(operator: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(operator)
    def implementation(*args: Any) -> Any:
        # As torch.set_float32_matmul_precision or torch.backends.cuda.matmul say; exact unless they are changed.
        return operator(*args, torch.backends.cuda.matmul.fp32_precision == "tf32")

    return implementation


unavailable, _architectures = _load()
if unavailable is None:
    register(name, "CUDA")


def runs_on(architectures: Sequence[int], capability: tuple[int, int]) -> bool:
    """Whether code compiled for `architectures` runs on a device: an architecture's machine code runs on its own major
    version from its minor on, and the last one's is there as PTX too, which runs on everything later."""
    major, minor = capability
    return 10 * major + minor >= max(architectures) or any(a // 10 == major and a % 10 <= minor for a in architectures)


def refusal(operation: str, x: Sequence[int], weight: Sequence[int], dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run an operation on an input and a weight of these shapes, or None."""
    if dtype not in _DTYPES:
        return f"x has dtype {dtype}, and the CUDA kernels take float32, float16 and bfloat16"
    if operation == "masked_linear":
        return None
    if operation == "masked_conv2d" and weight[-3] != 1:
        return f"its filters have {weight[-3]} channels, and the CUDA kernels take depthwise ones (Triton takes any)"
    if operation == "masked_conv_transpose2d" and weight[-3] != 1:
        return (
            f"its groups have {weight[-3]} output channels, and the CUDA kernels take one (depthwise; Triton takes any)"
        )
    if weight[-2] * weight[-1] > _MOST_TAPS:
        return f"its filters have {weight[-2]}×{weight[-1]} weights, and the CUDA kernels take {_MOST_TAPS}"
    return None


def supports(operation: str, x: Tensor, weight: Tensor) -> str | None:
    """Why this backend cannot run an operation (in words), or None if it can."""
    if unavailable is not None:
        return unavailable
    if x.device.type != "cuda":
        return f"x is on {x.device}, and the CUDA kernels need a CUDA device"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    capability = torch.cuda.get_device_capability(x.device)
    if not runs_on(_architectures, capability):
        compiled = ", ".join(f"{a // 10}.{a % 10}" for a in _architectures)
        return (
            f"{x.device} has compute capability {capability[0]}.{capability[1]}, and the kernels were compiled for "
            f"{compiled} (RTL_KERNELS_CUDA_ARCHS)"
        )
    return refusal(operation, x.shape, weight.shape, x.dtype)
