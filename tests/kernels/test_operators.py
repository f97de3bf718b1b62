"""A mixed batch equals K separate passes with dense masked weights: outputs and all gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rtl_kernels as rk
from rtl_kernels import testing

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


@testing.for_backends
@testing.for_devices
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("case", testing.CASES, ids=str)
def test_mixed_batch_equals_separate_passes(case, dtype, device, backend):
    example = testing.make(case, dtype, device)
    testing.assert_matches_separate_passes(example, testing.run(example, backend))


# ---- the same for drawn shapes, masks and batches


@st.composite
def batches(draw):
    num_masks = draw(st.integers(1, 5))
    untied = draw(st.booleans())
    if draw(st.integers(0, 4)) == 0:
        return testing.EVERY, num_masks, untied
    index = draw(st.lists(st.integers(0 if untied else -1, num_masks - 1), max_size=9))
    if draw(st.booleans()):
        index.sort()
    return tuple(index), num_masks, untied


@st.composite
def common(draw):
    index, num_masks, untied = draw(batches())
    batch = draw(st.integers(0, 3)) if index == testing.EVERY else len(index)
    return batch, {
        "index": index,
        "num_masks": num_masks,
        "untied": untied,
        "bias": draw(st.booleans()),
        "density": draw(st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0])),
    }


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def linear_cases(draw):
    batch, rest = draw(common())
    wide, out = draw(st.integers(1, 70)), draw(st.integers(1, 40))
    middle = draw(st.lists(st.integers(1, 3), max_size=2))
    return testing.Case("drawn", "linear", (batch, *middle, wide), (out, wide), **rest)


@st.composite
def conv2d_cases(draw):
    batch, rest = draw(common())
    groups, into, out = (draw(st.integers(1, 3)) for _ in range(3))
    kernel, stride, dilation = draw(pairs), draw(pairs), draw(pairs)
    size = [d * (k - 1) + draw(st.integers(1, 5)) for k, d in zip(kernel, dilation, strict=True)]
    sides = st.tuples(st.integers(0, 2), st.integers(0, 2))
    padding = draw(st.one_of(st.integers(0, 2), sides, st.tuples(sides, sides)))
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    weight = (groups * out, into, *kernel)
    return testing.Case("drawn", "conv2d", (batch, groups * into, *size), weight, **rest, options=options)


@st.composite
def conv_transpose2d_cases(draw):
    batch, rest = draw(common())
    groups, into, out = (draw(st.integers(1, 3)) for _ in range(3))
    kernel, stride, dilation = draw(pairs), draw(pairs), draw(pairs)
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    options = {
        "stride": stride,
        "dilation": dilation,
        "groups": groups,
        "padding": tuple(draw(st.integers(0, r // 2)) for r in reach),
        "output_padding": tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)),
    }
    size = draw(pairs)
    weight = (groups * into, out, *kernel)
    return testing.Case("drawn", "conv_transpose2d", (batch, groups * into, *size), weight, **rest, options=options)


def check(case, dtype, seed, backend):
    example = testing.make(case, dtype, seed=seed)
    testing.assert_matches_separate_passes(example, testing.run(example, backend))


dtypes, seeds = st.sampled_from(testing.DTYPES), st.integers(0, 1000)


@testing.for_backends
@given(case=linear_cases(), dtype=dtypes, seed=seeds)
def test_any_linear_batch_equals_separate_passes(case, dtype, seed, backend):
    check(case, dtype, seed, backend)


@testing.for_backends
@given(case=conv2d_cases(), dtype=dtypes, seed=seeds)
def test_any_convolution_batch_equals_separate_passes(case, dtype, seed, backend):
    check(case, dtype, seed, backend)


@testing.for_backends
@given(case=conv_transpose2d_cases(), dtype=dtypes, seed=seeds)
def test_any_transposed_convolution_batch_equals_separate_passes(case, dtype, seed, backend):
    check(case, dtype, seed, backend)


@testing.for_backends
@given(data=st.data())
def test_the_order_of_samples_only_permutes_rows(data, backend):
    case = data.draw(st.one_of(linear_cases(), conv2d_cases()).filter(lambda c: c.index != testing.EVERY and c.x[0]))
    example = testing.make(case, torch.float64)
    result = testing.run(example, backend)
    order = torch.tensor(data.draw(st.permutations(range(case.x[0]))))
    route = rk.Route.build(torch.tensor(case.index)[order], case.num_masks)
    call = (example.x[order], example.weight, example.bank, route, example.bias)
    torch.testing.assert_close(example.function(*call, **case.options, backend=backend), result.y[order])


# ---- Route.every


@testing.for_backends
@pytest.mark.parametrize("case", [c for c in testing.CASES if c.index == testing.EVERY], ids=str)
def test_every_takes_its_own_rows_as_well_as_its_samples(case, backend):
    example = testing.make(case)
    y = testing.run(example, backend).y
    rows = example.x.repeat(case.num_masks, *[1] * (example.x.dim() - 1))
    call = (rows, example.weight, example.bank, example.route, example.bias)
    testing.assert_bitwise(example.function(*call, **case.options, backend=backend), y)


@testing.for_backends
def test_every_gives_a_sample_the_gradient_of_all_its_rows(backend):
    example = testing.make(next(c for c in testing.CASES if str(c) == "linear-every"), torch.float64)
    gradient = testing.run(example, backend).x
    weights = example.weight * example.masks
    torch.testing.assert_close(gradient, torch.einsum("kbo,koi->bi", example.dy, weights))


# ---- explain


def test_explain_names_a_backend_that_runs_the_call_and_runs_nothing():
    example = testing.make(testing.CASES[0])
    explanation = rk.explain(rk.masked_linear, example.x, example.weight, example.bank, example.route)
    assert explanation.backend in rk.functional.BACKENDS
    assert str(explanation).startswith(f"runs on {explanation.backend}")
    assert list(rk.functional.BACKENDS)[: len(explanation.refused)] == list(explanation.refused)


def test_explain_gives_the_reason_of_every_refusal(monkeypatch):
    class Picky:
        name = "picky"

        @staticmethod
        def supports(*call):
            return "it is Monday"

    monkeypatch.setattr(rk.functional, "BACKENDS", {"picky": Picky, **rk.functional.BACKENDS})
    example = testing.make(testing.CASES[0])
    call = (example.x, example.weight, example.bank, example.route)
    assert "not picky: it is Monday" in str(rk.explain(rk.masked_linear, *call))
    with pytest.raises(ValueError, match="backend is 'picky', which cannot run this masked_linear: it is Monday"):
        rk.masked_linear(*call, backend="picky")
    with pytest.raises(ValueError, match="backend is 'cude', expected one of"):
        rk.masked_linear(*call, backend="cude")
    with pytest.raises(ValueError, match="expected one of the masked operators"):
        rk.explain(torch.add, *call)
    with pytest.raises(TypeError, match="missing a required argument: 'weight'"):
        rk.explain(rk.masked_linear, example.x)
    with pytest.raises(TypeError, match="weight is a list, expected a Tensor"):
        rk.explain(rk.masked_linear, example.x, [1.0], *call[2:])
