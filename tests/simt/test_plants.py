"""The checker is checked: bugs planted in the kernels (RTL_PLANT in csrc/cuda) are each caught, and by the right one.

EXPECTED names, for every kernel and every bug that it can have, the rung that has to catch it and the report it has to
make. What a kernel does not have is not listed: a kernel without asynchronous copies cannot forget to wait for them.
"""

from __future__ import annotations

import os

import pytest
import simt_harness as simt

# A race is a race whether or not a value came out wrong, so barriers are ThreadSanitizer's: eager copies where the bug
# is to overwrite what is still in use, lazy ones where it is to read too soon.
_BEFORE_USE = ("tsan", "skew", "lazy", "race")
_BEFORE_REUSE = ("tsan", "skew", "eager", "race")
_WAIT = ("asan", "forward", "lazy", "copy wait")
_DIVERGENT = ("asan", "forward", "lazy", "divergence")
_PLAIN_ADD = ("tsan", "skew", "lazy", "race")
_PAST = ("asan", "forward", "lazy", "poisoned")
_WRONG = ("asan", "forward", "lazy", "reference")
_OVERFLOW = ("asan", "forward", "lazy", "overflow")

_BY_PLANT = {
    1: _BEFORE_USE,
    2: _BEFORE_REUSE,
    3: _WAIT,
    4: _DIVERGENT,
    5: _PLAIN_ADD,
    6: _PAST,
    7: _WRONG,
    8: _WRONG,
    9: _OVERFLOW,
}
_PLANTS = {
    "gemm_forward": [1, 2, 3, 4, 6, 7, 8, 9],
    "gemm_grad_input": [1, 2, 3, 4, 6, 7, 8, 9],
    "gemm_grad_weight": [1, 2, 3, 6, 7, 8, 9],
    "grad_bias": [1, 2, 5, 6, 8, 9],
    "small_forward": [1, 4, 6, 7, 8, 9],
    "small_grad_input": [1, 2, 4, 5, 6, 7, 8, 9],
    "depthwise_forward": [1, 2, 4, 6, 7, 8, 9],
    "depthwise_grad_input": [1, 2, 4, 6, 7, 8, 9],
    "depthwise_grad_weight": [1, 2, 4, 5, 6, 7, 8, 9],
    "tile_summary": [4, 7, 9],
}
EXPECTED = {(family, plant): _BY_PLANT[plant] for family, plants in _PLANTS.items() for plant in plants}


@pytest.mark.parametrize(
    ("family", "plant"), EXPECTED, ids=[f"{family}-{simt.PLANTS[plant]}" for family, plant in EXPECTED]
)
def test_planted_bug_is_caught(family: str, plant: int) -> None:
    mode, order, copies, report = EXPECTED[family, plant]
    size = "huge" if plant == 9 else "tiny"
    options = ["--kernel", family, "--size", size, "--order", order, "--copies", copies]
    result = simt.run(mode, *options, "--plant", str(plant))
    assert simt.caught(result) == report, result.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("RTL_VERIFY_GPU"), reason="takes minutes: set RTL_VERIFY_GPU=1")
def test_planted_when_compiled() -> None:
    """-DPLANT=n in place of the runtime choice."""
    wrong = simt.run("plain", "--size", "tiny", "--kernel", "gemm_forward", plant="7")
    assert simt.caught(wrong) == "reference", wrong.stderr[-2000:]


def test_every_kernel_has_its_planted_bugs() -> None:
    names = [line.split()[0] for line in simt.run("plain", "--list").stdout.splitlines()]
    assert len(names) > 60
    for name in names:
        assert [family for family in _PLANTS if name.startswith(family)], name


def test_every_bug_is_planted_in_some_kernel() -> None:
    assert {plant for _, plant in EXPECTED} == set(simt.PLANTS)


def test_sources_without_plants_have_none() -> None:
    """RTL_PLANT(n, good, bad) is `good` alone unless PLANT is defined, and nothing in the sources defines it."""
    for path in simt.CUDA.iterdir():
        assert "define PLANT" not in path.read_text(), path
