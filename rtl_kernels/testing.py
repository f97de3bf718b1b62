"""What tests of the operators share: a table of cases, the dense computation to compare with, and the tolerance.

The specification of every operator is K separate passes, each of one ticket's samples through a dense masked weight
(`separate_passes`). What a kernel may be wrong by is not a hand-tuned number but the error of that same dense
computation in the same precision:

    |actual − exact| ≤ s · (FACTOR · ω + u_sum) + u_out · |exact|  + tiny           element by element

    exact   the dense passes in float64, from the inputs as the dtype holds them
    s       Σ |terms|: the dense passes in float64 over absolute values
    ω       the largest |same − exact| / s of the dense passes in the dtype itself; for float64, which is as exact as
            what it is compared with, that of float32 times the ratio of their roundings
    u_sum   one rounding of a term in the dtype sums are made in (float32 for half precision)
    u_out   one rounding of the result to its dtype
    tiny    the dtype's smallest subnormal

s makes the bound free of scale: an output of small terms beside large ones is held to its own. Where s is 0, as under
an all-zero mask, the result has to be exactly 0.

A new backend runs the same suite: `for_backends` and `for_devices` parametrise over what there is, `run` skips a call
that the backend's `supports` refuses, with its reason. They need pytest; the rest of this file does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import functional
from .masks import MaskBank
from .routing import Route
from .shapes import statistics_dtype

__all__ = [
    "CASES",
    "DTYPES",
    "FACTOR",
    "Case",
    "Example",
    "Results",
    "assert_accurate",
    "assert_bitwise",
    "assert_matches_separate_passes",
    "for_backends",
    "for_devices",
    "make",
    "run",
    "separate_passes",
    "skip_if_refused",
]

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# A kernel sums in an order of its own, so it may be a little worse than dense PyTorch, which has an order too. Twice is
# what swapping the order of a sum does to its largest error over many outputs; a sum in the wrong dtype, or a term too
# many, is off by orders of magnitude.
FACTOR = 2.0

EVERY = "every"


@dataclass(frozen=True)
class Case:
    """One call of one operator.

    Attributes:
        operation: "linear", "conv2d" or "conv_transpose2d".
        x: the input's shape, batch first.
        weight: the weight's shape, without K.
        index: the mask of each sample, or EVERY.
        num_masks: K.
        density: fraction of weights each mask keeps; 0 and 1 are exact.
        untied: one weight for each mask.
        bias: whether there is one.
        scale: input and weight are multiplied by the dtype's largest number to this power (float64: float32's).
        options: stride, padding, ... as the operator takes them.
    """

    name: str
    operation: str
    x: tuple[int, ...]
    weight: tuple[int, ...]
    index: tuple[int, ...] | str
    num_masks: int
    density: float = 0.5
    untied: bool = False
    bias: bool = True
    scale: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.operation}-{self.name}"


def _cases() -> list[Case]:
    mixed = (2, 0, -1, 3, 2, 2, 0)  # unsorted, repeated, one dense sample, mask 1 without samples
    ticketed = (2, 0, 3, 2, 2, 0)
    cases = []

    def add(
        operation: str, name: str, x: Sequence[int], weight: Sequence[int], index: Any = mixed, **rest: Any
    ) -> None:
        batch = 5 if index == EVERY else len(index)
        rest.setdefault("num_masks", 4)
        cases.append(Case(name, operation, (batch, *x), tuple(weight), index, **rest))

    # name -> what differs, for every operation
    common: dict[str, dict[str, Any]] = {
        "ragged": {},
        "sorted": {"index": (-1, 0, 0, 2, 2, 3)},
        "one-sample": {"index": (1,)},
        "empty-batch": {"index": ()},
        "one-mask": {"index": (0, -1, 0, 0), "num_masks": 1},
        "dense-only": {"index": (-1, -1, -1)},
        "more-masks-than-samples": {"index": (30, 3, 7), "num_masks": 33},
        "all-zero": {"density": 0.0},
        "all-one": {"density": 1.0},
        "sparse": {"density": 0.1},
        "no-bias": {"bias": False},
        "untied": {"index": ticketed, "untied": True},
        "every": {"index": EVERY},
        "every-untied": {"index": EVERY, "untied": True},
        "large": {"scale": 0.3},
        "small": {"scale": -0.3},
    }
    for name, rest in common.items():
        add("linear", name, (37,), (19, 37), **rest)
        add("conv2d", name, (5, 7, 6), (6, 5, 3, 3), options={"padding": 1}, **rest)
        add("conv_transpose2d", name, (5, 4, 3), (5, 6, 3, 3), options={"stride": 2, "padding": 1}, **rest)

    add("linear", "three-dimensions", (3, 12), (7, 12))
    add("linear", "four-dimensions", (2, 3, 12), (7, 12))
    add("linear", "one-word", (32,), (32, 32))
    add("linear", "over-a-word", (33,), (65, 33))
    add("linear", "1x1", (1,), (1, 1))
    add("linear", "one-output", (64,), (1, 64))
    add("linear", "wide", (300,), (70, 300))
    add("linear", "many-samples", (48,), (40, 48), tuple(i % 5 - 1 for i in range(150)))

    add("conv2d", "1x1", (16, 5, 5), (24, 16, 1, 1))
    add("conv2d", "one-pixel", (4, 1, 1), (4, 4, 1, 1))
    add("conv2d", "depthwise", (9, 6, 6), (9, 1, 3, 3), options={"groups": 9, "padding": 1})
    add("conv2d", "depthwise-multiplier", (4, 6, 6), (8, 1, 5, 5), options={"groups": 4, "padding": 2})
    wide = {"groups": 4, "stride": 2, "padding": 1}
    add("conv2d", "depthwise-untied", (4, 6, 6), (8, 1, 3, 3), ticketed, untied=True, options=wide)
    strided = {"groups": 3, "stride": (1, 2), "dilation": (2, 1), "padding": (2, 0)}
    add("conv2d", "depthwise-every", (3, 6, 5), (6, 1, 3, 2), EVERY, options=strided)
    add("conv2d", "grouped", (6, 5, 5), (9, 2, 3, 3), options={"groups": 3})
    add("conv2d", "stride", (3, 9, 8), (5, 3, 3, 3), options={"stride": 2, "padding": 1})
    add("conv2d", "stride-of-one-axis", (2, 9, 8), (3, 2, 3, 3), options={"stride": (1, 2), "padding": 1})
    add("conv2d", "stride-over-kernel", (3, 9, 9), (4, 3, 1, 1), options={"stride": 3})
    add("conv2d", "dilation", (3, 9, 9), (4, 3, 3, 3), options={"dilation": (2, 3), "padding": (2, 3)})
    add("conv2d", "asymmetric-padding", (3, 6, 5), (4, 3, 3, 3), options={"padding": ((0, 1), (2, 1))})
    add("conv2d", "same-even-kernel", (3, 6, 5), (4, 3, 4, 2), options={"padding": "same"})
    add("conv2d", "valid", (3, 6, 5), (4, 3, 3, 3), options={"padding": "valid"})
    add("conv2d", "kernel-over-image", (3, 2, 2), (4, 3, 5, 5), options={"padding": 2})
    add("conv2d", "33-channels", (33, 4, 4), (33, 33, 3, 3), options={"padding": 1})
    add(
        "conv2d",
        "grouped-stride-untied",
        (6, 6, 6),
        (4, 3, 3, 3),
        ticketed,
        untied=True,
        options={"groups": 2, "stride": 2},
    )

    add("conv_transpose2d", "1x1", (16, 3, 3), (16, 8, 1, 1))
    add("conv_transpose2d", "depthwise", (6, 4, 4), (6, 1, 3, 3), options={"groups": 6})
    one = {"groups": 2, "stride": 2, "padding": 1, "output_padding": 1}
    add("conv_transpose2d", "one-output-a-group", (6, 4, 3), (6, 1, 3, 3), options=one)
    add("conv_transpose2d", "one-output-a-group-every", (6, 4, 3), (6, 1, 3, 3), EVERY, options=one)
    add("conv_transpose2d", "one-output-a-group-untied", (6, 4, 3), (6, 1, 3, 3), ticketed, untied=True, options=one)
    add("conv_transpose2d", "grouped", (6, 4, 4), (6, 2, 3, 3), options={"groups": 3, "padding": 1})
    add(
        "conv_transpose2d",
        "output-padding",
        (3, 4, 3),
        (3, 5, 3, 3),
        options={"stride": (2, 3), "output_padding": (1, 2)},
    )
    add("conv_transpose2d", "dilation", (3, 4, 4), (3, 4, 3, 3), options={"dilation": (2, 1), "padding": (2, 0)})
    return cases


CASES: list[Case] = _cases()


@dataclass(frozen=True)
class Example:
    """Tensors for a case: what the public operator takes, and the dense masks and a gradient to start from."""

    case: Case
    x: Tensor
    weight: Tensor
    masks: Tensor
    bank: MaskBank
    route: Route
    bias: Tensor | None
    dy: Tensor

    @property
    def function(self) -> Callable[..., Tensor]:
        function: Callable[..., Tensor] = getattr(functional, f"masked_{self.case.operation}")
        return function


class Results(NamedTuple):
    """An output and its gradients, None where there is nothing to differentiate."""

    y: Tensor
    x: Tensor
    weight: Tensor
    bias: Tensor | None


def make(case: Case, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", seed: int = 0) -> Example:
    """Draw a case's tensors; the same for every device, and rounded from the same numbers for every dtype."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    lead = (case.num_masks,) if case.untied else ()
    out = case.weight[1] * case.options.get("groups", 1) if case.operation == "conv_transpose2d" else case.weight[0]
    scale = torch.finfo(_yardstick(dtype)).max ** case.scale
    x = (draw(*case.x) * scale).to(device, dtype)
    weight = (draw(*lead, *case.weight) * scale).to(device, dtype)
    bias = draw(*lead, out).to(device, dtype) if case.bias else None
    # torch.rand is below 1, so that densities 0 and 1 keep nothing and everything.
    masks = (torch.rand(case.num_masks, *case.weight, generator=generator) < case.density).to(device)
    if case.index == EVERY:
        route = Route.every(case.num_masks, case.x[0], device)
    else:
        assert not isinstance(case.index, str)
        route = Route.build(case.index, case.num_masks).to(device)
    with torch.no_grad():
        probe = _dense(case, x[:1].double(), weight[0].double() if case.untied else weight.double(), None)
    y_shape = (*([case.num_masks] if case.index == EVERY else []), case.x[0], *probe.shape[1:])
    dy = draw(*y_shape).to(device, dtype) if case.x[0] else torch.zeros(y_shape, dtype=dtype, device=device)
    return Example(case, x, weight, masks, MaskBank.from_dense(masks), route, bias, dy)


def run(example: Example, backend: str = "auto") -> Results:
    """The masked operator, forward and backward. Skips the running test if the backend refuses the call."""
    skip_if_refused(example, backend)
    x, weight, bias = _leaves(example.x, example.weight, example.bias)
    y = example.function(x, weight, example.bank, example.route, bias, **example.case.options, backend=backend)
    return _differentiate(y, x, weight, bias, example.dy)


def separate_passes(example: Example, dtype: torch.dtype | None = None, absolute: bool = False) -> Results:
    """The specification: each mask's samples through a dense masked weight in dense PyTorch, and autograd's gradients.

    Args:
        dtype: what to compute in; None: the example's own.
        absolute: of absolute values throughout, which gives Σ |terms| of every element.
    """

    def cast(tensor: Tensor) -> Tensor:
        return (tensor.abs() if absolute else tensor).to(dtype or tensor.dtype)

    case, masks = example.case, example.masks
    x, weight, bias = _leaves(
        cast(example.x), cast(example.weight), None if example.bias is None else cast(example.bias)
    )

    def through(mask: int, rows: Tensor) -> Tensor:
        w = weight[mask] if case.untied else weight
        b = bias[mask] if case.untied and bias is not None else bias
        return _dense(case, rows, w if mask < 0 else w * masks[mask], b)

    if case.index == EVERY:
        y = torch.stack([through(mask, x) for mask in range(case.num_masks)])
    else:
        index = torch.tensor(case.index, dtype=torch.int64, device=x.device)
        y = torch.zeros_like(example.dy, dtype=x.dtype)
        for mask in range(-1, case.num_masks):
            samples = (index == mask).nonzero()[:, 0]
            if len(samples):
                y = y.index_copy(0, samples, through(mask, x[samples]))
    return _differentiate(y, x, weight, bias, cast(example.dy))


def assert_accurate(actual: Tensor, same_precision: Tensor, exact: Tensor, terms: Tensor, name: str = "result") -> None:
    """Fail unless `actual` is as near to `exact` as this file's head says.

    Args:
        actual: what is judged.
        same_precision: the dense computation in actual's dtype; in float32 if that is float64.
        exact: the same in float64.
        terms: Σ |terms| of each element, float64.
    """
    yardstick = _yardstick(actual.dtype)
    assert same_precision.dtype == yardstick, f"same_precision is {same_precision.dtype}, expected {yardstick}"
    assert actual.shape == exact.shape, f"{name} has shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    if not actual.numel():
        return
    info = torch.finfo(actual.dtype)
    unit_sum, unit_out = torch.finfo(statistics_dtype(actual.dtype)).eps, info.eps / 2
    scale = terms.clamp(min=torch.finfo(torch.float64).tiny)
    omega = float(((same_precision.double() - exact).abs() / scale).max()) * info.eps / torch.finfo(yardstick).eps
    assert omega < 1, f"{name}: the dense computation itself is wrong by {omega} of its terms"
    tiny = info.smallest_normal * info.eps
    bound = terms * (FACTOR * omega + unit_sum) + unit_out * exact.abs() + tiny * (terms > 0)
    error = (actual.double() - exact).abs()
    wrong = ~(error <= bound)  # a NaN is wrong
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} elements are off; at {at} {float(actual[at])} for "
            f"{float(exact[at])}, an error of {float(error[at]):.3g} where {float(bound[at]):.3g} is allowed"
        )


def assert_matches_separate_passes(example: Example, actual: Results) -> None:
    """`assert_accurate` for an output and all its gradients."""
    same = separate_passes(example, _yardstick(example.x.dtype))
    exact = separate_passes(example, torch.float64)
    terms = separate_passes(example, torch.float64, absolute=True)
    for name, a, s, e, t in zip(Results._fields, actual, same, exact, terms, strict=True):
        if a is None or s is None or e is None or t is None:
            assert a is e, f"gradient of {name} is {a}, expected {e}"
            continue
        assert a.dtype == example.x.dtype, f"{name} is {a.dtype}, expected {example.x.dtype}"
        assert_accurate(a, s, e, t, "y" if name == "y" else f"gradient of {name}")


def _yardstick(dtype: torch.dtype) -> torch.dtype:
    """What the dense computation runs in whose error is the measure."""
    return torch.float32 if dtype == torch.float64 else dtype


def assert_bitwise(actual: Tensor, expected: Tensor, name: str = "result") -> None:
    """Fail unless two tensors are equal bit by bit: −0 is not 0, and a NaN is itself."""
    assert actual.dtype == expected.dtype, f"{name} is {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{name} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    same = torch.equal(*(t.detach().contiguous().flatten().view(torch.uint8) for t in (actual, expected)))
    difference = (actual.detach().double() - expected.detach().double()).abs()
    assert same, f"{name}: bits differ, by up to {float(difference.max())}"


def for_backends(test: Callable[..., Any]) -> Any:
    """Run a test once for every backend there is, as its argument `backend`."""
    import pytest

    return pytest.mark.parametrize("backend", list(functional.BACKENDS))(test)


def for_devices(test: Callable[..., Any]) -> Any:
    """Run a test on the CPU and, where there is one, on a GPU, as its argument `device`; a skip says there is none."""
    import pytest

    absent = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    return pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[absent, pytest.mark.gpu])])(test)


def skip_if_refused(example: Example, backend: str) -> None:
    try:
        functional.explain(
            example.function,
            example.x,
            example.weight,
            example.bank,
            example.route,
            example.bias,
            **example.case.options,
            backend=backend,
        )
    except ValueError as refusal:
        if backend not in functional.BACKENDS:
            raise
        import pytest

        pytest.skip(str(refusal))


def _dense(case: Case, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    options = dict(case.options)
    if case.operation == "linear":
        return F.linear(x, weight, bias)
    if case.operation == "conv_transpose2d":
        return F.conv_transpose2d(x, weight, bias, **options)
    if isinstance(options.get("padding"), tuple) and isinstance(options["padding"][0], tuple):
        (top, bottom), (left, right) = options.pop("padding")
        x = F.pad(x, (left, right, top, bottom))
    return F.conv2d(x, weight, bias, **options)


def _leaves(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    x, weight = (t.detach().requires_grad_() for t in (x, weight))
    return x, weight, None if bias is None else bias.detach().requires_grad_()


def _differentiate(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor) -> Results:
    inputs = [t for t in (x, weight, bias) if t is not None]
    gradients = (
        [
            torch.zeros_like(t) if g is None else g
            for t, g in zip(inputs, torch.autograd.grad(y, inputs, dy, allow_unused=True), strict=True)
        ]
        if y.requires_grad
        else [torch.zeros_like(t) for t in inputs]
    )
    return Results(y.detach(), gradients[0], gradients[1], gradients[2] if bias is not None else None)
