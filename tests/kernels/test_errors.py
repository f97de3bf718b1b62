"""Bad input to the operators: an error that names the argument, its value and what was expected."""

from __future__ import annotations

import pytest
import torch

import rtl_kernels as rk

K = 4


def call(function, **replaced):
    """The operator with good arguments, some of them replaced."""
    shapes = {
        rk.masked_linear: ((3, 5), (6, 5), 6),
        rk.masked_conv2d: ((3, 4, 6, 5), (6, 2, 3, 3), 6),
        rk.masked_conv_transpose2d: ((3, 4, 6, 5), (4, 3, 3, 3), 6),
    }
    x, weight, out = shapes[function]
    arguments = {
        "x": torch.zeros(x),
        "weight": torch.zeros(weight),
        "bank": rk.MaskBank.ones(K, weight),
        "route": rk.Route.build([0, 2, 1], K),
        "bias": torch.zeros(out),
    }
    if function is not rk.masked_linear:
        arguments["groups"] = 2
    return function(**{**arguments, **replaced})


every_operator = pytest.mark.parametrize(
    "function", [rk.masked_linear, rk.masked_conv2d, rk.masked_conv_transpose2d], ids=lambda f: f.__name__
)
convolutions = pytest.mark.parametrize(
    "function", [rk.masked_conv2d, rk.masked_conv_transpose2d], ids=lambda f: f.__name__
)


@every_operator
def test_good_arguments_run(function):
    assert call(function).shape[:2] == (3, 6)


@every_operator
@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("x", [1.0], "x is a list, expected a Tensor"),
        ("weight", None, "weight is a NoneType, expected a Tensor"),
        ("bias", 1.0, "bias is a float, expected a Tensor"),
        ("bank", torch.ones(3), r"bank is a Tensor, expected a MaskBank"),
        ("route", torch.tensor([0, 2, 1]), r"route is a Tensor, expected a Route \(Route.build\(index, num_masks\)\)"),
        ("weight", torch.zeros(6, 5, dtype=torch.int32), r"weight has shape|weight has dtype torch.int32"),
    ],
)
def test_an_argument_of_another_type_is_named(function, argument, value, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(function, **{argument: value})


@every_operator
def test_dtypes_must_be_supported_and_equal(function):
    good = call(function)
    assert good.dtype == torch.float32
    shape = {rk.masked_linear: (3, 5)}.get(function, (3, 4, 6, 5))
    with pytest.raises(TypeError, match=r"x has dtype torch.int64, expected one of torch.float32, torch.float16"):
        call(function, x=torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"x has dtype torch.complex64, expected one of"):
        call(function, x=torch.zeros(shape, dtype=torch.complex64))
    for bias in ({}, {"bias": None}):  # the layer is of another dtype, not its bias alone
        with pytest.raises(TypeError, match=r"weight has dtype torch.float32, expected x's, torch.float64"):
            call(function, x=torch.zeros(shape, dtype=torch.float64), **bias)
    with pytest.raises(TypeError, match=r"bias has dtype torch.float16, expected x's, torch.float32"):
        call(function, bias=torch.zeros(6, dtype=torch.float16))


@every_operator
def test_the_bank_must_be_of_this_weight(function):
    weight = {rk.masked_linear: (6, 5), rk.masked_conv2d: (6, 2, 3, 3)}.get(function, (4, 3, 3, 3))
    other = (weight[0] + 1, *weight[1:])
    with pytest.raises(
        ValueError, match=r"weight has shape .*, but the bank's masks are of .*: expected that, or \(4,"
    ):
        call(function, bank=rk.MaskBank.ones(K, other))
    with pytest.raises(ValueError, match=r"bank is of weights of shape \(6,\), expected [24] dimensions"):
        call(function, bank=rk.MaskBank.ones(K, (6,)))
    with pytest.raises(ValueError, match=r"weight has shape \(3, .*expected that, or \(4, ...\) before it for untied"):
        call(function, weight=torch.zeros(3, *weight))
    with pytest.raises(ValueError, match=r"weight has shape \(5,\)"):
        call(function, weight=torch.zeros(5))
    with pytest.raises(ValueError, match="route is for 4 masks, but the bank holds 5"):
        call(function, bank=rk.MaskBank.ones(5, weight))


@every_operator
def test_the_route_must_be_for_this_batch(function):
    with pytest.raises(ValueError, match=r"x has shape \(3, .*, but its route is for 2 samples"):
        call(function, route=rk.Route.build([0, 2], K))
    with pytest.raises(ValueError, match=r"x has shape \(3, .*, but its route is for 2 or 8 samples"):
        call(function, route=rk.Route.every(K, 2))


@every_operator
def test_the_bias_must_be_of_the_outputs(function):
    with pytest.raises(ValueError, match=r"bias has shape \(7,\), expected \(6,\)"):
        call(function, bias=torch.zeros(7))
    with pytest.raises(ValueError, match=r"bias has shape \(4, 6\), expected \(6,\)"):
        call(function, bias=torch.zeros(4, 6))


@every_operator
def test_untied_weights_take_untied_biases(function):
    weight = {rk.masked_linear: (6, 5), rk.masked_conv2d: (6, 2, 3, 3)}.get(function, (4, 3, 3, 3))
    call(function, weight=torch.zeros(K, *weight), bias=torch.zeros(K, 6))
    with pytest.raises(ValueError, match=r"bias has shape \(6,\), expected \(4, 6\)"):
        call(function, weight=torch.zeros(K, *weight))


@every_operator
def test_index_minus_one_has_no_meaning_for_untied_weights(function):
    weight = {rk.masked_linear: (6, 5), rk.masked_conv2d: (6, 2, 3, 3)}.get(function, (4, 3, 3, 3))
    with pytest.raises(ValueError, match=r"index holds -1 \(no mask\), but the weights are untied: expected 0..K-1"):
        call(
            function,
            weight=torch.zeros(K, *weight),
            bias=torch.zeros(K, 6),
            route=rk.Route.build([0, -1, 1], K),
        )


@every_operator
@pytest.mark.parametrize("argument", ["weight", "bank", "route", "bias"])
def test_everything_must_be_on_the_device_of_x(function, argument):
    good = {"weight": (6, 5)}
    weight = {rk.masked_linear: good["weight"], rk.masked_conv2d: (6, 2, 3, 3)}.get(function, (4, 3, 3, 3))
    elsewhere = {
        "weight": torch.zeros(weight, device="meta"),
        "bank": rk.MaskBank(
            torch.zeros(rk.MaskBank.ones(K, weight).words.shape, dtype=torch.int32, device="meta"), weight
        ),
        "route": rk.Route.every(K, 3, device="meta"),
        "bias": torch.zeros(6, device="meta"),
    }
    with pytest.raises(ValueError, match=rf"{argument} is on meta, expected x's device, cpu"):
        call(function, **{argument: elsewhere[argument]})


def test_linear_takes_features_last():
    with pytest.raises(ValueError, match=r"x has shape \(3, 6\), expected \(batch, ..., 5\)"):
        call(rk.masked_linear, x=torch.zeros(3, 6))
    with pytest.raises(ValueError, match=r"x has shape \(3,\), expected \(batch, ..., 5\)"):
        call(rk.masked_linear, x=torch.zeros(3))
    with pytest.raises(ValueError, match=r"x has shape \(\)"):
        call(rk.masked_linear, x=torch.tensor(1.0))


@convolutions
def test_convolutions_take_channels_second(function):
    with pytest.raises(ValueError, match=r"x has shape \(3, 5, 6, 5\), expected \(batch, 4, height, width\)"):
        call(function, x=torch.zeros(3, 5, 6, 5))
    with pytest.raises(ValueError, match=r"x has shape \(3, 4, 6\), expected \(batch, 4, height, width\)"):
        call(function, x=torch.zeros(3, 4, 6))


@convolutions
@pytest.mark.parametrize("groups", [0, -2, 5, 2.0])
def test_groups_divide_the_channels(function, groups):
    with pytest.raises(ValueError, match=rf"groups is {groups}, expected a divisor|bias has shape"):
        call(function, groups=groups, bias=None)


@convolutions
@pytest.mark.parametrize("argument", ["stride", "dilation"])
@pytest.mark.parametrize("value", [0, -1, (1, 0), (1,), (1, 1, 1), 1.5, (1.5, 1), "same", None])
def test_stride_and_dilation_are_positive(function, argument, value):
    with pytest.raises(ValueError, match=rf"{argument} is .*, expected an integer >= 1 or two \(height, width\)"):
        call(function, **{argument: value})


@pytest.mark.parametrize(
    "value", [-1, (1, -1), (1,), (1, 2, 3, 4), ((1, 2), 3, 4), ((1, 2, 3), 1), 0.5, ((0.5, 1), 1), None]
)
def test_padding_of_a_convolution_has_one_of_its_forms(value):
    with pytest.raises(ValueError, match=r"padding is .*, expected an integer >= 0, \(height, width\) or \(\(top, bot"):
        call(rk.masked_conv2d, padding=value)


def test_padding_by_name_is_same_or_valid():
    with pytest.raises(ValueError, match="padding is 'reflect', expected 'same', 'valid' or integers"):
        call(rk.masked_conv2d, padding="reflect")
    with pytest.raises(ValueError, match=r"padding is 'same' with stride \[2, 2\], expected stride 1"):
        call(rk.masked_conv2d, padding="same", stride=2)


def test_a_kernel_larger_than_the_padded_image_is_refused():
    with pytest.raises(ValueError, match=r"x has shape \(3, 4, 2, 5\), .* smaller than the kernel \(3, 3\)"):
        call(rk.masked_conv2d, x=torch.zeros(3, 4, 2, 5))


@pytest.mark.parametrize("value", [-1, (0, -1), 1.0, "same", ((1, 1), (0, 0))])
def test_padding_of_a_transposed_convolution_is_one_or_two_integers(value):
    with pytest.raises(ValueError, match=r"padding is .*, expected an integer >= 0 or two \(height, width\)"):
        call(rk.masked_conv_transpose2d, padding=value)


def test_output_padding_is_smaller_than_stride_or_dilation():
    with pytest.raises(ValueError, match=r"output_padding is 2, expected less than stride \(2\) or dilation \(1\)"):
        call(rk.masked_conv_transpose2d, stride=2, output_padding=2)
    call(rk.masked_conv_transpose2d, dilation=2, output_padding=1)


def test_a_transposed_convolution_that_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match=r"x has shape \(3, 4, 1, 1\), .* leaves nothing of the output"):
        call(rk.masked_conv_transpose2d, x=torch.zeros(3, 4, 1, 1), padding=2)


@every_operator
def test_the_backend_must_exist(function):
    with pytest.raises(ValueError, match=r"backend is 'gpu', expected one of \['auto', "):
        call(function, backend="gpu")
