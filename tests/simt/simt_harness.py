"""Builds the emulator with csrc/cuda in it (runner.cpp) and runs it; used by the tests here.

    python tests/simt/simt_harness.py        prints the plant table: which rung catches which planted bug

Builds are cached under build/simt by the hash of everything that goes into them.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CUDA = ROOT / "csrc" / "cuda"

# Undefined behaviour that can hide in arithmetic and addresses; the rest of -fsanitize=undefined doubles the compile
# time and has no bearing here.
_UNDEFINED = "signed-integer-overflow,shift,alignment,bounds,integer-divide-by-zero,float-cast-overflow,unreachable"
MODES = {
    "plain": (["-O2"], []),
    "asan": (["-O1", f"-fsanitize=address,{_UNDEFINED}", "-fno-sanitize-recover=all"], ["-DSIMT_ASAN"]),
    "tsan": (["-O1", "-fsanitize=thread"], ["-DSIMT_TSAN"]),
}

PLANTS = {
    1: "barrier missing before a use",
    2: "barrier missing before a reuse",
    3: "copy not waited for",
    4: "divergent shuffle",
    5: "plain add for a reduction",
    6: "one past shared memory",
    7: "wrong mask word",
    8: "wrong group boundary",
    9: "offset in 32 bits",
}

# What each of them looks like when it is caught, in the words of whoever catches it.
REPORTS = {
    "race": "WARNING: ThreadSanitizer: data race",
    "past shared memory": "SIMT: write past shared memory",
    "poisoned": "AddressSanitizer: use-after-poison",
    "copy wait": "SIMT: missing copy wait",
    "divergence": "SIMT: divergent collective",
    "overflow": "runtime error: signed integer overflow",
    "reference": "MISMATCH",
    "fault": "SEGV",
}


@functools.cache
def why_not(mode: str) -> str | None:
    """Why the emulator cannot be built and run here in this mode, or None: tried on an empty program."""
    if not shutil.which("g++"):
        return "g++ is not installed"
    flags, _ = MODES[mode]
    with tempfile.TemporaryDirectory() as work:
        source = Path(work) / "empty.cpp"
        source.write_text("int main() { return 0; }\n")
        for command in (["g++", *flags, str(source), "-o", f"{work}/empty"], [f"{work}/empty"]):
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                return f"{' '.join(flags)} does not work here: {result.stderr.strip()[-200:]}"
    return None


def sources() -> list[Path]:
    return sorted([*CUDA.glob("*.cuh"), *CUDA.glob("*.cu"), *CUDA.glob("*.h"), *HERE.glob("*.h"), *HERE.glob("*.cpp")])


def cache_folder(*parts: str) -> Path:
    digest = hashlib.sha256()
    for path in sources():
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    for part in parts:
        digest.update(part.encode() + b"\0")
    return ROOT / "build" / "simt" / digest.hexdigest()[:16]


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time builds what goes into a folder; the others wait, and find it made."""
    folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


@functools.cache
def build(mode: str, plant: str = "simt::planted") -> Path:
    """The runner, instrumented as `mode` says. `plant` is what -DPLANT is given: by default a runtime choice."""
    flags, runtime = MODES[mode]
    common = ["g++", "-std=c++17", "-g1", f"-I{HERE}", f"-I{CUDA}"]
    kernels = [*common, *flags, "-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror", f"-DPLANT={plant}"]
    # The runtime itself is not instrumented, and its loops stay loops: memcpy would be intercepted.
    emulator = [*common, *runtime, "-O2", "-Wall", "-Werror", "-fno-builtin", "-fno-tree-loop-distribute-patterns"]
    folder = cache_folder(mode, *kernels, *emulator)
    runner = folder / "runner"
    with _alone(folder), tempfile.TemporaryDirectory(dir=folder) as work:
        if runner.exists():
            return runner
        for compiler, name in ((kernels, "runner"), (kernels, "simt_copy"), (emulator, "simt")):
            subprocess.run([*compiler, "-c", str(HERE / f"{name}.cpp"), "-o", f"{work}/{name}.o"], check=True)
        objects = [f"{work}/{name}.o" for name in ("runner", "simt_copy", "simt")]
        subprocess.run(["g++", *flags, *objects, "-o", f"{work}/linked"], check=True)
        os.replace(f"{work}/linked", runner)
    return runner


@functools.cache
def build_backend() -> Path:
    """The operators of csrc/registration_cuda.cpp over the emulated kernels: a library that torch loads."""
    from torch.utils.cpp_extension import include_paths, library_paths

    glue = ROOT / "csrc" / "registration_cuda.cpp"
    shared = ["g++", "-std=c++17", "-fPIC", "-g1", f"-I{HERE}", f"-I{CUDA}", "-Wall", "-Werror"]
    kernels = [*shared, "-O2", "-fno-strict-aliasing", "-Wextra", "-x", "c++"]
    emulator = [*shared, "-O2", "-fno-builtin", "-fno-tree-loop-distribute-patterns"]
    torch = [f"-isystem{path}" for path in include_paths()]
    defines = ["-DRTL_EMULATED", '-DRTL_BACKEND="emulated"', "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    operators = [*shared, "-O1", f"-I{ROOT / 'csrc'}", *torch, *defines]
    steps = [(kernels, CUDA / "launch.cu"), (kernels, HERE / "simt_copy.cpp"), (emulator, HERE / "simt.cpp")]
    steps.append((operators, glue))
    objects = [_made(f"{source.stem}.o", [*compiler, "-c", str(source)], source) for compiler, source in steps]
    libraries = ["-Wl,--no-as-needed", *[f"-L{path}" for path in library_paths()], "-ltorch_cpu"]
    return _made("_emulated.so", ["g++", "-shared", *map(str, objects), *libraries], glue)


def _made(name: str, command: list[str], source: Path) -> Path:
    """What a command writes to its -o, made once for this state of the sources."""
    folder = cache_folder(name, source.read_text(), *command)
    made = folder / name
    with _alone(folder), tempfile.TemporaryDirectory(dir=folder) as work:
        if not made.exists():
            subprocess.run([*command, "-o", f"{work}/{name}"], check=True)
            os.replace(f"{work}/{name}", made)
    return made


def run(
    mode: str, *arguments: str, plant: str = "simt::planted", timeout: float = 1200
) -> subprocess.CompletedProcess[str]:
    """The runner's run to its end. Skips the calling test where the mode is not to be had."""
    if reason := why_not(mode):
        pytest.skip(reason)
    environment = os.environ | {
        "TSAN_OPTIONS": "halt_on_error=1 exitcode=66",
        "ASAN_OPTIONS": "exitcode=99 detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=0",
    }
    command = [str(build(mode, plant)), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)


def caught(result: subprocess.CompletedProcess[str]) -> str | None:
    """The name of the report a run ended with, or None if it ended well."""
    if result.returncode == 0:
        return None
    if result.returncode < 0:
        return "fault"
    for name, text in REPORTS.items():
        if text in result.stderr:
            return name
    return f"exit {result.returncode}: {result.stderr[-500:]}"


def plant_table(families: dict[str, list[int]]) -> str:
    """Every planted bug on every rung, as a Markdown table."""
    rungs = [(m, o, c) for m in ("plain", "asan", "tsan") for o in ("forward", "skew") for c in ("lazy", "eager")]
    lines = ["| kernel | planted bug | " + " | ".join(f"{m} {o} {c}" for m, o, c in rungs) + " |"]
    lines.append("|" + "---|" * (len(rungs) + 2))
    for family, plants in families.items():
        for plant in plants:
            cells = []
            for mode, order, copies in rungs:
                if plant == 9 and mode == "tsan":
                    cells.append("")  # its shadow memory would need the strides' whole extent
                    continue
                size = "huge" if plant == 9 else "tiny"
                options = ["--kernel", family, "--plant", str(plant), "--size", size, "--order", order]
                cells.append(caught(run(mode, *options, "--copies", copies)) or "–")
            lines.append(f"| {family} | {PLANTS[plant]} | " + " | ".join(cells) + " |")
            print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


if __name__ == "__main__":
    from test_plants import EXPECTED

    by_family: dict[str, list[int]] = {}
    for family, plant in EXPECTED:
        by_family.setdefault(family, []).append(plant)
    print(plant_table(by_family))
