"""Speed on a GPU, for whoever has one: `make bench-gpu`, or `python -m benchmarks.gpu_bench`.

Each layer of the static report and the roofline, and a few of few rows a mask: every GPU backend that takes the call,
and its peers, timed by CUDA events with a cold L2 cache, medians of 30. Where each mask's samples are is known
beforehand, to all alike.

    dense        F.linear / F.conv2d with the shared weight, no masks: cuBLAS and cuDNN
    loop         each mask's samples through F.linear / F.conv2d with its masked weight, put back in their places
    loop_cached  the same over K masked weights made beforehand, which training cannot
    grouped_mm   torch's grouped product over K masked weights made beforehand (linear, bfloat16, sizes divisible by 8:
                 what it takes)

`launch` is how a call reaches the GPU. eager: from Python, as in a loop of one's own; the time of short kernels is
mostly the host's. graph: captured in a CUDA graph and replayed, which leaves the kernels' own time.

Before it is timed, a contender's output is compared with float64: `error` is its largest error over the largest output,
and one above the bound of its arithmetic ends the run. (`python -m pytest -m gpu` checks the numbers thoroughly.)

The report is written after every layer; started again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import rtl_kernels as rk
from benchmarks.gpu_roofline import FEW
from rtl_kernels import functional
from rtl_kernels.backends.triton_kernels.cases import ARITHMETIC, LAYERS, VARIANTS, Layer
from rtl_kernels.backends.triton_kernels.tune import device_times, path_for

RESULTS = Path(__file__).parent / "results" / "gpu_measured.json"

CASES = (*LAYERS, *FEW, *(layer for layer in VARIANTS if not layer.every and not layer.untied))
SPARSITIES = (0.5, 0.9)
MODES = ("forward", "train")
LAUNCHES = ("graph", "eager")
BEFOREHAND = ("loop_cached", "grouped_mm")  # what a training step cannot have
# The largest error over the largest output: sums of thousands of rounded terms, in any order.
BOUNDS = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 1e-4, "tf32": 4e-3}

_EXAMPLE = """example:
  $ python -m benchmarks.gpu_bench --only "linear 2048"
  ...
  written to benchmarks/results/gpu_measured.json and gpu_measured.md"""

Timer = Callable[..., Sequence[float]]  # of tune.device_times's arguments


class Problem:
    """One layer with its tensors: inputs, masks, a route that deals the samples out at random."""

    def __init__(self, layer: Layer, dtype: torch.dtype, sparsity: float, device: str) -> None:
        g = torch.Generator().manual_seed(0)
        shape: tuple[int, ...] = (layer.outputs, layer.inputs // layer.groups)
        shape += (layer.kernel, layer.kernel) if layer.size else ()
        fan_in = shape[1] * (layer.kernel**2 if layer.size else 1)
        self.layer = layer
        self.x = torch.randn(layer.batch, layer.inputs, *layer.size, generator=g).to(device, dtype)
        self.weight = (torch.randn(shape, generator=g) / fan_in**0.5).to(device, dtype)
        self.masks = (torch.rand(layer.masks, *shape, generator=g) >= sparsity).to(device)
        # As many samples for each mask as the layer's name says, in disorder.
        self.index = (torch.arange(layer.batch) % layer.masks)[torch.randperm(layer.batch, generator=g)].to(device)
        self.bank, self.route = rk.MaskBank.from_dense(self.masks), rk.Route.build(self.index, layer.masks)
        self.parts = [(self.index == k).nonzero()[:, 0] for k in range(layer.masks)]
        self.options: dict[str, Any] = {}
        if layer.size:
            self.options = {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups}

    @property
    def operator(self) -> Callable[..., Tensor]:
        return rk.masked_conv2d if self.layer.size else rk.masked_linear

    def dense(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, **self.options) if self.layer.size else F.linear(x, weight)

    def loop(self, x: Tensor, weights: Iterable[Tensor]) -> Tensor:
        results = torch.cat([self.dense(x[rows], weight) for rows, weight in zip(self.parts, weights, strict=True)])
        return torch.empty_like(results).index_copy(0, torch.cat(self.parts), results)

    def exact(self) -> Tensor:
        return self.loop(self.x.double(), self.weight.double() * self.masks)


def contenders(problem: Problem) -> Iterator[tuple[str, Callable[[Tensor, Tensor], Tensor]]]:
    """(name, f(x, weight) -> y) of everything that can run here; all but `dense` compute the same."""
    yield "dense", problem.dense
    yield "loop", lambda x, weight: problem.loop(x, (weight * mask for mask in problem.masks))
    sizes, every = problem.weight.shape, problem.weight * problem.masks
    yield "loop_cached", lambda x, weight: problem.loop(x, every)
    if len(sizes) == 2 and problem.x.dtype == torch.bfloat16 and not any(size % 8 for size in sizes):
        order = problem.index.argsort(stable=True)
        ends = torch.bincount(problem.index, minlength=problem.layer.masks).cumsum(0).to(torch.int32)
        masked = every.transpose(1, 2)

        def grouped(x: Tensor, weight: Tensor) -> Tensor:
            y = F.grouped_mm(x[order], masked, offs=ends)
            return torch.empty_like(y).index_copy(0, order, y)

        yield "grouped_mm", grouped
    for name, module in functional.BACKENDS.items():
        if name != "reference" and module.supports(problem.operator.__name__, problem.x, problem.weight) is None:
            yield (
                name,
                lambda x, weight, name=name: problem.operator(
                    x, weight, problem.bank, problem.route, **problem.options, backend=name
                ),
            )


def step(run: Callable[[Tensor, Tensor], Tensor], problem: Problem, mode: str) -> Callable[[], object]:
    if mode == "forward":
        return lambda: run(problem.x, problem.weight)
    x, weight = problem.x.clone().requires_grad_(), problem.weight.clone().requires_grad_()
    dy = torch.randn_like(run(x, weight))
    return lambda: torch.autograd.grad(run(x, weight), (x, weight), dy)


def set_arithmetic(name: str) -> torch.dtype:
    """Whether float32 is rounded to TF32, in products and convolutions alike; the dtype to compute in."""
    dtype, tf32 = ARITHMETIC[name]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    return dtype


def measure(layer: Layer, arithmetic: str, sparsity: float, device: str, timer: Timer) -> list[dict[str, Any]]:
    """Rows of the report: every contender and mode of one layer.

    Raises:
        RuntimeError: a contender's output is wrong.
    """
    problem = Problem(layer, set_arithmetic(arithmetic), sparsity, device)
    exact = problem.exact()
    rows: list[dict[str, Any]] = []
    for name, run in contenders(problem):
        error = None
        if name != "dense":
            error = float((run(problem.x, problem.weight).double() - exact).abs().max() / exact.abs().max())
            if not error <= BOUNDS[arithmetic]:
                raise RuntimeError(
                    f"{name} is off by {error:.3g} of the largest output on {layer.name}, {arithmetic}, sparsity "
                    f"{sparsity}; {BOUNDS[arithmetic]} is allowed"
                )
        for mode in MODES:
            if name in BEFOREHAND and mode == "train":
                continue
            for launch in LAUNCHES:
                times = sorted(timer(step(run, problem, mode), graph=launch == "graph"))
                rows.append(
                    {
                        "layer": layer.name,
                        "arithmetic": arithmetic,
                        "sparsity": sparsity,
                        "mode": mode,
                        "launch": launch,
                        "contender": name,
                        "microseconds": round(statistics.median(times), 2),
                        "p10": round(times[len(times) // 10], 2),
                        "p90": round(times[len(times) * 9 // 10], 2),
                        "error": error,
                    }
                )
    dense = {(row["mode"], row["launch"]): row["microseconds"] for row in rows if row["contender"] == "dense"}
    for row in rows:
        row["ratio_to_dense"] = round(row["microseconds"] / dense[row["mode"], row["launch"]], 3)
    return rows


def peaks() -> dict[str, float]:
    """What the GPU at hand reaches: a copy of 2 GiB (bytes read and written) and products of 8192×8192 matrices."""
    source = torch.empty(2**29, dtype=torch.int32, device="cuda").random_()
    time = statistics.median(device_times(partial(torch.empty_like(source).copy_, source), 10, graph=False))
    found = {"copy GB/s": 2 * 2**31 / time / 1e3}
    for arithmetic in ARITHMETIC:
        dtype = set_arithmetic(arithmetic)
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
        time = statistics.median(device_times(partial(torch.mm, a, b), 10))
        found[f"{arithmetic} TFLOP/s"] = 2 * 8192**3 / time / 1e6
    return {name: round(value, 1) for name, value in found.items()}


def environment(device: str) -> dict[str, Any]:
    cuda = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "capability": list(torch.cuda.get_device_capability()) if cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": metadata.version("triton") if cuda and find_spec("triton") else None,
        "tiles": ("tuned" if path_for(torch.cuda.get_device_name()).exists() else "table") if cuda else None,
        "backends": {name: getattr(module, "unavailable", None) for name, module in functional.BACKENDS.items()},
    }


def table(report: dict[str, Any]) -> Iterator[str]:
    """Markdown: what dense takes, and every contender's time as a ratio to it."""
    names = list(dict.fromkeys(row["contender"] for row in report["rows"] if row["contender"] != "dense"))
    yield f"Measured on {report['environment']['device']}, {report['date']}; medians, ratios are of dense's time."
    for launch in LAUNCHES:
        columns = ["layer", "arithmetic", "sparsity", "mode"]
        times: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
        for row in report["rows"]:
            if row["launch"] == launch:
                times.setdefault(tuple(row[name] for name in columns), {})[row["contender"]] = row
        yield f"\n## Launch: {launch}\n"
        yield "| " + " | ".join([*columns, "dense µs", *names]) + " |"
        yield "|" + " --- |" * len(columns) + " ---: |" * (1 + len(names))
        for key, by in times.items():
            ratios = [f"{by[name]['ratio_to_dense']:.2f}" if name in by else "–" for name in names]
            yield "| " + " | ".join([*map(str, key), str(by["dense"]["microseconds"]), *ratios]) + " |"


def write(path: Path, report: dict[str, Any]) -> None:
    """The report as JSON and as a table beside it, each whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1, ensure_ascii=False)
    for target, content in ((path, text), (path.with_suffix(".md"), "\n".join(table(report)))):
        partial = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        try:
            with partial.open("w") as file:
                file.write(content + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)


def collect(
    out: Path,
    cases: Sequence[Layer],
    arithmetics: Sequence[str],
    sparsities: Sequence[float],
    device: str,
    timer: Timer,
) -> dict[str, Any]:
    """Measure what the report at `out` does not hold yet; a report of another environment is begun anew."""
    here = environment(device)
    report: dict[str, Any] = {}
    if out.exists():
        report = json.loads(out.read_text())
    if report.get("environment") != here:
        report = {"command": "python -m benchmarks.gpu_bench", "environment": here, "rows": []}
    if device == "cuda" and "peaks" not in report:
        report["peaks"] = peaks()
    report["date"] = datetime.now(timezone.utc).date().isoformat()
    done = {(row["layer"], row["arithmetic"], row["sparsity"]) for row in report["rows"]}
    for layer in cases:
        for arithmetic in arithmetics:
            for sparsity in sparsities:
                if (layer.name, arithmetic, sparsity) in done:
                    continue
                rows = measure(layer, arithmetic, sparsity, device, timer)
                report["rows"] += rows
                write(out, report)
                for row in rows:
                    names = f"{row['layer']:27} {arithmetic:8} {sparsity:4} {row['mode']:7} {row['launch']:5}"
                    time = f"{row['microseconds']:10.2f} µs {row['ratio_to_dense']:7.2f} of dense"
                    print(f"{names} {row['contender']:11} {time}", flush=True)
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_bench",
        description=__doc__,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="layers whose name contains TEXT")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: benchmarks/results/gpu_measured.json")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was measured (torch.cuda.is_available() is false)", file=sys.stderr)
        return 2
    cases = [layer for layer in CASES if options.only in layer.name]
    collect(options.out, cases, list(ARITHMETIC), SPARSITIES, "cuda", device_times)
    print(f"written to {options.out} and {options.out.with_suffix('.md').name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
