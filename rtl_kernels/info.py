"""What this installation can do, and which backend each operator runs on: `python -m rtl_kernels.info`."""

from __future__ import annotations

import argparse
import os
import platform
from importlib import metadata
from typing import Any

import torch

from . import functional
from .backends import cpu
from .masks import MaskBank
from .routing import Route

__all__ = ["collect"]

GPU_NOTE = (
    "the cuda and triton backends are tested on an H200 (9.0); for other GPUs they are verified by compilation, "
    "interpretation and emulation"
)

_EXAMPLE = """example:
  $ python -m rtl_kernels.info
  rtl_kernels  0.1.0
  ...
  compiled     yes, runs avx512 (RTL_KERNELS_CPU_LEVEL: avx512, avx2, baseline)
  ...
  masked_linear on cpu, float32, float64, float16, bfloat16: runs on cpu

Attach the output to a bug report. From Python: rtl_kernels.info.collect() gives the same as a dict."""


def collect() -> dict[str, Any]:
    """Versions, the machine, the backends that exist, and how every operator would run.

    Returns:
        {"rtl_kernels", "torch", "python", "platform", "cpu", "threads", "cuda": its name or None, "backends": [...],
        "compiled": {"level", "levels", "cache_bytes", "cache_limit"} of the compiled backend in this process, or
        {"missing": why it is not there}, or {"refused": why it does not run},
        "operators": [{"operation", "device", "dtype", "backend", "refused": {backend: reason}}, ...]}, all of it JSON.
        Nothing is run: a tiny call of each operator, device and dtype is explained (`rtl_kernels.explain`).
    """
    try:
        version = metadata.version("rtl-kernels")
    except metadata.PackageNotFoundError:
        version = "not installed (run from its sources)"
    cuda = torch.cuda.is_available()
    return {
        "rtl_kernels": version,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if cuda else None,
        "backends": list(functional.BACKENDS),
        "compiled": _compiled(),
        "operators": [
            _explain(operation, device, dtype)
            for operation in (
                functional.masked_linear,
                functional.masked_conv2d,
                functional.masked_conv_transpose2d,
            )
            for device in ["cpu"] + ["cuda"] * cuda
            for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
        ],
    }


def _compiled() -> dict[str, Any]:
    """The compiled CPU backend: its instructions, and the compiled masks it keeps."""
    if cpu.unavailable is not None:
        return {"missing": cpu.unavailable}
    operators = torch.ops.rtl_kernels
    try:
        return {
            "level": operators.cpu_level(),
            "levels": operators.cpu_levels(),
            "cache_bytes": operators.cpu_cache_bytes(),
            "cache_limit": operators.cpu_cache_limit(),
        }
    except (RuntimeError, ValueError) as error:  # an environment variable it cannot follow: its operators say the same
        return {"refused": str(error).splitlines()[0]}


def _explain(operation: Any, device: str, dtype: torch.dtype) -> dict[str, Any]:
    planes = () if operation is functional.masked_linear else (3, 3)
    bank = MaskBank.ones(2, (4, 4, *planes), device=device)
    x = torch.zeros(2, 4, *planes, dtype=dtype, device=device)
    weight = torch.zeros(bank.shape, dtype=dtype, device=device)
    explanation = functional.explain(operation, x, weight, bank, Route.build([0, 1], 2).to(device))
    return {
        "operation": operation.__name__,
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "backend": explanation.backend,
        "refused": explanation.refused,
    }


def describe(collected: dict[str, Any]) -> str:
    """What `collect` found, as text: operators that run alike share a line, reasons for refusals stand below it."""
    width = max(len(key) for key in collected) + 2
    lines = []
    for key, value in collected.items():
        if key == "operators":
            continue
        if key == "compiled":
            lines += [f"{name:<{width}}{text}" for name, text in _describe_compiled(value)]
            continue
        text = ", ".join(value) if isinstance(value, list) else value
        lines.append(f"{key:<{width}}{'none' if text is None else text}")
    alike: dict[tuple[Any, ...], list[str]] = {}
    for row in collected["operators"]:
        how = (row["operation"], row["device"], row["backend"], tuple(row["refused"].items()))
        alike.setdefault(how, []).append(row["dtype"])
    lines.append(GPU_NOTE)
    fails = ", which refuses it: see above" if "refused" in collected.get("compiled", {}) else ""
    for (operation, device, backend, refused), dtypes in alike.items():
        lines.append(f"{operation} on {device}, {', '.join(dtypes)}: runs on {backend}{fails * (backend == 'cpu')}")
        lines += [f"  not {name}: {reason}" for name, reason in refused]
    return "\n".join(lines)


def _describe_compiled(compiled: dict[str, Any]) -> list[tuple[str, str]]:
    if "missing" in compiled:
        return [("compiled", f"no: {compiled['missing']}")]
    if "refused" in compiled:
        return [("compiled", f"yes, but {compiled['refused']}")]
    megabytes = compiled["cache_bytes"] / 2**20, compiled["cache_limit"] >> 20
    return [
        ("compiled", f"yes, runs {compiled['level']} (RTL_KERNELS_CPU_LEVEL: {', '.join(compiled['levels'])})"),
        ("masks kept", f"{megabytes[0]:.1f} of at most {megabytes[1]} MB (RTL_KERNELS_CACHE_MB)"),
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m rtl_kernels.info",
        description=__doc__,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(arguments)
    print(describe(collect()))


if __name__ == "__main__":
    main()
