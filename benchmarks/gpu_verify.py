"""Everything that can be verified of the GPU kernels without a GPU, kept as it passes: `make verify-gpu`.

    python -m benchmarks.gpu_verify [--minutes 20] [--workers 2] [--only TEXT]

Runs the tests of SUITES with RTL_VERIFY_GPU=1: every CUDA kernel on the emulator in every schedule, with and without
sanitizers, every planted bug, the Triton kernels interpreted, the compiled code of every architecture. What each came
to, and how long it took, goes to results/gpu_verify.json as soon as it is known. Started again it goes on where it was,
and runs anew what belongs to a source that has changed. Ends with 0 if everything there is has passed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import hashlib
import importlib.util
import io
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "gpu_verify.json"


class Suite(NamedTuple):
    tests: tuple[str, ...]
    sources: tuple[str, ...]  # what the tests are of, folders whole


SUITES = {
    "cuda": Suite(
        ("tests/simt",),
        (
            *("csrc/cuda", "csrc/registration_cuda.cpp", "rtl_kernels/backends/cuda.py"),
            *("tests/simt", "benchmarks/gpu_static_cuda.py"),
        ),
    ),
    "triton": Suite(
        ("tests/kernels/test_triton.py", "tests/kernels/test_triton_static.py"),
        (
            *("rtl_kernels/backends/triton_kernels", "rtl_kernels/backends/triton.py"),
            *("tests/kernels/test_triton.py", "tests/kernels/test_triton_static.py"),
            *("tests/kernels/triton_interpreter.py", "benchmarks/gpu_static.py"),
        ),
    ),
}
# As they are: run again in one process, pytest would escape names that it has escaped before.
NAMES = ("-o", "disable_test_id_escaping_and_forfeit_all_rights_to_community_support=true")
TOGETHER = 4  # tests that one call of pytest runs: it takes a moment to collect them

_EXAMPLE = """example:
  $ python -m benchmarks.gpu_verify --minutes 20
  passed     12.3 s  tests/simt/test_emulation.py::test_every_kernel_runs
  ...
  500 of 500: 500 passed, in 1234 s of processor time"""


class Row(NamedTuple):
    test: str
    outcome: str  # passed, skipped or failed
    seconds: float  # of processor time, of all processes that took part
    output: str  # of a test that failed


def digest(suite: str) -> str:
    """Of what a suite's results are of."""
    found = hashlib.sha256()
    for source in SUITES[suite].sources:
        path = ROOT / source
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if file.is_file():
                found.update(file.name.encode() + b"\0" + file.read_bytes())
    return found.hexdigest()[:16]


def suite_of(test: str) -> str:
    return next(name for name, suite in SUITES.items() if test.startswith(suite.tests))


def collected() -> list[str]:
    """Every test there is, by its pytest name."""
    tests = [test for suite in SUITES.values() for test in suite.tests]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-q", *NAMES, *tests]
    environment = os.environ | {"RTL_VERIFY_GPU": "1", "PYTHONUTF8": "1"}
    listed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8")
    if listed.returncode:
        raise RuntimeError(f"the tests cannot be collected:\n{listed.stdout}{listed.stderr}")
    return [line for line in listed.stdout.splitlines() if "::" in line]


def _processor_time() -> float:
    """Of this process and of those it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


class _Recorder:
    """A pytest plugin that keeps what became of every test."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._begin, self._outcome, self._output = _processor_time(), "passed", ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self._outcome, self._output = "failed", self._output + report.longreprtext
        elif report.skipped:
            self._outcome = "skipped"

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.rows.append(Row(nodeid, self._outcome, _processor_time() - self._begin, self._output))


def run(tests: Sequence[str]) -> list[Row]:
    """What becomes of tests, in this process."""
    import pytest

    os.environ["RTL_VERIFY_GPU"] = "1"
    os.chdir(ROOT)
    recorder, printed = _Recorder(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = pytest.main(["-p", "no:cacheprovider", "-q", *NAMES, *tests], plugins=[recorder])
    if len(recorder.rows) != len(tests) or code not in (0, 1, 5):
        raise RuntimeError(f"pytest ended with {code!r} on {tests}:\n{printed.getvalue()}")
    return recorder.rows


def versions() -> dict[str, str | None]:
    """Of what compiled and ran the kernels; None for what is not there."""

    from benchmarks import gpu_static_cuda as static

    gcc = None
    if shutil.which("g++"):
        gcc = subprocess.run(["g++", "-dumpfullversion"], capture_output=True, text=True, check=True).stdout.strip()
    triton = metadata.version("triton") if importlib.util.find_spec("triton") else None
    return {
        "g++": gcc,
        "nvcc": static.version() if static.find_tool("nvcc") else None,
        "triton": triton,
        "torch": metadata.version("torch"),
        "python": platform.python_version(),
    }


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of the report at `path` that are of the sources as they are now."""
    if not path.exists():
        return []
    report = json.loads(path.read_text(encoding="utf-8"))
    current = {name for name in SUITES if report["sources"][name] == digest(name)}
    return [row for row in report["rows"] if suite_of(row["test"]) in current]


def write(path: Path, rows: Iterable[dict[str, Any]], sources: dict[str, str]) -> None:
    """The report, whole or not at all."""
    report = {
        "command": "make verify-gpu",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": versions(),
        "sources": sources,
        "rows": list(rows),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("w", encoding="utf-8") as file:
            json.dump(report, file, indent=1, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def verify(
    path: Path, tests: Sequence[str], minutes: float, pool: concurrent.futures.Executor, workers: int, runner: Any = run
) -> list[dict[str, Any]]:
    """Run what the report does not hold yet, until the time is up; a test that failed is run again."""
    end = time.monotonic() + 60 * minutes
    sources = {name: digest(name) for name in SUITES}  # as they are at the beginning
    rows = {row["test"]: row for row in read(path)}
    left = [test for test in tests if rows.get(test, {}).get("outcome") != "passed"]
    batches = iter([left[i : i + TOGETHER] for i in range(0, len(left), TOGETHER)])
    running: set[concurrent.futures.Future[list[Row]]] = set()
    while True:
        while len(running) < workers and time.monotonic() < end and (batch := next(batches, None)):
            running.add(pool.submit(runner, batch))
        if not running:
            break
        done, running = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
        for row in (row for future in done for row in future.result()):
            print(f"{row.outcome:8} {row.seconds:8.1f} s  {row.test}\n{row.output}".rstrip(), flush=True)
            rows[row.test] = {"test": row.test, "outcome": row.outcome, "seconds": round(row.seconds, 1)}
        write(path, rows.values(), sources)
    if next(batches, None):
        print(f"{minutes:g} minutes are up: start again to go on")
    return list(rows.values())


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_verify",
        description=__doc__,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=20, help="begin no test after this long (default 20)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--only", default="", metavar="TEXT", help="tests whose name contains TEXT")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: benchmarks/results/gpu_verify.json")
    options = parser.parse_args()
    everything = collected()
    chosen = [test for test in everything if options.only in test]
    with concurrent.futures.ProcessPoolExecutor(options.workers) as pool:
        rows = verify(options.out, chosen, options.minutes, pool, options.workers)
    there = [row for row in rows if row["test"] in set(everything)]
    outcomes, seconds = Counter(row["outcome"] for row in there), sum(row["seconds"] for row in there)
    counts = ", ".join(f"{n} {name}" for name, n in outcomes.items())
    print(f"{len(there)} of {len(everything)}: {counts}, in {seconds:.0f} s of processor time")
    return 0 if outcomes["passed"] == len(everything) else 1


if __name__ == "__main__":
    sys.exit(main())
