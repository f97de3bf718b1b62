"""Single layers: every case, sparsity and mode, all contenders in turn. Started by `python -m benchmarks`."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import contenders
from benchmarks.cases import CASES, SMALL, SMALL_SPARSITIES, SPARSITIES
from benchmarks.harness import MODES, Settings, measure

POINTS = [(name, s) for name in CASES for s in SPARSITIES] + [(name, s) for name in SMALL for s in SMALL_SPARSITIES]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("case", "sparsity"), POINTS)
def test_operator(benchmark: Any, settings: Settings, case: str, sparsity: float, mode: str) -> None:
    problem = contenders.Problem({**CASES, **SMALL}[case], sparsity, training=mode == "training")
    runs, skipped = contenders.build(problem, settings.chosen(contenders.CONTENDERS))
    measure(benchmark, runs, skipped, settings, {"case": case, "sparsity": sparsity, "mode": mode})
