"""Options of the benchmarks, and the environment they insist on. `python -m benchmarks` starts them with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.harness import MODES, Settings, why_not_fixed
from rtl.report import environment


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks", "benchmarks of rtl_kernels (started by python -m benchmarks)")
    defaults = Settings()
    group.addoption("--case", action="append", help="only the case of this name; may be repeated")
    group.addoption("--sparsity", action="append", type=float, help="only this sparsity; may be repeated")
    group.addoption("--mode", action="append", choices=MODES, help="only this mode; may be repeated")
    group.addoption("--contender", action="append", help="only this contender, and dense; may be repeated")
    group.addoption("--seconds", type=float, default=defaults.seconds, help="for the rounds of one measurement")
    group.addoption("--limit", type=float, default=defaults.limit, help="seconds a call; slower contenders are skipped")
    group.addoption("--threads", type=int, default=defaults.threads, help="threads of every contender")


def pytest_configure(config: pytest.Config) -> None:
    threads = config.getoption("threads")
    missing = why_not_fixed(threads)
    if missing is not None:
        raise pytest.UsageError(f"the environment lacks {missing}: start the benchmarks with python -m benchmarks")
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        parameters = item.callspec.params  # type: ignore[attr-defined]
        kept = all(
            wanted is None or value in wanted
            for wanted, value in (
                (config.getoption("case"), parameters["case"]),
                (config.getoption("sparsity"), parameters["sparsity"]),
                (config.getoption("mode"), parameters["mode"]),
            )
        )
        (chosen if kept else others).append(item)
    items[:] = chosen
    config.hook.pytest_deselected(items=others)


@pytest.fixture
def settings(request: pytest.FixtureRequest) -> Settings:
    option = request.config.getoption
    contenders = option("contender")
    return Settings(
        option("threads"), None if contenders is None else tuple(contenders), option("seconds"), option("limit")
    )


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """The machine and the versions, without its name in somebody's network."""
    machine_info.clear()
    machine_info.update(
        environment(), instructions=torch.backends.cpu.get_cpu_capability(), threads=torch.get_num_threads()
    )


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    kept = {key: commit_info.get(key) for key in ("id", "time", "dirty")}
    commit_info.clear()
    commit_info.update(kept)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Leave out the single rounds' times, of no use and by far the longest part."""
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)
