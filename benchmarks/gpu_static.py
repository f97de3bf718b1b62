"""What the compiler makes of every Triton kernel and configuration, without a GPU: `python benchmarks/gpu_static.py`.

Compiles each for sm_80, 86, 89, 90 and 100, prints registers, spills, shared memory, theoretical occupancy, tensor-core
instructions and the share of 128-bit loads, writes them to results/gpu_static.json, and fails if a threshold is missed.
These are properties of the code. Nothing is run, and nothing is said about speed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from rtl_kernels.backends.triton_kernels import ahead, cases, configs
from rtl_kernels.backends.triton_kernels.launch import Launch

RESULTS = Path(__file__).parent / "results" / "gpu_static.json"

# The least theoretical occupancy. A product of four warps that takes every register still leaves room for two blocks on
# a multiprocessor, and one of eight warps for one: 8 warps of 64. They hide latency by loading tiles ahead; the other
# kernels hold little and hide it by other warps.
OCCUPANCY_FLOOR = {
    "correlate": 0.125,
    "adjoint": 0.125,
    "weight_grad": 0.125,
    "bias_grad": 0.25,
    "sum_splits": 0.5,
    "live_columns": 0.5,
    "live_rows": 0.5,
}
PRODUCTS = ("correlate", "adjoint", "weight_grad")


def launches(architecture: int) -> Iterator[tuple[str, str, Launch]]:
    """(layer, arithmetic, launch) of every kernel and configuration, each kind of launch once.

    Launches that differ in sizes only compile to the same code. bfloat16 differs from float16 in the opcode of its
    products: it is compiled for one layer. The variants (odd sizes, untied weights, every mask, …) are compiled in half
    and exact precision, where there is the most and the least room: on sm_80 and sm_90.
    """
    seen = set()
    for layer in (*cases.LAYERS, *cases.VARIANTS):
        for arithmetic in cases.ARITHMETIC:
            if layer in cases.VARIANTS and (architecture not in (80, 90) or arithmetic not in ("float16", "float32")):
                continue
            if arithmetic == "bfloat16" and layer is not cases.LAYERS[1]:
                continue
            for step in cases.record(layer, arithmetic, architecture):
                key = _key(step)
                if key not in seen and (step.kernel in PRODUCTS or arithmetic == "float32"):
                    seen.add(key)
                    yield layer.name, arithmetic, step


def _key(step: Launch) -> Any:
    names = [*step.arguments, *step.constants]
    return step.kernel, step.warps, step.stages, step.registers, repr(ahead.specialise(step, names))


def measure(job: tuple[str, str, Launch], architecture: int) -> dict[str, Any]:
    """One row of the report."""
    layer, arithmetic, step = job
    report = ahead.compile_launch(step, architecture)
    return {
        "backend": "triton",
        "kernel": step.kernel,
        "arch": architecture,
        "dtype": arithmetic,
        "layer": layer,
        "tile": [step.constants.get(f"BLOCK_{axis}", 0) for axis in "ORK"],
        "warps": step.warps,
        "stages": step.stages,
        "registers": report.registers,
        "spill_bytes": report.spill_bytes,
        "shared_bytes": report.shared_bytes,
        "occupancy": round(report.occupancy, 4),
        "tensor_instructions": report.tensor_instructions,
        "wide_load_share": round(report.wide_load_share, 4),
    }


def failures(row: dict[str, Any]) -> list[str]:
    """Which thresholds a row misses, in words."""
    product, exact = row["kernel"] in PRODUCTS, row["dtype"] == "float32"
    checks = {
        f"spills {row['spill_bytes']} bytes": row["spill_bytes"] > 0,
        f"takes {row['shared_bytes']} bytes of shared memory": row["shared_bytes"] > configs.SHARED_LIMIT[row["arch"]],
        f"has occupancy {row['occupancy']:.3f}": row["occupancy"] < OCCUPANCY_FLOOR[row["kernel"]],
        "uses no tensor core": product and not exact and row["tensor_instructions"] == 0,
        "rounds exact float32 on tensor cores": product and exact and row["tensor_instructions"] > 0,
    }
    return [text for text, failed in checks.items() if failed]


COLUMNS = {
    "kernel": "{:13}",
    "arch": "{:4}",
    "dtype": "{:9}",
    "layer": "{:27}",
    "registers": "{:9}",
    "spill_bytes": "{:11}",
    "shared_bytes": "{:12}",
    "occupancy": "{:9.2f}",
    "tensor_instructions": "{:19}",
    "wide_load_share": "{:15.2f}",
}


def line(row: dict[str, Any]) -> str:
    return " ".join(form.format(row[key]) for key, form in COLUMNS.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=list(configs.ARCHITECTURES), metavar="N")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes (default 2)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default results/gpu_static.json beside this script")
    options = parser.parse_args()
    print(" ".join(f"{key:{len(form.format(0))}}" for key, form in COLUMNS.items()))
    rows, missed = [], 0
    with ProcessPoolExecutor(options.jobs) as pool:
        for architecture in options.arch:
            for row in pool.map(partial(measure, architecture=architecture), launches(architecture)):
                rows.append(row)
                problems = failures(row)
                missed += bool(problems)
                print(line(row), "; ".join(problems), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = json.loads(options.out.read_text()) if options.out.exists() else {"rows": []}
    others = [row for row in report["rows"] if row.get("backend") != "triton"]  # CUDA C++'s rows stand in the same file
    made = {
        "command": "python benchmarks/gpu_static.py",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "version": metadata.version("triton"),
    }
    report = {"made": report.get("made", {}) | {"triton": made}, "rows": others + rows}
    options.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    print(f"{len(rows)} kernels compiled, {missed} miss a threshold")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
