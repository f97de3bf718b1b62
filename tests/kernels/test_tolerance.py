"""The tolerance itself: it lets rounding through and nothing else."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import rtl_kernels as rk
from rtl_kernels import testing

LINEAR = next(c for c in testing.CASES if str(c) == "linear-many-samples")
ZERO = next(c for c in testing.CASES if str(c) == "linear-all-zero")


def judge(example, actual):
    testing.assert_matches_separate_passes(example, actual)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_the_dense_computation_passes_its_own_test(dtype):
    example = testing.make(LINEAR, dtype)
    judge(example, testing.separate_passes(example))


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("field", testing.Results._fields)
def test_one_wrong_element_fails(field, dtype):
    example = testing.make(LINEAR, dtype)
    actual = testing.run(example)
    wrong = getattr(actual, field).clone()
    wrong.view(-1)[wrong.abs().argmax()] *= 1 + 32 * torch.finfo(dtype).eps
    with pytest.raises(AssertionError, match="are off"):
        judge(example, actual._replace(**{field: wrong}))


def test_a_forgotten_mask_fails():
    example = testing.make(LINEAR)
    flipped = example.masks.clone()
    flipped[0, 0, 0] ^= True
    with pytest.raises(AssertionError, match="are off"):
        judge(example, testing.run(dataclasses.replace(example, bank=rk.MaskBank.from_dense(flipped))))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_sum_made_in_half_precision_fails(dtype):
    example = testing.make(LINEAR, dtype)
    actual = testing.run(example)
    x = example.x.flatten(1)
    weight = torch.cat([example.masks, torch.ones_like(example.masks[:1])]).to(dtype) * example.weight
    y = torch.zeros_like(actual.y)
    for i in range(x.shape[1]):  # rounds after every term
        y = y + x[:, i : i + 1] * weight[list(LINEAR.index), :, i]
    with pytest.raises(AssertionError, match="are off"):
        judge(example, actual._replace(y=y + example.bias))


def test_nan_fails():
    example = testing.make(LINEAR)
    actual = testing.run(example)
    y = actual.y.clone()
    y[0, 0] = float("nan")
    with pytest.raises(AssertionError, match="are off"):
        judge(example, actual._replace(y=y))


def test_where_there_are_no_terms_nothing_but_zero_passes():
    example = testing.make(dataclasses.replace(ZERO, index=(0, 1, 2), x=(3, 37)))
    actual = testing.run(example)
    judge(example, actual)
    with pytest.raises(AssertionError, match="are off"):
        judge(example, actual._replace(weight=actual.weight + 1e-44))


def test_dtype_and_shape_are_part_of_the_result():
    example = testing.make(LINEAR, torch.float16)
    actual = testing.run(example)
    with pytest.raises(AssertionError, match=r"torch.float32, expected torch.float16"):
        judge(example, actual._replace(y=actual.y.float()))
    with pytest.raises(AssertionError, match="has shape"):
        judge(example, actual._replace(y=actual.y[:1]))
    with pytest.raises(AssertionError, match="gradient of bias is None"):
        judge(example, actual._replace(bias=None))


def test_bitwise_tells_minus_zero_from_zero_and_takes_nan_for_itself():
    zero = torch.zeros(3)
    testing.assert_bitwise(zero * float("nan"), zero * float("nan"))
    with pytest.raises(AssertionError, match="bits differ"):
        testing.assert_bitwise(-zero, zero)
