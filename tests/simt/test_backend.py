"""The cuda backend on the CPU: its operators (csrc/registration_cuda.cpp) over the emulated kernels, held to the cases
that every backend is held to; and its dispatch rules, which need no GPU to be told.

Nothing here runs on a GPU.
"""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import pytest
import simt_harness as simt
import torch

import rtl_kernels as rk
from rtl_kernels import functional, testing
from rtl_kernels.backends import cuda

_NO_COMPILER = simt.why_not("plain")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _refusal(case: testing.Case, dtype: torch.dtype = torch.float32) -> str | None:
    lead = (case.num_masks,) if case.untied else ()
    return cuda.refusal(f"masked_{case.operation}", case.x, (*lead, *case.weight), dtype)


SUPPORTED = [case for case in testing.CASES if _refusal(case) is None]


@functools.cache
def _load() -> str:
    torch.ops.load_library(str(simt.build_backend()))
    cuda.register("emulated", "CPU")
    return "emulated"


@pytest.fixture(scope="session")
def library() -> str:
    if _NO_COMPILER is not None:
        pytest.skip(_NO_COMPILER)
    return _load()


@pytest.fixture
def emulated(library: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a backend that runs the CUDA kernels on CPU tensors."""
    backend = SimpleNamespace(
        name=library, supports=lambda operation, x, weight: cuda.refusal(operation, x.shape, weight.shape, x.dtype)
    )
    monkeypatch.setattr(functional, "BACKENDS", {**functional.BACKENDS, library: backend})
    return library


def case_named(operation: str, name: str) -> testing.Case:
    return next(c for c in testing.CASES if (c.operation, c.name) == (operation, name))


# ---- the suite of every backend


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SUPPORTED, ids=str)
def test_it_is_as_accurate_as_dense_passes(case: testing.Case, dtype: torch.dtype, emulated: str) -> None:
    example = testing.make(case, dtype)
    testing.assert_matches_separate_passes(example, testing.run(example, emulated))


def test_the_cases_it_runs_are_those_it_is_made_for() -> None:
    names = {(case.operation, case.name) for case in SUPPORTED}
    assert {name for operation, name in names if operation == "linear"} == {
        case.name for case in testing.CASES if case.operation == "linear"
    }
    assert {f"{o}-{n}" for o, n in names if o != "linear"} == {
        str(case) for case in testing.CASES if case.operation != "linear" and case.weight[1] == 1
    }


def test_any_layout_of_the_input_gives_the_same(emulated: str) -> None:
    for operation, name in (("linear", "ragged"), ("conv2d", "depthwise"), ("conv_transpose2d", "depthwise")):
        example = testing.make(case_named(operation, name))
        plain = testing.run(example, emulated)
        last = example.x.dim() - 1
        transposed = dataclasses.replace(
            example,
            x=example.x.transpose(0, last).contiguous().transpose(0, last),  # for planes: samples are neighbours
            dy=example.dy.transpose(0, last).contiguous().transpose(0, last),
            weight=example.weight.transpose(0, -1).contiguous().transpose(0, -1),
        )
        assert transposed.x.stride() != example.x.stride()
        testing.assert_matches_separate_passes(example, testing.run(transposed, emulated))
        testing.assert_bitwise(testing.run(transposed, emulated).y, plain.y)


def test_an_expanded_gradient_and_a_column_of_a_wider_input(emulated: str) -> None:
    example = testing.make(case_named("linear", "wide"))
    wide = torch.zeros(len(example.x), 512)
    wide[:, :300] = example.x
    x = wide[:, :300]
    assert x.stride() == (512, 1)
    weight = example.weight.clone().requires_grad_()
    y = example.function(x, weight, example.bank, example.route, example.bias, backend=emulated)
    y.sum().backward()
    ones = dataclasses.replace(example, dy=torch.ones_like(example.dy))
    expected = testing.run(ones, emulated)
    testing.assert_bitwise(y.detach(), expected.y)
    testing.assert_bitwise(weight.grad, expected.weight)


def test_tf32_only_on_request(emulated: str) -> None:
    example = testing.make(case_named("linear", "many-samples"))
    exact = testing.run(example, emulated)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        rounded = testing.run(example, emulated)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    for a, b in zip(exact, rounded, strict=True):
        torch.testing.assert_close(b, a, rtol=2e-2, atol=2e-2)
    assert not torch.equal(exact.y, rounded.y)


def test_tiles_that_hold_no_bit_are_skipped(emulated: str) -> None:
    """What lies under an empty tile is never multiplied: an infinite input there would spoil the sum."""
    masks = torch.zeros(1, 96, 128, dtype=torch.bool)
    masks[0, 70, 100] = True
    x = torch.ones(20, 128)
    x[:, :96] = float("inf")
    weight, bank, route = torch.full((96, 128), 2.0), rk.MaskBank.from_dense(masks), rk.Route.build([0] * 20, 1)
    y = rk.masked_linear(x, weight, bank, route, backend=emulated)
    expected = torch.zeros(20, 96)
    expected[:, 70] = 2
    testing.assert_bitwise(y[:, 64:], expected[:, 64:])
    masks[0, 70, 0] = True  # now the tile is taken, and its other rows' products with infinity are NaN
    y = rk.masked_linear(x, weight, rk.MaskBank.from_dense(masks), route, backend=emulated)
    assert y[:, 64:].isnan().any()


@pytest.mark.parametrize("name", ["untied", "depthwise-untied"])
def test_a_row_without_a_mask_gives_nan_where_weights_are_untied(name: str, emulated: str) -> None:
    example = testing.make(case_named("linear" if name == "untied" else "conv2d", name))
    batch = len(example.x)
    route = rk.Route.build([-1, *[k % 4 for k in range(batch - 1)]], 4)
    # The public function refuses it on the CPU, where looking costs nothing.
    operator = getattr(torch.ops.rtl_kernels, f"masked_{example.case.operation}_emulated").default
    geometry = ([2, 2], [1, 1, 1, 1], [1, 1], 4) if name == "depthwise-untied" else ()
    y = operator(example.x, example.weight, example.bank.words, route.offsets, route.order, 1, example.bias, *geometry)
    assert y.isnan().flatten(1).all(1).tolist() == [True] + [False] * (batch - 1)
    assert not y[1:].isnan().any()


@pytest.mark.parametrize("operation", ["linear", "conv2d"])
def test_tensors_that_do_not_fit_are_refused(operation: str, emulated: str) -> None:
    example = testing.make(case_named(operation, "ragged" if operation == "linear" else "depthwise"))
    operator = getattr(torch.ops.rtl_kernels, f"masked_{operation}_emulated").default
    geometry = () if operation == "linear" else ([1, 1], [1, 1, 1, 1], [1, 1], 9)
    words, offsets, order = example.bank.words, example.route.offsets, example.route.order

    def call(x=example.x, words=words, offsets=offsets, order=order, repeat=1):
        return operator(x, example.weight, words, offsets, order, repeat, None, *geometry)

    assert call().shape[0] == len(example.x)
    for wrong, message in (
        ({"words": words[:, :-1]}, "words do not fit the weight"),
        ({"words": words.long()}, "words do not fit the weight"),
        ({"offsets": offsets[:-1]}, "offsets do not fit the masks"),
        ({"order": order[:-1]}, "order does not fit the batch"),
        ({"repeat": 2}, "repeat is 2"),
        ({"x": example.x[:, :-1]}, "features" if operation == "linear" else "a whole number for each of 8"),
        ({"x": example.x.double()}, "dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(**wrong)


# ---- which calls it takes


def test_it_says_which_shapes_it_refuses() -> None:
    half = torch.float16
    assert cuda.refusal("masked_linear", (5, 3, 7), (2, 4, 7), half) is None
    assert "float64" in cuda.refusal("masked_linear", (5, 7), (4, 7), torch.float64)
    assert cuda.refusal("masked_conv2d", (5, 8, 6, 6), (16, 1, 3, 3), half) is None
    assert cuda.refusal("masked_conv2d", (5, 8, 6, 6), (4, 16, 1, 3, 3), half) is None  # untied
    assert "4 channels" in cuda.refusal("masked_conv2d", (5, 8, 6, 6), (16, 4, 3, 3), half)
    assert "8 channels" in cuda.refusal("masked_conv2d", (5, 8, 6, 6), (16, 8, 1, 1), half)
    assert cuda.refusal("masked_conv_transpose2d", (5, 8, 6, 6), (8, 1, 3, 3), half) is None
    assert "2 output channels" in cuda.refusal("masked_conv_transpose2d", (5, 8, 6, 6), (8, 2, 3, 3), half)
    assert cuda.refusal("masked_conv2d", (1, 1, 64, 64), (1, 1, 32, 64), half) is None
    assert "32×65" in cuda.refusal("masked_conv2d", (1, 1, 64, 65), (1, 1, 32, 65), half)


def test_what_it_takes_is_what_the_kernels_take() -> None:
    text = (simt.CUDA / "launch.h").read_text()
    assert f"kDepthwiseTaps = {cuda._MOST_TAPS};" in text


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ((80,), (8, 0), True),
        ((80,), (8, 9), True),
        ((86,), (8, 0), False),
        ((80, 90), (7, 5), False),
        ((80, 100), (9, 0), False),
        ((80, 90), (12, 0), True),  # by the last one's PTX
        ((90,), (10, 0), True),
    ],
)
def test_which_devices_the_compiled_code_runs_on(architectures: Any, capability: Any, runs: bool) -> None:
    assert cuda.runs_on(architectures, capability) is runs


def test_it_says_why_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = SimpleNamespace(shape=torch.Size((4, 7)))

    def why(device: str, dtype: torch.dtype = torch.float16, **state: Any) -> str | None:
        monkeypatch.setattr(cuda, "unavailable", state.get("unavailable"))
        monkeypatch.setattr(cuda, "_architectures", (80, 90))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: state.get("cuda", True))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: state.get("capability", (9, 0)))
        x = SimpleNamespace(device=torch.device(device), dtype=dtype, shape=torch.Size((5, 7)))
        return cuda.supports("masked_linear", x, weight)

    assert why("cuda:0") is None
    assert why("cuda:0", unavailable="the extension is not built") == "the extension is not built"
    assert "x is on cpu" in why("cpu")
    assert "no CUDA device" in why("cuda:0", cuda=False)
    assert "7.5" in why("cuda:0", capability=(7, 5))
    assert "8.0, 9.0" in why("cuda:0", capability=(7, 5))
    assert "float64" in why("cuda:0", torch.float64)


@pytest.mark.skipif(cuda.unavailable is None, reason="the extension is built")
def test_without_the_extension_the_backend_is_named_and_refused() -> None:
    example = testing.make(case_named("linear", "ragged"))
    call = (example.x, example.weight, example.bank, example.route)
    assert rk.explain(rk.masked_linear, *call).refused["cuda"] == cuda.unavailable
    with pytest.raises(ValueError, match="backend is 'cuda', which cannot run this masked_linear: "):
        rk.masked_linear(*call, backend="cuda")
