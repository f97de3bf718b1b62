"""csrc/cuda on the CPU: every kernel against float64, under every schedule, with the sanitizers watching.

The default is a subset of two minutes. RTL_VERIFY_GPU=1 runs all of it: forward order and skew (three seeds) × lazy
and eager copies, up to 256³ as it is, up to 128³ under AddressSanitizer, UndefinedBehaviorSanitizer and
ThreadSanitizer. Nothing here has run on a GPU, and nothing here says how fast it would be.
"""

from __future__ import annotations

import os

import pytest
import simt_harness as simt

whole = pytest.mark.skipif(not os.environ.get("RTL_VERIFY_GPU"), reason="takes minutes: set RTL_VERIFY_GPU=1")

# In forward order a seed chooses nothing but the numbers.
SCHEDULES = [("forward", 0), ("skew", 1), ("skew", 2), ("skew", 3)]
ORDERS = pytest.mark.parametrize(("order", "seed"), SCHEDULES, ids=[f"{order}-{seed}" for order, seed in SCHEDULES])
COPIES = pytest.mark.parametrize("copies", ["lazy", "eager"])


def check(mode: str, *options: str) -> set[str]:
    """Runs to the end without a report; returns the kernels that took part."""
    result = simt.run(mode, *options)
    assert simt.caught(result) is None, result.stderr[-4000:]
    assert "OK" in result.stdout
    return {line.split()[1] for line in result.stdout.splitlines() if line.startswith("RAN ")}


def test_every_kernel_runs() -> None:
    listed = {line.split()[0] for line in simt.run("asan", "--list").stdout.splitlines()}
    assert check("asan", "--size", "quick", "--order", "skew", "--copies", "lazy") == listed


def test_addresses_eager() -> None:
    check("asan", "--size", "tiny", "--order", "forward", "--copies", "eager", "--seed", "1")


def test_offsets_past_32_bits() -> None:
    check("asan", "--size", "huge")


def test_offsets_that_no_route_holds() -> None:
    check("asan", "--garbage")


@COPIES
def test_races(copies: str) -> None:
    check("tsan", "--size", "tiny", "--order", "skew", "--copies", copies, "--seed", "2")


def test_bits_depend_on_nothing_else() -> None:
    """Not on other groups, not on the tile's size, not on the schedule."""
    check("asan", "--invariance")


@whole
@pytest.mark.slow
@ORDERS
@COPIES
def test_whole(order: str, copies: str, seed: int) -> None:
    check("plain", "--size", "full", "--order", order, "--copies", copies, "--seed", str(seed))


@whole
@pytest.mark.slow
@ORDERS
@COPIES
@pytest.mark.parametrize("mode", ["asan", "tsan"])
def test_whole_under_sanitizers(mode: str, order: str, copies: str, seed: int) -> None:
    check(mode, "--size", "quick", "--order", order, "--copies", copies, "--seed", str(seed))


@whole
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 3))
def test_whole_bits(seed: int) -> None:
    check("plain", "--invariance", "--seed", str(seed))
