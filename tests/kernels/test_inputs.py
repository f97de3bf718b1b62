"""Unusual inputs: values that must not leak, memory layouts, autocast."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import rtl_kernels as rk
from rtl_kernels import testing

SHAPES = {
    "linear": ((12,), (7, 12), {}),
    "conv2d": ((4, 6, 5), (6, 4, 3, 3), {"padding": 1}),
    "conv_transpose2d": ((4, 5, 4), (4, 6, 3, 3), {"stride": 2}),
}
INDEX = (2, 0, 2, 1, 0)
for_operations = pytest.mark.parametrize("operation", SHAPES)


def make(operation, dtype=torch.float32, device="cpu", index=INDEX, **rest):
    x, weight, options = SHAPES[operation]
    case = testing.Case("input", operation, (len(index), *x), weight, index, 3, options=options, **rest)
    return testing.make(case, dtype, device)


def run(example, backend, **replaced):
    """y, dx, dW, db with some of the example's tensors replaced; leaves keep their strides."""
    testing.skip_if_refused(example, backend)
    tensors = {name: replaced.get(name, getattr(example, name)) for name in ("x", "weight", "bias")}
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    y = example.function(
        leaves["x"],
        leaves["weight"],
        example.bank,
        example.route,
        leaves["bias"],
        **example.case.options,
        backend=backend,
    )
    return y.detach(), *torch.autograd.grad(y, list(leaves.values()), replaced.get("dy", example.dy))


# ---- values


@testing.for_backends
@testing.for_devices
@for_operations
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf"), -0.0])
def test_what_stands_in_a_pruned_weight_does_not_leak(operation, dtype, garbage, device, backend):
    example = make(operation, dtype, device)
    pruned = ~(example.masks[0] | example.masks[1] | example.masks[2])
    weight = example.weight.clone()
    weight[pruned] = garbage
    clean = example.weight.clone()
    clean[pruned] = 0
    for found, expected in zip(run(example, backend, weight=weight), run(example, backend, weight=clean), strict=True):
        testing.assert_bitwise(found, expected)


@testing.for_backends
@for_operations
def test_a_weight_that_is_nan_for_one_mask_is_absent_for_another(operation, backend):
    example = make(operation, index=(0, 1, 0))
    weight = example.weight.clone()
    weight[example.masks[1] & ~example.masks[0]] = float("nan")
    y, dx, *_ = run(example, backend, weight=weight)
    assert y[[0, 2]].isfinite().all()
    assert dx[[0, 2]].isfinite().all()
    assert y[1].isnan().any()


@testing.for_backends
@for_operations
def test_nan_and_inf_in_one_sample_stay_in_it(operation, backend):
    example = make(operation)
    x = example.x.clone()
    x[0], x[3] = float("nan"), float("inf")
    clean, spoilt = run(example, backend)[0], run(example, backend, x=x)[0]
    testing.assert_bitwise(spoilt[[1, 2, 4]], clean[[1, 2, 4]])
    assert spoilt[0].isnan().any()


@testing.for_backends
@for_operations
def test_an_all_zero_mask_gives_the_bias(operation, backend):
    example = make(operation, density=0.0)
    y = run(example, backend)[0]
    bias = example.bias if operation == "linear" else example.bias[:, None, None]
    testing.assert_bitwise(y, bias.expand_as(y).contiguous())


# ---- layouts


def unaligned(t):
    return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)


def strided(t):
    return torch.stack([t, t + 1], -1)[..., 0]


def transposed(t):
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else transposed(t)


def channel_major(t):
    return t.movedim(0, -1).contiguous().movedim(-1, 0)


LAYOUTS = [unaligned, strided, transposed, channels_last, channel_major]


@testing.for_backends
@for_operations
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("what", ["x", "weight", "dy", "bias"])
def test_any_layout_is_as_accurate_as_the_contiguous_one(operation, layout, what, dtype, backend):
    example = make(operation, dtype)
    result = run(example, backend, **{what: layout(getattr(example, what))})
    testing.assert_matches_separate_passes(example, testing.Results(*result))


@testing.for_backends
@for_operations
def test_expanded_inputs_are_read_as_their_copies(operation, backend):
    example = make(operation)
    x = example.x[:1].expand_as(example.x)
    dy = example.dy.flatten()[0].expand_as(example.dy)  # the gradient a sum has
    weight = example.weight[:, :1].expand_as(example.weight)
    found = run(example, backend, x=x, dy=dy, weight=weight)
    expected = run(example, backend, x=x.contiguous(), dy=dy.contiguous(), weight=weight.contiguous())
    torch.testing.assert_close(found, expected)


@testing.for_backends
def test_words_of_a_bank_may_be_a_slice(backend):
    example = make("linear")
    words = torch.cat([example.bank.words, example.bank.words])[1::2]
    bank = rk.MaskBank(torch.stack([words, words], -1)[..., 0], example.bank.shape)
    dense = rk.MaskBank(words.clone(), bank.shape)
    expected = rk.masked_linear(example.x, example.weight, dense, example.route, backend=backend)
    testing.assert_bitwise(rk.masked_linear(example.x, example.weight, bank, example.route, backend=backend), expected)


# ---- autocast


@testing.for_backends
@pytest.mark.parametrize("operation", ["linear", "conv2d"])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_outputs_and_gradients_as_the_dense_operator(operation, low, backend):
    example = make(operation, density=1.0)
    dense = getattr(F, operation)
    leaves = [t.clone().requires_grad_() for t in (example.x, example.weight, example.bias)]
    twins = [t.detach().clone().requires_grad_() for t in leaves]
    with torch.autocast("cpu", dtype=low):
        y = example.function(
            leaves[0], leaves[1], example.bank, example.route, leaves[2], **example.case.options, backend=backend
        )
        expected = dense(*twins, **example.case.options)
    assert y.dtype == expected.dtype == low
    y.backward(example.dy.to(low))
    expected.backward(example.dy.to(low))
    for leaf, twin in zip(leaves, twins, strict=True):
        assert leaf.grad.dtype == twin.grad.dtype == torch.float32
        torch.testing.assert_close(leaf.grad, twin.grad, rtol=0.05, atol=0.05)


@testing.for_backends
@for_operations
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_as_accurate_as_inputs_cast_by_hand(operation, low, backend):
    example = make(operation)
    with torch.autocast("cpu", dtype=low):
        y = run(example, backend)[0]
    by_hand = {name: getattr(example, name).to(low) for name in ("x", "weight", "bias", "dy")}
    testing.assert_bitwise(y, run(example, backend, **by_hand)[0])


@testing.for_backends
@for_operations
def test_autocast_takes_mixed_inputs_as_it_does_for_the_dense_operator(operation, backend):
    example = make(operation)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, dx, dw, db = run(example, backend, x=example.x.bfloat16(), dy=example.dy.bfloat16())
    assert (y.dtype, dx.dtype, dw.dtype, db.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32)


@testing.for_backends
@for_operations
def test_autocast_leaves_float64_alone(operation, backend):
    example = make(operation, torch.float64)
    expected = run(example, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(example, backend)
    for f, e in zip(found, expected, strict=True):
        testing.assert_bitwise(f, e)


@for_operations
def test_autocast_casts_no_integers(operation):
    example = make(operation)
    call = (example.x.long(), example.weight, example.bank, example.route, example.bias)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match=r"x has dtype torch\.int64"):
        example.function(*call, **example.case.options)


@testing.for_backends
@for_operations
def test_backward_outside_autocast_or_inside_gives_the_same_bits(operation, backend):
    example = make(operation)
    gradients = []
    for inside in (False, True):
        weight = example.weight.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = example.function(
                example.x, weight, example.bank, example.route, **example.case.options, backend=backend
            )
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            y.backward(example.dy.bfloat16())
        gradients.append(weight.grad)
    testing.assert_bitwise(*gradients)
