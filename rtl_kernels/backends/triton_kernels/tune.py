"""Tiles chosen by measurement on the GPU at hand, kept on disk: `python -m rtl_kernels.backends.triton_kernels.tune`.

Optional. Only this command measures anything: the backend reads the file it leaves, if there is one for this device and
this version of Triton, at its first call, and takes configs.py's table for whatever is not in it. So nothing is tuned
while a model runs, every process uses the same tiles, and a configuration still depends on kernel, dtype, shape and
architecture alone. The file lies in RTL_KERNELS_CACHE, by default ~/.cache/rtl_kernels.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from . import cases
from .cases import LAYERS, Layer
from .configs import Config, Problem, choose

__all__ = ["Tuned", "candidates", "cell", "device_times", "load", "path_for", "save", "tune"]

_EXAMPLE = """example:
  $ python -m rtl_kernels.backends.triton_kernels.tune
  correlate   half     up to 32 outputs  rows     table   12.1 µs  best   10.4 µs  32x64x64, 4 warps, 4 stages
  ...
  written to ~/.cache/rtl_kernels/triton-nvidia-h100.json

Delete the file to go back to the table. Stopped half way, it goes on where it was when started again."""

# What a configuration is kept under: a problem whose outputs are counted as the table counts them.
Cell = tuple[str, str, int, bool, str]


def cell(problem: Problem) -> Cell:
    return problem.kernel, problem.arithmetic, problem.architecture, problem.outputs <= 32, problem.kind


def candidates(problem: Problem) -> list[Config]:
    """The table's configuration, then its neighbours: other widths, depths, warps and stages, one or two at a time."""
    first = choose(problem)
    near = [first]
    for block_r in (first.BLOCK_R // 2, first.BLOCK_R, first.BLOCK_R * 2):
        for block_k in (first.BLOCK_K // 2, first.BLOCK_K, first.BLOCK_K * 2):
            for warps in (4, 8):
                for stages in sorted({2, 4, first.stages}):
                    if block_r >= 16 and block_k >= 16:
                        near.append(Config(first.BLOCK_O, block_r, block_k, warps, stages, first.registers))
    return list(dict.fromkeys(near))


def tune(problem: Problem, measure: Callable[[Problem, Config], float | None]) -> tuple[Config, float, float]:
    """The fastest candidate, its time and the table's; `measure` gives a time, or None where one cannot run.

    Raises:
        RuntimeError: the table's own configuration cannot run.
    """
    first, *others = candidates(problem)
    default = measure(problem, first)
    if default is None:
        raise RuntimeError(f"the table's configuration {first} for {problem} cannot run on this device")
    best, least = first, default
    for config in others:
        time = measure(problem, config)
        if time is not None and time < least:
            best, least = config, time
    return best, least, default


# ---- on disk


def path_for(device: str) -> Path:
    """Where a device's configurations are kept."""
    folder = os.environ.get("RTL_KERNELS_CACHE") or Path.home() / ".cache" / "rtl_kernels"
    return Path(folder) / f"triton-{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def save(path: Path, device: str, version: str, found: dict[Cell, Config]) -> None:
    """Write configurations, whole or not at all."""
    rows = [{"cell": list(key), **dataclasses.asdict(config)} for key, config in found.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("w") as file:
            json.dump({"device": device, "triton": version, "configs": rows}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: Path, device: str, version: str) -> dict[Cell, Config]:
    """What `save` wrote; nothing if there is no file, or (with a warning) if it is of another device or Triton.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        held = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} does not hold configurations ({error}): delete it, or tune again") from error
    try:
        if (held["device"], held["triton"]) != (device, version):
            warnings.warn(
                f"{path} is of {held['device']} and Triton {held['triton']}, not of {device} and {version}: not used",
                stacklevel=2,
            )
            return {}
        fields = [field.name for field in dataclasses.fields(Config)]
        return {tuple(row["cell"]): Config(**{name: row[name] for name in fields}) for row in held["configs"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} does not hold configurations ({error}): delete it, or tune again") from error


class Tuned:
    """`configs.choose` with what was found on disk in front of the table."""

    def __init__(self, found: dict[Cell, Config]) -> None:
        self._found = found

    def __call__(self, problem: Problem) -> Config:
        return self._found.get(cell(problem)) or choose(problem)


# ---- measuring


def device_times(call: Callable[[], object], repeats: int = 30, graph: bool = True) -> list[float]:
    """Microseconds of `call` on the current CUDA device, each with the L2 cache full of something else.

    Args:
        call: what is timed.
        repeats: how often.
        graph: captures `call` in a CUDA graph and times its replays, which leaves out the time that the host takes to
            launch kernels one by one.
    """
    flush = torch.empty(64 * 2**20, dtype=torch.int32, device="cuda")
    if graph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()  # compiles and loads what a capture may not
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            call()
        call = captured.replay
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return times


def layer_for(problem: Problem) -> Layer:
    """The layer of the table's own cases that stands for a problem's cell."""
    kind = {"rows": "linear", "planes": "conv 1×1", "windows": "conv 3×3"}[problem.kind]
    return next(one for one in LAYERS if one.name.startswith(kind) and (one.outputs <= 32) == (problem.outputs <= 32))


def _measure(problem: Problem, config: Config) -> float | None:
    from triton.runtime.errors import OutOfResources

    from ..triton import _run

    arithmetic = "float16" if problem.arithmetic == "half" else problem.arithmetic
    steps = cases.record(
        layer_for(problem), arithmetic, problem.architecture, lambda p: config if p == problem else choose(p), "cuda"
    )
    try:
        for step in steps:  # the lists of live tiles are made by the first of them
            _run(step)
        timed = [step for step in steps if step.kernel == problem.kernel]

        def run() -> None:
            for step in timed:
                _run(step)

        return statistics.median(device_times(run))
    except OutOfResources:
        return None


def main(arguments: Sequence[str] | None = None, measure: Callable[[Problem, Config], float | None] = _measure) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m rtl_kernels.backends.triton_kernels.tune",
        description=__doc__,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device: there is nothing to tune on", file=sys.stderr)
        return 2
    import triton

    device = torch.cuda.get_device_name()
    major, minor = torch.cuda.get_device_capability()
    path, version = path_for(device), triton.__version__
    found = load(path, device, version)
    for problem in cases.problems(10 * major + minor):
        if cell(problem) in found:
            continue
        best, least, default = tune(problem, measure)
        found[cell(problem)] = best
        save(path, device, version, found)
        outputs = "up to 32 outputs" if problem.outputs <= 32 else "more outputs"
        tile = f"{best.BLOCK_O}x{best.BLOCK_R}x{best.BLOCK_K}, {best.warps} warps, {best.stages} stages"
        print(
            f"{problem.kernel:11} {problem.arithmetic:8} {outputs:17} {problem.kind:8} table {default:7.1f} µs  "
            f"best {least:7.1f} µs  {tile}",
            flush=True,
        )
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
