"""benchmarks/gpu_bench.py as far as it goes without a GPU: its contenders and their check on the CPU, made-up times."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from rtl_kernels.backends.triton_kernels.cases import Layer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks import gpu_bench  # noqa: E402

SMALL = (
    Layer("linear", 6, 5, 12, masks=3),
    Layer("conv", 4, 3, 6, (5, 5), 3, 2, masks=2),
    Layer("depthwise", 4, 4, 6, (5, 5), 3, groups=4, masks=2),
)


class Timer:
    """Runs what it is given once and says that it took a microsecond longer than the one before."""

    def __init__(self) -> None:
        self.calls = 0
        self.launches: list[str] = []

    def __call__(self, call, graph) -> list[float]:
        call()
        self.calls += 1
        self.launches.append("graph" if graph else "eager")
        return [float(self.calls)] * 10


def test_every_contender_is_checked_timed_and_reported(tmp_path):
    out, timer = tmp_path / "deep" / "measured.json", Timer()
    report = gpu_bench.collect(out, SMALL, ["float32"], [0.5], "cpu", timer)
    assert json.loads(out.read_text()) == report
    rows = report["rows"]
    assert {row["layer"] for row in rows} == {"linear", "conv", "depthwise"}
    assert {"dense", "loop", "loop_cached"} <= {row["contender"] for row in rows}
    assert {row["mode"] for row in rows} == {"forward", "train"}
    assert {row["launch"] for row in rows} == {"graph", "eager"}
    assert [row["launch"] for row in rows] == timer.launches
    assert all(row["mode"] == "forward" for row in rows if row["contender"] == "loop_cached")
    assert timer.calls == len(rows)
    first = [row for row in rows if row["layer"] == "linear"]
    assert [row["microseconds"] for row in first] == list(range(1, len(first) + 1))
    assert [(row["contender"], row["ratio_to_dense"]) for row in first[:8]] == [
        *[("dense", 1.0)] * 4,
        ("loop", 5.0),  # graph, forward: 5 after 1
        ("loop", 3.0),
        ("loop", 2.333),
        ("loop", 2.0),
    ]
    assert all((row["error"] is None) == (row["contender"] == "dense") for row in rows)
    assert all(row["error"] is None or row["error"] < 1e-5 for row in rows)
    table = out.with_suffix(".md").read_text()
    assert table.count("\n| linear | float32 | 0.5 |") == 4
    assert "| linear | float32 | 0.5 | forward | 1.0 | 5.00 | 9.00 |" in table
    assert sorted(p.name for p in out.parent.iterdir()) == ["measured.json", "measured.md"]


def test_the_grouped_product_is_a_contender_in_bfloat16(tmp_path):
    layer = Layer("linear", 16, 8, 12, masks=3)
    report = gpu_bench.collect(tmp_path / "measured.json", [layer], ["bfloat16"], [0.5], "cpu", Timer())
    rows = [row for row in report["rows"] if row["contender"] == "grouped_mm"]
    assert [row["mode"] for row in rows] == ["forward"] * 2
    assert all(0 < row["error"] < 3e-2 for row in rows)


def test_it_goes_on_where_it_was(tmp_path):
    out = tmp_path / "measured.json"

    def interrupted(call, graph) -> list[float]:
        if out.exists():
            raise KeyboardInterrupt
        return [1.0]

    with pytest.raises(KeyboardInterrupt):
        gpu_bench.collect(out, SMALL, ["float32"], [0.5], "cpu", interrupted)
    assert {row["layer"] for row in json.loads(out.read_text())["rows"]} == {"linear"}
    timer = Timer()
    report = gpu_bench.collect(out, SMALL, ["float32"], [0.5], "cpu", timer)
    assert {row["layer"] for row in report["rows"]} == {"linear", "conv", "depthwise"}
    assert timer.calls == sum(row["layer"] != "linear" for row in report["rows"])


def test_a_report_of_another_machine_is_begun_anew(tmp_path):
    out = tmp_path / "measured.json"
    out.write_text(json.dumps({"environment": {"device": "another"}, "rows": [{"layer": "linear"}]}))
    report = gpu_bench.collect(out, SMALL[:1], ["float32"], [0.5], "cpu", Timer())
    assert all("microseconds" in row for row in report["rows"])


def test_a_wrong_contender_ends_the_run(tmp_path, monkeypatch):
    right = gpu_bench.contenders
    monkeypatch.setattr(
        gpu_bench, "contenders", lambda problem: [*right(problem), ("wrong", lambda x, w: problem.dense(x, w))]
    )
    with pytest.raises(RuntimeError, match=r"wrong is off by .* on linear"):
        gpu_bench.collect(tmp_path / "measured.json", SMALL, ["float32"], [0.5], "cpu", Timer())


def test_tf32_is_what_its_name_says():
    try:
        for name, rounded in (("tf32", True), ("float32", False)):
            assert gpu_bench.set_arithmetic(name) == torch.float32
            assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == rounded
    finally:
        gpu_bench.set_arithmetic("float32")


def test_the_cases_hold_few_and_many_rows_a_mask():
    rows = {layer.rows // layer.masks for layer in gpu_bench.CASES if not layer.size}
    assert {1, 4, 16, 32} <= rows
    assert len({layer.name for layer in gpu_bench.CASES}) == len(gpu_bench.CASES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    run = subprocess.run([sys.executable, "-m", "benchmarks.gpu_bench"], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 2
    assert run.stderr.startswith("no CUDA device")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_it_measures_a_gpu(tmp_path):
    report = gpu_bench.collect(
        tmp_path / "measured.json", SMALL, ["float16"], [0.5], "cuda", partial(gpu_bench.device_times, repeats=3)
    )
    assert all(row["microseconds"] > 0 for row in report["rows"])
