"""What bench_operators.py and bench_networks.py share: which environment, which modes, and one interleaved measurement.

pytest-benchmark times one function at a time. Here that function is a ROUND, in which every contender of a case runs
once (timing.RoundRobin): its own statistics are of rounds, each contender's stand in `extra_info`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from benchmarks.timing import RoundRobin, Run
from rtl.workers import ALLOCATOR

MODES = ("inference", "training")
BASELINE = "dense"


def environment(threads: int) -> dict[str, str]:
    """What the process that measures has to be started with: the same for every contender, and as for rtl's workers."""
    return {**ALLOCATOR, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def why_not_fixed(threads: int) -> str | None:
    """What is missing of the fixed environment, in words, or None."""
    missing = {k: v for k, v in environment(threads).items() if os.environ.get(k) != v}
    return " ".join(f"{k}={v}" for k, v in missing.items()) or None


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a measurement is made.

    Attributes:
        contenders: names; None: all there are. dense is always among them.
        seconds: time for the rounds of one case, sparsity and mode; checks and warming up come on top.
        limit: seconds a call; contenders that take longer are skipped.
    """

    threads: int = 1
    contenders: tuple[str, ...] | None = None
    seconds: float = 3.0
    limit: float = 5.0

    def chosen(self, all_of_them: Iterable[str]) -> list[str]:
        wanted = self.contenders
        return [name for name in all_of_them if wanted is None or name == BASELINE or name in wanted]


def measure(
    benchmark: Any, runs: Mapping[str, Run], skipped: Mapping[str, str], settings: Settings, what: Mapping[str, Any]
) -> None:
    """Time contenders that were checked, and leave case, figures and reasons in `benchmark.extra_info`."""
    robin = RoundRobin(runs, settings.limit)
    benchmark.pedantic(robin.round, rounds=robin.rounds(settings.seconds), iterations=1)
    benchmark.extra_info.update(
        what,
        threads=torch.get_num_threads(),
        clock=robin.clock,
        contenders={name: dataclasses.asdict(timing) for name, timing in robin.timings().items()},
        skipped={**skipped, **robin.skipped},
    )
