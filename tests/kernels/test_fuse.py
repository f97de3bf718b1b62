"""`nn.fuse`, and the raw operators under it: what follows a layer, done by its own operator."""

from __future__ import annotations

import copy
import dataclasses
import io
import operator
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rtl_kernels as rk
from rtl_kernels import functional, testing
from rtl_kernels.fuse import FusedLayer, PointConv2d
from rtl_kernels.nn import SubsetBatchNorm2d
from rtl_kernels.ops import define

K = 3
INDEX = [2, 0, 1, 1, 2, 0, 2]
WITH_DENSE = [2, 0, -1, 1, 2, 0, -1]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- the operators: y = act(scale · op(x, m ⊙ w) + shift + residual)


def geometry(case):
    """What the raw operator takes behind y, from the options of the public one."""
    if case.operation == "linear":
        return ()
    options = case.options
    stride, dilation = (functional._pair(k, options.get(k, 1), 1) for k in ("stride", "dilation"))
    if case.operation == "conv2d":
        sides = functional._sides(options.get("padding", 0), case.weight[2:], stride, dilation)
        return stride, sides, dilation, options.get("groups", 1)
    padding, extra = (functional._pair(k, options.get(k, 0), 0) for k in ("padding", "output_padding"))
    return stride, padding, extra, options.get("groups", 1), dilation


def out_channels(case):
    return case.weight[1] * case.options.get("groups", 1) if case.operation == "conv_transpose2d" else case.weight[0]


def own(case):
    """Whether scale and shift may be given for each mask: no sample goes without one."""
    return case.index == testing.EVERY or -1 not in case.index


def steps(example, dtype, *, residual=False, relu=False):
    """Scale, shift, residual (rows, ...) and relu for an example, of the size of its own sums."""
    case, wide = example.case, torch.float64 if dtype == torch.float64 else torch.float32
    size = (case.num_masks, out_channels(case)) if own(case) else (out_channels(case),)
    big = max(1.0, float(example.dy.numel() and testing.separate_passes(example).y.abs().double().max()))
    scale, shift = torch.randn(size).to(wide), (torch.randn(size).double() * big).clamp(-1e30, 1e30).to(wide)
    added = (torch.randn(example.dy.shape).double() * big).clamp(-6e4, 6e4).to(dtype) if residual else None
    return scale, shift, added, relu


def run_into(example, backend, scale, shift, residual, relu, room=None, buffer=None):
    testing.skip_if_refused(example, backend)
    case = example.case
    rows = None if residual is None else residual.reshape(-1, *residual.shape[1 + (case.index == testing.EVERY) :])
    y = functional.run_into(
        f"masked_{case.operation}",
        example.x,
        example.weight,
        example.bank.words,
        example.route,
        scale,
        shift,
        rows,
        relu,
        geometry(case),
        room,
        buffer,
        backend,
    )
    return y if room is not None else y.reshape(example.dy.shape)


def expected(example, scale, shift, residual, relu, dtype, absolute=False):
    """The same by separate passes, one step after the other."""
    case = example.case

    def cast(tensor):
        return (tensor.abs() if absolute else tensor).to(dtype)

    y = testing.separate_passes(dataclasses.replace(example, bias=None), dtype, absolute).y
    every = case.index == testing.EVERY
    channel = -1 if case.operation == "linear" else 1 + every
    index = torch.arange(case.num_masks)[:, None] if every else torch.tensor(case.index, dtype=torch.int64)

    def of_rows(parameter):
        parameter = cast(parameter)
        if parameter.dim() == 2:
            parameter = parameter[index]
            shape = [*index.shape, *(1 for _ in y.shape[index.dim() + 1 :]), y.shape[-1]]
            parameter = parameter.reshape(shape)
        return parameter

    y = y.movedim(channel, -1)
    y = (y * of_rows(scale) + of_rows(shift)).movedim(-1, channel)
    y = y if residual is None else y + cast(residual)
    return torch.relu(y) if relu else y


@testing.for_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", testing.CASES, ids=str)
def test_what_follows_a_layer_is_done_by_its_operator(case, dtype, backend):
    if dtype == torch.bfloat16 and case.scale:
        pytest.skip("the extreme scales are tested in float32, which has bfloat16's range")
    example = testing.make(case, dtype)
    for residual, relu in ((False, True), (True, False), (True, True)):
        parts = steps(example, dtype, residual=residual, relu=relu)
        actual = run_into(example, backend, *parts)
        same = expected(example, *parts, testing._yardstick(dtype))
        exact, terms = (expected(example, *parts, torch.float64, absolute) for absolute in (False, True))
        testing.assert_accurate(actual, same, exact, terms)


@testing.for_backends
def test_a_step_that_is_absent_changes_nothing(backend):
    example = testing.make(next(c for c in testing.CASES if str(c) == "conv2d-untied"))
    plain = testing.run(dataclasses.replace(example, bias=None), backend).y
    testing.assert_bitwise(run_into(example, backend, None, None, None, False), plain)
    shift = torch.randn(out_channels(example.case))
    with_bias = dataclasses.replace(example, bias=shift.expand(example.case.num_masks, -1).contiguous())
    testing.assert_accurate(
        run_into(example, backend, None, shift, None, False),
        testing.separate_passes(with_bias).y,
        testing.separate_passes(with_bias, torch.float64).y,
        testing.separate_passes(with_bias, torch.float64, absolute=True).y,
    )
    nan = dataclasses.replace(example, x=torch.full_like(example.x, float("nan")))
    assert run_into(nan, backend, None, shift, None, True).isnan().any()


def path(operation, sample, weight, times=1, **options):
    return testing.Case(
        "path", operation, (len(INDEX) * times, *sample), weight, tuple(INDEX * times), K, options=options
    )


PATHS = {  # the CPU kernels' ways through a group, by shapes that take them
    "in-place": path("conv2d", (9, 12, 12), (7, 9, 1, 1)),
    "pixels": path("conv2d", (9, 6, 7), (7, 9, 1, 1)),
    "strips": path("conv2d", (5, 40, 7), (6, 5, 3, 3), 6, padding=1),
    "filter": path("conv2d", (6, 18, 17), (6, 1, 3, 3), groups=6),
    "filter-stride": path("conv2d", (6, 33, 33), (6, 1, 3, 3), groups=6, stride=2),
    "flat": path("conv2d", (6, 9, 10), (6, 1, 3, 3), padding=1, groups=6),
    "flat-small": path("conv2d", (6, 3, 4), (6, 1, 3, 3), 4, padding=1, groups=6),
    "flat-transposed": path("conv_transpose2d", (6, 6, 7), (6, 1, 3, 3), 2, padding=1, groups=6),
    "lanes": path("conv2d", (7, 3, 3), (5, 7, 3, 3), 8, padding=1),
    "phases": path("conv_transpose2d", (5, 30, 6), (5, 4, 3, 3), 6, stride=2),
    "few": path("linear", (1100,), (37, 1100)),
    "many": path("linear", (300,), (70, 300), 12),
    "rows": path("linear", (700,), (300, 700), 12),
}


@testing.for_backends
@pytest.mark.parametrize("path", PATHS)
def test_every_path_takes_the_steps(path, backend):
    for case in (PATHS[path], dataclasses.replace(PATHS[path], untied=True)):
        example = testing.make(case)
        parts = steps(example, torch.float32, residual=True, relu=True)
        for some in (parts, (*parts[:2], None, True), (*parts[:3], False)):
            args = (example, *some)
            exact, terms = (expected(*args, torch.float64, absolute) for absolute in (False, True))
            testing.assert_accurate(run_into(example, backend, *some), expected(*args, torch.float32), exact, terms)


@testing.for_backends
@pytest.mark.parametrize("path", PATHS)
def test_a_group_is_computed_from_its_own_samples_alone(path, backend):
    example = testing.make(PATHS[path])
    scale, shift, residual, _ = steps(example, torch.float32, residual=True)
    whole = run_into(example, backend, scale, shift, residual, True)
    testing.assert_bitwise(run_into(example, backend, scale, shift, residual, True), whole)
    for mask in range(K):
        mine = [b for b, k in enumerate(example.case.index) if k == mask]
        case = dataclasses.replace(example.case, x=(len(mine), *example.x.shape[1:]), index=(mask,) * len(mine))
        alone = dataclasses.replace(
            example, case=case, x=example.x[mine], dy=example.dy[mine], route=rk.Route.build(case.index, K)
        )
        y = run_into(alone, backend, scale, shift, residual[mine], True)
        testing.assert_bitwise(y, whole[mine])


@pytest.mark.parametrize("path", PATHS)
def test_the_compiled_operators_give_the_same_on_any_number_of_threads(path):
    example = testing.make(PATHS[path])
    parts = steps(example, torch.float32, residual=True, relu=True)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(run_into(example, "cpu", *parts))
    finally:
        torch.set_num_threads(before)
    testing.assert_bitwise(*results)


@testing.for_backends
@pytest.mark.parametrize("path", [path for path in PATHS if PATHS[path].operation != "linear"])
def test_slices_of_channels_are_read_and_written_in_place(path, backend):
    example = testing.make(PATHS[path])
    scale, shift, residual, _ = steps(example, torch.float32, residual=True)
    whole = run_into(example, backend, scale, shift, residual, True)

    def sliced(tensor, before, after):
        wide = torch.full((tensor.shape[0], tensor.shape[1] + before + after, *tensor.shape[2:]), float("nan"))
        part = wide.narrow(1, before, tensor.shape[1])
        part.copy_(tensor)
        return part

    inside = dataclasses.replace(example, x=sliced(example.x, 1, 2))
    channels = whole.shape[1]
    buffer = torch.full((len(whole), channels + 5, *whole.shape[2:]), 7.0)
    y = run_into(inside, backend, scale, shift, sliced(residual, 2, 0), True, (3, channels + 5), buffer)
    assert y is buffer
    testing.assert_bitwise(y[:, 3 : 3 + channels], whole)
    assert (y[:, :3] == 7).all()
    assert (y[:, 3 + channels :] == 7).all()


@testing.for_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("path", ["in-place", "phases", "few"])
def test_the_operators_pass_opcheck(path, dtype, backend):
    example = testing.make(PATHS[path], dtype)
    testing.skip_if_refused(example, backend)
    case, route = example.case, example.route
    operator = functional.raw_operator(f"masked_{case.operation}_into_{backend}")
    for residual, relu in ((False, False), (True, True)):
        scale, shift, added, _ = steps(example, dtype, residual=residual)
        y = torch.zeros_like(example.dy)
        groups = (example.bank.words, route.offsets, route.order, 1)
        torch.library.opcheck(
            operator, (example.x, example.weight, *groups, scale, shift, added, relu, y, *geometry(case))
        )


@pytest.mark.parametrize("operation", ["linear", "conv2d", "conv_transpose2d"])
def test_a_compiled_library_without_such_operators_is_given_them(operation):
    """As the CUDA kernels', which a fused model's depthwise layers run on."""
    define(f"masked_{operation}", "library", None, "CPU")
    own = getattr(torch.ops.rtl_kernels, f"masked_{operation}_reference").default
    torch.library.impl(f"rtl_kernels::masked_{operation}_library", "CPU", own)
    example = testing.make(next(c for c in testing.CASES if str(c) == f"{operation}-ragged"))
    call = (example.x, example.weight, example.bank.words, example.route.offsets, example.route.order, 1)
    y = own(*call, None, *geometry(example.case))
    filled = torch.empty_like(y)
    into = functional.raw_operator(f"masked_{operation}_into_library")
    into(*call, None, None, None, True, filled, *geometry(example.case))
    testing.assert_bitwise(filled, torch.relu(y))


def test_the_compiled_operator_refuses_what_does_not_fit():
    if functional.cpu.unavailable is not None:
        pytest.skip(functional.cpu.unavailable)
    example = testing.make(PATHS["few"])
    route, y = example.route, torch.zeros(7, 37)
    operator = torch.ops.rtl_kernels.masked_linear_into_cpu

    def call(scale=None, shift=None, residual=None, y=y, offsets=route.offsets):
        operator(
            example.x, example.weight, example.bank.words, offsets, route.order, 1, scale, shift, residual, False, y
        )

    call(torch.ones(37), torch.ones(K, 37))
    for wrong in (torch.ones(36), torch.ones(K + 1, 37), torch.ones(37).double(), torch.ones(1, 1, 37)):
        with pytest.raises(RuntimeError, match="scale and shift do not fit the weight"):
            call(wrong)
        with pytest.raises(RuntimeError, match="scale and shift do not fit the weight"):
            call(None, wrong)
    for wrong in (y[:6], y.double()):
        with pytest.raises(RuntimeError, match="residual does not fit the call"):
            call(residual=wrong)
        with pytest.raises(RuntimeError, match="y does not fit the call"):
            call(y=wrong)
    dense = rk.Route.build(WITH_DENSE, K).offsets
    call(torch.ones(37), offsets=dense)
    with pytest.raises(RuntimeError, match="index holds -1"):
        call(torch.ones(K, 37), offsets=dense)
    strided = torch.zeros(37, 7).T  # no sample in one piece: filled by a copy
    call(torch.ones(37), y=strided)
    call(torch.ones(37))
    testing.assert_bitwise(strided, y)


# ---- models


class Ghost(nn.Module):
    """Two convolutions and a cheap one whose results are concatenated, and a shortcut."""

    def __init__(self, channels, out, shortcut):
        super().__init__()
        half = out // 2
        self.primary = nn.Sequential(nn.Conv2d(channels, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU())
        self.cheap = nn.Sequential(nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False), nn.BatchNorm2d(half))
        self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1), nn.BatchNorm2d(out)) if shortcut else nn.Identity()

    def forward(self, x):
        first = self.primary(x)
        return torch.cat((first, self.cheap(first)), dim=1) + self.shortcut(x)


class Residual(nn.Module):
    """As in a residual network: ReLU after the addition, in place."""

    def __init__(self, channels):
        super().__init__()
        self.one, self.two = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.norm1, self.norm2 = (nn.BatchNorm2d(channels) for _ in range(2))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.norm1(self.one(x)))
        y = self.norm2(self.two(y))
        y += x
        return self.relu(y)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.Sequential(Ghost(8, 8, False), Ghost(8, 12, True), nn.Dropout(0.5))
        self.up = nn.ConvTranspose2d(12, 6, 3, stride=2)
        self.norm = nn.BatchNorm2d(6)
        self.mirror = nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect")
        self.residual = Residual(6)
        self.head = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 5))

    def forward(self, x):
        y = F.relu(self.norm(self.up(self.blocks(self.stem(x)))))
        y = self.residual(torch.relu(self.mirror(y)))
        return self.head(y.mean((2, 3)))


def masked(model, density=0.5, **rest):
    """A converted model with random masks, and statistics as if it had been trained."""
    net = rk.nn.convert(model, K, **rest)
    for module in net.masked_modules().values():
        module.bank = rk.MaskBank.from_dense(torch.rand(K, *module.bank.shape) < density)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            if module.weight is not None:
                nn.init.uniform_(module.weight, -1, 1)
                nn.init.uniform_(module.bias, -0.5, 0.5)
    return net


def kinds(net):
    """How often a fused model's graph calls each type of module or function."""
    count = {}
    for node in net.model.graph.nodes:
        if node.op not in ("placeholder", "output"):
            kind = type(net.model.get_submodule(node.target)) if node.op == "call_module" else node.target
            count[kind] = count.get(kind, 0) + 1
    return count


def assert_same(fused, net, *args, **kwargs):
    """A fused model's results are the model's, up to rounding in float64."""
    net.eval()
    with torch.no_grad():
        actual, wanted = fused(*args, **kwargs), net(*args, **kwargs)
    torch.testing.assert_close(actual, wanted, rtol=1e-11, atol=1e-11)


VARIANTS = {
    "shared": {},
    "per_ticket": {"batch_norm": "per_ticket"},
    "affine_per_ticket": {"batch_norm": "per_ticket", "affine_per_ticket": True},
    "untied": {},
}


def variant(name, model):
    net = masked(model, **VARIANTS[name])
    if name == "untied":
        rk.nn.untie(net)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return net


@testing.for_backends
@pytest.mark.parametrize("name", VARIANTS)
def test_a_fused_model_computes_what_the_model_does(name, backend):
    net = variant(name, Net().double())
    for module in net.masked_modules().values():
        module.backend = backend
    fused = rk.nn.fuse(net)
    x = torch.randn(len(INDEX), 2, 9, 8, dtype=torch.float64)
    assert_same(fused, net, x, INDEX)
    assert_same(fused, net, x, rk.Route.every(K, len(INDEX)))
    assert_same(fused, net, x[:0], [])
    if name == "shared":
        assert_same(fused, net, x, WITH_DENSE)
    else:
        with pytest.raises(ValueError, match="index holds -1"):
            fused(x, WITH_DENSE)


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_is_left_of_what_can_be_fused(name):
    count = kinds(rk.nn.fuse(variant(name, Net())))
    masked_layers = 1 + 2 + 3 + 1 + 1 + 2 + 2
    additions = 1  # of the first ghost module's input, to a concatenation
    assert count.pop(FusedLayer) == masked_layers
    assert count.pop(torch.narrow) == 2
    assert sum(count.values()) == additions + 1, count  # and the mean


def test_float32_is_as_accurate_as_the_model_itself():
    for name in VARIANTS:
        net = variant(name, Net()).eval()
        x = torch.randn(64, 2, 9, 8)
        index = torch.randint(K, (64,))
        exact = copy.deepcopy(net).double()(x.double(), index)
        with torch.no_grad():
            own, fused = ((n(x, index) - exact).abs() for n in (net, rk.nn.fuse(net)))
        assert fused.max() <= testing.FACTOR * own.max()
        assert fused.mean() <= 1.25 * own.mean()


def test_a_mask_sees_its_own_samples_alone_bitwise():
    fused = rk.nn.fuse(variant("per_ticket", Net()))
    index = torch.tensor(INDEX * 5)
    x = torch.randn(len(index), 2, 9, 8)
    whole = fused(x, index)
    for mask in range(K):
        mine = index == mask
        testing.assert_bitwise(fused(x[mine], index[mine]), whole[mine])
    testing.assert_bitwise(fused(x, index), whole)


class Several(nn.Module):
    """Two inputs, three outputs, a result with two users, and layers that others follow."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(3, 4, 3, padding=1)
        self.two = nn.Conv2d(3, 4, 1)
        self.three = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x, other, scale=2.0):
        a, b = self.one(x), self.two(other)
        c = self.norm(a) + a  # a is read twice
        d = torch.relu(b + c)
        e = self.three(d) + 1.0  # no tensor
        f = self.three(d) + d.mean((2, 3), keepdim=True)  # of another shape
        g = self.three(d) + 1 / x.shape[2]  # a number, computed
        return {"first": self.head(e.mean((2, 3))) * scale, "rest": [torch.relu(f), torch.cat([a, d], 1), g.relu()]}


def test_several_inputs_and_outputs_and_results_with_several_users():
    net = masked(Several().double())
    fused = rk.nn.fuse(net)
    x, other = torch.randn(2, len(INDEX), 3, 6, 5, dtype=torch.float64)
    for index in (INDEX, WITH_DENSE):
        assert_same(fused, net, x, index, other=other[index], scale=0.5)
        assert_same(fused, net, x, index, other[index])


class Overwrites(nn.Module):
    """A tensor that is written into between a layer and what is added to it, also by another name."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        y = x * 1
        a = self.one(y)
        y.mul_(2)
        z, n = y, x.shape[0]
        m = n
        m += 1
        z += self.two(x) * m / n
        a = self.norm(a) + y
        return self.three(self.two(a))


def test_tensors_written_in_place_are_written_when_the_model_does():
    net = masked(Overwrites().double())
    assert_same(rk.nn.fuse(net), net, torch.randn(len(INDEX), 3, 4, 4, dtype=torch.float64), INDEX)


class Clips(nn.Module):
    """A concatenation that is written into while a part of it is still read."""

    def __init__(self, clip):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.clip = clip

    def forward(self, x):
        a, b = self.one(x), self.two(x)
        c = torch.cat((a, b), 1)
        self.clip(c)
        return c, a + 1


@pytest.mark.parametrize(
    "clip",
    [
        nn.ReLU(inplace=True),
        lambda c: F.relu(c, True),
        lambda c: F.relu(c, inplace=True),
        torch.relu_,
        lambda c: c.relu_(),
        lambda c: operator.imul(c, 2),
        lambda c: c.__imul__(2),
        lambda c: torch.add(c, 1, out=c),
    ],
)
def test_concatenations_written_in_place_are_left_alone(clip):
    net = masked(Clips(clip).double())
    assert_same(rk.nn.fuse(net), net, torch.randn(len(INDEX), 3, 4, 4, dtype=torch.float64), INDEX)


@pytest.mark.parametrize("batch_norm", ["shared", "per_ticket"])
def test_dense_convolutions_take_shared_batch_norms(batch_norm):
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 3, 2), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)
    )
    net = masked(model.double(), scope=["4"], batch_norm=batch_norm)
    fused = rk.nn.fuse(net)
    assert kinds(fused).get(SubsetBatchNorm2d, 0) == (0 if batch_norm == "shared" else 2)
    assert_same(fused, net, torch.randn(len(INDEX), 2, 6, 6, dtype=torch.float64), INDEX)


@pytest.mark.parametrize("groups", [2, 4])
def test_dense_transposed_convolutions_of_several_groups_keep_their_batch_norms(groups):
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ConvTranspose2d(4, 4, 3, groups=groups), nn.BatchNorm2d(4))
    net = masked(model.double(), scope=["0"])
    fused = rk.nn.fuse(net)
    assert kinds(fused) == {FusedLayer: 1, nn.ConvTranspose2d: 1, SubsetBatchNorm2d: 1}
    assert_same(fused, net, torch.randn(len(INDEX), 2, 6, 6, dtype=torch.float64), INDEX)


class Squeezed(nn.Module):
    """Squeeze-and-excitation whose convolutions stay dense, and the second of them on whole planes too."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3)
        self.reduce = nn.Conv2d(6, 4, 1)
        self.expand = nn.Conv2d(4, 6, 1, bias=False)
        self.strided = nn.Conv2d(4, 6, 1, stride=2)

    def forward(self, x):
        x = self.conv(x)
        small, large = self.reduce(x.mean((2, 3), keepdim=True)), self.reduce(x)
        return x * torch.sigmoid(self.expand(small)) + self.expand(large), self.strided(large)


def test_dense_convolutions_on_single_pixels_are_linear_layers_and_on_planes_convolutions():
    net = rk.nn.convert(Squeezed().double(), K, scope=["conv"])
    net.banks = {"conv": rk.MaskBank.from_dense(torch.rand(K, 6, 2, 3, 3) < 0.5)}
    fused = rk.nn.fuse(net)
    assert kinds(fused)[PointConv2d] == 4  # calls
    assert kinds(fused)[nn.Conv2d] == 1
    for size in (9, 5, 9):  # a layer remembers the shapes it was given
        x = torch.randn(len(INDEX), 2, size, size, dtype=torch.float64)
        for ours, theirs in zip(fused(x, INDEX), net.eval()(x, INDEX), strict=True):
            torch.testing.assert_close(ours, theirs)
    for bad in (torch.zeros(len(INDEX), 3, 9, 9), torch.zeros(len(INDEX), 2, 2, 9)):
        with pytest.raises(ValueError, match=r"x has shape \(7, "):
            fused(bad.double(), INDEX)


def test_batch_norms_without_running_statistics_or_parameters_stay_right():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3, momentum=None)
    )
    net = masked(model.double())
    fused = rk.nn.fuse(net)
    assert kinds(fused) == {FusedLayer: 2}
    x = torch.randn(len(INDEX), 2, 6, 6, dtype=torch.float64)
    assert_same(fused, net, x, INDEX)
    batch = nn.BatchNorm2d(4, track_running_stats=False)
    net = rk.nn.convert(nn.Sequential(nn.Conv2d(2, 4, 3), batch).double(), K)
    assert kinds(rk.nn.fuse(net)) == {FusedLayer: 1, SubsetBatchNorm2d: 1}
    assert_same(rk.nn.fuse(net), net, x, INDEX)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return torch.relu(self.layer(torch.relu(self.layer(x)))) + x


def test_layers_used_twice_and_models_of_one_layer():
    x = torch.randn(len(INDEX), 4, dtype=torch.float64)
    for model in (Twice(), nn.Linear(4, 3)):
        net = masked(model.double())
        assert_same(rk.nn.fuse(net), net, x, INDEX)
    fused = rk.nn.fuse(masked(Twice()))
    assert len({layer.weight.data_ptr() for layer in fused.modules() if isinstance(layer, FusedLayer)}) == 1


def test_hooks_of_a_layer_run():
    net = masked(nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU()).double())
    net.model[0].register_forward_hook(lambda module, inputs, output: output - 1)
    assert_same(rk.nn.fuse(net), net, torch.randn(len(INDEX), 2, 3, 3, dtype=torch.float64), INDEX)


def test_the_copy_is_for_inference_and_the_model_stays_as_it_is():
    net = masked(Net()).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    fused = rk.nn.fuse(net)
    assert net.training
    assert net.model.residual.relu.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module.training for module in fused.modules())
    assert not any(p.requires_grad for p in fused.parameters())
    x = torch.randn(len(INDEX), 2, 9, 8, requires_grad=True)
    y = fused(x, INDEX)
    assert not y.requires_grad
    with pytest.raises(ValueError, match="a fused copy is for inference: train the model it was made from"):
        fused.train()
    assert fused.eval() is fused
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    net.banks = {name: rk.MaskBank.ones(K, bank.shape) for name, bank in net.banks.items()}
    testing.assert_bitwise(fused(x, INDEX), y)
    for function in (rk.nn.untie, lambda fused: rk.nn.extract(fused, 0)):
        for wrong in (fused, net.model):
            with pytest.raises(TypeError, match=rf"net is a {type(wrong).__name__}, expected the RoutedModel that"):
                function(wrong)
    for again in (fused, fused.model):
        with pytest.raises(ValueError, match="model is converted already"):
            rk.nn.convert(again, K)


def test_copies_and_states():
    net = masked(Net(), batch_norm="per_ticket")
    fused = rk.nn.fuse(net)
    x = torch.randn(len(INDEX), 2, 9, 8)
    y = fused(x, INDEX)
    testing.assert_bitwise(copy.deepcopy(fused)(x, INDEX), y)
    testing.assert_bitwise(pickle.loads(pickle.dumps(fused))(x, INDEX), y)
    state = io.BytesIO()
    torch.save(fused.state_dict(), state)
    state.seek(0)
    other = rk.nn.fuse(masked(Net(), batch_norm="per_ticket"))
    assert not torch.equal(other(x, INDEX), y)
    other.load_state_dict(torch.load(state, weights_only=True))
    testing.assert_bitwise(other(x, INDEX), y)


def test_half_precision_and_autocast():
    net = masked(Net()).eval()
    x = torch.randn(len(INDEX), 2, 9, 8)
    with torch.no_grad():
        exact = copy.deepcopy(net).double()(x.double(), INDEX)
        half = copy.deepcopy(net).bfloat16()
        own = (half(x.bfloat16(), INDEX) - exact).abs().max()
        assert (rk.nn.fuse(half)(x.bfloat16(), INDEX) - exact).abs().max() <= testing.FACTOR * own
        assert (rk.nn.fuse(net).bfloat16()(x.bfloat16(), INDEX) - exact).abs().max() <= testing.FACTOR * own
        with torch.autocast("cpu", torch.bfloat16):
            assert (rk.nn.fuse(net)(x, INDEX) - exact).abs().max() <= testing.FACTOR * own


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(2, 2, 1)

    def forward(self, x):
        return self.inner(x) if x.sum() > 0 else x


def test_models_that_cannot_be_traced_are_refused_in_words():
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), Branches()).double()
    net = masked(model)
    with pytest.raises(ValueError, match=r"torch.fx cannot trace the model: .* in leaves=\[...\]"):
        rk.nn.fuse(net)
    with pytest.raises(ValueError, match="leaves holds 'branches', which is no submodule of the model"):
        rk.nn.fuse(net, leaves=["branches"])
    fused = rk.nn.fuse(net, leaves=["2"])
    assert kinds(fused) == {FusedLayer: 1, Branches: 1}
    assert_same(fused, net, torch.randn(len(INDEX), 2, 4, 4, dtype=torch.float64), INDEX)
    for wrong in (model, rk.nn.fuse(masked(nn.Linear(2, 2)))):
        with pytest.raises(TypeError, match=r"expected the RoutedModel that rtl_kernels\.nn\.convert returns"):
            rk.nn.fuse(wrong)


def test_bad_calls_are_refused_in_words():
    fused = rk.nn.fuse(masked(nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU())))
    x = torch.randn(2, 2, 5, 5)
    with pytest.raises(ValueError, match="called without a route"):
        fused.model(x)
    with pytest.raises(TypeError, match=r"x is torch\.float64 on cpu, expected torch\.float32 on cpu"):
        fused(x.double(), [0, 1])
    with pytest.raises(ValueError, match="index is a route for 4 masks"):
        fused(x, rk.Route.build([0, 1], 4))
    with pytest.raises(ValueError, match="which does not fit a weight of"):
        fused(x[:, :1], [0, 1])
    with pytest.raises(ValueError, match="leaves nothing of the output"):
        fused(x[..., :2], [0, 1])
    with pytest.raises(ValueError, match="but index is for 1 samples"):
        fused(x, [0])


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, 1)

    def forward(self, x):
        y = self.one(x)
        return y, torch.cat((y, self.two(x)), 1)


def test_results_of_a_model_share_no_memory():
    net = masked(Both().double())
    fused = rk.nn.fuse(net)
    x = torch.randn(len(INDEX), 2, 4, 4, dtype=torch.float64)
    assert_same(fused, net, x, INDEX)
    y, both = fused(x, INDEX)
    y.zero_()
    assert both[:, :3].all()


class Apart(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, 3)

    def forward(self, x):
        return torch.cat((self.one(x), self.two(x)), 1)


def test_concatenated_planes_of_other_sizes_are_refused_as_torch_does():
    fused = rk.nn.fuse(masked(Apart()))
    with pytest.raises(ValueError, match="are concatenated along dimension 1"):
        fused(torch.randn(2, 2, 5, 5), [0, 1])


def test_torch_compile_gives_the_same():
    net = masked(Net().double())
    fused = rk.nn.fuse(net)
    x, index = torch.randn(len(INDEX), 2, 9, 8, dtype=torch.float64), torch.tensor(INDEX)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, index), fused(x, index), rtol=1e-12, atol=1e-12)
