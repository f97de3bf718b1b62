"""The compiled CPU backend against the float64 reference and its own promises.

Accuracy: its largest error is at most twice that of the reference in the same precision, plus a few roundings of the
largest result: both add the same products, in another order.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rtl_kernels as rk
from rtl_kernels.backends import cpu

pytestmark = pytest.mark.skipif(cpu.unavailable is not None, reason=f"the cpu backend is not there: {cpu.unavailable}")

CPU_FLAGS = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
LEVELS = {"avx512": "avx512bw", "avx2": "avx2", "baseline": ""} if os.uname().machine == "x86_64" else {"neon": ""}


@dataclass
class Case:
    """One call of a masked operator: sizes, what it is called with, and its index."""

    function: Callable[..., Tensor]
    weight: tuple[int, ...]
    x: tuple[int, ...]  # without the batch
    index: list[int] | None  # None: Route.every
    masks: int
    density: float | tuple[float, ...] = 0.5
    batch: int = 0  # where index is None
    untied: bool = False
    bias: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def out_channels(self) -> int:
        if self.function is rk.masked_conv_transpose2d:
            return self.weight[1] * self.options.get("groups", 1)
        return self.weight[0]

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, rk.MaskBank, rk.Route, Tensor | None]:
        g = torch.Generator().manual_seed(seed)

        def randn(*size: int) -> Tensor:
            return torch.randn(size, generator=g, dtype=torch.float64).to(dtype)

        batch = self.batch if self.index is None else len(self.index)
        x = randn(batch, *self.x)
        lead = (self.masks,) if self.untied else ()
        weight = randn(*lead, *self.weight)
        density = torch.tensor(self.density, dtype=torch.float64)
        density = density.reshape(-1, *(1 for _ in self.weight)) if density.dim() else density
        bank = rk.MaskBank.from_dense(torch.rand((self.masks, *self.weight), generator=g) < density)
        if self.index is None:
            route = rk.Route.every(self.masks, batch)
        else:
            route = rk.Route.build(torch.tensor(self.index, dtype=torch.int64), self.masks)
        return x, weight, bank, route, randn(*lead, self.out_channels()) if self.bias else None

    def run(self, backend: str, dtype: torch.dtype, like: torch.dtype | None = None, seed: int = 0) -> list[Tensor]:
        """y, dx, dw and db; with `like` the inputs are first rounded to that dtype."""
        x, weight, bank, route, bias = self.tensors(like or dtype, seed)
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias) if t is not None]
        y = self.function(
            leaves[0],
            leaves[1],
            bank,
            route,
            *([leaves[2]] if bias is not None else []),
            **self.options,
            backend=backend,
        )
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(like or dtype).to(dtype))]


def ragged(masks: int, batch: int, seed: int = 0, dense: bool = True) -> list[int]:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-1 if dense else 0, masks, (batch,), generator=g).tolist()


def linear(out: int, features: int, batch: int, masks: int = 3, **kwargs: Any) -> Case:
    index = kwargs.pop("index", ragged(masks, batch))
    return Case(rk.masked_linear, (out, features), kwargs.pop("x", (features,)), index, masks, batch=batch, **kwargs)


def conv(
    out: int, channels: int, kernel: tuple[int, int], size: tuple[int, int], batch: int, masks: int = 3, **kwargs: Any
) -> Case:
    index, groups = kwargs.pop("index", ragged(masks, batch)), kwargs.get("options", {}).get("groups", 1)
    return Case(
        rk.masked_conv2d, (out, channels // groups, *kernel), (channels, *size), index, masks, batch=batch, **kwargs
    )


def conv_transpose(
    out: int, channels: int, kernel: tuple[int, int], size: tuple[int, int], batch: int, masks: int = 3, **kwargs: Any
) -> Case:
    index, groups = kwargs.pop("index", ragged(masks, batch)), kwargs.get("options", {}).get("groups", 1)
    weight = (channels, out // groups, *kernel)
    return Case(rk.masked_conv_transpose2d, weight, (channels, *size), index, masks, batch=batch, **kwargs)


CASES = {
    "linear": linear(33, 70, 50),
    "linear, blocks of every width": linear(9, 40, 290, index=sorted([0] * 120 + [1] * 97 + [2] * 73)),
    "linear, a long row": linear(7, 1500, 20, density=(0.9, 0.5, 0.05)),
    "linear, many samples of one mask": linear(24, 48, 300, masks=1, index=[0] * 300),
    "linear, inner dimensions": linear(6, 11, 9, x=(3, 2, 11)),
    "linear, one sample a mask": linear(19, 37, 4, masks=4, index=[2, 0, 3, 1]),
    "linear, no batch": linear(5, 8, 0),
    "linear, no features": linear(5, 0, 6),
    "linear, no outputs": linear(0, 5, 6, bias=False),
    "linear, one weight": linear(1, 1, 40),
    "linear, all-zero and all-one masks": linear(33, 65, 90, density=(0.0, 1.0, 0.5)),
    "linear, all masks for every sample": linear(13, 35, 21, index=None),
    "linear, untied": linear(13, 35, 60, index=ragged(3, 60, dense=False), untied=True),
    "linear, untied, all masks for every sample": linear(13, 35, 7, index=None, untied=True),
    "linear, dense only": linear(21, 34, 40, index=[-1] * 40),
    "1×1": conv(24, 20, (1, 1), (4, 4), 40),
    "1×1, planes of whole vectors": conv(12, 6, (1, 1), (8, 16), 9),
    "1×1, wide planes": conv(8, 24, (1, 1), (32, 32), 5),
    "1×1, one pixel": conv(24, 20, (1, 1), (1, 1), 40),
    "1×1, stride 2": conv(7, 5, (1, 1), (9, 8), 37, options={"stride": 2}),
    "1×1, padding": conv(7, 5, (1, 1), (3, 4), 20, options={"padding": 1}),
    "1×1, one pixel that reads only zeros": conv(7, 5, (1, 1), (1, 1), 20, options={"padding": 1, "stride": 3}),
    "3×3, one pixel": conv(7, 5, (3, 3), (1, 1), 40, options={"padding": 1}),
    "linear, two samples a mask": linear(35, 70, 6, index=[2, 0, 1, 1, 0, 2]),
    "linear, wide": linear(300, 270, 40),
    "linear, up to eight samples a mask": linear(21, 150, 20, masks=4, index=[0] * 8 + [1] * 5 + [2] * 6 + [3]),
    "linear, up to eight samples a sparse mask": linear(21, 150, 14, masks=2, index=[0] * 8 + [1] * 6, density=0.1),
    "linear, weights past L2": linear(1025, 1030, 32, index=[0] * 23 + [1] * 9),
    "1×1, planes of 3 pixels": conv(9, 7, (1, 1), (1, 3), 60),
    "1×1, planes of 10 pixels": conv(9, 7, (1, 1), (2, 5), 45),
    "1×1, planes of 21 pixels": conv(9, 7, (1, 1), (3, 7), 30),
    "3×3": conv(10, 9, (3, 3), (8, 7), 70, options={"padding": 1}),
    "3×3, few samples": conv(10, 9, (3, 3), (20, 31), 7, options={"padding": 1}),
    "3×3, many channels": conv(8, 70, (3, 3), (6, 6), 60, options={"padding": 1}),
    "3×3, strips": conv(6, 40, (3, 3), (60, 40), 20, masks=1, options={"padding": 1}),
    "3×3, strips of one sample": conv(5, 3, (3, 3), (90, 70), 3, options={"padding": 1}),
    "3×3, no padding": conv(10, 9, (3, 3), (5, 5), 40),
    "3×3, stride 2": conv(10, 9, (3, 3), (9, 8), 40, options={"padding": 1, "stride": 2}),
    "stride (1, 2), dilation (2, 1)": conv(
        5, 4, (3, 2), (11, 17), 23, options={"padding": (2, 1), "stride": (1, 2), "dilation": (2, 1)}
    ),
    "stride past the kernel": conv(5, 4, (2, 2), (11, 12), 23, options={"stride": 3}),
    "asymmetric padding": conv(5, 4, (2, 4), (6, 7), 40, options={"padding": ((0, 1), (1, 2))}),
    "padding past the kernel": conv(5, 4, (2, 2), (3, 3), 40, options={"padding": (3, 4)}),
    "same": conv(5, 4, (2, 4), (6, 7), 12, options={"padding": "same"}),
    "groups": conv(12, 9, (3, 3), (6, 6), 40, options={"padding": 1, "groups": 3}),
    "many groups": conv(300, 300, (3, 3), (5, 5), 20, options={"padding": 1, "groups": 300}),
    "depthwise": conv(20, 20, (3, 3), (16, 16), 20, options={"padding": 1, "groups": 20}),
    "depthwise, small planes": conv(20, 20, (3, 3), (4, 4), 50, options={"padding": 1, "groups": 20}),
    "depthwise, planes of a part of a vector": conv(9, 9, (3, 3), (3, 3), 40, options={"padding": 1, "groups": 9}),
    "depthwise, planes of many vectors": conv(
        6, 6, (5, 3), (14, 15), 9, options={"padding": (4, 1), "dilation": (2, 1), "groups": 6}
    ),
    "depthwise, smaller than its input": conv(20, 20, (3, 3), (18, 18), 20, options={"groups": 20}),
    "depthwise, stride 2": conv(6, 6, (5, 5), (33, 30), 9, options={"padding": 2, "groups": 6, "stride": 2}),
    "depthwise, two filters a channel": conv(12, 6, (3, 3), (9, 9), 20, options={"padding": 1, "groups": 6}),
    "conv, untied": conv(8, 6, (3, 3), (7, 7), 30, index=ragged(3, 30, dense=False), untied=True),
    "conv, all masks for every sample": conv(8, 6, (3, 3), (7, 7), 18, index=None, options={"padding": 1}),
    "depthwise, all masks for every sample": conv(
        8, 8, (3, 3), (16, 16), 5, index=None, options={"padding": 1, "groups": 8}
    ),
    "conv, no batch": conv(4, 3, (3, 3), (5, 5), 0),
    "transposed": conv_transpose(7, 5, (3, 3), (6, 5), 40, options={"padding": 1}),
    "transposed, stride 2": conv_transpose(
        7, 5, (3, 3), (6, 5), 40, options={"padding": 1, "stride": 2, "output_padding": 1}
    ),
    "transposed, gaps": conv_transpose(4, 3, (2, 1), (4, 5), 22, options={"stride": (3, 2), "output_padding": (2, 0)}),
    "transposed, dilation": conv_transpose(
        4, 6, (3, 2), (5, 6), 22, options={"stride": (2, 3), "dilation": (3, 2), "groups": 2, "padding": (2, 1)}
    ),
    "transposed, depthwise": conv_transpose(
        6, 6, (4, 4), (12, 13), 20, options={"groups": 6, "stride": 2, "padding": 1}
    ),
    "transposed, depthwise, as large as its input": conv_transpose(
        6, 6, (3, 5), (8, 9), 20, options={"groups": 6, "padding": (1, 2)}
    ),
    "transposed, all masks for every sample": conv_transpose(4, 3, (3, 3), (4, 4), 17, index=None),
    "transposed, untied": conv_transpose(4, 3, (3, 3), (4, 4), 25, index=ragged(3, 25, dense=False), untied=True),
}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def largest(error: Tensor) -> float:
    return float(error.abs().max()) if error.numel() else 0.0


def check_accuracy(case: Case, dtype: torch.dtype) -> None:
    exact = case.run("reference", torch.float64, like=dtype)
    ours, reference = case.run("cpu", dtype), case.run("reference", dtype)
    eps = torch.finfo(dtype).eps
    for name, e, o, r in zip(("y", "dx", "dw", "db"), exact, ours, reference, strict=False):
        assert o.dtype == dtype
        assert o.shape == e.shape, name
        # In float64 the reference IS the exact result: leave room for a sum of a few thousand terms in another order.
        allowed = 2 * largest(r.double() - e) + (64 if dtype == torch.float64 else 4) * eps * largest(e)
        assert largest(o.double() - e) <= allowed, name


def test_results_and_gradients_are_as_accurate_as_the_reference(case: Case) -> None:
    check_accuracy(case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype_is_as_accurate_as_the_reference(case: Case, dtype: torch.dtype) -> None:
    if case.function is not rk.masked_linear and len(case.index or ()) > 60:
        pytest.skip("the shapes are covered in float32")
    check_accuracy(case, dtype)


def test_pruned_weights_get_exactly_no_gradient(case: Case) -> None:
    _, _, bank, _, _ = case.tensors(torch.float32)
    present = set(range(case.masks) if case.index is None else case.index)
    keep = torch.zeros(case.weight, dtype=torch.bool)
    for mask in present:
        keep |= bank.dense(mask) if mask >= 0 else torch.tensor(True)
    if case.untied:
        keep = bank.to_dense()
    dw = case.run("cpu", torch.float32)[2]
    assert not dw[~keep].any()


def test_repeated_calls_give_the_same_bits(case: Case) -> None:
    first, second = case.run("cpu", torch.float32), case.run("cpu", torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_forward_bits_do_not_depend_on_gradients(case: Case) -> None:
    x, weight, bank, route, bias = case.tensors(torch.float32)
    with torch.no_grad():
        y = case.function(x, weight, bank, route, bias, **case.options, backend="cpu")
    assert torch.equal(y, case.run("cpu", torch.float32)[0])


@pytest.mark.parametrize("keep", [0.5, 0.1])
def test_results_do_not_depend_on_what_was_computed_before(keep: float) -> None:
    """What is kept of a mask from call to call was made for a number of samples; another number has its own."""
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(40, 600, generator=g), torch.randn(90, 600, generator=g)
    masks = torch.rand(1, 40, 600, generator=g) < keep
    sizes = (1, 9, 12, 20, 40, 90)

    def results(sizes: Sequence[int]) -> dict[int, Tensor]:
        bank = rk.MaskBank.from_dense(masks)
        route = {n: rk.Route.build(torch.zeros(n, dtype=torch.int64), 1) for n in sizes}
        return {n: rk.masked_linear(x[:n], weight, bank, route[n], backend="cpu") for n in sizes}

    upwards, downwards = results(sizes), results(sizes[::-1])
    assert all(torch.equal(upwards[n], downwards[n]) for n in sizes)


def test_results_do_not_depend_on_the_number_of_threads(case: Case, threads: None) -> None:
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(case.run("cpu", torch.float32))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_group_depends_on_its_own_samples_only(case: Case) -> None:
    """y and dx of one mask's samples, alone in a batch, have the bits they have among the others."""
    if case.index is None:
        pytest.skip("every sample is in every group")
    x, weight, bank, route, bias = case.tensors(torch.float32)
    dy = torch.randn_like(case.function(x, weight, bank, route, bias, **case.options, backend="cpu"))

    def run(rows: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x[rows].requires_grad_()
        own = rk.Route.build(torch.tensor(case.index, dtype=torch.int64)[rows], case.masks)
        y = case.function(leaf, weight, bank, own, bias, **case.options, backend="cpu")
        return y.detach(), torch.autograd.grad(y, leaf, dy[rows])[0]

    index = torch.tensor(case.index, dtype=torch.int64)
    everything = run(torch.arange(len(index)))
    for mask in set(case.index):
        rows = (index == mask).nonzero()[:, 0]
        for whole, alone in zip(everything, run(rows), strict=True):
            assert torch.equal(whole[rows], alone), mask


@pytest.mark.parametrize("name", ["linear, untied", "conv, untied", "transposed, untied"])
def test_an_untied_gradient_depends_on_its_own_samples_only(name: str) -> None:
    case = CASES[name]
    x, weight, bank, _, bias = case.tensors(torch.float32)
    index = torch.tensor(case.index, dtype=torch.int64)

    def run(rows: Tensor) -> Tensor:
        leaf = weight.clone().requires_grad_()
        y = case.function(
            x[rows], leaf, bank, rk.Route.build(index[rows], case.masks), bias, **case.options, backend="cpu"
        )
        return torch.autograd.grad(y, leaf, y.detach().cos())[0]

    everything = run(torch.arange(len(index)))
    for mask in range(case.masks):
        assert torch.equal(everything[mask], run((index == mask).nonzero()[:, 0])[mask]), mask


@pytest.mark.parametrize("name", ["linear, untied", "3×3, stride 2", "groups", "transposed, stride 2", "depthwise"])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    case = CASES[name]
    small = Case(**{**case.__dict__, "index": (case.index or [])[:3]})
    x, weight, bank, route, bias = small.tensors(torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    assert torch.autograd.gradcheck(
        lambda x, w, b: small.function(x, w, bank, route, b, **small.options, backend="cpu"), leaves, fast_mode=True
    )


@pytest.mark.parametrize("name", ["linear", "1×1, planes of whole vectors", "3×3", "depthwise", "transposed"])
def test_inputs_may_be_strided_and_unaligned(name: str) -> None:
    case = CASES[name]
    x, weight, bank, route, bias = case.tensors(torch.float32)
    expected = case.function(x, weight, bank, route, bias, **case.options, backend="cpu")

    def strided(t: Tensor) -> Tensor:
        return torch.stack([t, t], -1).transpose(0, -1)[1].transpose(0, -1) if t.dim() == 1 else _strided(t)

    def unaligned(t: Tensor) -> Tensor:
        buffer = torch.empty(t.numel() + 1, dtype=t.dtype)
        return buffer[1:].view(t.shape).copy_(t)

    for change in (strided, unaligned):
        y = case.function(change(x), change(weight), bank, route, change(bias), **case.options, backend="cpu")
        assert torch.equal(y, expected), change.__name__


def _strided(t: Tensor) -> Tensor:
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), dtype=t.dtype)
    wide[..., ::2] = t
    return wide[..., ::2]


def test_masks_changed_in_place_are_followed() -> None:
    case = CASES["3×3"]
    x, weight, bank, route, bias = case.tensors(torch.float32)
    for change in (lambda: bank.words.bitwise_and_(0x0F0F0F0F), lambda: bank.words.numpy().fill(0)):
        case.function(x, weight, bank, route, bias, **case.options, backend="cpu")
        change()
        y = case.function(x, weight, bank, route, bias, **case.options, backend="cpu")
        assert torch.allclose(
            y, case.function(x, weight, bank, route, bias, **case.options, backend="reference"), atol=1e-4
        )


@pytest.mark.parametrize("make", [linear, lambda *sizes, **rest: conv(*sizes[:2], (1, 1), (1, 1), *sizes[2:], **rest)])
def test_masks_inverted_in_place_reach_no_weight_behind_a_row(make: Callable[..., Case]) -> None:
    """So little is kept then that rows become lists; the bits behind a row, in its last word, are inverted too."""
    case = make(40, 1001, 24, density=0.95, masks=2, index=[0, 1] * 12)
    x, weight, bank, route, bias = case.tensors(torch.float32)
    inverse = rk.MaskBank.from_dense(~bank.to_dense())
    bank.words.bitwise_not_()
    results = []
    for masks in (bank, inverse):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        y = case.function(*leaves, masks, route, bias, backend="cpu")
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
    for with_bits, without in zip(*results, strict=True):
        torch.testing.assert_close(with_bits, without)


def test_a_pruned_weight_is_not_read_whatever_stands_there() -> None:
    case = CASES["linear"]
    x, weight, bank, route, bias = linear(33, 70, 50, index=ragged(3, 50, dense=False)).tensors(torch.float32)
    expected = rk.masked_linear(x, weight, bank, route, bias, backend="cpu")
    weight[~bank.union().dense(0)] = float("nan")
    assert torch.equal(rk.masked_linear(x, weight, bank, route, bias, backend="cpu"), expected)
    assert case.masks == bank.num_masks


def test_routes_that_reach_outside_the_batch_are_refused() -> None:
    x, weight, bank, route, bias = CASES["linear"].tensors(torch.float32)
    operator = torch.ops.rtl_kernels.masked_linear_cpu.default
    for offsets, order in (
        (route.offsets + 1, route.order),
        (route.offsets.flip(0), route.order),
        (route.offsets, route.order + 1),
        (route.offsets, -route.order),
        (route.offsets[1:], route.order),
        (route.offsets, route.order[1:]),
    ):
        with pytest.raises(RuntimeError, match=r"offsets|order"):
            operator(x, weight, bank.words, offsets, order, 1, bias)
    with pytest.raises(RuntimeError, match="words"):
        operator(x, weight, bank.words[:, 1:], route.offsets, route.order, 1, bias)


def test_explain_names_the_backend() -> None:
    x, weight, bank, route, _ = CASES["linear"].tensors(torch.float32)
    assert rk.explain(rk.masked_linear, x, weight, bank, route).backend == "cpu"


AVAILABLE = [name for name, flag in LEVELS.items() if flag in CPU_FLAGS]


def test_the_instruction_set_is_the_best_there_is_or_the_one_asked_for() -> None:
    assert torch.ops.rtl_kernels.cpu_levels() == AVAILABLE
    assert torch.ops.rtl_kernels.cpu_level() == (os.environ.get("RTL_KERNELS_CPU_LEVEL") or AVAILABLE[0])


@pytest.mark.parametrize("level", AVAILABLE)
def test_every_instruction_set_is_as_accurate_as_the_reference(level: str) -> None:
    """Forced, in a process of its own; of the one that this process uses, what stands above is the test."""
    tests, count = "asked_for", 1
    if level != torch.ops.rtl_kernels.cpu_level():
        tests, count = f"{tests} or (accurate_as and gradients) or number_of_threads", 2 * len(CASES) + 1
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", tests],
        env={**os.environ, "RTL_KERNELS_CPU_LEVEL": level},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert f"{count} passed" in result.stdout


def test_an_unknown_instruction_set_is_refused_by_name() -> None:
    code = "import torch, rtl_kernels as rk; i = torch.zeros(1, dtype=torch.int64); w = torch.ones(1, 1)\n"
    code += "rk.masked_linear(w, w, rk.MaskBank.ones(1, (1, 1)), rk.Route.build(i, 1))"
    env = {**os.environ, "RTL_KERNELS_CPU_LEVEL": "avx1024"}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert result.returncode != 0
    assert "RTL_KERNELS_CPU_LEVEL is 'avx1024', expected one of" in result.stderr


def test_nothing_of_a_dense_call_differs_from_torch() -> None:
    x = torch.randn(40, 20, 6, 6)
    weight = torch.randn(8, 20, 3, 3)
    y = rk.masked_conv2d(x, weight, rk.MaskBank.ones(1, weight.shape), rk.Route.build([-1] * 40, 1), backend="cpu")
    assert torch.allclose(y, F.conv2d(x, weight), atol=1e-4)


PAST_THE_CACHES = {  # results of more than 16 MiB over both masks, less for one alone
    "linear": linear(64, 20, 0, masks=2, index=[0, 1] * 34000),
    "1×1 in place": conv(104, 16, (1, 1), (32, 32), 0, masks=2, index=[0, 1] * 22),
    "1×1, many inputs": conv(104, 600, (1, 1), (32, 32), 0, masks=2, index=[0, 1] * 22),
    "3×3": conv(16, 4, (3, 3), (30, 32), 0, masks=2, index=[0, 1] * 150, options={"padding": 1}),
    "depthwise": conv(72, 72, (3, 3), (16, 16), 0, masks=2, index=[0, 1] * 130, options={"padding": 1, "groups": 72}),
    "depthwise, stride 2": conv(
        72, 72, (3, 3), (32, 32), 0, masks=2, index=[0, 1] * 130, options={"padding": 1, "groups": 72, "stride": 2}
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", PAST_THE_CACHES)
def test_results_larger_than_the_caches_have_the_bits_of_smaller_ones(name: str, dtype: torch.dtype) -> None:
    case = PAST_THE_CACHES[name]
    x, weight, bank, route, bias = case.tensors(dtype)
    assert case.index is not None
    own = torch.tensor(case.index) == 0
    alone = rk.Route.build(torch.zeros(int(own.sum()), dtype=torch.int64), case.masks)
    with torch.no_grad():
        y = case.function(x, weight, bank, route, bias, **case.options, backend="cpu")
        few = case.function(x[own], weight, bank, alone, bias, **case.options, backend="cpu")
    assert few.nbytes < 16 << 20 < y.nbytes or dtype == torch.float64
    assert torch.equal(y[own], few)
    exact = case.function(
        x[own][:3].double(), weight.double(), bank, rk.Route.build([0] * 3, case.masks), bias.double(), **case.options
    )
    torch.testing.assert_close(few[:3].double(), exact, rtol=1e-4, atol=1e-3)


def test_elements_past_two_to_the_31_are_reached() -> None:
    """Of 9 GB of input, in memory that is there only where it is touched, the masks keep two channels."""
    channels, height, width = 2200, 1000, 1040
    size = channels * height * width
    assert size > 2**31
    no_reserve = 0x4000  # MAP_NORESERVE, which Python before 3.13 has no name for
    try:
        memory = mmap.mmap(-1, size * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    except OSError as error:
        pytest.skip(f"9 GB of address space are not to be had: {error}")
    x = torch.frombuffer(memory, dtype=torch.float32).view(1, channels, height, width)
    last = channels - 1
    x[0, 7], x[0, last] = 2.0, torch.arange(width, dtype=torch.float32)
    weight = torch.randn(2, channels, 1, 1)
    keep = torch.zeros(1, 2, channels, 1, 1, dtype=torch.bool)
    keep[0, 0, [7, last]] = keep[0, 1, last] = True
    y = rk.masked_conv2d(x, weight, rk.MaskBank.from_dense(keep), rk.Route.build([0], 1), backend="cpu")
    exact = weight[:, last] * x[0, last]
    exact[0] += weight[0, 7] * x[0, 7]
    assert torch.allclose(y[0], exact, rtol=1e-6, atol=1e-4)


CACHE = """
import torch
import rtl_kernels as rk
operators = torch.ops.rtl_kernels
most, banks, x, route = 0, [], torch.randn(64, 256), rk.Route.build([0] * 64, 1)
for seed in range(40):  # 65536 weights each, half of them kept: some 40 KB. Kept, lest one takes a freed one's place
    bank = rk.MaskBank.from_dense(torch.rand(1, 256, 256, generator=torch.Generator().manual_seed(seed)) < 0.5)
    banks.append(bank)
    y = rk.masked_linear(x, torch.ones(256, 256), bank, route, backend="cpu")
    assert torch.allclose(y, x @ bank.to_dense()[0].float().T, atol=1e-3)
    most = max(most, operators.cpu_cache_bytes())
print(most, operators.cpu_cache_limit())
"""


def test_the_masks_kept_stay_within_their_limit() -> None:
    env = {**os.environ, "RTL_KERNELS_CACHE_MB": "1"}
    shown = subprocess.run([sys.executable, "-c", CACHE], env=env, capture_output=True, text=True, check=True).stdout
    most, limit = map(int, shown.split())
    assert limit == 1 << 20
    assert 0.8 * limit <= most <= limit


def test_a_limit_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("1G", "many", "-1"):
        monkeypatch.setenv("RTL_KERNELS_CACHE_MB", value)
        with pytest.raises(ValueError, match=f"RTL_KERNELS_CACHE_MB is '{value}', expected whole megabytes"):
            torch.ops.rtl_kernels.cpu_cache_limit()


PLANES = {  # channels side by side, whole vectors of them and not; a channel at a time, rows of whole vectors and not
    "3×2": (32, 5, 3, 2),
    "2×2, many channels": (64, 184, 2, 2),
    "4×4": (300, 9, 4, 4),
    "8×8": (40, 6, 8, 8),
    "9×10": (50, 4, 9, 10),
    "16×16": (20, 7, 16, 16),
    "37×41": (10, 3, 37, 41),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("planes", PLANES)
def test_batch_norm_is_as_accurate_as_the_reference(planes: str, dtype: torch.dtype, threads: None) -> None:
    """Three groups, one empty; means a few deviations off zero. The same bits on any threads, and of a group alone."""
    operators, (rows, channels, *plane) = torch.ops.rtl_kernels, PLANES[planes]
    g = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(rows, channels, *plane, generator=g, dtype=torch.float64) for _ in range(2))
    weight, bias = (torch.randn(3, channels, generator=g, dtype=torch.float64) for _ in range(2))
    x = 3 + 2 * x
    own = rows // 3

    def run(backend: str, dtype: torch.dtype, stop: int = rows) -> list[Tensor]:
        a, d, w, b = (t.to(dtype) for t in (x[:stop], dy[:stop], weight, bias))
        offsets = torch.tensor([0, 0, own, own, stop])
        forward = getattr(operators, f"subset_batch_norm_{backend}")
        y, mean, variance, inverse_std = forward(a, w, b, offsets, 1e-5)
        backward = getattr(operators, f"subset_batch_norm_grad_{backend}")
        return [y, mean, variance, inverse_std, *backward(d, a, w, offsets, mean, inverse_std, 1e-5)]

    exact, reference, ours = run("reference", torch.float64), run("reference", dtype), run("cpu", dtype)
    eps = torch.finfo(dtype).eps
    names = ("y", "mean", "variance", "inverse_std", "dx", "dw", "db")
    for name, e, r, o in zip(names, exact, reference, ours, strict=True):
        allowed = 2 * largest(r.double() - e) + (64 if dtype == torch.float64 else 4) * eps * largest(e)
        assert largest(o.double() - e) <= allowed, name
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert all(torch.equal(a, b) for a, b in zip(ours, run("cpu", dtype), strict=True))
    alone = run("cpu", dtype, own)
    assert torch.equal(alone[0], ours[0][:own])
    assert torch.equal(alone[4], ours[4][:own])
    assert torch.equal(alone[5][0], ours[5][0])


def test_batch_norm_refuses_parameters_of_another_number_of_masks_or_channels() -> None:
    x, offsets = torch.randn(6, 5, 2, 2), torch.tensor([0, 0, 2, 4, 6])
    forward = torch.ops.rtl_kernels.subset_batch_norm_cpu
    backward = torch.ops.rtl_kernels.subset_batch_norm_grad_cpu
    good = torch.ones(3, 5)
    _, mean, _, inverse_std = forward(x, good, good, offsets, 1e-5)
    backward(x, x, good, offsets, mean, inverse_std, 1e-5)
    forward(x, good[0], None, offsets, 1e-5)
    for wrong in (torch.ones(2, 5), torch.ones(3, 4), torch.ones(4)):
        with pytest.raises(RuntimeError, match="weight does not fit x and offsets"):
            forward(x, wrong, good, offsets, 1e-5)
        with pytest.raises(RuntimeError, match="bias does not fit x and offsets"):
            forward(x, good, wrong, offsets, 1e-5)
        with pytest.raises(RuntimeError, match="weight does not fit x and offsets"):
            backward(x, x, wrong, offsets, mean, inverse_std, 1e-5)
        with pytest.raises(RuntimeError, match="mean does not fit x and offsets"):
            backward(x, x, good, offsets, wrong, inverse_std, 1e-5)
    for weight, bias in ((good, good[0]), (good[0], good), (None, good)):
        with pytest.raises(RuntimeError, match="bias does not fit weight"):
            forward(x, weight, bias, offsets, 1e-5)
