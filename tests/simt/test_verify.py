"""benchmarks/gpu_verify.py: what it keeps, and when it runs a test again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks import gpu_verify


def test_it_goes_on_where_it_was_and_begins_anew_with_other_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, ran = tmp_path / "verify.json", []

    def runner(test: str) -> tuple[str, float, str]:
        if test == "c" and "c" not in ran:
            ran.append(test)
            return "failed", 1.0, "why"
        ran.append(test)
        return "passed", 2.0, ""

    gpu_verify.verify(path, ["a", "b"], 1, runner)
    assert ran == ["a", "b"]
    report = gpu_verify.verify(path, ["a", "b", "c"], 1, runner)
    assert ran == ["a", "b", "c"]
    assert [row["outcome"] for row in report["rows"]] == ["passed", "passed", "failed"]
    report = gpu_verify.verify(path, ["a", "b", "c"], 1, runner)
    assert ran == ["a", "b", "c", "c"]
    assert {row["outcome"] for row in report["rows"]} == {"passed"}
    assert json.loads(path.read_text()) == report
    monkeypatch.setattr(gpu_verify, "sources", lambda: "others")
    assert gpu_verify.verify(path, ["a"], -1, runner)["rows"] == []  # no time left
    assert [row["test"] for row in gpu_verify.verify(path, ["a"], 1, runner)["rows"]] == ["a"]
    assert [file.name for file in tmp_path.iterdir()] == ["verify.json"]


def test_a_failing_test_is_told_from_a_passing_and_a_skipped_one(tmp_path: Path) -> None:
    path = tmp_path / "test_three.py"
    path.write_text(
        "import os, pytest\n"
        "def test_good(): assert os.environ['RTL_VERIFY_GPU'] == '1'\n"
        "def test_bad(): assert False\n"
        "def test_absent(): pytest.skip('no tool')\n"
    )
    outcomes = {name: gpu_verify.run(f"{path}::test_{name}")[0] for name in ("good", "bad", "absent")}
    assert outcomes == {"good": "passed", "bad": "failed", "absent": "skipped"}
