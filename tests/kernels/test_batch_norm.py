"""SubsetBatchNorm2d: one mixed pass equals K separate passes through K `nn.BatchNorm2d`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rtl_kernels as rk
from rtl_kernels import testing
from rtl_kernels.nn import SubsetBatchNorm2d

K, C = 4, 5
INDEX = [3, 0, 0, 3, 1, 0, 3, 1]  # ticket 2 has no sample
BATCHES = [INDEX, [2, 2, 0, 0, 1, 1], [1, 1, 1]]

OPTIONS = {
    "defaults": {},
    "momentum-none": {"momentum": None},
    "momentum-half": {"momentum": 0.5},
    "momentum-zero": {"momentum": 0.0},
    "no-statistics": {"track_running_stats": False},
    "no-affine": {"affine": False},
    "large-eps": {"eps": 0.1},
}


def pair(dtype=torch.float64, affine_per_ticket=False, **options):
    """The layer and K dense ones that start as it does."""
    torch.manual_seed(0)
    layer = SubsetBatchNorm2d(C, K, affine_per_ticket=affine_per_ticket, **options).to(dtype)
    dense = [nn.BatchNorm2d(C, **options).to(dtype) for _ in range(K)]
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(torch.randn_like(parameter))
            for k, twin in enumerate(dense):
                getattr(twin, name).copy_(parameter[k] if affine_per_ticket else parameter)
    return layer, dense


def draw(index, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = 3 + 2 * torch.randn(len(index), C, 3, 2, generator=generator, dtype=torch.float64)
    dy = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return x.to(dtype).requires_grad_(), dy.to(dtype)


def separate(dense, x, index):
    y = torch.zeros_like(x)
    for k, layer in enumerate(dense):
        own = (torch.tensor(index) == k).nonzero()[:, 0]
        if len(own):
            y = y.index_copy(0, own, layer(x[own]))
    return y


def parameter_gradients(layer, dense):
    for name, parameter in layer.named_parameters():
        theirs = [torch.zeros_like(p) if p.grad is None else p.grad for p in (getattr(d, name) for d in dense)]
        yield parameter.grad, torch.stack(theirs) if layer.affine_per_ticket else sum(theirs)


def check_equal(layer, dense, index, seed):
    x, dy = draw(index, seed=seed)
    twin = x.detach().clone().requires_grad_()
    y = layer(x, rk.Route.build(index, K))
    expected = separate(dense, twin, index)
    torch.testing.assert_close(y, expected)
    y.backward(dy)
    expected.backward(dy)
    torch.testing.assert_close(x.grad, twin.grad)
    for ours, theirs in parameter_gradients(layer, dense):
        torch.testing.assert_close(ours, theirs)
    for name, buffer in layer.named_buffers():
        for k, d in enumerate(dense):
            torch.testing.assert_close(buffer[k], getattr(d, name))


@pytest.mark.parametrize("affine_per_ticket", [False, True], ids=["affine-shared", "affine-per-ticket"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_mixed_passes_equal_separate_ones_in_training_and_after(options, affine_per_ticket):
    """Outputs, gradients of x, scale and shift (accumulated), running statistics and counts, over several batches."""
    layer, dense = pair(affine_per_ticket=affine_per_ticket, **options)
    for seed, index in enumerate(BATCHES):
        check_equal(layer, dense, index, seed)
    for module in (layer, *dense):
        module.eval()
    check_equal(layer, dense, INDEX, 9)


def test_a_ticket_without_samples_keeps_its_statistics_to_the_bit():
    layer, _ = pair()
    layer(draw([2, 2, 2])[0], rk.Route.build([2, 2, 2], K))
    before = copy.deepcopy(dict(layer.named_buffers()))
    layer(draw(INDEX)[0], rk.Route.build(INDEX, K))
    for name, buffer in layer.named_buffers():
        testing.assert_bitwise(buffer[2], before[name][2], name)
        assert not torch.equal(buffer[3], before[name][3])


@pytest.mark.parametrize("momentum", [0.1, None])
def test_nan_in_one_ticket_stays_there(momentum):
    layer, _ = pair(momentum=momentum)
    x, _ = draw(INDEX)
    x = x.detach()
    x[0] = float("nan")
    y = layer(x, rk.Route.build(INDEX, K))
    assert y[torch.tensor(INDEX) != 3].isfinite().all()
    for buffer in (layer.running_mean, layer.running_var):
        assert buffer[[0, 1, 2]].isfinite().all()
        assert buffer[3].isnan().all()


@pytest.mark.parametrize("training", [True, False])
def test_a_group_is_invariant_bitwise(training):
    layer, _ = pair(torch.float32)
    layer.train(training)
    x, dy = draw(INDEX, torch.float32)
    y = layer(x, rk.Route.build(INDEX, K))
    y.backward(dy)
    for k in set(INDEX):
        own = torch.tensor(INDEX) == k
        alone = x.detach()[own].requires_grad_()
        z = layer(alone, rk.Route.build([k] * int(own.sum()), K))
        z.backward(dy[own])
        testing.assert_bitwise(z, y[own])
        testing.assert_bitwise(alone.grad, x.grad[own])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(3, 2), (12, 11)], ids=str)
def test_fixed_statistics_are_a_scale_and_a_shift_with_the_same_bits_with_gradients_and_without(dtype, size):
    torch.manual_seed(0)
    layer, dense = pair(dtype, affine_per_ticket=True)
    layer.eval()
    with torch.no_grad():
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
        for k, twin in enumerate(dense):
            twin.eval().running_mean.copy_(layer.running_mean[k])
            twin.running_var.copy_(layer.running_var[k])
    x = torch.randn(len(INDEX), C, *size).to(dtype).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    route = rk.Route.build(INDEX, K)
    y, expected = layer(x, route), separate(dense, twin, INDEX)
    torch.testing.assert_close(y, expected)
    with torch.no_grad():
        testing.assert_bitwise(layer(x, route), y)
    if dtype == torch.bfloat16:
        return
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy)
    torch.testing.assert_close(x.grad, twin.grad)
    for ours, theirs in parameter_gradients(layer, dense):
        torch.testing.assert_close(ours, theirs)


def test_gradients_agree_with_finite_differences():
    for training in (True, False):
        layer, _ = pair(affine_per_ticket=True)
        layer.train(training)
        route = rk.Route.build([1, 0, 1, 0], K)

        def call(x, weight, bias, layer=layer, route=route):
            return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x, route))

        inputs = (draw([1, 0, 1, 0])[0][:, :, :2, :1].detach().requires_grad_(), layer.weight, layer.bias)
        assert torch.autograd.gradcheck(call, inputs)


def test_second_derivatives_in_training_are_refused_in_words():
    layer, _ = pair()
    x, _ = draw(INDEX)
    (g,) = torch.autograd.grad(layer(x, rk.Route.build(INDEX, K)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        g.sum().backward()


@pytest.mark.parametrize("training", [True, False])
def test_index_minus_one_is_refused(training):
    layer, _ = pair()
    layer.train(training)
    with pytest.raises(ValueError, match=r"index holds -1 \(no mask\), which per-ticket batch norm has no meaning for"):
        layer(draw([0, -1, 0])[0], rk.Route.build([0, -1, 0], K))


def test_a_ticket_with_one_value_a_channel_is_refused_in_training_only():
    layer, _ = pair()
    x = torch.randn(3, C, 1, 1, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"x has one value a channel for mask 2 \(shape \(1, 5, 1, 1\)\): expected more"
    ):
        layer(x, rk.Route.build([0, 2, 0], K))
    layer.eval()(x, rk.Route.build([0, 2, 0], K))


def test_inputs_are_checked():
    layer, _ = pair()
    with pytest.raises(ValueError, match="expected 4D input"):
        layer(torch.zeros(3, C, dtype=torch.float64), rk.Route.build([0, 1, 1], K))
    with pytest.raises(ValueError, match=r"x has shape \(3, .*, but its route is for 2 samples"):
        layer(torch.zeros(3, C, 2, 2, dtype=torch.float64), rk.Route.build([0, 1], K))
    with pytest.raises(TypeError, match=r"route is a list, expected a Route \(Route.build\(index, num_masks\)\)"):
        layer(torch.zeros(3, C, 2, 2, dtype=torch.float64), [0, 1, 1])
    with pytest.raises(ValueError, match="SubsetBatchNorm2d was called without a route"):
        layer(torch.zeros(3, C, 2, 2, dtype=torch.float64))
    own = SubsetBatchNorm2d(C, K, affine_per_ticket=True, track_running_stats=False).double()
    for other in (layer, own, copy.deepcopy(layer).eval()):
        with pytest.raises(ValueError, match="route is for 6 masks, but the layer has statistics of 4"):
            other(torch.zeros(3, C, 2, 2, dtype=torch.float64), rk.Route.build([0, 5, 1], K + 2))
    with pytest.raises(ValueError, match="affine_per_ticket is True with per_ticket=False"):
        SubsetBatchNorm2d(C, K, per_ticket=False, affine_per_ticket=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("per_ticket", [True, False])
def test_channels_and_dtypes_of_another_layer_are_refused(per_ticket, training):
    layer, route = SubsetBatchNorm2d(4, 2, per_ticket=per_ticket).train(training), rk.Route.build([0, 1, 1], 2)
    assert layer(torch.zeros(3, 4, 2, 2, dtype=torch.bfloat16), route).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"x has shape \(3, 5, 2, 2\), expected \(rows, 4, height, width\)"):
        layer(torch.zeros(3, 5, 2, 2), route)
    with pytest.raises(TypeError, match=r"x has dtype torch.uint8, expected a floating-point one"):
        layer(torch.zeros(3, 4, 2, 2, dtype=torch.uint8), route)
    with pytest.raises(TypeError, match=r"weight has dtype torch.float32, which does not go with x's, torch.float64"):
        layer(torch.zeros(3, 4, 2, 2, dtype=torch.float64), route)
    free = SubsetBatchNorm2d(4, 2, per_ticket=per_ticket, affine=False, track_running_stats=False)
    assert free(torch.ones(3, 5, 2, 2), route).shape == (3, 5, 2, 2)  # it knows of no number of channels


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_as_accurate_as_nn_batch_norm(dtype, training):
    """Also where the mean is large beside the deviation, so that scaled input and shift nearly cancel."""
    low, low_dense = pair(dtype)
    exact, exact_dense = pair()
    for ours, theirs in zip((low, *low_dense), (exact, *exact_dense), strict=True):
        theirs.load_state_dict(ours.state_dict())
        for module in (ours, theirs):
            module.train(training)
            if not training:
                module.running_mean.fill_(40)
                module.running_var.fill_(0.25)
    x, _ = draw(INDEX)
    x = (40 + x / 4).to(dtype)
    y = low(x, rk.Route.build(INDEX, K))
    assert y.dtype == dtype
    expected = separate(exact_dense, x.double(), INDEX)
    error = (y.double() - expected).abs().max()
    theirs = (separate(low_dense, x, INDEX).double() - expected).abs().max()
    assert error <= testing.FACTOR * theirs


def test_a_dense_state_dict_loads_with_a_copy_for_every_ticket():
    dense = nn.BatchNorm2d(C)
    dense(torch.randn(8, C, 2, 2))
    with torch.no_grad():
        dense.weight.copy_(torch.randn(C))
    for affine_per_ticket in (False, True):
        layer = SubsetBatchNorm2d(C, K, affine_per_ticket=affine_per_ticket)
        layer.load_state_dict(dense.state_dict())
        for name, value in layer.state_dict().items():
            expected = dense.state_dict()[name]
            per_ticket = affine_per_ticket or name not in ("weight", "bias")
            testing.assert_bitwise(value, torch.stack([expected] * K) if per_ticket else expected)
        again = SubsetBatchNorm2d(C, K, affine_per_ticket=affine_per_ticket)
        again.load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        SubsetBatchNorm2d(C, K + 1).load_state_dict(layer.state_dict())


# ---- in a model


class Net(nn.Module):
    """A batch norm stands before the first masked layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm2d(2)
        self.conv = nn.Conv2d(2, C, 3)
        self.norm = nn.BatchNorm2d(C)

    def forward(self, x):
        return torch.relu(self.norm(self.conv(self.first(x))))


def converted(mode):
    torch.manual_seed(0)
    net = rk.nn.convert(Net().double(), K, batch_norm=mode)
    net.model.conv.bank = rk.MaskBank.from_dense(torch.rand(K, C, 2, 3, 3) < 0.5)
    return net


def test_a_mixed_pass_of_a_model_equals_a_pass_for_each_ticket():
    mixed, apart = converted("per_ticket"), converted("per_ticket")
    x = torch.randn(8, 2, 6, 5, dtype=torch.float64)
    y = mixed(x, INDEX)
    y.square().sum().backward()
    for k in set(INDEX):
        own = torch.tensor(INDEX) == k
        z = apart(x[own], [k] * int(own.sum()))
        z.square().sum().backward()
        torch.testing.assert_close(y[own], z)
    for ours, theirs in zip(mixed.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(dict(mixed.named_buffers()), dict(apart.named_buffers()))


@pytest.mark.parametrize("training", [True, False])
def test_every_works_with_a_batch_norm_before_the_first_masked_layer(training):
    every, apart = converted("per_ticket").train(training), converted("per_ticket").train(training)
    x = torch.randn(6, 2, 6, 5, dtype=torch.float64)
    y = every(x, rk.Route.every(K, 6))
    for k in range(K):
        torch.testing.assert_close(y[k], apart(x, [k] * 6))
    torch.testing.assert_close(dict(every.named_buffers()), dict(apart.named_buffers()))


@pytest.mark.parametrize("training", [True, False])
def test_shared_statistics_are_those_of_nn_batch_norm_over_the_whole_batch(training):
    net = converted("shared").train(training)
    norm = nn.BatchNorm2d(2).double().train(training)
    x = torch.randn(8, 2, 6, 5, dtype=torch.float64)
    seen = []
    net.model.first.register_forward_hook(lambda module, inputs, output: seen.append(output))
    net(x, INDEX)
    torch.testing.assert_close(seen[0], norm(rk.Route.build(INDEX, K).arrange(x)))
    torch.testing.assert_close(net.model.first.running_var, norm.running_var)
    assert net.model.first.running_mean.shape == (2,)
    net(x, [-1] * 8)  # the dense weight has a meaning here


@pytest.mark.parametrize("per_ticket", [False, True])
def test_a_batch_without_samples_moves_no_statistics(per_ticket):
    layer = SubsetBatchNorm2d(C, K, per_ticket=per_ticket)
    for buffer in (layer.running_mean, layer.running_var):
        nn.init.uniform_(buffer, 1, 2)
    before = copy.deepcopy([layer.running_mean, layer.running_var])
    x = torch.zeros(0, C, 4, 3, requires_grad=True)
    y = layer(x, rk.Route.build([], K))
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    for buffer, old in zip((layer.running_mean, layer.running_var), before, strict=True):
        testing.assert_bitwise(buffer, old)
