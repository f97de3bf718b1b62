"""A roofline on paper for the GPU kernels: `python benchmarks/gpu_roofline.py`. A PREDICTION: nothing is run.

For each kernel, layer and GPU: the operations issued (tiles padded, masks applied, nothing skipped), the bytes that
have to cross the memory bus at least once, and the time below which that cannot go; beside it the same bound for the
dense operation of the same batch without masks, which is what cuBLAS or cuDNN could reach at best. Real kernels take
longer than either: launches, latency and imperfect overlap are not in it.

Peaks are the vendor's data-sheet figures, dense: operations with float32 sums on tensor cores, float32 on the ordinary
units, and memory bandwidth. On sm_90 and sm_100 tensor cores reach them by instructions of their own, which Triton
emits and the CUDA C++ kernels (`cuda.…`, mma.sync) do not: for these the bound is further off than for the others.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rtl_kernels.backends.triton_kernels import cases
from rtl_kernels.backends.triton_kernels.cases import ARITHMETIC, Layer
from rtl_kernels.backends.triton_kernels.launch import Launch

RESULTS = Path(__file__).parent / "results" / "gpu_roofline.json"


@dataclass(frozen=True)
class Gpu:
    """Peaks in operations and bytes a second."""

    name: str
    half: float
    tf32: float
    float32: float
    bandwidth: float


GPUS = {
    80: Gpu("A100 SXM 80 GB", 312e12, 156e12, 19.5e12, 2.04e12),
    86: Gpu("A10", 125e12, 62.5e12, 31.2e12, 0.6e12),
    89: Gpu("L40S", 362e12, 183e12, 91.6e12, 0.864e12),
    90: Gpu("H100 SXM", 989e12, 494e12, 67e12, 3.35e12),
    100: Gpu("B200", 2250e12, 1100e12, 75e12, 8e12),
}

PRODUCTS = {"correlate": "y", "adjoint": "dx", "weight_grad": "dw"}

# A mask's few rows, where the weight is what has to be read.
FEW = tuple(Layer(f"linear 2048→2048, {rows} a mask", 2048, 2048, 8 * rows) for rows in (1, 4, 16))
SMALL_ROWS = 16  # groups of so few have kernels of their own: kSmallRows in csrc/cuda/launch.h


def _up(n: int, block: int) -> int:
    return -(-n // block) * block


def count(layer: Layer, step: Launch, itemsize: int) -> dict[str, int]:
    """Operations and bytes of one product and of its dense peer, the batch spread evenly over the masks."""
    taps = layer.kernel**2
    rows_per_group = layer.rows // layer.masks
    pixels = layer.plane[0] * layer.plane[1]
    per_group = layer.groups  # convolution groups: each a product of its own
    outputs, inputs = layer.outputs // per_group, layer.inputs // per_group
    block_o, block_r, block_k = (step.constants[f"BLOCK_{axis}"] for axis in "ORK")
    if step.kernel == "correlate":
        tiled = (
            layer.masks * _up(rows_per_group * pixels, block_r) * _up(outputs, block_o) * _up(inputs * taps, block_k)
        )
    elif step.kernel == "adjoint":
        # A stride's phases share the taps out between them: over all, every output pixel meets every tap once.
        tiled = (
            layer.masks * _up(rows_per_group * pixels, block_r) * _up(inputs, block_o) * _up(outputs, block_k) * taps
        )
    else:
        tiled = (
            layer.masks * _up(rows_per_group * pixels, block_r) * _up(outputs, block_o) * _up(inputs * taps, block_k)
        )
    return {"flops": 2 * tiled * per_group, **moved(layer, itemsize)}


def moved(layer: Layer, itemsize: int) -> dict[str, int]:
    """Bytes of a product, each tensor once, and operations and bytes of its dense peer."""
    pixels, taps = layer.plane[0] * layer.plane[1], layer.kernel**2
    inputs = layer.inputs // layer.groups
    x = layer.batch * layer.inputs * (layer.size[0] * layer.size[1] if layer.size else 1) * itemsize
    y = layer.rows * layer.outputs * pixels * itemsize
    weight = layer.outputs * inputs * taps * itemsize
    words = layer.masks * layer.outputs * -(-inputs * taps // 32) * 4
    masked = weight * (layer.masks if layer.untied else 1)
    return {
        "bytes": x + y + masked + words,
        "dense_flops": 2 * layer.rows * pixels * layer.outputs * inputs * taps,
        "dense_bytes": x + y + weight,
    }


def count_cuda(layer: Layer, result: str, arithmetic: str) -> tuple[str, int, bool]:
    """(kernel, operations, whether on tensor cores) of a product by csrc/cuda, as launch.cu chooses."""
    rows, pixels = layer.rows // layer.masks, layer.plane[0] * layer.plane[1]
    name = {"y": "forward", "dx": "grad_input", "dw": "grad_weight"}[result]
    if layer.size:
        return f"cuda.depthwise_{name}", 2 * layer.rows * pixels * layer.outputs * layer.kernel**2, False
    sums = layer.every and result == "dx"
    if result != "dw" and rows <= SMALL_ROWS and not sums:
        return f"cuda.small_{name}", 2 * layer.rows * layer.outputs * layer.inputs, False
    tensor = arithmetic != "float32"
    if result == "dw":
        tiled = layer.masks * _up(rows, 32) * _up(layer.outputs, 64) * _up(layer.inputs, 64)
        return "cuda.gemm_grad_weight", 2 * tiled, tensor
    columns, depth = (layer.outputs, layer.inputs) if result == "y" else (layer.inputs, layer.outputs)
    aligned = columns % 8 == 0 and depth % 8 == 0
    tile = 128 if tensor and aligned and columns >= 128 and rows >= 128 else 64
    tiled = layer.masks * _up(rows, tile) * _up(columns, tile) * _up(depth, 32)
    return f"cuda.gemm_{name}", 2 * tiled, tensor


def cuda_rows() -> list[dict[str, Any]]:
    """The rows of the CUDA C++ kernels: linear layers and depthwise convolutions."""
    table = []
    for layer in (*cases.LAYERS, *FEW, *cases.VARIANTS):
        if layer.size and layer.groups != layer.inputs:
            continue
        for arithmetic, (dtype, _) in ARITHMETIC.items():
            for architecture, gpu in GPUS.items():
                for result in PRODUCTS.values():
                    kernel, flops, tensor = count_cuda(layer, result, arithmetic)
                    if arithmetic == "bfloat16" or (arithmetic == "tf32" and not tensor):
                        continue  # as float16; as float32
                    counted = {"flops": flops, **moved(layer, torch.finfo(dtype).bits // 8)}
                    of = arithmetic if tensor else "float32"
                    table.append(_row(kernel, result, architecture, arithmetic, of, layer, gpu, counted))
    return table


def _row(
    kernel: str,
    result: str,
    architecture: int,
    arithmetic: str,
    units: str,
    layer: Layer,
    gpu: Gpu,
    counted: dict[str, int],
) -> dict[str, Any]:
    """One row of the table; `units` is the arithmetic whose peak bounds the kernel."""
    peaks = {"float32": gpu.float32, "tf32": gpu.tf32, "float16": gpu.half}
    time, limit = bound(counted["flops"], counted["bytes"], peaks[units], gpu.bandwidth)
    dense, dense_limit = bound(counted["dense_flops"], counted["dense_bytes"], peaks[arithmetic], gpu.bandwidth)
    return {
        "kernel": kernel,
        "result": result,
        "arch": architecture,
        "gpu": gpu.name,
        "dtype": arithmetic,
        "layer": layer.name,
        **counted,
        "predicted_us": round(time, 3),
        "bound": limit,
        "dense_us": round(dense, 3),
        "dense_bound": dense_limit,
        "ratio_to_dense": round(time / dense, 3),
    }


def bound(flops: int, moved: int, peak: float, bandwidth: float) -> tuple[float, str]:
    """(microseconds, what limits it)."""
    compute, memory = flops / peak * 1e6, moved / bandwidth * 1e6
    return max(compute, memory), "compute" if compute > memory else "memory"


def rows() -> list[dict[str, Any]]:
    table = []
    for layer in (*cases.LAYERS, *cases.VARIANTS):
        for arithmetic, (dtype, _) in ARITHMETIC.items():
            if arithmetic == "bfloat16":  # as float16
                continue
            for architecture, gpu in GPUS.items():
                for step in cases.record(layer, arithmetic, architecture):
                    if step.kernel in PRODUCTS:
                        counted = count(layer, step, torch.finfo(dtype).bits // 8)
                        result = PRODUCTS[step.kernel]
                        table.append(
                            _row(step.kernel, result, architecture, arithmetic, arithmetic, layer, gpu, counted)
                        )
    return table + cuda_rows()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="default results/gpu_roofline.json beside this script"
    )
    options = parser.parse_args()
    table = rows()
    print("PREDICTED from shapes and data-sheet peaks; nothing was run.")
    print(f"{'layer':27} {'kernel':26} {'arch':4} {'dtype':8} {'µs':>9} {'bound':7} {'dense µs':>9} {'ratio':>6}")
    for row in table:
        print(
            f"{row['layer']:27} {row['kernel']:26} {row['arch']:4} {row['dtype']:8} {row['predicted_us']:9.2f} "
            f"{row['bound']:7} {row['dense_us']:9.2f} {row['ratio_to_dense']:6.2f}"
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"prediction": "from shapes and data-sheet peaks; nothing was run", "rows": table}
    partial = options.out.with_suffix(".new")
    partial.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    partial.replace(options.out)


if __name__ == "__main__":
    main()
