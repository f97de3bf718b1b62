"""The Triton kernels compiled ahead of time: a fast subset of benchmarks/gpu_static.py, and its committed report.
RTL_VERIFY_GPU=1 compiles all of it.

Nothing here runs on a GPU, and nothing is said about speed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
import torch

from rtl_kernels.backends.triton_kernels import ahead, cases, configs
from rtl_kernels.backends.triton_kernels.configs import ARCHITECTURES, SHARED_LIMIT, Config
from rtl_kernels.backends.triton_kernels.launch import Launch, Target

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


static = _script("gpu_static")

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: its kernels cannot be compiled"
)


def _launch(kernel: str, arithmetic: str, architecture: int, layer: str = "linear 2048→2048") -> Launch:
    found = next(one for one in (*cases.LAYERS, *cases.VARIANTS) if one.name == layer)
    return next(step for step in cases.record(found, arithmetic, architecture) if step.kernel == kernel)


@needs_triton
@pytest.mark.parametrize("kernel", ["correlate", "adjoint", "weight_grad"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_half_precision_compiles_to_tensor_cores_everywhere(kernel, architecture):
    row = static.measure(("linear", "float16", _launch(kernel, "float16", architecture)), architecture)
    assert static.failures(row) == [], row
    assert row["wide_load_share"] >= 0.25, row


@needs_triton
@pytest.mark.parametrize(
    ("kernel", "arithmetic"),
    [("correlate", "tf32"), ("correlate", "float32"), ("adjoint", "bfloat16"), ("live_columns", "float32")],
)
def test_other_precisions_meet_the_thresholds(kernel, arithmetic):
    row = static.measure(("linear", arithmetic, _launch(kernel, arithmetic, 90)), 90)
    assert static.failures(row) == [], row


@needs_triton
@pytest.mark.parametrize("kernel", ["correlate", "adjoint", "weight_grad", "bias_grad"])
def test_64_bit_indices_compile(kernel):
    step = _launch(kernel, "float16", 80)
    wide = dataclasses.replace(step, constants={**step.constants, "WIDE": True})
    assert static.failures(static.measure(("linear", "float16", wide), 80)) == []


@needs_triton
def test_a_tile_too_large_for_the_registers_is_caught(monkeypatch):
    monkeypatch.setattr(
        cases, "Target", lambda run, arch, tf32, _: Target(run, arch, tf32, lambda problem: Config(128, 128, 64, 4, 2))
    )
    step = _launch("correlate", "float16", 80, "conv 3×3 64→64")
    problems = static.failures(static.measure(("conv", "float16", step), 80))
    assert any("spills" in problem for problem in problems)


def _row(**changes: object) -> dict:
    row = {
        "kernel": "correlate",
        "arch": 80,
        "dtype": "float16",
        "registers": 100,
        "spill_bytes": 0,
        "shared_bytes": 1000,
        "occupancy": 0.25,
        "tensor_instructions": 8,
        "wide_load_share": 0.5,
    }
    return row | changes


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"spill_bytes": 8}, "spills"),
        ({"shared_bytes": SHARED_LIMIT[80] + 1}, "shared memory"),
        ({"occupancy": 0.1}, "occupancy"),
        ({"tensor_instructions": 0}, "no tensor core"),
        ({"dtype": "float32"}, "rounds exact float32"),
    ],
)
def test_each_threshold_can_fail(changes, word):
    assert static.failures(_row()) == []
    (problem,) = static.failures(_row(**changes))
    assert word in problem


def test_occupancy_is_what_the_scarcest_resource_allows():
    assert ahead.occupancy(80, 4, 32, 0) == 1.0
    assert ahead.occupancy(80, 4, 255, 0) == 8 / 64  # 2 blocks of 128 threads with 256 registers
    assert ahead.occupancy(86, 4, 32, 49 * 1024) == 8 / 48  # 2 blocks of 50 KiB in 100
    assert ahead.occupancy(80, 8, 32, 200 * 1024) == 0  # does not fit
    assert ahead.occupancy(100, 4, 32, 0, tensor_columns=256) == 8 / 64


def test_launches_are_specialised_as_triton_does():
    tensor = torch.empty(4, dtype=torch.float16, device="meta")
    step = Launch("k", (1, 1), {"a": tensor, "b": 1, "c": 32, "d": 7, "e": 2**31, "f": None}, {"G": True}, 4, 1)
    signature, constants, attributes = ahead.specialise(step, list("abcdefG"))
    assert list(signature.values()) == ["*fp16", "constexpr", "i32", "i32", "i64", "constexpr", "constexpr"]
    assert constants == {(1,): 1, (5,): None, (6,): True}
    assert set(attributes) == {(0,), (2,), (4,)}
    signature, constants, attributes = ahead.specialise(step, list("abcdefG"), ["b", "c"])
    assert [signature[name] for name in "bc"] == ["i32", "i32"]
    assert set(constants) == {(5,), (6,)}
    assert set(attributes) == {(0,), (4,)}


@needs_triton
@pytest.mark.parametrize("layer", [*cases.LAYERS, *cases.VARIANTS], ids=lambda layer: layer.name)
def test_a_launch_gives_a_kernel_its_parameters_and_no_others(layer):
    from rtl_kernels.backends.triton_kernels import kernels

    for step in cases.record(layer, "float16", 80):
        assert sorted([*step.arguments, *step.constants]) == sorted(getattr(kernels, step.kernel).arg_names)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_layers_reach_every_cell_of_the_table(architecture):
    reached = set()
    for layer in cases.LAYERS:
        for arithmetic in cases.ARITHMETIC:
            for step in cases.record(layer, arithmetic, architecture):
                if step.kernel in static.PRODUCTS:
                    reached.add((step.kernel, *_tile(step)))
    for problem in cases.problems(architecture):
        config = configs.choose(problem)
        tile = config.BLOCK_O, config.BLOCK_R, config.BLOCK_K, config.warps, config.stages
        assert (problem.kernel, *tile) in reached, problem


def _tile(step: Launch) -> tuple[int, ...]:
    return (*(step.constants[f"BLOCK_{axis}"] for axis in "ORK"), step.warps, step.stages)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_committed_report_holds_every_launch_and_every_threshold(architecture):
    report = json.loads(static.RESULTS.read_text())["rows"] if static.RESULTS.exists() else []
    rows = [row for row in report if row.get("backend") == "triton" and row["arch"] == architecture]
    if not rows:
        pytest.skip(f"no report for sm_{architecture} yet: run benchmarks/gpu_static.py")
    for row in rows:
        assert static.failures(row) == [], row
    reported = {(r["kernel"], r["dtype"], r["layer"], tuple(r["tile"]), r["warps"], r["stages"]) for r in rows}
    for layer, arithmetic, step in static.launches(architecture):
        tile = tuple(step.constants.get(f"BLOCK_{axis}", 0) for axis in "ORK")
        assert (step.kernel, arithmetic, layer, tile, step.warps, step.stages) in reported


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("RTL_VERIFY_GPU"), reason="takes minutes: set RTL_VERIFY_GPU=1")
@pytest.mark.parametrize("kernel", static.OCCUPANCY_FLOOR)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_launch_compiles_to_what_the_report_says(architecture, kernel):
    report = json.loads(static.RESULTS.read_text())
    same_version = report["made"]["triton"]["version"] == metadata.version("triton")
    jobs = [job for job in static.launches(architecture) if job[2].kernel == kernel]
    assert jobs
    for job in jobs:
        row = static.measure(job, architecture)
        assert static.failures(row) == [], row
        assert not same_version or row in report["rows"], row


def test_the_roofline_is_a_lower_bound_and_says_that_it_is_a_prediction():
    roofline = _script("gpu_roofline")
    table = roofline.rows()
    assert json.loads(roofline.RESULTS.read_text()) == {
        "prediction": "from shapes and data-sheet peaks; nothing was run",
        "rows": table,
    }
    for row in table:
        assert row["predicted_us"] >= row["dense_us"] > 0
        assert row["flops"] >= row["dense_flops"]
    # 256 rows × 2048 × 2048: weight, input, output once each and 8 masks of an eighth of a byte a weight.
    (row,) = [
        r
        for r in table
        if (r["kernel"], r["arch"], r["dtype"], r["layer"]) == ("correlate", 90, "float16", "linear 2048→2048")
    ]
    assert row["flops"] == 2 * 256 * 2048 * 2048
    assert row["bytes"] == 2 * (2048 * 2048 + 2 * 256 * 2048) + 8 * 2048 * 2048 // 8


def test_the_roofline_has_the_cuda_kernels():
    roofline = _script("gpu_roofline")
    table = {(r["kernel"], r["arch"], r["dtype"], r["layer"]): r for r in roofline.cuda_rows()}
    # A row for each of eight masks reads the weight and the bits and little else, on the ordinary units: with sixteen
    # these are the bound.
    one, many = (table["cuda.small_forward", 90, "float16", f"linear 2048→2048, {rows} a mask"] for rows in (1, 16))
    assert one["flops"] == one["dense_flops"] == 2 * 8 * 2048 * 2048
    assert one["bytes"] == 2 * (2048 * 2048 + 2 * 8 * 2048) + 8 * 2048 * 2048 // 8
    assert (one["bound"], many["bound"]) == ("memory", "compute")
    # 32 rows a mask fill half of a tile of 64.
    gemm = table["cuda.gemm_forward", 80, "float16", "linear 2048→2048"]
    assert gemm["flops"] == 2 * gemm["dense_flops"]
    assert table["cuda.gemm_grad_weight", 80, "float16", "linear 2048→2048"]["flops"] == gemm["dense_flops"]
    assert table["cuda.depthwise_forward", 80, "float32", "depthwise 3×3 128"]["bound"] == "memory"
    assert {r["kernel"] for r in table.values()} == {
        f"cuda.{kind}_{result}"
        for kind, results in (
            ("small", ("forward", "grad_input")),
            ("gemm", ("forward", "grad_input", "grad_weight")),
            ("depthwise", ("forward", "grad_input", "grad_weight")),
        )
        for result in results
    }
    header = (BENCHMARKS.parent / "csrc" / "cuda" / "launch.h").read_text()
    assert f"kSmallRows = {roofline.SMALL_ROWS};" in header
