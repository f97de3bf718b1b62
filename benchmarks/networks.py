"""Whole networks with ten tickets, one batch that mixes them all.

As in contenders.py each contender prepares what does not change and returns the call, or raises `SkippedError`. A
training call is a whole step: forward pass, cross-entropy or squared error, backward pass, Adam; ours through
`rtl_kernels.optim.masked_step`. The others' plain Adam is safe here without it: every ticket is in the batch, weight
decay is zero, and a weight outside all masks has gradient 0 from the first step on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import rtl_kernels as rk
from benchmarks.cases import Network
from benchmarks.timing import Run, SkippedError
from rtl.models import ghostnet, inr

LEARNING_RATE = 1e-4


class Problem:
    """A network with random masks; images (B, 3, size, size) and labels, or places (B, 2) and colours; tickets."""

    def __init__(self, network: Network, sparsity: float, training: bool, seed: int = 0) -> None:
        self.network, self.training = network, training
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.dense: nn.Module
            if network.model == "inr":
                self.dense, self.outputs = inr(), 3
                self.x, self.targets = torch.rand(network.batch, 2) * 2 - 1, torch.rand(network.batch, 3)
            else:
                self.dense, self.outputs = ghostnet(num_classes=10), 10
                self.x = torch.randn(network.batch, 3, network.size, network.size)
                self.targets = torch.randint(10, (network.batch,))
            self.index = torch.randint(network.tickets, (network.batch,))
            model = copy.deepcopy(self.dense)
            net = rk.nn.convert(model, network.tickets, scope=model.prunable, batch_norm=network.batch_norm)
            net.banks = {
                name: rk.MaskBank.from_dense(torch.rand(network.tickets, *bank.shape) >= sparsity)
                for name, bank in net.banks.items()
            }
            for module in net.modules():  # statistics as a trained network has them, each ticket its own
                if isinstance(module, rk.nn.SubsetBatchNorm2d):
                    assert module.running_mean is not None
                    assert module.running_var is not None
                    module.running_mean.normal_(0, 0.1)
                    module.running_var.uniform_(0.5, 1.5)
        self.net = net
        self.dense.train(training)
        self.net.train(training)

    def loss(self, y: Tensor) -> Tensor:
        return F.mse_loss(y, self.targets) if y.shape == self.targets.shape else F.cross_entropy(y, self.targets)

    def tickets(self, net: rk.nn.RoutedModel) -> list[nn.Module]:
        return [rk.nn.extract(net, k).train(self.training) for k in range(self.network.tickets)]


@dataclass(frozen=True)
class Call:
    """A contender made ready.

    `forward` gives the results in the samples' order; `parameters` are what a step moves, in the dense model's order;
    `optimizer` is None in inference; `computes` is "dense" or "masked".
    """

    forward: Callable[[], Tensor]
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer | None
    computes: str


def _adam(p: Problem, parameters: Iterable[Tensor]) -> torch.optim.Optimizer | None:
    return torch.optim.Adam(parameters, lr=LEARNING_RATE) if p.training else None


def dense(p: Problem) -> Call:
    """the network without masks"""
    model = copy.deepcopy(p.dense)
    return Call(lambda: model(p.x), list(model.parameters()), _adam(p, model.parameters()), "dense")


def ours(p: Problem) -> Call:
    """the converted network, sorting the batch included"""
    net = copy.deepcopy(p.net)
    optimizer = _adam(p, net.parameters())
    if optimizer is not None:
        rk.optim.masked_step(optimizer, net)
    return Call(lambda: net(p.x, p.index), list(net.model.parameters()), optimizer, "masked")


def fused(p: Problem) -> Call:
    """its copy for inference, `rtl_kernels.nn.fuse`"""
    if p.training:
        raise SkippedError("a fused copy is for inference")
    try:
        net = rk.nn.fuse(p.net)
    except ValueError as error:
        raise SkippedError("torch.fx cannot trace the network") from error
    return Call(lambda: net(p.x, p.index), [], None, "masked")


def loop(p: Problem) -> Call:
    """for each ticket, its samples through the dense network with `weight * mask` (and the ticket's statistics)"""
    norms = any(isinstance(module, nn.BatchNorm2d) for module in p.dense.modules())
    if p.training and norms and p.network.batch_norm == "shared":
        raise SkippedError("normalises each subset by itself, which is batch norm per ticket")
    model = copy.deepcopy(p.dense)
    masks = {f"{name}.weight": bank.to_dense().float() for name, bank in p.net.banks.items()}
    buffers = [dict(ticket.named_buffers()) for ticket in p.tickets(p.net)]
    parameters = dict(model.named_parameters())

    def forward() -> Tensor:
        y = p.x.new_empty(p.network.batch, p.outputs)
        for k in range(p.network.tickets):
            where = p.index == k
            masked = {name: parameters[name] * mask[k] for name, mask in masks.items()}
            y[where] = functional_call(model, {**masked, **buffers[k]}, (p.x[where],))
        return y

    return Call(forward, list(parameters.values()), _adam(p, model.parameters()), "masked")


def loop_cached(p: Problem) -> Call:
    """the same with ten networks of masked weights kept from call to call (inference)"""
    if p.training:
        raise SkippedError("masked weights change with every training step: nothing to cache")
    tickets = p.tickets(p.net)

    def forward() -> Tensor:
        y = p.x.new_empty(p.network.batch, p.outputs)
        for k, ticket in enumerate(tickets):
            where = p.index == k
            y[where] = ticket(p.x[where])
        return y

    return Call(forward, [], None, "masked")


CONTENDERS: dict[str, Callable[[Problem], Call]] = {
    "dense": dense,
    "ours": ours,
    "ours, fused": fused,
    "loop": loop,
    "loop, cached": loop_cached,
}


class Expected:
    """What a contender has to give: the dense network, or the converted one on the reference backend, in float64.

    Results may be off by four times what the same network in float32 is off by (2-norms). A gradient jumps where an
    activation lies within rounding of a ReLU's kink: dense PyTorch's own is off by 0.1 to 1 % of its norm. 5 % of a
    parameter's are allowed, and 10⁻⁴ of that of all (a shift before a batch norm has gradient 0, and rounding); the
    gradient through a wrong mask is off by most of itself.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._known: dict[str, tuple[float, Tensor, list[Tensor]]] = {}

    def check(self, name: str, call: Call) -> None:
        """Run a contender once, without a step. Raises AssertionError if what it gives is wrong."""
        if call.computes not in self._known:
            results, gradients = self._pass(call.computes, torch.float64)
            rounding = _distance(self._pass(call.computes, torch.float32)[0], results)
            self._known[call.computes] = rounding, results, gradients
        rounding, exact, exact_gradients = self._known[call.computes]
        results, gradients = _results(self.problem, call.forward, call.parameters)
        _check(f"{name}: results", results, exact, 4 * rounding)
        everything = float(torch.stack([g.norm() for g in exact_gradients]).norm()) if exact_gradients else 0.0
        for number, (gradient, e) in enumerate(zip(gradients, exact_gradients, strict=True)):
            _check(f"{name}: gradient {number}", gradient, e, 0.05 * float(e.norm()) + 1e-4 * everything)

    def _pass(self, computes: str, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        p = self.problem
        x = p.x.to(dtype)
        if computes == "dense":
            model = copy.deepcopy(p.dense).to(dtype)
            return _results(p, lambda: model(x), list(model.parameters()))
        net = copy.deepcopy(p.net).to(dtype)
        for module in net.masked_modules().values():
            module.backend = "reference"
        return _results(p, lambda: net(x, p.index), list(net.model.parameters()))


def _distance(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm())


def _check(name: str, actual: Tensor, exact: Tensor, allowed: float) -> None:
    assert actual.shape == exact.shape, f"{name} has shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    error = _distance(actual, exact)
    assert error <= allowed, f"{name} is off by {error:.2g} (2-norm), allowed are {allowed:.2g}"


def _results(p: Problem, forward: Callable[[], Tensor], parameters: list[nn.Parameter]) -> tuple[Tensor, list[Tensor]]:
    """The results and, in training, the gradients of all parameters."""
    with torch.set_grad_enabled(p.training):
        y = forward()
        gradients = torch.autograd.grad(p.loss(y), parameters) if p.training else ()
    return y.detach().clone(), list(gradients)


def build(problem: Problem, names: Iterable[str] = CONTENDERS) -> tuple[dict[str, Run], dict[str, str]]:
    """As contenders.build, for a network."""
    expected = Expected(problem)
    runs: dict[str, Run] = {}
    skipped: dict[str, str] = {}
    for name in names:
        try:
            call = CONTENDERS[name](problem)
        except SkippedError as reason:
            skipped[name] = str(reason)
            continue
        expected.check(name, call)
        runs[name] = _step(problem, call)
    return runs, skipped


def _step(problem: Problem, call: Call) -> Run:
    optimizer = call.optimizer
    if optimizer is None:

        def infer() -> Tensor:
            with torch.no_grad():
                return call.forward()

        return infer

    def step() -> None:
        optimizer.zero_grad()
        problem.loss(call.forward()).backward()
        optimizer.step()

    return step
