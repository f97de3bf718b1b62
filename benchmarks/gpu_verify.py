"""Everything that can be verified of the CUDA kernels without a GPU, kept as it passes: `make verify-gpu`.

    python -m benchmarks.gpu_verify [--minutes 20] [--only TEXT] [--shard 1/2]

Runs the tests of tests/simt one by one with RTL_VERIFY_GPU=1: every kernel on the emulator in every schedule, with and
without sanitizers, every planted bug, the compiled code of every architecture. What each came to, and how long it took,
goes to results/gpu_verify.json as soon as it is known. Started again it goes on where it was, and begins anew where a
source has changed. Ends with 0 if everything there is has passed.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "gpu_verify.json"
TESTS = "tests/simt"

_EXAMPLE = """example:
  $ python -m benchmarks.gpu_verify --minutes 20
  passed     12.3 s  tests/simt/test_emulation.py::test_every_kernel_runs
  ...
  107 of 107: 107 passed"""


def sources() -> str:
    """A digest of what the results are of: the kernels, their operators, the emulator and its tests."""
    digest = hashlib.sha256()
    files = [*(ROOT / "csrc" / "cuda").iterdir(), ROOT / "csrc" / "registration_cuda.cpp", *(ROOT / TESTS).iterdir()]
    for path in sorted(file for file in files if file.is_file()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def collected() -> list[str]:
    """Every test there is, by its pytest name."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-q", TESTS]
    listed = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True)
    if listed.returncode:
        raise RuntimeError(f"the tests cannot be collected:\n{listed.stdout}{listed.stderr}")
    return [line for line in listed.stdout.splitlines() if "::" in line]


def _environment() -> dict[str, str]:
    return os.environ | {"RTL_VERIFY_GPU": "1"}


def run(test: str) -> tuple[str, float, str]:
    """(passed, skipped or failed; seconds; what pytest printed) of one test."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", test]
    result = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    if result.returncode:
        return "failed", seconds, result.stdout + result.stderr
    return ("skipped" if " skipped" in result.stdout and " passed" not in result.stdout else "passed"), seconds, ""


def read(path: Path, of: str) -> dict[str, Any]:
    """The report at `path` if it is of these sources, else an empty one."""
    if path.exists():
        report: dict[str, Any] = json.loads(path.read_text())
        if report.get("sources") == of:
            return report
    return {"sources": of, "rows": []}


def write(path: Path, report: dict[str, Any]) -> None:
    """The report, whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("w") as file:
            json.dump(report, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def verify(path: Path, tests: list[str], minutes: float, runner: Any = run) -> dict[str, Any]:
    """Run what the report does not hold yet, until the time is up; a test that failed is run again."""
    of, end = sources(), time.monotonic() + 60 * minutes
    for test in tests:
        report = read(path, of)
        if any(row["test"] == test and row["outcome"] == "passed" for row in report["rows"]):
            continue
        if time.monotonic() > end:
            print(f"{minutes:g} minutes are up: start again to go on")
            break
        outcome, seconds, output = runner(test)
        print(f"{outcome:8} {seconds:8.1f} s  {test}\n{output}".rstrip(), flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)  # another shard may write as well
            report = read(path, of)
            report["date"] = datetime.now(timezone.utc).date().isoformat()
            report["machine"] = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
            rows = [row for row in report["rows"] if row["test"] != test]
            report["rows"] = [*rows, {"test": test, "outcome": outcome, "seconds": round(seconds, 1)}]
            write(path, report)
        finally:
            os.close(folder)
    return read(path, of)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_verify",
        description=__doc__,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=20, help="begin no test after this long (default 20)")
    parser.add_argument("--only", default="", metavar="TEXT", help="tests whose name contains TEXT")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="every Nth test, from the Ith on")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: benchmarks/results/gpu_verify.json")
    options = parser.parse_args()
    shard, shards = map(int, options.shard.split("/"))
    if not 1 <= shard <= shards:
        parser.error(f"--shard is {options.shard}, expected I/N with 1 <= I <= N")
    everything = collected()
    chosen = [test for test in everything if options.only in test][shard - 1 :: shards]
    report = verify(options.out, chosen, options.minutes)
    outcomes = Counter(row["outcome"] for row in report["rows"] if row["test"] in everything)
    print(f"{sum(outcomes.values())} of {len(everything)}: " + ", ".join(f"{n} {name}" for name, n in outcomes.items()))
    return 0 if outcomes["passed"] == len(everything) else 1


if __name__ == "__main__":
    sys.exit(main())
