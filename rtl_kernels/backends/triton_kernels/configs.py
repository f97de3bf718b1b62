"""Which tiles each kernel runs with, by architecture and shape class. Chosen on paper, but for `_TIMED`.

A configuration may depend on the kernel, the dtype, the layer's shape and the architecture, never on the batch: a
group's bits must not change with the rows of other groups.

What decided the numbers on paper:
* BLOCK_O (outputs) of 64 fills the tensor core's tall side, whose least height on sm_90 is 64; 32 for layers with no
  more outputs than that.
* BLOCK_R (rows × pixels) is narrow where a sample is one row, as a group may hold few rows; wide for planes.
* BLOCK_K of 64 halves, or 32 floats, is one 128-byte line. Windows (kernels larger than 1×1, strides) gather every
  input by its own address: half as deep, as much as registers hold without spilling.
* Exact float32 runs on the ordinary units, whose operands live in registers: 16 deep.
* Stages: a tile's number in the list of live tiles is itself loaded ahead, which takes half of them, so 6 keep three
  tiles in flight. sm_86 and sm_89 have 99 KiB of shared memory a block, the others 163 KiB or more: fewer there.
* 4 warps, and 8 where registers would spill with 4: windows, whose addresses take many, and weight_grad in float32,
  which holds two accumulators (a group's and the sum).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ARCHITECTURES", "SHARED_LIMIT", "Config", "Problem", "choose"]

ARCHITECTURES = (80, 86, 89, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block


@dataclass(frozen=True)
class Config:
    BLOCK_O: int
    BLOCK_R: int
    BLOCK_K: int
    warps: int
    stages: int
    registers: int | None = None  # the most a thread may take; None: as the compiler chooses


@dataclass(frozen=True)
class Problem:
    """What a configuration may depend on.

    Attributes:
        kernel: "correlate", "adjoint", "weight_grad" or "bias_grad".
        arithmetic: "half" (float16, bfloat16), "tf32" or "float32".
        architecture: compute capability, 10 · major + minor.
        outputs: channels of the result (of a conv group); for weight_grad the weight's rows.
        kind: "rows" (a sample has fewer than 32 pixels, as in a linear layer), "planes" (1×1) or "windows".
    """

    kernel: str
    arithmetic: str
    architecture: int
    outputs: int
    kind: str


# (BLOCK_R, BLOCK_K) of a product by arithmetic and kind.
_TILES = {
    "correlate": {
        "half": {"rows": (32, 64), "planes": (128, 64), "windows": (64, 32)},
        "tf32": {"rows": (32, 32), "planes": (64, 32), "windows": (64, 32)},
        "float32": {"rows": (32, 16), "planes": (64, 16), "windows": (64, 16)},
    },
    "adjoint": {
        "half": {"rows": (32, 64), "planes": (128, 64), "windows": (64, 32)},
        "tf32": {"rows": (32, 32), "planes": (64, 32), "windows": (64, 32)},
        "float32": {"rows": (32, 16), "planes": (64, 16), "windows": (64, 16)},
    },
    "weight_grad": {
        "half": {"rows": (32, 64), "planes": (32, 64), "windows": (32, 64)},
        "tf32": {"rows": (32, 64), "planes": (32, 64), "windows": (32, 64)},
        "float32": {"rows": (16, 64), "planes": (16, 64), "windows": (16, 64)},
    },
}


# (arithmetic, kind, BLOCK_O) of weight_grad where the compiler, left to itself, stops at 128 registers for the sake of
# another block and spills: 16 bytes on sm_86 and sm_89, 20 bytes on sm_100.
_ALL_REGISTERS = {("half", "planes", 32), ("tf32", "windows", 64)}


# Half precision on sm_90, timed by tune.py on an H200 (Triton 3.6.0): the fastest that spills nothing, where it took
# less than .95 of the time of the tiles chosen on paper: windows' dX .42 and .51, their dW .61 and .81.
_TIMED = {
    ("correlate", "rows", 32): Config(32, 32, 64, 4, 4),
    ("correlate", "planes", 32): Config(32, 64, 32, 4, 4),
    ("correlate", "windows", 32): Config(32, 64, 16, 4, 6),
    ("correlate", "windows", 64): Config(64, 128, 16, 4, 6),
    ("adjoint", "rows", 32): Config(32, 32, 32, 4, 2),
    ("adjoint", "planes", 32): Config(32, 64, 32, 4, 2),
    ("adjoint", "windows", 32): Config(32, 128, 16, 4, 2),
    ("adjoint", "windows", 64): Config(64, 128, 16, 4, 2),
    ("weight_grad", "rows", 32): Config(32, 16, 32, 4, 6),
    ("weight_grad", "windows", 32): Config(32, 16, 64, 4, 6),
    ("weight_grad", "windows", 64): Config(64, 16, 128, 8, 6),
}


def choose(problem: Problem) -> Config:
    """The configuration for a problem."""
    block_o = 32 if problem.outputs <= 32 else 64
    if (problem.architecture, problem.arithmetic) == (90, "half"):
        timed = _TIMED.get((problem.kernel, problem.kind, block_o))
        if timed is not None:
            return timed
    if problem.kernel == "bias_grad":
        return Config(block_o, 32, 0, 4, 1)
    block_r, block_k = _TILES[problem.kernel][problem.arithmetic][problem.kind]
    two_sums = problem.kernel == "weight_grad" and problem.arithmetic != "half"
    warps = 8 if problem.kind == "windows" or two_sums else 4
    if problem.kernel == "weight_grad" and (problem.arithmetic, problem.kind, block_o) in _ALL_REGISTERS:
        return Config(block_o, block_r, block_k, warps, _stages(problem), 255)
    if problem.arithmetic == "float32":
        return Config(block_o, block_r, min(block_k, block_o), warps, 2)
    return Config(block_o, block_r, block_k, warps, _stages(problem))


def _stages(problem: Problem) -> int:
    return 4 if problem.architecture in (86, 89) else 6
