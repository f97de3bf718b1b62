"""Bits: what a mask's samples give depends on nothing but them, their weight and their mask, and comes out again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rtl_kernels as rk
from rtl_kernels import testing

SHAPES = {
    "linear": ((70,), (45, 70), {}),
    "linear-narrow": ((3, 5), (3, 5), {}),
    "conv2d": ((6, 9, 7), (10, 6, 3, 3), {"padding": 1}),
    "conv2d-uneven": ((6, 8, 7), (9, 2, 3, 2), {"padding": ((0, 1), (2, 0)), "stride": (1, 2), "groups": 3}),
    "conv2d-depthwise": ((8, 6, 6), (8, 1, 3, 3), {"groups": 8, "padding": 1}),
    "conv2d-1x1": ((17, 4, 4), (12, 17, 1, 1), {}),
    "conv_transpose2d": ((6, 5, 4), (6, 7, 3, 3), {"stride": 2, "padding": 1}),
}
K = 5
INDEX = (3, 0, -1, 3, 1, 0, 3, 4, -1, 3, 0, 4, 3)


def case_of(shape, index, untied=False, every=False):
    x, weight, options = SHAPES[shape]
    batch = 3 if every else len(index)
    return testing.Case(
        shape,
        shape.split("-")[0],
        (batch, *x),
        weight,
        testing.EVERY if every else tuple(index),
        K,
        untied=untied,
        options=options,
    )


def differentiate(example, index, x, dy, backend, arranged=False):
    """y, dx and dW of a batch with this index, or of samples already sorted by it."""
    route = rk.Route.build(index, K).to(x.device)
    if arranged:
        route = route.sorted()
    x, weight = x.detach().requires_grad_(), example.weight.clone().requires_grad_()
    y = example.function(x, weight, example.bank, route, example.bias, **example.case.options, backend=backend)
    y.backward(dy)
    return y.detach(), x.grad, weight.grad


def check_group_unchanged(example, mask, index, x, dy, backend, before):
    """Mask `mask`'s samples are the same in the same order in this other batch; so are their results."""
    old = torch.tensor(example.case.index) == mask
    new = torch.tensor(index) == mask
    assert torch.equal(example.x[old], x[new])
    y, dx, dw = differentiate(example, index, x, dy, backend)
    testing.assert_bitwise(y[new], before[0][old], "y")
    testing.assert_bitwise(dx[new], before[1][old], "dx")
    if example.case.untied:
        testing.assert_bitwise(dw[mask], before[2][mask], "dW")


def make(shape, dtype, device, backend, untied):
    index = [i for i in INDEX if i >= 0] if untied else INDEX
    example = testing.make(case_of(shape, index, untied), dtype, device)
    testing.skip_if_refused(example, backend)
    before = differentiate(example, list(example.case.index), example.x, example.dy, backend)
    return example, before


for_shapes = pytest.mark.parametrize("shape", SHAPES)
for_dtypes = pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
for_tying = pytest.mark.parametrize("untied", [False, True], ids=["shared", "untied"])


@testing.for_backends
@testing.for_devices
@for_shapes
@for_dtypes
@for_tying
def test_a_group_does_not_notice_that_other_groups_vanish(shape, dtype, untied, device, backend):
    example, before = make(shape, dtype, device, backend, untied)
    index = torch.tensor(example.case.index)
    for mask in index.unique().tolist():
        own = index == mask
        check_group_unchanged(example, mask, index[own].tolist(), example.x[own], example.dy[own], backend, before)


@testing.for_backends
@testing.for_devices
@for_shapes
@for_dtypes
@for_tying
def test_a_group_does_not_notice_that_other_groups_change(shape, dtype, untied, device, backend):
    example, before = make(shape, dtype, device, backend, untied)
    index = torch.tensor(example.case.index)
    x, dy = example.x.clone(), example.dy.clone()
    other = index != 3
    x[other], dy[other] = -7 * x[other], float("nan")
    index = torch.where(other, 4, index)
    check_group_unchanged(example, 3, index.tolist(), x, dy, backend, before)


@testing.for_backends
@testing.for_devices
@for_shapes
@for_dtypes
@for_tying
def test_a_group_does_not_notice_that_samples_move_between_others(shape, dtype, untied, device, backend):
    example, before = make(shape, dtype, device, backend, untied)
    index = torch.tensor(example.case.index)
    for shift in (1, 4, 7):  # the samples of mask 3 keep their order, but stand elsewhere among the others
        own, others = (index == 3).nonzero()[:, 0].tolist(), (index != 3).nonzero()[:, 0].tolist()
        order = others[:shift] + own[:2] + others[shift:] + own[2:]
        moved = index[order].tolist()
        check_group_unchanged(example, 3, moved, example.x[order], example.dy[order], backend, before)


@testing.for_backends
@testing.for_devices
@for_shapes
@for_dtypes
def test_samples_already_sorted_give_the_bits_of_samples_sorted_by_the_operator(shape, dtype, device, backend):
    example, before = make(shape, dtype, device, backend, untied=False)
    route = example.route
    x, dy = route.arrange(example.x), route.arrange(example.dy)
    y, dx, dw = differentiate(example, list(example.case.index), x, dy, backend, arranged=True)
    testing.assert_bitwise(y, route.arrange(before[0]), "y")
    testing.assert_bitwise(dx, route.arrange(before[1]), "dx")
    testing.assert_bitwise(dw, before[2], "dW")


def cropped(t):
    """Rows that stand apart in memory, so that no copy of them is made of one piece."""
    return torch.cat([t, t], -1)[..., : t.shape[-1]]


def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else cropped(t)


@testing.for_backends
@for_shapes
@for_dtypes
@pytest.mark.parametrize("layout", [torch.clone, cropped, channels_last], ids=lambda f: f.__name__)
def test_sorted_samples_do_not_notice_what_stands_before_them_in_any_layout(shape, dtype, layout, backend):
    """A slice's alignment and strides depend on the groups before it; its results do not."""
    example, _ = make(shape, dtype, "cpu", backend, untied=False)
    index = [0, 0, 0, 1, 2, 2, 2, 2, 4, 4]
    order = torch.arange(len(index)) % len(example.x)
    x, dy = layout(example.x[order]), layout(example.dy[order])
    y, dx, _ = differentiate(example, index, x, dy, backend, arranged=True)
    for mask in (1, 2, 4):
        own = torch.tensor(index) == mask
        alone = [mask] * int(own.sum())
        rest = differentiate(example, alone, layout(x[own]), layout(dy[own]), backend, arranged=True)
        testing.assert_bitwise(y[own], rest[0], "y")
        testing.assert_bitwise(dx[own], rest[1], "dx")


@testing.for_backends
@testing.for_devices
@for_shapes
@for_dtypes
def test_every_gives_each_mask_the_bits_of_a_batch_of_its_own(shape, dtype, device, backend):
    example = testing.make(case_of(shape, (), every=True), dtype, device)
    y = testing.run(example, backend).y
    for mask in range(K):
        route = rk.Route.build([mask] * len(example.x), K).to(device)
        call = (example.x, example.weight, example.bank, route, example.bias)
        own = example.function(*call, **example.case.options, backend=backend)
        testing.assert_bitwise(y[mask], own)


@testing.for_backends
@testing.for_devices
@for_shapes
@for_dtypes
def test_a_call_gives_the_same_bits_again_and_with_or_without_a_gradient(shape, dtype, device, backend):
    example, before = make(shape, dtype, device, backend, untied=False)
    index = list(example.case.index)
    again = differentiate(example, index, example.x, example.dy, backend)
    for one, other in zip(before, again, strict=True):
        testing.assert_bitwise(one, other)
    call = (example.x, example.weight, example.bank, example.route, example.bias)
    testing.assert_bitwise(example.function(*call, **example.case.options, backend=backend), before[0])


@testing.for_backends
@given(
    shape=st.sampled_from(list(SHAPES)),
    index=st.lists(st.integers(-1, K - 1), min_size=1, max_size=20),
    dtype=st.sampled_from(testing.DTYPES),
    data=st.data(),
)
def test_any_group_of_any_batch_can_stand_alone(shape, index, dtype, data, backend):
    example = testing.make(case_of(shape, index), dtype)
    before = differentiate(example, index, example.x, example.dy, backend)
    mask = data.draw(st.sampled_from(sorted(set(index))))
    own = torch.tensor(index) == mask
    check_group_unchanged(example, mask, [mask] * int(own.sum()), example.x[own], example.dy[own], backend, before)
