"""Whole networks: every case, sparsity and mode, all contenders in turn. Started by `python -m benchmarks`."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import networks
from benchmarks.cases import NETWORK_SPARSITIES, NETWORKS
from benchmarks.harness import MODES, Settings, measure


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sparsity", NETWORK_SPARSITIES)
@pytest.mark.parametrize("case", NETWORKS)
def test_network(benchmark: Any, settings: Settings, case: str, sparsity: float, mode: str) -> None:
    problem = networks.Problem(NETWORKS[case], sparsity, training=mode == "training")
    runs, skipped = networks.build(problem, settings.chosen(networks.CONTENDERS))
    measure(benchmark, runs, skipped, settings, {"case": case, "sparsity": sparsity, "mode": mode})
