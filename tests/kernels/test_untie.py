"""`untie`: one batched loop over all tickets equals K separate trainings."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import rtl_kernels as rk

K = 3


class Net(nn.Module):
    """Masked and unmasked layers, a shared batch norm, a layer used twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.mix = nn.Conv2d(4, 4, 1, bias=False)
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.head = nn.Linear(3, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        x = self.mix(torch.relu(self.mix(x)))
        return self.head(torch.relu(self.up(x)).mean((2, 3)))


def untied(scope=("conv", "mix", "up"), **rest):
    torch.manual_seed(0)
    net = rk.nn.convert(Net().double(), K, scope=list(scope), **rest)
    for module in net.masked_modules().values():
        module.bank = rk.MaskBank.from_dense(torch.rand(K, *module.bank.shape) < 0.5)
    return net


class MaskedTraining:
    """One ticket's training as textbooks have it: a dense model, its gradients and weights masked after every step."""

    def __init__(self, net, ticket, make_optimizer):
        self.model = rk.nn.extract(net, ticket)
        self.masks = {name: module.bank.dense(ticket) for name, module in net.masked_modules().items()}
        self.optimizer = make_optimizer(self.model.parameters())

    def step(self, x, target):
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(x), target, reduction="sum").backward()
        for name, mask in self.masks.items():
            self.model.get_submodule(name).weight.grad.mul_(mask)
        self.optimizer.step()
        for name, mask in self.masks.items():
            self.model.get_submodule(name).weight.data.mul_(mask)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("batch_norm", ["shared", "per_ticket"])
def test_one_batched_loop_equals_separate_trainings(batch_norm, optimizer):
    net = untied(batch_norm=batch_norm)
    tied = copy.deepcopy(net)
    rk.nn.untie(net)
    separate = [MaskedTraining(tied, k, optimizer) for k in range(K)]
    together = rk.optim.masked_step(optimizer(net.parameters()), net)
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        index = torch.cat([torch.arange(K), torch.randint(K, (9,), generator=generator)])
        x = torch.randn(len(index), 2, 5, 4, generator=generator, dtype=torch.float64)
        target = torch.randint(5, (len(index),), generator=generator)
        together.zero_grad()
        nn.functional.cross_entropy(net(x, index), target, reduction="sum").backward()
        together.step()
        for k, training in enumerate(separate):
            training.step(x[index == k], target[index == k])
    for k, training in enumerate(separate):
        found = rk.nn.extract(net, k).state_dict()
        torch.testing.assert_close(found, training.model.state_dict())
        assert not torch.equal(found["conv.weight"], tied.model.conv.weight)


def test_every_parameter_has_a_copy_for_every_ticket_and_starts_equal():
    net = untied()
    before = {name: p.detach().clone() for name, p in net.model.named_parameters()}
    assert rk.nn.untie(net) is net
    for name, p in net.model.named_parameters():
        assert p.shape == (K, *before[name].shape)
        assert all(torch.equal(p[k], before[name]) for k in range(K))
        assert p.is_leaf
        assert p.requires_grad


def test_untying_changes_no_output():
    for mode in ("shared", "per_ticket"):
        net = untied(batch_norm=mode).eval()
        x, index = torch.randn(5, 2, 5, 4, dtype=torch.float64), [2, 0, 1, 1, 0]
        expected = net(x, index)
        torch.testing.assert_close(rk.nn.untie(net)(x, index), expected)


def test_unmasked_layers_get_all_one_masks_and_batch_norms_keep_everything_per_ticket():
    net = rk.nn.untie(untied())
    assert net.model.head.bank.density().tolist() == [1.0] * K
    assert net.model.norm.per_ticket
    assert net.model.norm.affine_per_ticket
    assert net.model.norm.running_mean.shape == (K, 4)


def test_a_parameter_that_layers_shared_they_go_on_sharing():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    net = rk.nn.untie(rk.nn.convert(model, K))
    assert model[0].weight is model[1].weight
    assert model[0].bias is not model[1].bias
    assert len(list(net.parameters())) == 3


class WithScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.ones(3))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (nn.LayerNorm(3), r"1 is a LayerNorm with parameters \['weight', 'bias'\]: cannot be untied"),
        (nn.Embedding(3, 3), r"1 is a Embedding with parameters \['weight'\]: cannot be untied"),
        (nn.BatchNorm1d(3), "1 is a BatchNorm1d with parameters"),
        (nn.BatchNorm1d(3, affine=False), "1 is a BatchNorm1d, which mixes samples of all tickets: cannot be untied"),
        (WithScale(), r"1 is a WithScale with parameters \['scale'\]: cannot be untied"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), "1 .*cannot be untied|1 has parametrisations"),
        (prune.identity(nn.Linear(3, 3), "weight"), "1 computes its weight anew in every pass .*: cannot be untied"),
        (prune.identity(nn.Linear(3, 3), "bias"), "1 computes its bias anew in every pass .*: cannot be untied"),
    ],
)
def test_modules_it_cannot_replicate_are_refused_and_nothing_is_changed(extra, message):
    net = rk.nn.convert(nn.Sequential(nn.Linear(3, 3), extra), K, scope=["0"])
    with pytest.raises(ValueError, match=message):
        rk.nn.untie(net)
    assert net.model[0].weight.shape == (3, 3)


def test_untying_twice_is_refused():
    with pytest.raises(ValueError, match="conv is untied already"):
        rk.nn.untie(rk.nn.untie(untied()))


def test_untied_state_makes_a_round_trip():
    net, other = rk.nn.untie(untied()), rk.nn.untie(untied())
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p))
    other.load_state_dict(net.state_dict())
    x = torch.randn(3, 2, 5, 4, dtype=torch.float64)
    assert torch.equal(other.eval()(x, [0, 1, 2]), net.eval()(x, [0, 1, 2]))


def test_index_minus_one_is_refused():
    with pytest.raises(ValueError, match=r"index holds -1 \(no mask\), but the weights are untied"):
        rk.nn.untie(untied())(torch.randn(2, 2, 5, 4, dtype=torch.float64), [0, -1])
