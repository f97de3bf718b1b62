"""The Triton kernels, interpreted on the CPU: the cases every backend is held to, and what only these kernels can get
wrong. Every address a kernel touches is checked against its arguments.

Nothing here runs on a GPU. bfloat16 is left out: the interpreter keeps it in integers and is silently wrong.
"""

from __future__ import annotations

import dataclasses
import mmap
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import rtl_kernels as rk
from rtl_kernels import functional
from rtl_kernels.backends import triton as backend
from rtl_kernels.ops import define
from rtl_kernels.testing import CASES, Case, Example, assert_bitwise, assert_matches_separate_passes, make, run

pytest.importorskip("triton", reason="Triton is not installed: its kernels can be neither interpreted nor compiled")

import triton_interpreter as interpret

from rtl_kernels.backends.triton_kernels import launch
from rtl_kernels.backends.triton_kernels.launch import Launch, Target

# ---- the kernels as a backend of their own: what its operators run is the target in `_current`

_current: list[Target] = []


def _define() -> SimpleNamespace:
    def implementation(operator: Any) -> Any:
        return lambda *args: operator(_current[-1], *args)

    for operation, operator in launch.OPERATIONS.items():
        define(operation, "interpreted", implementation(operator), "CPU")
    return SimpleNamespace(name="interpreted", supports=lambda operation, x, weight: None)


_BACKEND = _define()


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return interpret.load()


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Any:
    """on(target) makes the backend "interpreted" run there."""
    monkeypatch.setattr(functional, "BACKENDS", {**functional.BACKENDS, "interpreted": _BACKEND})
    yield _current.append
    _current.clear()


def case(operation: str, name: str) -> Case:
    return next(c for c in CASES if (c.operation, c.name) == (operation, name))


# ---- accuracy


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_as_accurate_as_dense_passes(case, kernels, on):
    on(interpret.target(kernels))
    example = make(case, torch.float32)
    assert_matches_separate_passes(example, run(example, "interpreted"))


HALF = ("ragged", "untied", "every", "1x1", "stride", "depthwise", "grouped", "output-padding", "three-dimensions")


@pytest.mark.parametrize("case", [c for c in CASES if c.name in HALF], ids=str)
def test_float16_is_as_accurate_as_dense_passes(case, kernels, on):
    on(interpret.target(kernels))
    example = make(case, torch.float16)
    assert_matches_separate_passes(example, run(example, "interpreted"))


LARGER = (
    Case("128", "linear", (40, 128), (128, 128), tuple((7 * i) % 4 - 1 for i in range(40)), 3),
    Case("plane", "conv2d", (6, 40, 8, 8), (72, 40, 1, 1), (1, 0, -1, 1, 0, 1), 2),
    Case("window", "conv2d", (3, 24, 9, 8), (40, 24, 3, 3), (1, 0, 1), 2, options={"padding": 1}),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("architecture", [80, 86])
@pytest.mark.parametrize("case", LARGER, ids=str)
def test_the_tables_configurations_are_as_accurate(case, architecture, dtype, kernels, on):
    on(interpret.table(kernels, architecture))
    example = make(case, dtype)
    assert_matches_separate_passes(example, run(example, "interpreted"))


TILES = [(16, 16, 16), (32, 16, 64), (16, 64, 32)]


@pytest.mark.parametrize("tiles", TILES, ids=str)
@pytest.mark.parametrize("name", ["over-a-word", "many-samples"])
def test_tiles_of_other_sizes_give_the_same(name, tiles, kernels, on):
    on(interpret.target(kernels, *tiles))
    example = make(case("linear", name))
    assert_matches_separate_passes(example, run(example, "interpreted"))


@pytest.mark.parametrize("operation", ["linear", "conv2d", "conv_transpose2d"])
@pytest.mark.parametrize("name", ["ragged", "every-untied"])
def test_64_bit_indices_give_the_same(operation, name, kernels, on, monkeypatch):
    on(interpret.target(kernels))
    example = make(case(operation, name))
    narrow = run(example, "interpreted")
    monkeypatch.setattr(launch, "_wide", lambda count, *tensors: True)
    for n, w in zip(narrow, run(example, "interpreted"), strict=True):
        assert_bitwise(w, n)


@pytest.mark.parametrize("layout", ["channels_last", "channel-major", "every second pixel"])
@pytest.mark.parametrize("name", ["ragged", "1x1"])
def test_any_strides_of_the_input_give_the_same(layout, name, kernels, on):
    on(interpret.target(kernels))
    example = make(case("conv2d", name))
    if layout == "channels_last":
        x = example.x.to(memory_format=torch.channels_last)
    elif layout == "channel-major":
        x = example.x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    else:
        x = example.x.repeat_interleave(2, 3)[..., ::2]
    assert x.stride() != example.x.stride()
    results = run(
        dataclasses.replace(example, x=x, dy=example.dy.transpose(2, 3).contiguous().transpose(2, 3)), "interpreted"
    )
    assert_matches_separate_passes(example, results)


# ---- which groups and tiles


def _groups(example: Example) -> tuple[Any, ...]:
    repeat = example.route.num_masks if example.route.all_masks else 1
    return example.bank.words, example.route.offsets, example.route.order, repeat


def test_tiles_that_hold_no_bit_are_skipped(kernels):
    """Only 2 of 3 × 4 blocks hold bits: what is visited is written down, and everything else is poisoned."""
    masks = torch.zeros(1, 96, 128, dtype=torch.bool)
    masks[0, 40, 70] = masks[0, 95, 127] = True
    weight = torch.full((96, 128), float("nan"))
    weight[32:64, 64:96] = weight[64:96, 96:128] = 2.0
    bank, route = rk.MaskBank.from_dense(masks), rk.Route.build([0, 0], 1)
    routing = bank.words, route.offsets, None, 1
    target = interpret.target(kernels, 32, 16, 32)
    # A pruned weight becomes 0 whatever it is; an input that is not finite would still spoil every product it is in.
    x = torch.ones(2, 128)
    x[:, :64] = float("inf")
    y = launch.linear(target, x, weight, *routing, None)
    expected = torch.zeros(2, 96)
    expected[:, 40] = expected[:, 95] = 2
    assert_bitwise(y, expected)
    dy = torch.ones(2, 96)
    dy[:, :32] = float("inf")
    dx = launch.linear_grad_input(target, dy, weight, *routing)
    expected = torch.zeros(2, 128)
    expected[:, 70] = expected[:, 127] = 2
    assert_bitwise(dx, expected)


def test_a_mask_that_keeps_nothing_gives_the_bias_and_no_gradient(kernels):
    example = make(case("linear", "all-zero"))
    target = interpret.target(kernels)
    y = launch.linear(target, example.x, example.weight, *_groups(example), example.bias)
    masked = torch.tensor(example.case.index) >= 0
    assert_bitwise(y[masked], example.bias.expand_as(y)[masked].contiguous())


def _pick(example: Example, samples: list[int]) -> Example:
    index = [example.case.index[i] for i in samples]
    route = rk.Route.build(index, example.case.num_masks)
    return dataclasses.replace(example, x=example.x[samples], dy=example.dy[samples], route=route)


@pytest.mark.parametrize("operation", ["linear", "conv2d", "conv_transpose2d"])
@pytest.mark.parametrize("name", ["ragged", "untied"])
def test_a_group_does_not_see_the_others(operation, name, kernels, on):
    """y, dx and an untied weight's own dw are the same bits when the other groups vanish or move."""
    on(interpret.target(kernels))
    example = make(case(operation, name))
    mine = [i for i, k in enumerate(example.case.index) if k == 2]
    both = run(example, "interpreted"), run(_pick(example, mine), "interpreted")
    assert_bitwise(both[0].y[mine].contiguous(), both[1].y)
    assert_bitwise(both[0].x[mine].contiguous(), both[1].x)
    if example.case.untied:
        assert_bitwise(both[0].weight[2], both[1].weight[2])
        assert_bitwise(both[0].bias[2], both[1].bias[2])


def test_a_sum_cut_into_parts_is_the_same_at_every_call(kernels, on):
    wide = Case("cut", "conv2d", (3, 4, 24, 24), (4, 4, 1, 1), (0, 1, 0), 2)
    launches: list[Launch] = []
    target = interpret.target(kernels)
    on(dataclasses.replace(target, run=lambda step: (launches.append(step), target.run(step))))
    example = make(wide)
    first, second = run(example, "interpreted"), run(example, "interpreted")
    assert any(step.kernel == "sum_splits" for step in launches)
    assert_matches_separate_passes(example, first)
    for a, b in zip(first, second, strict=True):
        assert_bitwise(a, b)


def test_a_row_without_a_mask_gives_nan_where_weights_are_untied(kernels):
    example = make(case("linear", "untied"))
    route = rk.Route.build([-1, 0, -1, 1, 2, 3], 4)
    y = launch.linear(
        interpret.target(kernels), example.x, example.weight, example.bank.words, route.offsets, route.order, 1, None
    )
    assert y.isnan().all(1).tolist() == [True, False, True, False, False, False]
    assert not y[[1, 3, 4, 5]].isnan().any()


# ---- offsets past 32 bits


def _far_apart(kernels: ModuleType) -> None:
    """A layer whose third sample lies 2³¹ elements behind its first, in memory that is reserved and hardly touched."""
    gap, size = 2**30, 2  # float16
    no_reserve = 0x4000
    memory = mmap.mmap(-1, 4 * gap * size + 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    example = make(Case("far", "linear", (3, 24), (16, 24), (0, 0, 0), 1, bias=False), torch.float16)
    # The first sample stands in the middle, so that an offset that wraps round stays inside and reads zeros.
    rows = [torch.frombuffer(memory, dtype=torch.float16, count=24, offset=(2 + i) * gap * size) for i in range(3)]
    for row, x in zip(rows, example.x, strict=True):
        row.copy_(x)
    start = rows[0].data_ptr()
    reach = [(start - 2 * gap * size, start + 2 * gap * size + 48)]

    def move(step: Launch) -> None:
        if step.kernel == "correlate":
            arguments = {**step.arguments, "x": rows[0], "x_n": gap}
            step = dataclasses.replace(step, arguments=arguments, constants={**step.constants, "WIDE": True})
        interpret.run(kernels, step, reach)

    target = dataclasses.replace(interpret.target(kernels), run=move)
    y = launch.linear(target, example.x, example.weight, *_groups(example), None)
    expected = torch.ops.rtl_kernels.masked_linear_reference(example.x, example.weight, *_groups(example), None)
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)


def test_samples_may_lie_further_apart_than_32_bits_reach(kernels):
    _far_apart(kernels)


def test_which_launches_count_in_64_bits():
    near = torch.empty(2**16, 2**15, device="meta", dtype=torch.float16)
    assert not launch._wide(10, near)
    assert launch._wide(2**31, near)
    assert launch._wide(10, torch.empty(2**16, 2**15 + 1, device="meta"))
    assert launch._wide(10, torch.empty(2, 4, device="meta").as_strided((2, 4), (2**31, 1)))


# ---- the checks are checked: each planted bug is caught


def _accurate(case: Case, **tiles: int) -> Any:
    def check(kernels: ModuleType, on: Any) -> None:
        on(interpret.target(kernels, **tiles))
        example = make(case)
        assert_matches_separate_passes(example, run(example, "interpreted"))

    return check


PLANTS = {
    "wrong mask word": (
        "    word = first // 32 + tl.arange(0, WORDS)\n    packed = tl.load(words[:, None]",
        "    word = first // 32 + 1 + tl.arange(0, WORDS)\n    packed = tl.load(words[:, None]",
        _accurate(case("linear", "ragged")),
    ),
    "wrong mask word, transposed": (
        "    word = first // 32 + tl.arange(0, WORDS)\n    packed = tl.load(words[None, :]",
        "    word = 0 + tl.arange(0, WORDS)\n    packed = tl.load(words[None, :]",
        _accurate(case("linear", "wide")),
    ),
    "the other half of a mask word": (
        "    shift = first % 32 + tl.arange(0, WIDTH)\n    return tl.reshape((packed[:, :, None]",
        "    shift = tl.arange(0, WIDTH)\n    return tl.reshape((packed[:, :, None]",
        _accurate(case("linear", "ragged"), block_k=16),
    ),
    "a bit of another tap": (
        "bits = (packed >> (bit % 32)[:, None]) & 1",
        "bits = (packed >> (q % 32)[:, None]) & 1",
        _accurate(case("conv2d", "ragged")),
    ),
    "the mask of the next group": (
        "words_row = words + (mask * conv_groups * conv_rows + weight_row) * row_words\n            masked",
        "words_row = words + ((mask + 1) % (groups - 1) * conv_rows + weight_row) * row_words\n            masked",
        _accurate(case("linear", "ragged")),
    ),
    "wrong group boundary": (
        "    end = _pixel_of(offsets, group + 1, pixels, WIDE)\n    return group",
        "    end = _pixel_of(offsets, group + 1, pixels, WIDE) + 1\n    return group",
        _accurate(case("linear", "sorted")),
    ),
    "a tile that straddles two groups": (
        "return group, first + (slot - (first // BLOCK + group)) * BLOCK, end",
        "return group, (slot - group) * BLOCK, end",
        _accurate(case("linear", "many-samples")),
    ),
    "missing tail mask of the reduction": (
        "            k_inside = k < reduction\n            factor",
        "            k_inside = k < reduction + BLOCK_K\n            factor",
        _accurate(case("linear", "ragged")),
    ),
    "missing tail mask of the rows": (
        "    inside = flat < end\n    row = flat // pixels\n    pixel = flat % pixels\n    sample",
        "    inside = flat < end + BLOCK_R\n    row = flat // pixels\n    pixel = flat % pixels\n    sample",
        _accurate(case("linear", "ragged")),
    ),
    "missing tail mask of the outputs": (
        "    o_inside = o < conv_rows\n    weight_row = _at(conv_group * conv_rows + o, WIDE)\n    entries",
        "    o_inside = o < conv_rows + BLOCK_O\n    weight_row = _at(conv_group * conv_rows + o, WIDE)\n    entries",
        _accurate(case("linear", "ragged")),
    ),
    "int32 offset": ("tl.int64 if WIDE else tl.int32", "tl.int32", lambda kernels, on: _far_apart(kernels)),
    "dw without its mask": (
        "total += tl.where(bits != 0, acc, 0.0)",
        "total += acc",
        _accurate(case("linear", "ragged")),
    ),
    "padding not masked": (
        "& (at_h >= 0) & (at_h < x_height)",
        "& (at_h < x_height)",
        _accurate(case("conv2d", "ragged")),
    ),
    "taps of another phase": (
        "tap_h = first_h + tap // count_w * STEP_H",
        "tap_h = first_h + tap // count_w",
        _accurate(case("conv_transpose2d", "ragged")),
    ),
    "a live tile forgotten": (
        "    tl.store(lives, count)\n\n\n@triton.jit\ndef live_rows",
        "    tl.store(lives, tl.maximum(count - 1, 0))\n\n\n@triton.jit\ndef live_rows",
        _accurate(case("linear", "wide")),
    ),
    "the last word of a tile not looked at": (
        "        inside = (row < rows)[:, None] & (word < last_word)[None, :]",
        "        inside = (row < rows)[:, None] & (word < last_word - 1)[None, :]",
        _accurate(case("linear", "wide")),
    ),
    "a part of a sum forgotten": (
        "    for split in range(splits):",
        "    for split in range(splits - 1):",
        _accurate(Case("cut", "conv2d", (3, 4, 24, 24), (4, 4, 1, 1), (0, 1, 0), 2)),
    ),
    "db of the next group's rows": (
        "        inside = flat < high\n",
        "        inside = flat < high + 1\n",
        _accurate(case("linear", "untied")),
    ),
    "rows written in sorted order": (
        "        target = sample\n    y_row = y + target * y_n + _at(pixel",
        "        target = _at(row, WIDE)\n    y_row = y + target * y_n + _at(pixel",
        _accurate(case("linear", "ragged")),
    ),
    "one weight for all masks": (
        "weights = weight + mask * weight_mask + weight_row",
        "weights = weight + weight_row",
        _accurate(case("linear", "untied")),
    ),
    "a split that overlaps the next": (
        "tl.minimum(low + share, end)",
        "tl.minimum(low + share + 1, end)",
        _accurate(Case("cut", "conv2d", (3, 4, 24, 24), (4, 4, 1, 1), (0, 1, 0), 2)),
    ),
}


@pytest.mark.parametrize("name", PLANTS)
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_a_planted_bug_is_caught(name, tmp_path, on):
    right, wrong, check = PLANTS[name]
    source = interpret.SOURCE.read_text()
    assert source.count(right) == 1, "the plant no longer fits the source"
    path = tmp_path / "kernels.py"
    path.write_text(source.replace(right, wrong))
    with pytest.raises(Exception, match=r"elements are off|lie in no argument|not close"):
        check(interpret.load(path), on)


# ---- what the backend refuses


def _refusal(x: Tensor, monkeypatch: pytest.MonkeyPatch, **state: Any) -> str | None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: state.get("cuda", True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: state.get("capability", (9, 0)))
    return backend.supports("masked_linear", x, x)


def test_it_says_why_it_is_refused(monkeypatch):
    on_gpu = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float16)
    assert _refusal(on_gpu, monkeypatch) is None
    assert "cpu" in _refusal(torch.zeros(1), monkeypatch)
    assert "float64" in _refusal(SimpleNamespace(device=on_gpu.device, dtype=torch.float64), monkeypatch)
    assert "no CUDA device" in _refusal(on_gpu, monkeypatch, cuda=False)
    assert "7.5" in _refusal(on_gpu, monkeypatch, capability=(7, 5))
    monkeypatch.setattr(backend, "_INSTALLED", False)
    assert "not installed" in _refusal(on_gpu, monkeypatch)
