"""benchmarks/gpu_verify.py: what it keeps, and when it runs a test again."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks import gpu_verify
from benchmarks.gpu_verify import Row

CUDA, TRITON = "tests/simt/test_x.py::", "tests/kernels/test_triton.py::"


def test_it_goes_on_where_it_was_and_runs_anew_what_a_changed_source_belongs_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, ran = tmp_path / "verify.json", []
    monkeypatch.setattr(gpu_verify, "TOGETHER", 1)

    def runner(tests: list[str]) -> list[Row]:
        rows = [Row(test, "failed" if test.endswith("c") and test not in ran else "passed", 1.0, "") for test in tests]
        ran.extend(tests)
        return rows

    def verify(*names: str, minutes: float = 1) -> list[str]:
        ran_before = len(ran)
        with ThreadPoolExecutor(1) as pool:
            rows = gpu_verify.verify(path, names, minutes, pool, 1, runner)
        assert json.loads(path.read_text())["rows"] == rows
        return ran[ran_before:]

    a, b, c = CUDA + "a", TRITON + "b", CUDA + "c"
    assert verify(a, b) == [a, b]
    assert verify(a, b, c) == [c]
    assert [row["outcome"] for row in gpu_verify.read(path)] == ["passed", "passed", "failed"]
    assert verify(a, b, c) == [c]
    assert verify(a, b, c) == []
    digests = {"cuda": "changed", "triton": gpu_verify.digest("triton")}
    monkeypatch.setattr(gpu_verify, "digest", digests.__getitem__)
    assert [row["test"] for row in gpu_verify.read(path)] == [b]
    with ThreadPoolExecutor(1) as pool:
        assert [row["test"] for row in gpu_verify.verify(path, [a, b], -1, pool, 1, runner)] == [b]  # no time left
    assert verify(a, b, c) == [a, c]
    assert [file.name for file in tmp_path.iterdir()] == ["verify.json"]


def test_every_test_there_is_belongs_to_a_suite_whose_sources_exist() -> None:
    for suite in gpu_verify.SUITES.values():
        assert all((gpu_verify.ROOT / path).exists() for path in (*suite.tests, *suite.sources))
    assert gpu_verify.suite_of(TRITON + "a") == "triton"


def test_a_failing_test_is_told_from_a_passing_and_a_skipped_one(tmp_path: Path) -> None:
    path = tmp_path / "test_four.py"
    path.write_text(
        "import os, pytest\n"
        "def test_good(): assert os.environ['RTL_VERIFY_GPU'] == '1'\n"
        "def test_bad(): assert False, 'the reason'\n"
        "def test_absent(): pytest.skip('no tool')\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError\n"
        "def test_broken(broken): pass\n"
    )
    code = (
        "from benchmarks.gpu_verify import run\n"
        f"for row in run([{str(path)!r} + '::test_' + n for n in ('good', 'bad', 'absent', 'broken')]):\n"
        "    print(row.test.rpartition('_')[2], row.outcome, 'the reason' in row.output, row.seconds < 60)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=gpu_verify.ROOT, capture_output=True, text=True, check=True
    )
    assert ended.stdout.splitlines() == [
        "good passed False True",
        "bad failed True True",
        "absent skipped False True",
        "broken failed False True",
    ]
