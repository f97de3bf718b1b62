"""`masked_step`: what is outside the batch's masks does not move by one bit, neither weight nor optimiser state."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn

import rtl_kernels as rk
from rtl_kernels import testing

K = 4

OPTIMIZERS = {
    "sgd": lambda p, **o: torch.optim.SGD(p, 0.05, **o),
    "sgd-momentum-decay": lambda p, **o: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1, **o),
    "sgd-nesterov": lambda p, **o: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=0.1, **o),
    "sgd-dampening-maximize": lambda p, **o: torch.optim.SGD(p, 0.05, momentum=0.9, dampening=0.5, maximize=True, **o),
    "adam": lambda p, **o: torch.optim.Adam(p, 0.05, weight_decay=0.1, **o),
    "adam-amsgrad": lambda p, **o: torch.optim.Adam(p, 0.05, amsgrad=True, **o),
    "adamw": lambda p, **o: torch.optim.AdamW(p, 0.05, weight_decay=0.1, **o),
    "rmsprop": lambda p, **o: torch.optim.RMSprop(p, 0.05, momentum=0.9, centered=True, **o),
    "adagrad": lambda p, **o: torch.optim.Adagrad(p, 0.05, initial_accumulator_value=0.1, lr_decay=0.01, **o),
    "rprop": lambda p, **o: torch.optim.Rprop(p, 0.05, **o),
    "nadam": lambda p, **o: torch.optim.NAdam(p, 0.05, weight_decay=0.1, **o),
    "adamax": lambda p, **o: torch.optim.Adamax(p, 0.05, weight_decay=0.1, **o),
}
WAYS = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
FUSED = {"sgd", "sgd-momentum-decay", "sgd-nesterov", "adam", "adam-amsgrad", "adamw"}

for_optimizers = pytest.mark.parametrize(
    ("make", "way"),
    [
        pytest.param(make, options, id=f"{name}-{way}")
        for name, make in OPTIMIZERS.items()
        for way, options in WAYS.items()
        if way != "fused" or name in FUSED
    ],
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.up = nn.ConvTranspose2d(4, 3, 2)
        self.free = nn.Linear(3, 3)
        self.head = nn.Linear(3, 5)

    def forward(self, x):
        x = torch.tanh(self.up(torch.tanh(self.conv(x))))
        return self.head(torch.tanh(self.free(x.mean((2, 3)))))


def converted(dtype=torch.float32):
    torch.manual_seed(0)
    net = rk.nn.convert(Net().to(dtype), K, scope=["conv", "up", "head"])
    for module in net.masked_modules().values():
        module.bank = rk.MaskBank.from_dense(torch.rand(K, *module.bank.shape) < 0.4)
    return net


def backward(net, index, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = next(net.parameters())
    x = torch.randn(len(index), 2, 5, 4, generator=generator, dtype=torch.float64).to(weight.dtype)
    # The penalty gives every weight a gradient, kept or not.
    penalty = sum(module.weight.nan_to_num().square().sum() for module in net.masked_modules().values())
    (net(x, index).square().mean() + 0.01 * penalty).backward()


# What tickets a step sees: masks join late, leave, and come back.
STEPS = [[0, 0], [1, 0], [2, 2, 2], [3, 1], [0], [2, 3]]


def kept(net, name, index):
    """bool: weights of a masked layer that some sample's mask keeps."""
    if -1 in index:
        return torch.ones(net.banks[name].shape, dtype=torch.bool)
    return net.banks[name].to_dense()[list(set(index))].any(0)


def snapshot(net, optimizer):
    """Every tensor of a layer's shape that a step may move: (layer, name) -> (tensor, copy)."""
    tensors = {}
    for name, module in net.masked_modules().items():
        tensors[name, "weight"] = module.weight
        for key, value in optimizer.state.get(module.weight, {}).items():
            if isinstance(value, torch.Tensor) and value.shape == module.weight.shape:
                tensors[name, key] = value
    return {key: value.detach().clone() for key, value in tensors.items()}


@for_optimizers
def test_pruned_weights_and_their_state_do_not_move_by_one_bit(make, way):
    net = converted()
    with torch.no_grad():  # values a step could spoil silently
        net.model.conv.weight[~net.banks["conv"].union().dense(0)] = float("nan")
        net.model.head.weight[~net.banks["head"].union().dense(0)] = -0.0
    optimizer = rk.optim.masked_step(make(net.parameters(), **way), net)
    initial = None
    for seed, index in enumerate(STEPS):
        before = snapshot(net, optimizer)
        optimizer.zero_grad()
        backward(net, index, seed)
        optimizer.step()
        after = snapshot(net, optimizer)
        if initial is None:
            initial = {key: value for key, value in after.items() if key not in before}
        for (name, key), value in after.items():
            still = ~kept(net, name, index)
            assert still.any()
            if (name, key) in before:
                testing.assert_bitwise(value[still], before[name, key][still], f"{name}.{key} in step {seed}")
            else:  # state made in this step: one constant, which momentum and moments start at
                assert len(value[still].unique()) == 1
        for name in net.masked_modules():
            moved = after[name, "weight"] != before[name, "weight"]
            assert moved[kept(net, name, index)].any(), name
    unseen = {name: ~bank.union().dense(0) for name, bank in net.banks.items()}
    for (name, key), value in initial.items():
        testing.assert_bitwise(snapshot(net, optimizer)[name, key][unseen[name]], value[unseen[name]])


@for_optimizers
def test_kept_weights_move_as_under_the_plain_optimiser(make, way):
    """With one mask everywhere, the plain optimiser on the masked gradient differs only where nothing is kept."""
    net, plain = converted(torch.float64), converted(torch.float64)
    masked, free = rk.optim.masked_step(make(net.parameters(), **way), net), make(plain.parameters(), **way)
    for seed in range(4):
        for model, optimizer in ((net, masked), (plain, free)):
            optimizer.zero_grad()
            backward(model, [1, 1, 1], seed)
            optimizer.step()
    for (name, ours), theirs in zip(net.model.named_parameters(), plain.model.parameters(), strict=True):
        layer, _, kind = name.rpartition(".")
        if layer in net.banks and kind == "weight":
            keep = net.banks[layer].dense(1)
            ours, theirs = ours[keep], theirs[keep]
        testing.assert_bitwise(ours, theirs, name)


@for_optimizers
def test_parameters_without_masks_move_as_they_always_do(make, way):
    net, plain = converted(), converted()
    masked, free = rk.optim.masked_step(make(net.parameters(), **way), net), make(plain.parameters(), **way)
    for model, optimizer in ((net, masked), (plain, free)):
        backward(model, [1, 0, 1], 0)
        optimizer.step()
    for name in ("conv.bias", "up.bias", "free.weight", "free.bias", "head.bias"):
        testing.assert_bitwise(net.model.get_parameter(name), plain.model.get_parameter(name), name)


def decaying(net):
    return torch.optim.SGD(net.parameters(), 0.05, weight_decay=0.1, momentum=0.9)


def weights(net):
    return {name: module.weight.detach().clone() for name, module in net.masked_modules().items()}


def assert_moved(net, before, index, everywhere=True):
    """Exactly what the index's masks keep has moved (decay moves every weight that may)."""
    for name, old in before.items():
        moved = net.masked_modules()[name].weight != old
        assert torch.equal(moved, kept(net, name, index)), name


def test_one_dense_sample_frees_every_weight():
    net = converted()
    optimizer = rk.optim.masked_step(decaying(net), net)
    before = weights(net)
    backward(net, [0, -1], 0)
    optimizer.step()
    assert_moved(net, before, [0, -1])


def test_every_batch_since_the_last_step_counts():
    net = converted()
    optimizer = rk.optim.masked_step(decaying(net), net)
    before = weights(net)
    backward(net, [0], 0)
    backward(net, [2], 1)
    optimizer.step()
    assert_moved(net, before, [0, 2])
    before = weights(net)
    backward(net, [1], 2)
    optimizer.step()
    assert_moved(net, before, [1])


def test_a_pass_without_gradients_does_not_count():
    net = converted()
    optimizer = rk.optim.masked_step(decaying(net), net)
    before = weights(net)
    backward(net, [0], 0)
    with torch.no_grad():
        net(torch.randn(1, 2, 5, 4), [3])
    optimizer.step()
    assert_moved(net, before, [0])


def test_a_step_without_a_batch_moves_no_masked_weight():
    net = converted()
    optimizer = rk.optim.masked_step(decaying(net), net)
    backward(net, [0], 0)
    optimizer.step()
    before, free = weights(net), net.model.free.weight.detach().clone()
    optimizer.step()  # momentum and the old gradient would move it
    for name, old in before.items():
        testing.assert_bitwise(net.masked_modules()[name].weight, old, name)
    assert not torch.equal(net.model.free.weight, free)


def test_a_route_through_every_mask_moves_their_union():
    net = converted()
    optimizer = rk.optim.masked_step(decaying(net), net)
    before = weights(net)
    net(torch.randn(2, 2, 5, 4), rk.Route.every(K, 2)).square().sum().backward()
    optimizer.step()
    assert_moved(net, before, range(K))


def test_a_parameter_without_a_gradient_is_left_alone():
    net = converted()
    net.model.up.weight.requires_grad_(False)
    optimizer = rk.optim.masked_step(decaying(net), net)
    before = weights(net)
    backward(net, [0], 0)
    optimizer.step()
    testing.assert_bitwise(net.model.up.weight, before["up"])


def test_two_optimisers_of_one_model_each_know_their_batches():
    net = converted()
    first = rk.optim.masked_step(torch.optim.SGD(net.model.conv.parameters(), 0.05, weight_decay=0.1), net)
    second = rk.optim.masked_step(torch.optim.SGD(net.model.head.parameters(), 0.05), net)
    before = weights(net)
    backward(net, [0], 0)
    first.step()
    assert torch.equal(net.model.conv.weight != before["conv"], kept(net, "conv", [0]))
    backward(net, [2], 1)
    first.step()  # leaves the gradients that the other has gathered since its last step
    second.step()
    assert torch.equal(net.model.head.weight != before["head"], kept(net, "head", [0, 2]))


def test_a_weight_that_two_layers_share_moves_where_either_keeps_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    net = rk.nn.convert(model, 2)
    first, second = (torch.rand(2, 2, 4, 4) < 0.4).unbind(1)
    model[0].bank, model[1].bank = rk.MaskBank.from_dense(first), rk.MaskBank.from_dense(second)
    optimizer = rk.optim.masked_step(torch.optim.SGD(net.parameters(), 0.05, weight_decay=0.1), net)
    before = model[0].weight.detach().clone()
    net(torch.randn(3, 4), [1, 1, 1]).square().sum().backward()
    optimizer.step()
    either = first[1] | second[1]
    assert torch.equal(model[0].weight != before, either)
    testing.assert_bitwise(model[0].weight[~either], before[~either])


@pytest.mark.parametrize("make", [decaying, lambda net: torch.optim.Adam(net.parameters(), 0.05, weight_decay=0.1)])
def test_untied_parameters_of_absent_tickets_stay(make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1))
    net = rk.nn.untie(rk.nn.convert(model, K, batch_norm="per_ticket"))
    for module in net.masked_modules().values():
        module.bank = rk.MaskBank.from_dense(torch.rand(K, *module.bank.shape) < 0.5)
    optimizer = rk.optim.masked_step(make(net), net)
    for seed, index in enumerate([[0, 1], [1, 2, 1], [2]]):
        before = {name: p.detach().clone() for name, p in net.model.named_parameters()}
        states = {
            (name, key): value.clone()
            for name, p in net.model.named_parameters()
            for key, value in optimizer.state.get(p, {}).items()
            if value.shape == p.shape
        }
        optimizer.zero_grad()
        backward(net, index, seed)
        optimizer.step()
        for name, p in net.model.named_parameters():
            for k in range(K):
                if k not in index:
                    testing.assert_bitwise(p[k], before[name][k], name)
                    for key in optimizer.state[p].keys() & {key for n, key in states if n == name}:
                        testing.assert_bitwise(optimizer.state[p][key][k], states[name, key][k], key)
                else:
                    assert not torch.equal(p[k], before[name][k]), (name, k)
                    if name in ("0.weight", "2.weight"):
                        mask = net.banks[name[0]].dense(k)
                        testing.assert_bitwise(p[k][~mask], before[name][k][~mask])


def test_learning_rate_schedulers_and_saved_states_work_as_before():
    net = converted()
    optimizer = rk.optim.masked_step(decaying(net), net)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for seed, index in enumerate(STEPS[:3]):
        before = weights(net)
        optimizer.zero_grad()
        backward(net, index, seed)
        optimizer.step()
        scheduler.step()
        assert_moved(net, before, index)
    assert optimizer.param_groups[0]["lr"] == 0.05 / 8
    other = converted()
    other.load_state_dict(net.state_dict())
    resumed = rk.optim.masked_step(decaying(other), other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, step in ((net, optimizer), (other, resumed)):
        model.zero_grad()
        backward(model, [1, 3], 7)
        step.step()
    for ours, theirs in zip(net.parameters(), other.parameters(), strict=True):
        testing.assert_bitwise(ours, theirs)


def test_a_parameter_group_added_later_is_masked_too():
    net = converted()
    optimizer = rk.optim.masked_step(torch.optim.SGD(net.model.conv.parameters(), 0.05, weight_decay=0.1), net)
    optimizer.add_param_group({"params": net.model.head.parameters()})
    before = weights(net)
    backward(net, [1], 0)
    optimizer.step()
    assert torch.equal(net.model.head.weight != before["head"], kept(net, "head", [1]))


def test_an_optimiser_that_is_gone_is_not_kept_up_to_date():
    net = converted()
    for _ in range(3):
        optimizer = rk.optim.masked_step(decaying(net), net)
        backward(net, [0], 0)
        optimizer.step()
    del optimizer
    gc.collect()
    assert not net._pass.seen


# ---- errors


def test_bad_arguments_are_named():
    net = converted()
    with pytest.raises(TypeError, match=r"model is a Net, expected the wrapper that rtl_kernels.nn.convert returned"):
        rk.optim.masked_step(decaying(net), net.model)
    for parameters in (Net().parameters(), net.model.free.parameters()):
        with pytest.raises(ValueError, match="optimizer holds no masked weight of the model: make"):
            rk.optim.masked_step(torch.optim.SGD(parameters, 0.1), net)


def test_an_optimiser_made_before_untie_is_refused():
    net = converted()
    optimizer = decaying(net)
    rk.nn.untie(net)
    with pytest.raises(ValueError, match="optimizer holds no masked weight"):
        rk.optim.masked_step(optimizer, net)


def test_masking_a_step_twice_is_refused():
    net = converted()
    optimizer = rk.optim.masked_step(decaying(net), net)
    with pytest.raises(ValueError, match="optimizer was given to masked_step before"):
        rk.optim.masked_step(optimizer, net)


@pytest.mark.parametrize("how", ["positional", "keyword"])
def test_a_closure_is_refused(how):
    net = converted()
    optimizer = rk.optim.masked_step(decaying(net), net)
    with pytest.raises(ValueError, match="closure is given, but a masked step has to know its batch before it"):
        optimizer.step(lambda: None) if how == "positional" else optimizer.step(closure=lambda: None)


def test_what_was_kept_of_earlier_steps_follows_new_masks_and_changed_bits():
    """The same tickets come by again and again, the masks they go through do not stay."""
    net = converted()
    optimizer = rk.optim.masked_step(decaying(net), net)

    def step(seed, index):
        before = weights(net)
        optimizer.zero_grad()
        backward(net, index, seed)
        optimizer.step()
        assert_moved(net, before, index)

    for seed in range(3):
        step(seed, [1, 2])
        step(seed, [seed])
    net.model.conv.bank = rk.MaskBank.from_dense(~net.banks["conv"].to_dense())
    step(3, [1, 2])
    net.model.head.mask_words[1] = net.model.head.mask_words[0]
    step(4, [1, 2])
    net.model.conv.mask_words.data[1] = net.model.conv.mask_words[3]  # no version of the tensor tells
    step(5, [1, 2])
    net.model.up.mask_words.numpy()[2] = 0
    step(6, [1, 2])
    for seed, index in enumerate([[0], [1], [2], [3], [0, 1], [0, 2], [0, 3], [1, 3], [0]]):  # more than are kept
        step(seed, index)
