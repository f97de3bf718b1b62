"""Route: which row is which sample, and where each mask's rows stand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rtl_kernels as rk
from rtl_kernels import ops, testing

batches = st.integers(1, 6).flatmap(lambda k: st.tuples(st.lists(st.integers(-1, k - 1), max_size=20), st.just(k)))


@given(batches)
def test_rows_stand_by_mask_dense_first_and_within_a_mask_in_the_order_of_the_samples(batch):
    index, num_masks = batch
    route = rk.Route.build(index, num_masks)
    expected = sorted(range(len(index)), key=lambda b: index[b])  # Python's sort is stable
    assert route.order.tolist() == expected
    assert route.index.tolist() == sorted(index)


@given(batches)
def test_offsets_say_where_every_mask_begins_and_ends(batch):
    index, num_masks = batch
    route = rk.Route.build(index, num_masks)
    assert route.offsets.dtype == torch.int64
    assert route.offsets.tolist() == [sum(i < mask for i in index) for mask in range(-1, num_masks + 1)]
    assert route.segments == [
        (mask, sum(i < mask for i in index), sum(i <= mask for i in index))
        for mask in range(-1, num_masks)
        if mask in index
    ]
    assert route.present.tolist() == [mask in index for mask in range(-1, num_masks)]
    assert (route.batch, route.rows, route.all_masks) == (len(index), len(index), False)


@given(batches)
def test_with_the_compiled_library_and_without_it_routes_are_the_same(batch):
    compiled = rk.Route.build(*batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "group_rows", None)
        plain = rk.Route.build(*batch)
    for attribute in ("order", "offsets", "index"):
        testing.assert_bitwise(getattr(compiled, attribute), getattr(plain, attribute))


@given(batches)
def test_restore_undoes_arrange(batch):
    index, num_masks = batch
    route = rk.Route.build(index, num_masks)
    x = torch.arange(2 * len(index)).view(-1, 2)
    arranged = route.arrange(x)
    assert torch.equal(arranged, x[route.order])
    assert torch.equal(route.restore(arranged), x)


def test_a_sorted_route_takes_rows_as_they_come():
    route = rk.Route.build([1, 0, 1], 2)
    ready = route.sorted()
    x = torch.arange(3)
    assert ready.order is None
    assert ready.segments == route.segments
    assert ready.arrange(x) is x
    assert ready.restore(x) is x


@pytest.mark.parametrize(("num_masks", "batch"), [(1, 1), (3, 4), (2, 0)])
def test_every_has_row_kb_plus_b_for_sample_b_through_mask_k(num_masks, batch):
    route = rk.Route.every(num_masks, batch)
    assert (route.batch, route.rows, route.all_masks, route.order) == (batch, num_masks * batch, True, None)
    assert route.index.tolist() == [k for k in range(num_masks) for _ in range(batch)]
    assert route.segments == [(k, k * batch, (k + 1) * batch) for k in range(num_masks) if batch]
    assert route.offsets[0] == route.offsets[1] == 0  # nobody goes without a mask
    assert route.restore(torch.zeros(route.rows, 5)).shape == (num_masks, batch, 5)


def test_every_accepts_samples_or_rows():
    route = rk.Route.every(3, 4)
    assert route.repeat_for(torch.zeros(4, 2)) == 3
    assert route.repeat_for(torch.zeros(12, 2)) == 1
    with pytest.raises(ValueError, match=r"x has shape \(5, 2\), but its route is for 4 or 12 samples"):
        route.repeat_for(torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"x has shape \(3, 2\), but its route is for 2 samples"):
        rk.Route.build([0, 1], 2).repeat_for(torch.zeros(3, 2))


@pytest.mark.parametrize(
    "index",
    [
        [1, 0],
        (1, 0),
        torch.tensor([1, 0], dtype=torch.int32),
        torch.tensor([1, 0], dtype=torch.uint8),
        np.array([1, 0]),
    ],
    ids=["list", "tuple", "int32", "uint8", "numpy"],
)
def test_an_index_may_be_any_sequence_of_integers(index):
    assert rk.Route.build(index, 2).order.tolist() == [1, 0]


@pytest.mark.parametrize("index", [[], torch.zeros(0, dtype=torch.int64)], ids=["list", "tensor"])
def test_a_batch_may_be_empty(index):
    route = rk.Route.build(index, 3)
    assert route.segments == []
    assert route.rows == 0


def test_building_a_route_leaves_the_index_alone():
    index = torch.tensor([2, -1, 0])
    route = rk.Route.build(index, 3)
    route.index.fill_(7)
    assert index.tolist() == [2, -1, 0]


@testing.for_devices
def test_a_route_moves_between_devices(device):
    route = rk.Route.build([2, -1, 0], 3)
    moved = route.to(device)
    assert {t.device.type for t in (moved.order, moved.offsets, moved.index)} == {device}
    assert moved.segments == route.segments
    assert rk.Route.every(3, 2).to(device).offsets.device.type == device


# ---- errors


@pytest.mark.parametrize("value", [4, 7, -2, 2**40])
def test_an_index_out_of_range_is_named_with_the_range(value):
    with pytest.raises(IndexError, match=rf"index holds {value}, but there are 4 masks \(0..3, or -1 for none\)"):
        rk.Route.build([0, value, 1], 4)


def test_a_list_is_checked_whatever_the_default_device_is():
    with torch.device("meta"):
        route = rk.Route.build([0, 3, 1], 4)
        with pytest.raises(IndexError, match="index holds 7"):
            rk.Route.build([0, 7, 1], 4)
    assert route.order.device == route.offsets.device == route.index.device == torch.device("meta")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_range_is_checked_on_request_and_clamped_otherwise(monkeypatch):
    index = torch.tensor([0, 7, -5], device="cuda")
    assert rk.Route.build(index, 4).index.tolist() == [-1, 0, 3]
    monkeypatch.setenv("RTL_KERNELS_CHECK_INDEX", "1")
    with pytest.raises(IndexError, match="index holds 7"):
        rk.Route.build(index, 4)


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ([0.0, 1.0], TypeError, "index has dtype torch.float32, expected integers"),
        ([True, False], TypeError, "index has dtype torch.bool, expected integers"),
        (3, TypeError, "index is a int, expected integers"),
        (["cat", "dog"], TypeError, r"index is a list of no integers \(.*\), expected some"),
        ([0, None], TypeError, r"index is a list of no integers \(.*\), expected some"),
        ([[0, 1], [1]], TypeError, r"index is a list of no integers \(.*\), expected some"),
        ("cat", TypeError, r"index is a str of no integers \(.*\), expected some"),
        (torch.tensor(3), ValueError, r"index has shape \(\), expected \(batch,\)"),
        ([[0, 1]], ValueError, r"index has shape \(1, 2\), expected \(batch,\)"),
    ],
)
def test_an_index_of_another_kind_is_named_with_what_was_expected(index, error, message):
    with pytest.raises(error, match=message):
        rk.Route.build(index, 4)


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="num_masks is 0, expected at least 1"):
        rk.Route.build([0], 0)
    with pytest.raises(ValueError, match="num_masks is 0, expected at least 1"):
        rk.Route.every(0, 3)
    with pytest.raises(ValueError, match="batch is -1, expected 0 or more"):
        rk.Route.every(2, -1)
    for call in (
        lambda: rk.Route.build([0], "2"),
        lambda: rk.Route.every("2", 3),
        lambda: rk.MaskBank.ones("2", (4, 5)),
        lambda: rk.nn.SubsetBatchNorm2d(3, "2"),
    ):
        with pytest.raises(TypeError, match="num_masks is '2', expected an integer"):
            call()
    with pytest.raises(TypeError, match=r"batch is 2.5, expected an integer"):
        rk.Route.every(2, 2.5)
    assert rk.Route.every(np.int64(2), np.int64(3)).rows == 6
