"""Compiling launches ahead of time, for any architecture and without a GPU, and reading what came out.

Triton carries the assembler and the disassembler this needs. A launch is compiled as Triton would at run time: an
integer argument that is 1 becomes a constant, one divisible by 16 is known to be, pointers are aligned to 16 bytes.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .launch import Launch

__all__ = ["Report", "compile_launch", "occupancy", "specialise"]

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class _Processor:
    """What one multiprocessor holds (CUDA C++ Programming Guide, technical specifications per compute capability)."""

    warps: int
    blocks: int
    shared: int  # bytes
    registers: int = 65536


_PROCESSORS = {
    80: _Processor(64, 32, 164 * 1024),
    86: _Processor(48, 16, 100 * 1024),
    89: _Processor(48, 24, 100 * 1024),
    90: _Processor(64, 32, 228 * 1024),
    100: _Processor(64, 32, 228 * 1024),
}
_RESERVED_SHARED = 1024  # bytes a block that the system takes
_TENSOR_MEMORY_COLUMNS = 512  # of one multiprocessor, from sm_100 on


@dataclass(frozen=True)
class Report:
    """What the compiler made of one launch.

    Attributes:
        registers: a thread.
        spill_bytes: that the code stores to a thread's local memory, each store counted once.
        shared_bytes: a block.
        occupancy: resident warps over the most a multiprocessor holds, 0 to 1.
        tensor_instructions: matrix instructions in the code (HMMA, HGMMA, UTC…MMA), each counted once.
        wide_load_share: loads from global memory of 128 bits over all of them, each counted once.
        sass: the machine code.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    occupancy: float
    tensor_instructions: int
    wide_load_share: float
    sass: str


def specialise(
    launch: Launch, names: list[str], general: Collection[str] = ()
) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], Any]]:
    """(signature, constants, attributes) of `launch` for a kernel whose parameters are `names`; of the `general` ones
    nothing is known beforehand."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for i, name in enumerate(names):
        value = launch.constants[name] if name in launch.constants else launch.arguments[name]
        known = name not in general
        if name in launch.constants or value is None or (isinstance(value, int) and value == 1 and known):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name], attributes[(i,)] = _POINTERS[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and known:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compile_launch(launch: Launch, architecture: int, kernels: Any = None) -> Report:
    """Compile one launch for an architecture; `kernels` is the module it is taken from (the package's own)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if kernels is None:
        from . import kernels
    function = getattr(kernels, launch.kernel)
    general = [parameter.name for parameter in function.params if parameter.do_not_specialize]
    signature, constants, attributes = specialise(launch, function.arg_names, general)
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch.options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        dump = [
            subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        ]
    registers = int(re.findall(r"REG:(\d+)", dump[0])[0])
    shared = compiled.metadata.shared
    operations = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", dump[1], re.MULTILINE))
    loads = {name: n for name, n in operations.items() if re.match(r"LDG(STS)?\.", name)}
    wide = sum(n for name, n in loads.items() if "128" in name)
    return Report(
        registers=registers,
        spill_bytes=sum(n * _bytes(name) for name, n in operations.items() if re.match(r"STL\b", name)),
        shared_bytes=shared,
        occupancy=occupancy(
            architecture, launch.warps, registers, shared, getattr(compiled.metadata, "tmem_size", None) or 0
        ),
        tensor_instructions=sum(n for name, n in operations.items() if re.match(r"HMMA|HGMMA|UTC\w*MMA", name)),
        wide_load_share=wide / max(1, sum(loads.values())),
        sass=dump[1],
    )


def _bytes(operation: str) -> int:
    """How many bytes a load or store moves a thread."""
    width = re.search(r"\.(?:[US]?(8|16)|(64)|(128))\b", operation)
    return int(next(filter(None, width.groups()))) // 8 if width else 4


def occupancy(architecture: int, warps: int, registers: int, shared: int, tensor_columns: int = 0) -> float:
    """Resident warps over the most a multiprocessor holds, as the resources allow: 0 if one block does not fit."""
    of = _PROCESSORS[architecture]
    per_warp = -(-registers * 32 // 256) * 256  # registers are given out in units of 256
    fits = [of.blocks, of.warps // warps, of.registers // per_warp // warps, of.shared // (shared + _RESERVED_SHARED)]
    if tensor_columns:
        fits.append(_TENSOR_MEMORY_COLUMNS // tensor_columns)
    return min(fits) * warps / of.warps
