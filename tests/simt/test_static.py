"""csrc/cuda compiled ahead of time, and what the compiled code must look like (benchmarks/gpu_static_cuda.py).

One architecture by default, all of them with RTL_VERIFY_GPU=1. Compiling shows that the code is accepted; it shows
neither that it runs nor how fast.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_static_cuda as static  # noqa: E402

_missing = static.why_not("nvcc", "nvdisasm", "g++", "c++filt")
compiled = pytest.mark.skipif(_missing is not None, reason=str(_missing))

ARCHITECTURES = list(static.ARCHITECTURES) if os.environ.get("RTL_VERIFY_GPU") else ["sm_80"]

# Share of a multiprocessor's warps that must be able to be resident, by kernel. The matrix products live on what they
# hold in registers, 64 sums a thread in the large tile; the others on many loads under way.
OCCUPANCY = {
    r"gemm_(forward|grad_input)_(f16|bf16)(_ragged)?": 0.25,
    r"gemm_(forward|grad_input)_tf32(_ragged)?": 0.16,
    r"gemm_(forward|grad_input)_f32(_ragged)?": 0.16,
    r"gemm_(forward|grad_input)_\w+_large": 0.12,
    r"gemm_grad_weight_(f16|bf16)(_ragged)?": 0.18,
    r"gemm_grad_weight_(f32|tf32)(_ragged)?": 0.12,
    r"small_(forward|grad_input)_\w+": 0.25,
    r"depthwise_(forward|grad_input)_\w+": 0.37,
    r"depthwise_grad_weight_\w+": 0.5,
    r"grad_bias_\w+": 0.5,
    r"tile_summary": 0.66,
}


def floor(kernel: str) -> float:
    (found,) = [value for pattern, value in OCCUPANCY.items() if re.fullmatch(pattern, kernel)]
    return found


@pytest.fixture(scope="module", params=ARCHITECTURES)
def rows(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return static.report(request.param)


@compiled
def test_nothing_spills(rows: list[dict[str, Any]]) -> None:
    assert {row["kernel"]: row["spill_bytes"] for row in rows if row["spill_bytes"]} == {}


@compiled
def test_tensor_cores_are_used(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        wanted = re.match(r"cuda\.gemm_\w*?_(tf32|f16|bf16)", row["kernel"]) is not None
        assert (row["tensor_instructions"] > 0) == wanted, row


@compiled
def test_shared_memory_fits(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert row["shared_bytes"] <= static.ARCHITECTURES[row["arch"]].shared_block * 1024, row


@compiled
def test_occupancy(rows: list[dict[str, Any]]) -> None:
    low = [row for row in rows if row["occupancy"] < floor(row["kernel"].removeprefix("cuda."))]
    assert low == [], static.table(low)


@compiled
def test_wide_loads(rows: list[dict[str, Any]]) -> None:
    """Matrices whose rows are whole 16-byte chunks are read 16 bytes at a time; ragged ones cannot be."""
    for row in rows:
        if re.match(r"cuda\.(gemm|small)_", row["kernel"]):
            assert (row["wide_load_share"] > 0) == (not row["kernel"].endswith("_ragged")), row
        if re.fullmatch(r"cuda\.small_forward_(f32|f16|bf16)", row["kernel"]):
            assert row["wide_load_share"] > 0.6, row


@compiled
def test_the_committed_report_says_so(rows: list[dict[str, Any]]) -> None:
    report = json.loads((ROOT / "benchmarks" / "results" / "gpu_static.json").read_text())
    committed = [row for row in report["rows"] if row["arch"] == rows[0]["arch"] and row["kernel"].startswith("cuda.")]
    assert {row["kernel"] for row in committed} == {row["kernel"] for row in rows}
    if report["made"]["cuda"]["version"] == static.version():
        assert sorted(committed, key=lambda row: row["kernel"]) == sorted(rows, key=lambda row: row["kernel"])


@pytest.mark.skipif(static.why_not("g++") is not None, reason=str(static.why_not("g++")))
def test_every_kernel_has_an_occupancy_floor() -> None:
    for kernel in static.catalogue():
        assert floor(kernel.name) > 0


def test_occupancy_arithmetic() -> None:
    assert static.occupancy("sm_80", 256, 32, 0) == 1.0
    assert static.occupancy("sm_80", 256, 64, 0) == 0.5
    assert static.occupancy("sm_80", 256, 65, 0) == 0.375  # registers are given out eight at a time
    assert static.occupancy("sm_86", 128, 32, 49 * 1024) == 8 / 48  # two blocks of 50 KiB
    assert static.occupancy("sm_86", 32, 16, 0) == 16 / 48  # sixteen blocks, however small


def test_rows_are_merged(tmp_path: Path) -> None:
    path = tmp_path / "gpu_static.json"
    correlate = [{"kernel": "correlate", "arch": 80, "layer": layer} for layer in "ab"]
    path.write_text(json.dumps({"made": {"triton": "kept"}, "rows": correlate}))
    static.merge_rows(path, [{"kernel": "cuda.b", "arch": "sm_80", "registers": 2}])
    static.merge_rows(path, [{"kernel": "cuda.b", "arch": "sm_80", "registers": 3}], {"version": "1"})
    found = json.loads(path.read_text())
    assert found["rows"] == [{"kernel": "cuda.b", "arch": "sm_80", "registers": 3}, *correlate]
    assert found["made"] == {"triton": "kept", "cuda": {"version": "1"}}
