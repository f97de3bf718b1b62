"""The compiled CPU kernels (csrc/): buckets of inputs by keep pattern, in the widest vectors the processor has.

A mask is compiled to buckets when it is first met, inside the operator, and kept there (csrc/cpu/structure.h): checked
bit for bit at every call, so it follows every change of the words, and works alike in eager mode, under torch.compile,
in an exported program and under vmap. Results do not depend on the number of threads. RTL_KERNELS_CPU_LEVEL selects
lower instructions than the best the processor has.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .. import ops

name = "cpu"

_INSTALL = "pip install --no-build-isolation ."

# What the library defines itself, beside the operators of ops.py.
_DEFINED = ("cpu_level", "cpu_levels", "cpu_cache_bytes", "cpu_cache_limit", "cpu_scale_rows", "cpu_group_rows")


def _load() -> str | None:
    """Load the compiled library; why it cannot be, or None."""
    built = sorted(Path(__file__).parent.parent.glob("_cpu*.so"))
    if not built:
        return f"the extension is not built (reinstall with a C++ compiler: {_INSTALL})"
    try:
        torch.ops.load_library(str(built[0]))
    except OSError as error:
        return f"{built[0].name} cannot be loaded: {error}"
    missing = [operator for operator in _DEFINED if not hasattr(torch.ops.rtl_kernels, operator)]
    if missing:
        return f"{built[0].name} was built from other sources, without {missing[0]} (reinstall: {_INSTALL})"
    return None


unavailable = _load()
if unavailable is None:
    for _operation in ops.OPERATIONS:
        ops.define(_operation, name, None, "CPU", into=False)
    torch.library.register_fake("rtl_kernels::cpu_scale_rows", lambda x, scale, shift, offsets: x.new_empty(x.shape))
    ops.group_rows = torch.ops.rtl_kernels.cpu_group_rows.default


def supports(operation: str, x: Tensor, weight: Tensor) -> str | None:
    """Why this backend cannot run an operation (in words), or None if it can."""
    if unavailable is not None:
        return unavailable
    if not x.is_cpu:
        return f"x is on {x.device}, expected the CPU"
    return None
