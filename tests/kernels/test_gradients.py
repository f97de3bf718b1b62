"""Derivatives: right to first order, zero where no mask keeps a weight, refused to second order."""

from __future__ import annotations

import pytest
import torch

import rtl_kernels as rk
from rtl_kernels import testing

SMALL = {
    "linear": ((3, 5), {}),
    "conv2d": ((4, 2, 3, 3), {"padding": ((1, 0), (2, 1)), "stride": (1, 2), "groups": 2}),
    "conv_transpose2d": ((4, 2, 3, 2), {"padding": 1, "stride": 2, "output_padding": (1, 0), "groups": 2}),
}
INPUTS = {"linear": (5,), "conv2d": (4, 4, 3), "conv_transpose2d": (4, 3, 3)}
INDEX = (2, 0, -1, 2)


def small(operation, index=INDEX, **rest):
    weight, options = SMALL[operation]
    batch = 2 if index == testing.EVERY else len(index)
    shape = (batch, *INPUTS[operation])
    return testing.Case("small", operation, shape, weight, index, 3, options=options, **rest)


def operator(example, backend):
    def call(x, weight, bias):
        options = example.case.options
        return example.function(x, weight, example.bank, example.route, bias, **options, backend=backend)

    return call


def leaves(example):
    return tuple(t.clone().requires_grad_() for t in (example.x, example.weight, example.bias))


@testing.for_backends
@testing.for_devices
@pytest.mark.parametrize(
    ("index", "untied"), [(INDEX, False), ((2, 0, 2), True), (testing.EVERY, False), (testing.EVERY, True)]
)
@pytest.mark.parametrize("operation", SMALL)
def test_gradients_agree_with_finite_differences(operation, index, untied, device, backend):
    example = testing.make(small(operation, index, untied=untied), torch.float64, device)
    testing.run(example, backend)  # skips if this backend has no float64
    assert torch.autograd.gradcheck(operator(example, backend), leaves(example))


@testing.for_backends
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
@pytest.mark.parametrize("operation", SMALL)
def test_any_subset_of_gradients_is_the_same_as_in_all(operation, wanted, backend):
    example = testing.make(small(operation))
    expected = testing.run(example, backend)
    inputs = [example.x, example.weight, example.bias]
    for i in wanted:
        inputs[i] = inputs[i].clone().requires_grad_()
    y = operator(example, backend)(*inputs)
    gradients = torch.autograd.grad(y, [inputs[i] for i in wanted], example.dy)
    for i, gradient in zip(wanted, gradients, strict=True):
        testing.assert_bitwise(gradient, expected[1 + i])


@testing.for_backends
@pytest.mark.parametrize("operation", SMALL)
@pytest.mark.parametrize("of", ["x", "weight", "dy"])  # y is linear in its bias
def test_a_second_derivative_is_refused_in_words(operation, of, backend):
    example = testing.make(small(operation), torch.float32)
    inputs = dict(zip(("x", "weight", "bias"), leaves(example), strict=True))
    y = operator(example, backend)(**inputs)
    dy = example.dy.clone().requires_grad_()
    first = torch.autograd.grad(y, list(inputs.values()), dy, create_graph=True)
    target = {**inputs, "dy": dy}[of]
    with pytest.raises(RuntimeError, match="second derivatives of the masked operators are not implemented"):
        torch.autograd.grad(sum(g.square().sum() for g in first), target)


@testing.for_backends
@testing.for_devices
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("operation", SMALL)
def test_a_weight_outside_every_mask_in_the_batch_gets_gradient_exactly_zero(operation, dtype, device, backend):
    example = testing.make(small(operation, (2, 0, 2)), dtype, device)
    gradient = testing.run(example, backend).weight
    outside = ~(example.masks[0] | example.masks[2])
    assert outside.any()
    testing.assert_bitwise(gradient[outside], torch.zeros_like(gradient[outside]))
    assert gradient[~outside].all()


@testing.for_backends
@pytest.mark.parametrize("operation", SMALL)
def test_an_untied_weight_gets_the_gradient_of_its_own_samples_only(operation, backend):
    example = testing.make(small(operation, (2, 0, 2), untied=True))
    result = testing.run(example, backend)
    assert not result.weight[1].any()
    assert not result.bias[1].any()
    for ticket in (0, 2):
        assert not result.weight[ticket][~example.masks[ticket]].any()
        assert result.weight[ticket][example.masks[ticket]].all()


@testing.for_backends
@pytest.mark.parametrize("operation", SMALL)
def test_one_dense_sample_frees_every_weight(operation, backend):
    example = testing.make(small(operation, (2, 0, -1)))
    assert testing.run(example, backend).weight.all()


@testing.for_backends
def test_gradients_accumulate_over_passes_as_those_of_one_batch(backend):
    example = testing.make(small("linear"), torch.float64)
    whole = testing.run(example, backend)
    x, weight, bias = leaves(example)
    for part in (slice(0, 2), slice(2, 4)):
        route = rk.Route.build(INDEX[part], 3)
        y = rk.masked_linear(x[part], weight, example.bank, route, bias, backend=backend)
        y.backward(example.dy[part])
    torch.testing.assert_close((x.grad, weight.grad, bias.grad), whole[1:])
