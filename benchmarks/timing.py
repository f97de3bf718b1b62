"""Times of several contenders, taken in turn so that what disturbs one disturbs all."""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

Run = Callable[[], object]

# A block is timed as a whole: one call, or as many as take this long, so that the clock's own cost does not count.
BLOCK_SECONDS = 1e-4
# Calls shorter than this are made untimed for as long before their block: it then meets the caches and predictors that
# the contender leaves itself. Otherwise a figure depends on who ran before, so on who else is measured (measured: at
# 0.2 ms a call by a third).
LEAD_IN_SECONDS = 1e-3
FEWEST_ROUNDS = 5
# Whose block takes more than this many times the first contender's, lead-in included, sits out rounds, but is timed in
# at least three.
FACTOR_OF_ROUNDS = 10
FEWEST_BLOCKS = 3


class SkippedError(Exception):
    """A contender cannot or should not be measured on a case; the message says why."""


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median and quartiles over `blocks` blocks of `calls` calls each."""

    median: float
    low: float
    high: float
    blocks: int
    calls: int


class RoundRobin:
    """Contenders timed in rounds: in every round each one once, in an order drawn anew.

    One thread is timed by its own CPU clock, which stands still while another process has the core; several by wall
    clock. Garbage is collected before the rounds, not in them.

    Args:
        runs: contenders by name, the one that sets the measure (dense) first. Each is called twice here, to warm up
            and to see how long it takes.
        limit: seconds a call; who takes longer is not timed.

    Attributes:
        skipped: name -> why, of those that are not timed.
    """

    def __init__(self, runs: Mapping[str, Run], limit: float = math.inf) -> None:
        self.skipped: dict[str, str] = {}
        self._clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        self._runs: dict[str, Run] = {}
        self._calls: dict[str, int] = {}
        self._lead_in: dict[str, int] = {}  # calls
        self._expected: dict[str, float] = {}  # seconds a block, with what leads in
        for name, run in runs.items():
            run()
            seconds = self._block(run, 1)
            if seconds > limit:
                self.skipped[name] = f"one call takes {seconds:.1f} s, over the limit of {limit:g} s"
                continue
            calls = math.ceil(BLOCK_SECONDS / max(seconds, 1e-9))
            self._runs[name], self._calls[name] = run, calls
            self._lead_in[name] = int(LEAD_IN_SECONDS / max(seconds, 1e-9))
            self._expected[name] = seconds * (calls + self._lead_in[name])
        first = next(iter(self._expected.values()), math.inf)
        self._every = {
            name: max(1, round(seconds / (FACTOR_OF_ROUNDS * first))) for name, seconds in self._expected.items()
        }
        self._blocks: dict[str, list[float]] = {name: [] for name in self._runs}
        self._order = list(self._runs)
        self._random = random.Random(0)
        self._round = 0
        gc.collect()

    @property
    def clock(self) -> str:
        return "CPU time of the thread" if self._clock is time.thread_time else "wall time"

    def rounds(self, seconds: float) -> int:
        """How many rounds take about `seconds`, with no contender timed too rarely."""
        a_round = sum(block / self._every[name] for name, block in self._expected.items())
        fewest = max(FEWEST_ROUNDS, (FEWEST_BLOCKS - 1) * max(self._every.values(), default=1) + 1)
        return max(fewest, int(seconds / max(a_round, 1e-9)))

    def round(self) -> None:
        self._random.shuffle(self._order)
        for name in self._order:
            if self._round % self._every[name] == 0:
                for _ in range(self._lead_in[name]):
                    self._runs[name]()
                self._blocks[name].append(self._block(self._runs[name], self._calls[name]) / self._calls[name])
        self._round += 1

    def timings(self) -> dict[str, Timing]:
        result = {}
        for name in self._runs:
            low, median, high = np.percentile(self._blocks[name], (25, 50, 75)).tolist()
            result[name] = Timing(median, low, high, len(self._blocks[name]), self._calls[name])
        return result

    def _block(self, run: Run, calls: int) -> float:
        start = self._clock()
        for _ in range(calls):
            run()
        return self._clock() - start
