"""torch.compile, torch.export, vmap, torch.func and opcheck."""

from __future__ import annotations

import copy
import os
import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap

import rtl_kernels as rk
from rtl_kernels import functional, ops, testing
from rtl_kernels.backends import cpu

# ---- raw operators

RAW = {
    "linear": ((5, 12), (7, 12), {}),
    "conv2d": ((5, 4, 6, 5), (6, 2, 3, 3), {"padding": ((1, 0), (2, 1)), "stride": (1, 2), "groups": 2}),
    "conv_transpose2d": ((5, 4, 5, 4), (4, 2, 3, 3), {"stride": 2, "groups": 2, "output_padding": (1, 0)}),
}


def raw_calls(example, backend):
    """(operator, arguments) of every raw operator that a forward and backward pass calls."""
    calls = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if operator.namespace == "rtl_kernels":
                calls.append((operator, args))
            return operator(*args, **(kwargs or {}))

    with Record():
        testing.run(example, backend)
    return calls


@testing.for_backends
@testing.for_devices
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, torch.float32) for kind in ("shared", "untied", "every", "no-bias", "empty")]
    + [("shared", torch.bfloat16)],
)
@pytest.mark.parametrize("operation", RAW)
def test_raw_operators_pass_opcheck(operation, kind, dtype, device, backend):
    x, weight, options = RAW[operation]
    index = {"untied": (2, 0, 1, 2, 2), "every": testing.EVERY, "empty": ()}.get(kind, (2, 0, -1, 2, 2))
    x = (0, *x[1:]) if kind == "empty" else x
    case = testing.Case(
        kind, operation, x, weight, index, 3, untied=kind == "untied", bias=kind != "no-bias", options=options
    )
    example = testing.make(case, dtype, device)
    testing.skip_if_refused(example, backend)
    calls = raw_calls(example, backend)
    assert len(calls) == 3
    for operator, arguments in calls:
        arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
        torch.library.opcheck(operator, tuple(arguments))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("per_ticket", [False, True])
def test_the_batch_norm_operators_pass_opcheck(per_ticket, backend, layout):
    if backend == "cpu" and cpu.unavailable is not None:
        pytest.skip(f"the cpu backend is not there: {cpu.unavailable}")
    x, offsets = torch.randn(6, 3, 2, 2), rk.Route.build([0, 2, 2, 0, 0, 2], 3).offsets
    x = x.to(memory_format=layout)
    weight = torch.randn((3, 3) if per_ticket else 3)
    forward = getattr(torch.ops.rtl_kernels, f"subset_batch_norm_{backend}").default
    torch.library.opcheck(forward, (x, weight, weight + 1, offsets, 1e-5))
    torch.library.opcheck(forward, (x, None, None, offsets, 1e-5))
    _, mean, _, inverse_std = forward(x, weight, weight, offsets, 1e-5)
    backward = getattr(torch.ops.rtl_kernels, f"subset_batch_norm_grad_{backend}").default
    torch.library.opcheck(backward, (x, x, weight, offsets, mean, inverse_std, 1e-5))


def test_the_routing_operators_pass_opcheck():
    torch.library.opcheck(torch.ops.rtl_kernels.route.default, (torch.tensor([2, -1, 0]), 3))
    route = rk.Route.build([2, 1, 0], 3)
    torch.library.opcheck(torch.ops.rtl_kernels.refuse_dense.default, (route.index, route.offsets, "this"))


def test_every_operation_has_an_operator_of_every_backend_that_has_kernels():
    for operation in ops.OPERATIONS:
        assert hasattr(torch.ops.rtl_kernels, f"{operation}_reference")
        forward = operation.removesuffix("_into")
        for backend in functional.BACKENDS:  # what runs a layer runs it in a fused model too
            there = hasattr(torch.ops.rtl_kernels, f"{forward}_{backend}")
            assert hasattr(torch.ops.rtl_kernels, f"{operation}_{backend}") == there, (operation, backend)
    if cpu.unavailable is None:
        assert hasattr(torch.ops.rtl_kernels, "masked_linear_into_cpu")


# ---- torch.compile


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(torch.relu(self.up(x)).mean((2, 3)))


def converted(batch_norm, seed=0):
    torch.manual_seed(seed)
    net = rk.nn.convert(Net(), 3, batch_norm=batch_norm)
    for module in net.masked_modules().values():
        module.bank = rk.MaskBank.from_dense(torch.rand(3, *module.bank.shape) < 0.5)
    return net


BATCHES = [[2, 0, 2, 1, 0, 0, 1], [1, 1, 0, 2, 2], [2, 0, 0, 0, 2, 1, 1, 1, 2]]


def step(call, net, index):
    net.zero_grad()
    x = torch.randn(len(index), 2, 5, 4, generator=torch.Generator().manual_seed(len(index)), requires_grad=True)
    y = call(x, torch.tensor(index))
    y.square().sum().backward()
    return y.detach(), x.grad, {name: p.grad.clone() for name, p in net.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("batch_norm", ["shared", "per_ticket"])
def test_a_compiled_model_trains_as_the_model_itself(batch_norm):
    """One graph, forward and backward, the route built inside, batch norm in training, batches of several sizes."""
    torch._dynamo.reset()
    eager, net = converted(batch_norm), converted(batch_norm)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for index in BATCHES:
        torch.testing.assert_close(step(compiled, net, index), step(eager, eager, index))
    torch.testing.assert_close(dict(net.named_buffers()), dict(eager.named_buffers()))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")
def test_inductor_compiles_a_model_in_one_graph():
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = rk.nn.convert(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)), 3, batch_norm="per_ticket")
    eager = copy.deepcopy(net)
    compiled = torch.compile(net, fullgraph=True, dynamic=True)
    for index in BATCHES[:2]:
        torch.testing.assert_close(step(compiled, net, index), step(eager, eager, index), rtol=1e-4, atol=1e-4)


def test_a_compiled_model_takes_a_list_and_a_model_its_compiled_layers():
    torch._dynamo.reset()
    net = converted("shared").eval()
    x, index = torch.randn(4, 2, 5, 4), [0, 2, 1, 1]
    expected = net(x, index)
    torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="aot_eager")(x, index), expected)
    net.model.conv.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(net(x, index), expected)


def test_new_batch_sizes_do_not_recompile_forever():
    torch._dynamo.reset()
    net = converted("per_ticket").eval()
    counter = CompileCounter()
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    with torch.no_grad():
        for batch in (4, 5, 6, 7, 9, 11, 16):
            index = torch.arange(batch) % 3
            x = torch.randn(batch, 2, 5, 4)
            torch.testing.assert_close(compiled(x, index), net(x, index))
    assert counter.frame_count <= 2  # the first size, and every other


def test_a_model_compiles_with_a_masked_step_and_a_route_through_every_mask():
    torch._dynamo.reset()
    eager, net = converted("shared"), converted("shared")
    weights = []
    for model, call in ((eager, eager), (net, torch.compile(net, fullgraph=True, backend="aot_eager"))):
        optimizer = rk.optim.masked_step(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), model)
        for index in ([0, 0, 1], [2, 2, 2]):
            optimizer.zero_grad()
            step(call, model, index)
            optimizer.step()
        weights.append(model.model.conv.weight.detach())
    torch.testing.assert_close(*weights)
    x = torch.randn(3, 2, 5, 4)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, rk.Route.every(3, 3)), net(x, rk.Route.every(3, 3)))


@testing.for_backends
@pytest.mark.parametrize("operation", RAW)
def test_a_compiled_operator_gives_the_bits_of_the_operator(operation, backend):
    torch._dynamo.reset()
    x, weight, options = RAW[operation]
    example = testing.make(testing.Case("compiled", operation, x, weight, (2, 0, -1, 2, 2), 3, options=options))
    expected = testing.run(example, backend)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(x, weight, bias, words, index):
        bank, route = rk.MaskBank.unchecked(words, example.bank.shape), rk.Route.build(index, 3)
        return example.function(x, weight, bank, route, bias, **options, backend=backend)

    leaves = [t.clone().requires_grad_() for t in (example.x, example.weight, example.bias)]
    y = call(*leaves, example.bank.words, torch.tensor(example.case.index))
    y.backward(example.dy)
    for found, wanted in zip((y, *(t.grad for t in leaves)), expected, strict=True):
        testing.assert_bitwise(found, wanted)


# ---- torch.export


@pytest.mark.parametrize("batch_norm", ["shared", "per_ticket"])
def test_a_model_exports_with_a_dynamic_batch(batch_norm):
    net = converted(batch_norm).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    example = (torch.randn(4, 2, 5, 4), torch.tensor([0, 2, 1, 1]))
    program = torch.export.export(net, example, dynamic_shapes=({0: batch}, {0: batch}))
    for index in ([2, 0, 1, 1, 0, 2, 2], [1, 2]):
        x = torch.randn(len(index), 2, 5, 4)
        torch.testing.assert_close(program.module()(x, torch.tensor(index)), net(x, torch.tensor(index)))


# ---- vmap and torch.func


def example_of(operation, **rest):
    x, weight, options = RAW[operation]
    rest = {"index": (2, 0, -1, 2, 2), **rest}
    return testing.make(testing.Case("func", operation, x, weight, num_masks=3, options=options, **rest), torch.float64)


def call_of(example, backend):
    def call(x, weight, bias):
        options = example.case.options
        return example.function(x, weight, example.bank, example.route, bias, **options, backend=backend)

    return call


@testing.for_backends
@pytest.mark.parametrize("mapped", ["x", "weight", "bias", "all"])
@pytest.mark.parametrize("operation", RAW)
def test_vmap_over_any_tensor_equals_a_loop(operation, mapped, backend):
    example = example_of(operation)
    testing.skip_if_refused(example, backend)
    call = call_of(example, backend)
    tensors = dict(x=example.x, weight=example.weight, bias=example.bias)
    chosen = {mapped} if mapped != "all" else set(tensors)
    stacked = [torch.stack([t, 2 * t, -t], 1) if n in chosen else t for n, t in tensors.items()]
    dims = tuple(1 if n in chosen else None for n in tensors)
    expected = [
        call(*(t.select(1, i) if d is not None else t for t, d in zip(stacked, dims, strict=True))) for i in range(3)
    ]
    torch.testing.assert_close(vmap(call, in_dims=dims)(*stacked), torch.stack(expected))


@testing.for_backends
@pytest.mark.parametrize("operation", RAW)
def test_func_grad_and_its_vmap_equal_autograd(operation, backend):
    example = example_of(operation)
    call = call_of(example, backend)
    expected = testing.run(example, backend)

    def loss(x, weight, bias):
        return (call(x, weight, bias) * example.dy).sum()

    gradients = grad(loss, argnums=(0, 1, 2))(example.x, example.weight, example.bias)
    torch.testing.assert_close(gradients, tuple(expected[1:]))
    factors = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    mapped = vmap(lambda s: grad(lambda w: loss(example.x, s * w, example.bias))(example.weight))(factors)
    shape = (3, *[1] * example.weight.dim())
    torch.testing.assert_close(mapped, factors.view(shape) * expected.weight)  # the loss is linear in the weight


@testing.for_backends
@pytest.mark.parametrize("operation", RAW)
def test_func_grad_of_vmap_and_the_jacobian_equal_autograd(operation, backend):
    example = example_of(operation)
    call = call_of(example, backend)
    expected = testing.run(example, backend)
    factors = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)

    def loss(weight):
        return (vmap(lambda s: call(s * example.x, weight, example.bias))(factors) * example.dy).sum()

    torch.testing.assert_close(grad(loss)(example.weight), factors.sum() * expected.weight)
    jacobian = jacrev(lambda b: call(example.x, example.weight, b))(example.bias)
    torch.testing.assert_close(torch.tensordot(example.dy, jacobian, example.dy.dim()), expected.bias)


@testing.for_backends
def test_per_sample_gradients_by_vmap_of_grad_add_up_to_the_batch(backend):
    example = example_of("linear")
    expected = testing.run(example, backend)

    def loss(weight, x, dy, index):
        words = example.bank.words.index_select(0, index.view(1))  # each sample with a bank of its own mask
        bank = rk.MaskBank.unchecked(words, example.bank.shape)
        y = rk.masked_linear(x[None], weight, bank, rk.Route.every(1, 1), backend=backend)
        return (y[0] * dy).sum()

    masked = torch.tensor([0, 1, 3, 4])
    index = torch.tensor(example.case.index)
    grads = vmap(grad(loss), (None, 0, 0, 0))(example.weight, example.x[masked], example.dy[masked], index[masked])
    dense = torch.outer(example.dy[2], example.x[2])
    torch.testing.assert_close(grads.sum(0) + dense, expected.weight)


def test_vmap_over_samples_and_their_indices_equals_a_batch(capfd):
    net = rk.nn.convert(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)), 3, batch_norm="per_ticket").eval()
    net.banks = {name: rk.MaskBank.from_dense(torch.rand(3, *bank.shape) < 0.5) for name, bank in net.banks.items()}
    x, index = torch.randn(4, 2, 5, 4), torch.tensor([2, 0, 1, 2])
    expected = net(x, index)
    torch.testing.assert_close(vmap(lambda sample, k: net(sample[None], k[None])[0])(x, index), expected)
    assert "batching rule for rtl_kernels" not in capfd.readouterr().err


@pytest.mark.parametrize("per_ticket", [False, True])
def test_vmap_over_a_batch_norm_in_training_equals_a_loop(per_ticket):
    norm = rk.nn.SubsetBatchNorm2d(2, 3, per_ticket=per_ticket, track_running_stats=False).double()
    route = rk.Route.build([0, 2, 2, 0], 3)
    x = torch.randn(3, 4, 2, 5, 4, dtype=torch.float64)

    def loss(x):
        return norm(x, route).sin().sum()

    torch.testing.assert_close(vmap(lambda x: norm(x, route))(x), torch.stack([norm(part, route) for part in x]))
    parts = [part.clone().requires_grad_() for part in x]
    expected = [torch.autograd.grad(loss(part), part)[0] for part in parts]
    torch.testing.assert_close(vmap(grad(loss))(x), torch.stack(expected))
    torch.testing.assert_close(grad(lambda x: vmap(loss)(x).sum())(x), torch.stack(expected))


def test_a_second_derivative_by_func_is_refused_in_words():
    example = example_of("linear")
    call = call_of(example, "auto")

    def loss(weight):
        return call(example.x, weight, example.bias).square().sum()

    with pytest.raises(RuntimeError, match="second derivatives of the masked operators are not implemented"):
        grad(lambda w: grad(loss)(w).square().sum())(example.weight)


@testing.for_backends
@pytest.mark.parametrize("operation", RAW)
def test_forward_mode_derivatives_are_refused_or_right_and_never_silently_zero(operation, backend):
    example = example_of(operation)
    call = call_of(example, backend)
    with pytest.raises(NotImplementedError, match="jvp"):
        jvp(lambda x: call(x, example.weight, example.bias), (example.x,), (example.x,))
    with forward_ad.dual_level():
        weight = forward_ad.make_dual(example.weight, example.weight)
        try:
            tangent = forward_ad.unpack_dual(call(example.x, weight, None)).tangent
        except (NotImplementedError, RuntimeError):
            return
    torch.testing.assert_close(tangent, call(example.x, example.weight, None))  # y is linear in the weight


def test_a_converted_model_runs_under_functional_call_and_func_grad():
    net = converted("shared").eval()
    x, index = torch.randn(4, 2, 5, 4), torch.tensor([0, 2, 1, 1])
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters):
        return functional_call(net, parameters, (x, index)).square().sum()

    found = grad(loss)(parameters)
    net(x, index).square().sum().backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


def test_the_raw_operator_runs_where_no_gradient_is_needed(monkeypatch):
    example = example_of("linear")

    def fail(*arguments):
        raise AssertionError("went through autograd")

    monkeypatch.setattr(functional, "apply", fail)
    call_of(example, "auto")(example.x, example.weight, example.bias)
    with torch.no_grad():
        call_of(example, "auto")(example.x.clone().requires_grad_(), example.weight, example.bias)
    with pytest.raises(AssertionError, match="went through autograd"):
        call_of(example, "auto")(example.x.clone().requires_grad_(), example.weight, example.bias)
