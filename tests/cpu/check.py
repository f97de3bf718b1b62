"""Builds csrc/cpu without torch, with check.cpp on top, and runs that against naive loops.

    python tests/cpu/check.py sanitize   under AddressSanitizer + UndefinedBehaviorSanitizer, then ThreadSanitizer
    python tests/cpu/check.py neon       compiled for aarch64, run under qemu
    python tests/cpu/check.py plain      as it is shipped, buffers ending at unmapped pages

(`make sanitize`, `make verify-neon`.) Each runs at every instruction set this CPU has, and first with bugs planted,
each of which has to be caught by its own watcher. Compiler flags and levels are setup.py's. Objects are kept under
build/check by what went into them, so that a run that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "csrc" / "cpu"
DRIVER = Path(__file__).resolve().parent / "check.cpp"


@dataclass(frozen=True)
class Build:
    """One way to compile and run the kernels."""

    name: str
    plants: dict[str, tuple[str, ...]]  # bug -> what its report says, one of; "" is a crash by a signal
    flags: tuple[str, ...] = ()
    level_flags: tuple[str, ...] = ()  # of the kernels' inner loops, besides
    compiler: str = "g++"
    machine: str = platform.machine()
    launcher: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    random: int = 150  # cases drawn, besides the named ones
    far: bool = True  # tensors past 2^31 elements too
    parts: int = 1  # processes that share the cases


CRASH = ("",)
MISMATCH = ("MISMATCH",)
# Threads that do each other's work pack into one buffer, and let each other's go.
RACE = MISMATCH + CRASH
BUILDS = {
    "plain": [Build("plain", {"overrun": CRASH, "mask": MISMATCH, "race": RACE, "narrow": MISMATCH})],
    "sanitize": [
        Build(
            "asan+ubsan",
            # A vector that lies partly inside the buffer is an unknown-crash to AddressSanitizer.
            {
                "overrun": ("heap-buffer-overflow", "unknown-crash"),
                "overflow": ("signed integer overflow",),
                "mask": MISMATCH,
            },
            # Checks by calls: inline ones take the compiler tens of minutes on the unrolled AVX-512 loops.
            (
                *("-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"),
                *("-fno-sanitize-recover=all", "--param", "asan-instrumentation-with-call-threshold=0"),
            ),
            # What else would be checked of every load, AddressSanitizer checks.
            ("-fno-sanitize=alignment,null,object-size,pointer-overflow,vptr",),
            # Fresh memory is NaN, in the kernels' own scratch too: what is used unwritten shows.
            environment={
                # detect_stack_use_after_return stays off: GCC 12 lays 64-byte vectors misaligned on the stack it needs.
                "ASAN_OPTIONS": "max_malloc_fill_size=1073741824:malloc_fill_byte=255",
                "UBSAN_OPTIONS": "print_stacktrace=1",
            },
        ),
        Build(
            "tsan",
            {"race": ("ThreadSanitizer: data race",), "mask": MISMATCH},
            ("-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=thread"),
            environment={"TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1"},
            random=60,
        ),
    ],
    "neon": [
        Build(
            "neon",
            {"overrun": CRASH, "mask": MISMATCH, "race": RACE},
            ("-static",),
            compiler="aarch64-linux-gnu-g++",
            machine="aarch64",
            launcher=("qemu-aarch64",),
            random=60,
            far=False,  # qemu keeps a note of every page, and offsets have 64 bits wherever they are computed
            parts=32,  # qemu 7.2 keeps 280 KB for every thread there ever was
        )
    ],
}
# A case that every plant but `narrow` shows in, small enough for all.
PLANTED = ("--only", "3×3, untied")


class CheckError(Exception):
    """A check that failed, or could not be made; the message says which."""


def _setup():
    spec = importlib.util.spec_from_file_location("rtl_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def commands(build: Build) -> dict[str, list[str]]:
    """How each source is compiled, without its output: setup.py's flags, the build's on top."""
    setup = _setup()
    levels = setup.instruction_sets(build.machine)
    sources = [path for path in sorted(KERNELS.glob("*.cpp")) if not path.name.startswith("level_")]
    sources += [KERNELS / name for name in levels] + [DRIVER]
    return {
        str(source): [
            *(build.compiler, *setup.FLAGS, *levels.get(source.name, ()), *build.flags),
            *(build.level_flags if source.name in levels else ()),
            *(f"-I{ROOT / 'csrc'}", "-c", str(source)),
        ]
        for source in sources
    }


def compile_all(build: Build) -> Path:
    """The driver, compiled and linked; what has not changed is taken from build/check."""
    if shutil.which(build.compiler) is None:
        raise CheckError(f"{build.compiler} is not installed")
    folder = ROOT / "build" / "check" / build.name
    folder.mkdir(parents=True, exist_ok=True)

    def compiled(command: list[str]) -> Path:
        text = subprocess.run([*command, "-E", "-P"], capture_output=True, check=True).stdout
        digest = hashlib.sha256("\0".join(command).encode() + text).hexdigest()[:16]
        built = folder / f"{Path(command[-1]).stem}-{digest}.o"
        if not built.exists():
            began = time.monotonic()
            partial = built.with_suffix(f".{os.getpid()}.o")
            subprocess.run([*command, "-o", str(partial)], check=True)
            os.replace(partial, built)
            say(f"{build.name}: {Path(command[-1]).name} compiled in {time.monotonic() - began:.0f} s")
        return built

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = [str(path) for path in pool.map(compiled, commands(build).values())]
    program = folder / "check"
    partial = folder / f"check.{os.getpid()}"
    subprocess.run([build.compiler, *build.flags, *objects, "-pthread", "-o", str(partial)], check=True)
    os.replace(partial, program)
    return program


def say(text: str) -> None:
    print(text, flush=True)


def execute(build: Build, program: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*build.launcher, str(program), *arguments],
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, **build.environment, **environment},
    )


def check_plant(build: Build, program: Path, bug: str, reports: tuple[str, ...], level: str) -> None:
    arguments = ["--far"] if bug == "narrow" else list(PLANTED)
    result = execute(build, program, *arguments, "--plant", bug, RTL_KERNELS_CPU_LEVEL=level)
    # qemu passes the signal of its guest on: to Python a death by signal either way.
    caught = any(report in result.stderr if report else result.returncode < 0 for report in reports)
    if result.returncode == 0 or not caught:
        raise CheckError(
            f"{build.name}, {level}: planted bug '{bug}' was not caught (exit {result.returncode})\n"
            f"{result.stderr[-2000:]}"
        )
    say(f"{build.name}, {level}: planted bug '{bug}' is caught: {' or '.join(r or 'a crash' for r in reports)}")


def check(build: Build, random: int | None, seed: int) -> None:
    """Compile, plant, run. Raises CheckError at the first thing that is not as it should be."""
    if build.launcher and shutil.which(build.launcher[0]) is None:
        compile_all(build)
        raise CheckError(f"{build.name}: compiled, but {build.launcher[0]} is not installed to run it")
    program = compile_all(build)
    levels = execute(build, program, "--levels").stdout.split()
    if not levels:
        raise CheckError(f"{build.name}: the driver names no level")
    for bug, reports in build.plants.items():
        check_plant(build, program, bug, reports, levels[0])
    cases = ["--random", str(build.random if random is None else random), "--seed", str(seed)]
    # A cache of 1 MB drops masks while others are in use.
    runs = [(cases, {"RTL_KERNELS_CACHE_MB": "1"})] + [(["--far"], {})] * build.far
    for level in levels:
        for arguments, environment in runs:
            for part in range(build.parts):
                asked = [*arguments, *(["--part", str(part), str(build.parts)] if build.parts > 1 else [])]
                began = time.monotonic()
                result = execute(build, program, *asked, RTL_KERNELS_CPU_LEVEL=level, **environment)
                name = f"{build.name}, {' '.join(asked)}"
                if result.returncode or result.stderr:
                    raise CheckError(f"{name}, {level}: exit {result.returncode}\n{result.stderr[:20000]}")
                say(f"{name}: {result.stdout.strip()} ({time.monotonic() - began:.0f} s)")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  $ python tests/cpu/check.py sanitize --random 1000 --seed 7",
    )
    parser.add_argument("what", choices=list(BUILDS))
    parser.add_argument("--random", type=int, metavar="N", help="cases drawn besides the named ones")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn cases (default: %(default)s)")
    chosen = parser.parse_args()
    try:
        for build in BUILDS[chosen.what]:
            check(build, chosen.random, chosen.seed)
    except (CheckError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
