"""Measure ours against everything else PyTorch offers: `python -m benchmarks`."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import contenders, networks, roofline
from benchmarks.cases import CASES, NETWORK_SPARSITIES, NETWORKS, SMALL, SMALL_SPARSITIES, SPARSITIES
from benchmarks.harness import MODES, Settings, environment
from benchmarks.summary import show, summarise, write_results
from rtl.errors import InputError
from rtl.progress import Progress
from rtl.workers import ALLOCATOR

ROOT = Path(__file__).parents[1]
UNFINISHED = ROOT / "runs" / "benchmarks" / "unfinished"
SUITES = {name: "operators" for name in (*CASES, *SMALL)} | {name: "networks" for name in NETWORKS}

# The reduced set: every case in inference, and in training the two that the kernels' goals are stated for.
REDUCED_TRAINING = ("linear 256, 512→512, K8", "conv 3×3 64→64, 32×32, B64, K4", *NETWORKS)
REDUCED_CONTENDERS = ("ours", "ours, fused", "loop", "loop, cached")
REDUCED_SECONDS = 1.0

_DESCRIPTION = """Times of the masked operators and of whole networks, and of everything else a mixed batch can be
computed with, in units of the dense layer. Contenders of a case run in turn, after each was checked against float64;
all under the same threads and allocator settings. An interrupted run goes on where it was; results are written after
each case, as unfinished.
"""
_EXAMPLE = """example:
  $ python -m benchmarks --reduced                     # what `make bench` runs: under ten minutes
  $ python -m benchmarks --case "conv 3×3" --contender ours --contender untied --mode training --seconds 1
  $ python -m benchmarks --threads 1 2 --out benchmarks/results    # everything, hours, and its results kept
"""


@dataclasses.dataclass(frozen=True)
class Stage:
    """What one process measures: a case in one mode, at all its sparsities or those given."""

    case: str
    mode: str
    settings: Settings
    sparsities: tuple[float, ...] | None

    @property
    def label(self) -> str:
        return f"{self.case}, {self.mode}, {self.settings.threads} thread{'s' * (self.settings.threads > 1)}"

    def command(self, output: Path) -> list[str]:
        settings = self.settings
        file = Path(__file__).with_name(f"bench_{SUITES[self.case]}.py")
        options = [f"--case={self.case}", f"--mode={self.mode}", f"--threads={settings.threads}"]
        options += [f"--seconds={settings.seconds}", f"--limit={settings.limit}"]
        options += [f"--contender={name}" for name in settings.contenders or ()]
        options += [f"--sparsity={sparsity}" for sparsity in self.sparsities or ()]
        options += ["--benchmark-disable-gc", f"--benchmark-json={output}", "-p", "no:cacheprovider", "-q"]
        return [sys.executable, "-m", "pytest", str(file), f"--rootdir={ROOT}", *options]


def sparsities(case: str) -> tuple[float, ...]:
    return SPARSITIES if case in CASES else SMALL_SPARSITIES if case in SMALL else NETWORK_SPARSITIES


def stages(options: argparse.Namespace) -> Iterator[Stage]:
    """What there is to measure, in order. Raises InputError if that is nothing."""
    known = [name for name in SUITES if any(text in name for text in options.case)]
    if not known:
        raise InputError(f"case is {options.case}, but the cases are {'; '.join(SUITES)}")
    if options.sparsity is not None:
        known = [name for name in known if set(options.sparsity) & set(sparsities(name))]
        if not known:
            raise InputError(f"sparsity is {options.sparsity}, which none of the chosen cases is measured at")
    for threads in options.threads:
        settings = Settings(threads, options.contender and tuple(options.contender), options.seconds, options.limit)
        for mode in options.mode:
            for name in known:
                if not options.reduced or mode == "inference" or name in REDUCED_TRAINING:
                    yield Stage(name, mode, settings, options.sparsity and tuple(options.sparsity))


def place(stage: Stage, state: str) -> Path:
    """Where a stage's report is kept until the run is finished: other code, torch or machine, another place."""
    return UNFINISHED / f"{hashlib.sha256(f'{stage} {state}'.encode()).hexdigest()[:16]}.json"


def run(stage: Stage, finished: Path) -> dict[str, Any]:
    """Measure a stage in a process of its own, unless its report is there."""
    if not finished.exists():
        UNFINISHED.mkdir(parents=True, exist_ok=True)
        partial = finished.with_suffix(".new")
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        fixed = {**os.environ, **environment(stage.settings.threads), "PYTHONPATH": paths}
        done = subprocess.run(stage.command(partial), env=fixed, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{stage.label} failed:\n{(done.stdout + done.stderr)[-6000:]}")
        os.replace(partial, finished)
    report: dict[str, Any] = json.loads(finished.read_text())
    return report


def state_of_code(folders: Sequence[str] = ("rtl_kernels", "benchmarks", "rtl/models")) -> str:
    """A digest of what decides the figures: kernels, benchmarks, torch and machine."""
    settings = torch.__version__, torch.backends.cpu.get_cpu_capability(), ALLOCATOR
    digest = hashlib.sha256(str(settings).encode())
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in (".py", ".so"):
                digest.update(file.read_bytes())
    return digest.hexdigest()


def merge(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One report of the processes' reports: the first's machine, versions and date, and all measurements."""
    return {**reports[0], "benchmarks": [entry for report in reports for entry in report["benchmarks"]]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0; 1 if a contender is wrong or a process fails; 2 for bad input; 130 if interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = parse(arguments)
        measure(options, shlex.join(["python", "-m", "benchmarks", *arguments]))
    except InputError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("benchmarks: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    names = list(dict.fromkeys([*contenders.CONTENDERS, *networks.CONTENDERS]))
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=_DESCRIPTION,
        epilog=_EXAMPLE + "\ncontenders:\n" + "".join(f"  {name:<14}{_what(name)}\n" for name in names),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    defaults = Settings()
    parser.add_argument("--reduced", action="store_true", help="fewer contenders, less training, shorter")
    parser.add_argument("--case", action="append", metavar="TEXT", help="cases with this in their name (default: all)")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument(
        "--contender", action="append", choices=names, metavar="NAME", help="besides dense (default: all below)"
    )
    parser.add_argument("--sparsity", type=float, nargs="+", help="of those the case has (default: all)")
    parser.add_argument("--threads", type=int, nargs="+", default=[defaults.threads], metavar="N", help="default: 1")
    parser.add_argument(
        "--seconds", type=float, help=f"a measurement (default {defaults.seconds:g}, reduced {REDUCED_SECONDS:g})"
    )
    parser.add_argument("--limit", type=float, default=defaults.limit, help="seconds a call at most (default 5)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where JSON and summary.json go (default: nowhere)")
    options = parser.parse_args(arguments)
    options.case = options.case or [""]
    if options.contender is None and options.reduced:
        options.contender = list(REDUCED_CONTENDERS)
    if options.seconds is None:
        options.seconds = REDUCED_SECONDS if options.reduced else defaults.seconds
    for name, value in (("threads", min(options.threads)), ("seconds", options.seconds), ("limit", options.limit)):
        if value <= 0:
            raise InputError(f"{name} is {value}, expected more than 0")
    if options.out is not None:  # what is measured in hours has to have a place
        try:
            options.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"out is {str(options.out)!r}, expected a folder ({error})") from error
    return options


def _what(name: str) -> str:
    contender = contenders.CONTENDERS.get(name) or networks.CONTENDERS[name]
    return (contender.__doc__ or "").strip()


def measure(options: argparse.Namespace, command: str) -> None:
    """Run all stages, print the table, and keep the results if asked to, after each stage."""
    todo = list(stages(options))
    if not todo:
        raise InputError(f"case is {options.case}, of which --reduced measures none in mode {', '.join(options.mode)}")
    state = state_of_code()
    reports: dict[str, list[dict[str, Any]]] = {}
    with Progress().task("benchmarks", len(todo)) as progress:
        for number, stage in enumerate(todo, 1):
            report = run(stage, place(stage, state))
            reports.setdefault(f"{SUITES[stage.case]}-{stage.settings.threads}", []).append(report)
            merged = {name: merge(parts) for name, parts in reports.items()}
            unfinished = f"{number} of {len(todo)} cases are measured" if number < len(todo) else None
            peaks = "measured at the end" if unfinished else roofline.measure()
            summary = summarise(merged.values(), command, peaks, unfinished)
            if options.out is not None:
                write_results(options.out, merged, summary)
            progress.advance(note=stage.label)
    for stage in todo:
        place(stage, state).unlink(missing_ok=True)
    show(summary)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the process that measures must not outlive this one
    sys.exit(main())
