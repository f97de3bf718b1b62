"""Masked layers, `convert`, the wrapper, `extract`."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import rtl_kernels as rk
from rtl_kernels import testing
from rtl_kernels.nn import MaskedConv2d, MaskedConvTranspose2d, MaskedLinear, SubsetBatchNorm2d

K = 3
INDEX = [2, 0, -1, 1, 2, 0]
TICKETS = [2, 0, 1, 1, 2, 0]


class Net(nn.Module):
    """Layers of every kind, with and without bias, a nested name, and no batch norm."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.ReLU())
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6)
        self.up = nn.ConvTranspose2d(6, 4, 3, stride=2)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(torch.relu(self.up(self.depthwise(self.stem(x)))).mean((2, 3)))


def masked(model, num_masks=K, density=0.5, **rest):
    net = rk.nn.convert(model, num_masks, **rest)
    for module in net.masked_modules().values():
        module.bank = rk.MaskBank.from_dense(torch.rand(num_masks, *module.bank.shape) < density)
    return net


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def x():
    return torch.randn(len(INDEX), 2, 6, 5, dtype=torch.float64)


@pytest.fixture
def net():
    return masked(Net().double())


def reference(net, x, index):
    """Each sample through the dense copy of its ticket, or the unmasked model."""
    dense = [rk.nn.extract(net, k) for k in range(net.num_masks)]
    free = copy.deepcopy(net)
    free.banks = {name: rk.MaskBank.ones(K, bank.shape) for name, bank in free.banks.items()}
    dense.append(rk.nn.extract(free, 0))
    return torch.cat([dense[k](x[b : b + 1]) for b, k in enumerate(index)])


# ---- convert


def test_convert_keeps_the_modules_their_names_and_the_identity_of_their_parameters():
    model = Net()
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    values = {name: p.clone() for name, p in parameters.items()}
    net = rk.nn.convert(model, K)
    assert net.model is model
    assert all(module is modules[name] for name, module in model.named_modules())
    assert list(dict(model.named_parameters())) == list(parameters)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert all(torch.equal(p, values[name]) for name, p in model.named_parameters())
    assert isinstance(model.depthwise, MaskedConv2d)
    assert isinstance(model.depthwise, nn.Conv2d)
    assert isinstance(model.up, MaskedConvTranspose2d)
    assert isinstance(model.head, MaskedLinear)


def test_a_model_just_converted_computes_what_it_did(x):
    model = Net().double()
    expected = model(x)
    torch.testing.assert_close(rk.nn.convert(model, K)(x, INDEX), expected)


def test_an_optimiser_made_before_convert_trains_the_model_after_it(x):
    model = Net().double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    net = rk.nn.convert(model, K)
    before = [p.detach().clone() for p in model.parameters()]
    net(x, INDEX).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_hooks_stay_and_run(x):
    model = Net().double()
    seen = []
    model.head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    model.head.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    expected = model(x)
    torch.testing.assert_close(rk.nn.convert(model, K)(x, INDEX), expected)
    assert seen == [(6, 5), (6, 5)]


def test_training_mode_and_frozen_parameters_stay():
    model = Net().eval()
    model.head.weight.requires_grad_(False)
    net = rk.nn.convert(model, K)
    assert not model.head.training
    assert not model.head.weight.requires_grad
    assert not rk.nn.extract(net, 0).head.weight.requires_grad
    assert rk.nn.extract(net, 0).head.bias.requires_grad
    rk.nn.untie(net)
    assert not model.head.weight.requires_grad
    assert model.head.bias.requires_grad


def names(net):
    return set(net.masked_modules())


def test_scope_is_a_predicate_over_names_and_modules():
    assert names(rk.nn.convert(Net(), K, scope=lambda name, module: name != "head")) == {"stem.0", "depthwise", "up"}
    assert names(rk.nn.convert(Net(), K, scope=lambda _, m: isinstance(m, nn.Linear))) == {"head"}


def test_scope_is_a_list_of_globs():
    assert names(rk.nn.convert(Net(), K, scope=["stem.*", "h*d"])) == {"stem.0", "head"}
    assert names(rk.nn.convert(Net(), K, scope=["*"])) == {"stem.0", "depthwise", "up", "head"}


def test_layers_out_of_scope_stay_dense_and_plain():
    net = rk.nn.convert(Net(), K, scope=["up"])
    assert type(net.model.head) is nn.Linear
    assert type(net.model.stem[0]) is nn.Conv2d


def test_a_model_may_be_one_layer():
    net = masked(nn.Linear(4, 3).double())
    x = torch.randn(6, 4, dtype=torch.float64)
    assert names(net) == {""}
    torch.testing.assert_close(net(x, INDEX), reference(net, x, INDEX))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.again = self.layer

    def forward(self, x):
        return self.again(torch.relu(self.layer(x)))


def test_a_module_used_twice_is_masked_once():
    net = masked(Twice().double())
    assert names(net) == {"layer"}
    assert net.model.again is net.model.layer
    x = torch.randn(6, 4, dtype=torch.float64)
    torch.testing.assert_close(net(x, INDEX), reference(net, x, INDEX))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_masks": 0}, ValueError, "num_masks is 0, expected at least 1"),
        ({"num_masks": 2.5}, TypeError, "num_masks is 2.5, expected an integer"),
        ({"scope": ["stem.*", "tail*"]}, ValueError, r"scope holds 'tail\*', which matches no linear or convolution"),
        ({"scope": "stem.*"}, TypeError, r"scope is 'stem.\*', expected a predicate or a list of globs"),
        ({"scope": lambda name, module: False}, ValueError, "scope holds no nn.Linear.* nothing to mask"),
        ({"scope": []}, ValueError, "nothing to mask"),
        ({"batch_norm": "ticket"}, ValueError, "batch_norm is 'ticket', expected 'shared' or 'per_ticket'"),
        ({"affine_per_ticket": True}, ValueError, "affine_per_ticket is True with batch_norm='shared'"),
    ],
)
def test_convert_refuses_in_words_and_leaves_the_model_as_it_was(arguments, error, message):
    model = Net()
    with pytest.raises(error, match=message):
        rk.nn.convert(model, **{"num_masks": K, **arguments})
    assert {type(m) for m in model.modules()} == {
        Net, nn.Sequential, nn.ReLU, nn.Conv2d, nn.ConvTranspose2d, nn.Linear
    }  # fmt: skip


def test_convert_refuses_models_it_does_not_understand():
    net = rk.nn.convert(Net(), K)
    for again in (net, net.model, nn.Sequential(net.model.head)):
        with pytest.raises(ValueError, match="model is converted already, expected a dense one"):
            rk.nn.convert(again, K)
    with pytest.raises(TypeError, match=r"model is a type, expected an nn.Module"):
        rk.nn.convert(Net, K)
    with pytest.raises(ValueError, match="nothing to mask"):
        rk.nn.convert(nn.ReLU(), K)
    with pytest.raises(ValueError, match="1 is lazy: run the model once before it is converted"):
        rk.nn.convert(nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(3)), K)
    hooked = nn.Linear(3, 3)
    prune.random_unstructured(hooked, "weight", 0.5)
    with pytest.raises(ValueError, match="0 computes its weight anew in every pass"):
        rk.nn.convert(nn.Sequential(hooked), K)
    with pytest.raises(ValueError, match="but 1 is a BatchNorm1d, expected BatchNorm2d, or batch_norm 'shared'"):
        rk.nn.convert(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), K, batch_norm="per_ticket")
    rk.nn.convert(nn.Sequential(nn.Conv2d(3, 3, 1), nn.InstanceNorm2d(3)), K, batch_norm="per_ticket")


def test_parametrised_layers_are_refused_or_left_out_of_scope():
    model = nn.Sequential(nn.Linear(3, 3), parametrizations.weight_norm(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="1 has parametrisations: remove them before it is masked"):
        rk.nn.convert(model, K)
    assert names(rk.nn.convert(model, K, scope=["0"])) == {"0"}


def test_an_encoder_layer_in_inference_does_not_read_its_weights_past_the_masks():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    net = masked(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double()).eval()
    x = torch.randn(6, 5, 8, dtype=torch.float64)
    expected = net(x, TICKETS)
    with torch.no_grad():
        torch.testing.assert_close(net(x, TICKETS), expected)


# ---- the bank of a layer


def test_assigning_a_bank_is_validated():
    layer = MaskedLinear(40, 5, num_masks=K)
    assert layer.bank.counts().tolist() == [200] * K
    bank = rk.MaskBank.from_dense(torch.rand(K, 5, 40) < 0.5)
    layer.bank = bank
    assert torch.equal(layer.bank.words, bank.words)
    with pytest.raises(ValueError, match=r"bank is 3 masks of \(5, 41\), but the layer has 3 masks of \(5, 40\)"):
        layer.bank = rk.MaskBank.ones(K, (5, 41))
    with pytest.raises(ValueError, match=r"bank is 4 masks of \(5, 40\), but the layer has 3"):
        layer.bank = rk.MaskBank.ones(K + 1, (5, 40))
    with pytest.raises(TypeError, match="bank is a Tensor, expected a MaskBank"):
        layer.bank = torch.ones(K, 5, 40)
    assert torch.equal(layer.bank.words, bank.words)


def test_layers_given_one_bank_have_masks_of_their_own():
    def make(masks):
        net = rk.nn.convert(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), K)
        net.banks = dict(zip(net.banks, masks, strict=True))
        return net

    ones, zeros = rk.MaskBank.ones(K, (4, 4)), rk.MaskBank.from_dense(torch.zeros(K, 4, 4, dtype=torch.bool))
    saved, other = make([ones, zeros]), make([ones, ones])
    other.load_state_dict(saved.state_dict())
    assert [int(bank.counts().sum()) for bank in other.banks.values()] == [16 * K, 0]
    assert ones.counts().tolist() == [16] * K


def test_all_banks_are_assigned_by_name(net):
    banks = {name: rk.MaskBank.ones(K, bank.shape) for name, bank in net.banks.items()}
    net.banks = banks
    assert all(torch.equal(bank.words, banks[name].words) for name, bank in net.banks.items())
    zeros = {name: rk.MaskBank.from_dense(~bank.to_dense()) for name, bank in banks.items()}
    with pytest.raises(
        ValueError, match=r"banks\['head'\] is 3 masks of \(5, 9\), but the layer has 3 masks of \(5, 4\)"
    ):
        net.banks = {**zeros, "head": rk.MaskBank.ones(K, (5, 9))}
    assert all(torch.equal(bank.words, banks[name].words) for name, bank in net.banks.items())
    del banks["head"]
    with pytest.raises(ValueError, match=r"banks names the layers \['depthwise', 'stem.0', 'up'\], but the model's"):
        net.banks = banks


def test_a_layer_called_without_a_route_says_how_to_call_it():
    with pytest.raises(ValueError, match=r"MaskedLinear was called without a route: call the model through the wrapp"):
        MaskedLinear(4, 5, num_masks=K)(torch.zeros(2, 4))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_inside_a_model_are_refused_in_words_and_of_the_whole_call_give_its_gradients(use_reentrant):
    class Checkpointed(nn.Sequential):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=use_reentrant)

    x = torch.randn(len(TICKETS), 4, requires_grad=True)
    net = rk.nn.convert(Checkpointed(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), K)
    with pytest.raises(ValueError, match=r"MaskedLinear was called in a backward pass.* the wrapper's whole call inst"):
        net(x, TICKETS).sum().backward()
    net = rk.nn.convert(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), K)
    weights = [layer.weight for layer in net.masked_modules().values()]
    expected = torch.autograd.grad(net(x, TICKETS).sum(), weights)
    checkpoint(net, x, TICKETS, use_reentrant=use_reentrant).sum().backward()
    for weight, gradient in zip(weights, expected, strict=True):
        testing.assert_bitwise(weight.grad, gradient)


@pytest.mark.parametrize(
    ("layer", "dense", "shape"),
    [
        (MaskedLinear(4, 5, num_masks=K), F.linear, (4,)),
        (MaskedConv2d(4, 6, 3, groups=2, num_masks=K), lambda x, w, b: F.conv2d(x, w, b, groups=2), (4, 5, 5)),
        (MaskedConvTranspose2d(4, 6, 3, bias=False, num_masks=K), F.conv_transpose2d, (4, 5, 5)),
    ],
    ids=["linear", "conv", "conv-transpose"],
)
def test_a_layer_of_its_own_takes_a_route(layer, dense, shape):
    layer.bank = rk.MaskBank.from_dense(torch.rand(K, *layer.bank.shape) < 0.5)
    x = torch.randn(6, *shape)
    y = layer(x, rk.Route.build(TICKETS, K))
    for b, k in enumerate(TICKETS):
        expected = dense(x[b : b + 1], layer.weight * layer.bank.dense(k), layer.bias)
        torch.testing.assert_close(y[b : b + 1], expected)


def test_a_layer_says_how_many_masks_it_has():
    assert "num_masks=3" in repr(MaskedConv2d(2, 3, 1, num_masks=K))
    assert "untied" in repr(rk.nn.untie(rk.nn.convert(nn.Linear(2, 2), K)))


# ---- state


def test_a_dense_state_dict_loads_as_all_ones(net):
    dense = Net().double()
    missing = net.model.load_state_dict(dense.state_dict())
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    for name, bank in net.banks.items():
        assert torch.equal(bank.words, rk.MaskBank.ones(K, bank.shape).words), name
    for (_, ours), (_, theirs) in zip(net.model.named_parameters(), dense.named_parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_masks_that_a_dense_state_dict_assigns_lie_beside_its_weights(net):
    elsewhere = {name: value.to("meta") for name, value in Net().state_dict().items()}
    net.model.load_state_dict(elsewhere, assign=True)
    for module in net.masked_modules().values():
        assert module.mask_words.device == module.weight.device == torch.device("meta")


def test_a_masked_state_dict_makes_a_round_trip(net, x):
    other = rk.nn.convert(Net().double(), K)
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    testing.assert_bitwise(other(x, INDEX), net(x, INDEX))


def test_a_state_dict_of_another_number_of_masks_is_refused(net):
    other = rk.nn.convert(Net().double(), K + 1)
    with pytest.raises(RuntimeError, match=r"size mismatch for model.stem.0.mask_words"):
        other.load_state_dict(net.state_dict())


def test_a_state_dict_with_padding_bits_is_refused(net):
    state = net.state_dict()
    state["model.head.mask_words"] = torch.full_like(state["model.head.mask_words"], -1)
    with pytest.raises(RuntimeError, match=r"model.head.mask_words has bits set behind the end of a row"):
        copy.deepcopy(net).load_state_dict(state)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64], ids=str)
def test_a_state_dict_whose_masks_were_cast_is_refused(net, x, dtype, assign):
    expected = net(x, INDEX)
    state = {name: value.to(dtype) if "mask_words" in name else value for name, value in net.state_dict().items()}
    with pytest.raises(RuntimeError, match=rf"model.head.mask_words has dtype {dtype}, expected torch.int32"):
        net.load_state_dict(state, assign=assign)
    testing.assert_bitwise(net(x, INDEX), expected)


def test_loading_leaves_the_state_dict_as_it_was():
    state = Net().state_dict()
    before = list(state)
    rk.nn.convert(Net(), K).model.load_state_dict(state)
    assert list(state) == before


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["deep", "pickle"]
)
def test_a_copy_of_a_wrapper_works_and_is_independent(net, x, duplicate):
    expected = net(x, INDEX)
    twin = duplicate(net)
    testing.assert_bitwise(twin(x, INDEX), expected)
    assert twin.model.head._pass is twin._pass is not net._pass
    with torch.no_grad():
        twin.model.head.weight.zero_()
    twin.model.head.bank = rk.MaskBank.ones(K, twin.model.head.bank.shape)
    testing.assert_bitwise(net(x, INDEX), expected)


def test_a_copy_of_a_model_that_an_optimiser_watches_works(net, x):
    rk.optim.masked_step(torch.optim.SGD(net.parameters(), 0.1), net)
    net(x, INDEX)
    testing.assert_bitwise(copy.deepcopy(net)(x, INDEX), net(x, INDEX))


# ---- the wrapper


@pytest.mark.parametrize("index", [INDEX, sorted(INDEX), [1] * 6, [-1] * 6])
def test_every_sample_goes_through_the_mask_its_index_names(net, x, index):
    expected = reference(net, x, index)
    for given in (index, torch.tensor(index), torch.tensor(index, dtype=torch.int32), rk.Route.build(index, K)):
        torch.testing.assert_close(net(x, given), expected)


def test_gradients_are_those_of_separate_passes(net, x):
    whole = torch.autograd.grad(net(x, INDEX).square().sum(), list(net.parameters()))
    parts = [
        torch.autograd.grad(net(x[b : b + 1], [k]).square().sum(), list(net.parameters())) for b, k in enumerate(INDEX)
    ]
    torch.testing.assert_close(whole, tuple(sum(p) for p in zip(*parts, strict=True)))


def test_a_batch_may_be_empty(net, x):
    assert net(x[:0], []).shape == (0, 5)
    assert net(x[:0], torch.zeros(0, dtype=torch.int64)).shape == (0, 5)


class Many(nn.Module):
    """Outputs of several kinds, and arguments of its own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 5)

    def forward(self, x, scale, *, shift=0.0):
        y = self.layer(x) * scale + shift
        return {"y": y, "pair": (y[:, :2], [y.sum(1)]), "mean": y.mean(), "table": torch.arange(3), "text": "same"}


def test_every_output_with_a_row_for_each_sample_comes_back_in_order():
    net = masked(Many().double())
    x = torch.randn(6, 4, dtype=torch.float64)
    found = net(x, INDEX, 2.0, shift=1.0)
    for b, k in enumerate(INDEX):
        single = net(x[b : b + 1], [k], 2.0, shift=1.0)
        torch.testing.assert_close(found["y"][b], single["y"][0])
        torch.testing.assert_close(found["pair"][0][b], single["pair"][0][0])
        torch.testing.assert_close(found["pair"][1][0][b], single["pair"][1][0][0])
    torch.testing.assert_close(found["mean"], found["y"].mean())
    assert found["table"].tolist() == [0, 1, 2]
    assert found["text"] == "same"
    assert net(x, rk.Route.every(K, 6), 2.0)["pair"][1][0].shape == (K, 6)


def test_every_through_a_whole_net_equals_a_pass_for_each_ticket(net, x):
    y = net(x, rk.Route.every(K, len(x)))
    assert y.shape == (K, len(x), 5)
    for k in range(K):
        torch.testing.assert_close(y[k], net(x, [k] * len(x)))


def test_every_gives_the_gradient_of_all_tickets_together(net, x):
    y = net(x, rk.Route.every(K, len(x)))
    found = torch.autograd.grad(y.square().sum(), list(net.parameters()))
    parts = [torch.autograd.grad(net(x, [k] * len(x)).square().sum(), list(net.parameters())) for k in range(K)]
    torch.testing.assert_close(found, tuple(sum(p) for p in zip(*parts, strict=True)))


def test_the_wrapper_refuses_an_index_of_another_batch_or_model(net, x):
    with pytest.raises(ValueError, match=r"x has shape \(6, 2, 6, 5\), but index is for 2 samples"):
        net(x, [0, 1])
    with pytest.raises(ValueError, match=r"x has shape \(6, 2, 6, 5\), but index is for 2 samples"):
        net(x, rk.Route.every(K, 2))
    with pytest.raises(ValueError, match="index is a route for 4 masks, but the model has 3"):
        net(x, rk.Route.build(INDEX, 4))
    with pytest.raises(IndexError, match="index holds 3, but there are 3 masks"):
        net(x, [0, 1, 2, 3, 0, 0])
    with pytest.raises(TypeError, match=r"x is a list, expected a Tensor \(batch, ...\)"):
        net([x], INDEX)


@pytest.mark.parametrize("form", [lambda net: net, rk.nn.fuse], ids=["plain", "fused"])
def test_passes_in_several_threads_keep_to_their_own_routes(net, x, form):
    net = form(net.eval())
    indices = TICKETS, TICKETS[::-1]
    with torch.no_grad():
        expected = [net(x, index) for index in indices]
    met = threading.Barrier(2)

    def meet(module, inputs):
        met.wait(300)  # both have begun before either reaches its first layer

    def run(index):
        with torch.no_grad():
            return net(x, index)

    net.model.register_forward_pre_hook(meet)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, indices))
    for y, wanted in zip(found, expected, strict=True):
        testing.assert_bitwise(y, wanted)


def test_a_pass_that_fails_leaves_no_route_behind(net, x):
    with pytest.raises(ValueError, match="expected"):
        net(x[:, :1], INDEX)
    with pytest.raises(ValueError, match="without a route"):
        net.model(x)


@testing.for_devices
def test_a_model_moves_between_devices_with_its_masks(net, x, device):
    expected = net(x, INDEX)
    torch.testing.assert_close(net.to(device)(x.to(device), INDEX).cpu(), expected)
    assert net.model.head.bank.device.type == device


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_model_in_half_precision_keeps_its_masks(net, x, dtype):
    exact, words = net(x, INDEX), net.model.head.mask_words.clone()
    y = net.to(dtype)(x.to(dtype), INDEX)
    assert y.dtype == dtype
    assert torch.equal(net.model.head.mask_words, words)
    torch.testing.assert_close(
        y.double(), exact, rtol=0, atol=16 * torch.finfo(dtype).eps * float(exact.detach().abs().max())
    )


# ---- particular layers


def test_strides_and_paddings_may_be_numbers_of_numpy_as_those_of_dense_layers():
    two, one = np.int64(2), np.int64(1)
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=two, padding=(one, np.int64(0)), dilation=one, groups=two),
        nn.ConvTranspose2d(6, 4, 3, stride=two, padding=one, output_padding=one),
    )
    x = torch.randn(3, 4, 7, 7)
    expected = model(x)
    torch.testing.assert_close(rk.nn.convert(model, K)(x, [0, 2, 1]), expected)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, (2, 1), "same"])
def test_padding_modes_are_those_of_the_dense_convolution(mode, padding):
    model = nn.Conv2d(2, 3, (3, 4), padding=padding, padding_mode=mode).double()
    x = torch.randn(6, 2, 5, 6, dtype=torch.float64)
    net = masked(model)
    torch.testing.assert_close(net(x, INDEX), reference(net, x, INDEX))


@pytest.mark.parametrize("how", ["keyword", "positional"])
def test_a_transposed_convolution_takes_an_output_size(how):
    class Up(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1)

        def forward(self, x, size):
            return self.up(x, output_size=size) if how == "keyword" else self.up(x, size)

    x = torch.randn(6, 2, 4, 5, dtype=torch.float64)
    net = masked(Up().double())
    dense = [rk.nn.extract(net, k) for k in range(K)]
    for size in ([7, 9], [8, 10], torch.Size([6, 3, 8, 9]), (8, 9)):
        expected = torch.cat([dense[k](x[b : b + 1], list(size)[-2:]) for b, k in enumerate(TICKETS)])
        torch.testing.assert_close(net(x, TICKETS, size), expected)
    with pytest.raises(ValueError, match="requested an output size of"):
        net(x, TICKETS, [12, 12])


# ---- extract


def test_an_extracted_ticket_is_a_plain_model_with_the_tickets_weights_bit_for_bit(net):
    plain = Net().double()
    for k in range(K):
        model = rk.nn.extract(net, k)
        assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
        assert list(model.state_dict()) == list(plain.state_dict())
        assert all(vars(m).keys() == vars(p).keys() for m, p in zip(model.modules(), plain.modules(), strict=True))
        for name, layer in net.masked_modules().items():
            weight = model.get_submodule(name).weight
            mask = layer.bank.dense(k)
            testing.assert_bitwise(weight[mask], layer.weight[mask])
            testing.assert_bitwise(weight[~mask], torch.zeros_like(weight[~mask]))
        plain.load_state_dict(model.state_dict())


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("batch_norm", ["shared", "per_ticket"])
def test_an_extracted_ticket_computes_what_the_ticket_does(batch_norm, untied):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 3, 2)).double()
    net = masked(model, batch_norm=batch_norm)
    x = torch.randn(6, 2, 6, 5, dtype=torch.float64)
    if untied:
        rk.nn.untie(net)
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p))
    net(x, TICKETS)  # gives the batch norms statistics
    net.eval()
    y = net(x, TICKETS)
    for b, k in enumerate(TICKETS):
        torch.testing.assert_close(rk.nn.extract(net, k)(x[b : b + 1]), y[b : b + 1])


def test_extract_leaves_the_wrapper_alone_and_refuses_tickets_that_are_not_there(net, x):
    expected = net(x, INDEX)
    model = rk.nn.extract(net, 1)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(7)
    testing.assert_bitwise(net(x, INDEX), expected)
    for ticket in (-1, K):
        with pytest.raises(IndexError, match=rf"ticket is {ticket}, but there are 3 \(0..2\)"):
            rk.nn.extract(net, ticket)
    with pytest.raises(TypeError, match="ticket is 'cat', expected an integer"):
        rk.nn.extract(net, "cat")


def test_an_extracted_model_can_be_converted_again(net, x):
    model = rk.nn.extract(net, 1)
    expected = model(x)
    torch.testing.assert_close(rk.nn.convert(model, 2)(x, [0, 1, 0, 1, -1, 0]), expected)


def test_batch_norm_layers_are_replaced_in_both_modes():
    for mode in ("shared", "per_ticket"):
        net = rk.nn.convert(nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)), K, batch_norm=mode)
        assert type(net.model[1]) is SubsetBatchNorm2d
        assert net.model[1].per_ticket == (mode == "per_ticket")
