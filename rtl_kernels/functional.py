"""Masked operators: every sample of a batch through the mask its index names, over one shared weight, with autograd.

    y[b] = op(x[b], m[index[b]] ⊙ θ) + bias

Here stand the checks, the choice of a backend and the derivative; backends/reference.py holds the mathematics. Where no
gradient is needed the raw operator is called directly.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import shapes
from .backends import cpu, cuda, reference, triton
from .masks import MaskBank
from .routing import Route

__all__ = ["BackendWarning", "Explanation", "explain", "masked_conv2d", "masked_conv_transpose2d", "masked_linear"]

# In order of preference: "auto" takes the first that supports the call. The reference supports everything.
BACKENDS: dict[str, ModuleType] = {module.name: module for module in (cuda, triton, cpu, reference)}

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

IntPair = int | Sequence[int]


def masked_linear(
    x: Tensor, weight: Tensor, bank: MaskBank, route: Route, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """y[b] = x[b] @ (weight ⊙ m[index[b]]).T + bias, as `torch.nn.functional.linear` with a mask for every sample.

    Args:
        x: (B, ..., I) in float32, float16, bfloat16 or float64.
        weight: (O, I) shared by all masks, or (K, O, I), one for each (untied).
        bank: K masks over (O, I).
        route: built for the B samples and K masks.
        bias: (O,), or (K, O) for untied weights.
        backend: "auto", or the name of one; a named backend that cannot run the call is an error.

    Returns:
        (B, ..., O) in x's dtype; (K, B, ..., O) for `Route.every`. Sums are made in float32 for half precision.

    Raises:
        TypeError: an argument of another type, or a dtype that is not x's.
        ValueError: shapes, devices or masks that do not fit; index −1 with untied weights (CPU); an unknown backend.
        RuntimeError: a second derivative is asked for.
    """
    return _as_given(linear_rows(x, weight, bank, route, bias, backend=backend), route)


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    bank: MaskBank,
    route: Route,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: str | IntPair | Sequence[Sequence[int]] = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    *,
    backend: str = "auto",
) -> Tensor:
    """y[b] = x[b] ∗ (weight ⊙ m[index[b]]) + bias, as `torch.nn.functional.conv2d` with a mask for every sample.

    Args:
        x: (B, C, H, W).
        weight: (O, C / groups, kh, kw) shared, or (K, O, C / groups, kh, kw) untied.
        bank: K masks over (O, C / groups, kh, kw).
        stride, dilation: an int or (height, width).
        padding: an int, (height, width), ((top, bottom), (left, right)), "valid", or "same" (stride 1).
        groups: divides C and O.

    `route`, `bias`, `backend`, dtypes, result and errors as for `masked_linear`.
    """
    y = conv2d_rows(x, weight, bank, route, bias, stride, padding, dilation, groups, backend=backend)
    return _as_given(y, route)


def masked_conv_transpose2d(
    x: Tensor,
    weight: Tensor,
    bank: MaskBank,
    route: Route,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: IntPair = 0,
    output_padding: IntPair = 0,
    groups: int = 1,
    dilation: IntPair = 1,
    *,
    backend: str = "auto",
) -> Tensor:
    """As `torch.nn.functional.conv_transpose2d` with a mask for every sample.

    Args:
        x: (B, C, H, W).
        weight: (C, O / groups, kh, kw) shared, or (K, C, O / groups, kh, kw) untied.
        bank: K masks over (C, O / groups, kh, kw).
        output_padding: smaller than stride or dilation.

    The other arguments, dtypes, result and errors as for `masked_conv2d`; padding as an int or (height, width).
    """
    y = conv_transpose2d_rows(
        x, weight, bank, route, bias, stride, padding, output_padding, groups, dilation, backend=backend
    )
    return _as_given(y, route)


def _as_given(y: Tensor, route: Route) -> Tensor:
    """The operators put every row back in its sample's place themselves; every-mask rows get their own dimension."""
    return y.unflatten(0, (route.num_masks, route.batch)) if route.all_masks else y


# ---- the same, giving rows: what modules use between a wrapper's sorting and restoring


def linear_rows(
    x: Tensor, weight: Tensor, bank: MaskBank, route: Route, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """`masked_linear` giving (rows, ..., O): what a wrapped model's layers hand to one another."""
    _check_types(x, weight, bank, route, bias, 2)
    x, weight, bias = _autocast(x, weight, bias)
    repeat = _check(x, weight, bank, route, bias, bank.shape[0])
    if x.dim() < 2 or x.shape[-1] != bank.shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (batch, ..., {bank.shape[1]})")
    return _run("masked_linear", x, weight, bank, route, bias, repeat, (), backend)


def conv2d_rows(
    x: Tensor,
    weight: Tensor,
    bank: MaskBank,
    route: Route,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: str | IntPair | Sequence[Sequence[int]] = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    *,
    backend: str = "auto",
) -> Tensor:
    """`masked_conv2d` giving (rows, O, H', W')."""
    _check_types(x, weight, bank, route, bias, 4)
    x, weight, bias = _autocast(x, weight, bias)
    out_channels, in_channels, *kernel = bank.shape
    repeat = _check(x, weight, bank, route, bias, out_channels)
    _check_channels(x, in_channels * groups, groups, out_channels)
    strides, dilations = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    sides = _sides(padding, kernel, strides, dilations)
    if min(shapes.conv_size(x.shape[2:], kernel, strides, sides, dilations)) < 1:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, which with padding {padding} is smaller than the kernel {tuple(kernel)} "
            f"with dilation {dilation}"
        )
    return _run("masked_conv2d", x, weight, bank, route, bias, repeat, (strides, sides, dilations, groups), backend)


def conv_transpose2d_rows(
    x: Tensor,
    weight: Tensor,
    bank: MaskBank,
    route: Route,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: IntPair = 0,
    output_padding: IntPair = 0,
    groups: int = 1,
    dilation: IntPair = 1,
    *,
    backend: str = "auto",
) -> Tensor:
    """`masked_conv_transpose2d` giving (rows, O, H', W')."""
    _check_types(x, weight, bank, route, bias, 4)
    x, weight, bias = _autocast(x, weight, bias)
    in_channels, out_channels, *_ = bank.shape
    repeat = _check(x, weight, bank, route, bias, out_channels * groups)
    _check_channels(x, in_channels, groups, in_channels)
    strides, dilations = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    pads, extra = _pair("padding", padding, 0), _pair("output_padding", output_padding, 0)
    if any(e >= max(s, d) for e, s, d in zip(extra, strides, dilations, strict=True)):
        raise ValueError(
            f"output_padding is {output_padding}, expected less than stride ({stride}) or dilation ({dilation})"
        )
    geometry = (strides, pads, extra, groups, dilations)
    if min(shapes.conv_transpose_size(x.shape[2:], bank.shape[2:], *geometry)) < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}, which with padding {padding} leaves nothing of the output")
    return _run("masked_conv_transpose2d", x, weight, bank, route, bias, repeat, geometry, backend)


# ---- which backend


class BackendWarning(UserWarning):
    """Calls run on a slower backend than this machine could have."""


_warned = False


@dataclass(frozen=True)
class Explanation:
    """Which backend a call runs on, and why each one preferred to it was refused."""

    backend: str
    refused: dict[str, str]

    def __str__(self) -> str:
        reasons = "".join(f"\n  not {name}: {reason}" for name, reason in self.refused.items())
        return f"runs on {self.backend}{reasons}"


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend `function(*args, **kwargs)` runs on and why the others were refused; runs nothing.

    Args:
        function: masked_linear, masked_conv2d or masked_conv_transpose2d; the rest as for the call.

    Raises:
        TypeError: an argument is missing, unknown or of another type.
        ValueError: another function, or a named backend that does not exist or cannot run the call.
    """
    if function not in (masked_linear, masked_conv2d, masked_conv_transpose2d):
        raise ValueError(f"function is {function!r}, expected one of the masked operators of rtl_kernels")
    call = inspect.signature(function).bind(*args, **kwargs).arguments
    x, weight = call["x"], call["weight"]
    _check_types(x, weight, call["bank"], call["route"], call.get("bias"), 2 if function is masked_linear else 4)
    return _choose(function.__name__, x, weight, call.get("backend", "auto"))


def _backend(operation: str, x: Tensor, weight: Tensor, backend: str) -> str:
    """The name `_choose` finds, quickly; warns once if it is the reference for want of the compiled extension."""
    if backend != "auto":
        return _choose(operation, x, weight, backend).backend
    if x.is_cpu and cpu.unavailable is None:  # the others before it take nothing from the CPU
        return cpu.name
    for name, module in BACKENDS.items():  # noqa: B007
        if module.supports(operation, x, weight) is None:
            break
    if name == "reference" and cpu.unavailable is not None and x.is_cpu and not torch.compiler.is_compiling():
        global _warned
        if not _warned:
            _warned = True
            warnings.warn(f"masked operators run on the reference: {cpu.unavailable}", BackendWarning, stacklevel=5)
    return name


def batch_norm_backend(x: Tensor) -> str:
    """The backend that normalises x (rows, C, ...) in training: "cpu" or "reference" (also for planes of one pixel)."""
    compiled = x.is_cpu and x.dim() > 2 and cpu.unavailable is None and x.shape[2:].numel() > 1
    return "cpu" if compiled else "reference"


def _choose(operation: str, x: Tensor, weight: Tensor, backend: str) -> Explanation:
    if backend != "auto":
        if backend not in BACKENDS:
            raise ValueError(f"backend is {backend!r}, expected one of {['auto', *BACKENDS]}")
        reason = BACKENDS[backend].supports(operation, x, weight)
        if reason is not None:
            raise ValueError(f"backend is {backend!r}, which cannot run this {operation}: {reason}")
        return Explanation(backend, {})
    refused: dict[str, str] = {}
    for name, module in BACKENDS.items():
        reason = module.supports(operation, x, weight)
        if reason is None:
            return Explanation(name, refused)
        refused[name] = reason
    raise AssertionError("the reference backend supports every call")


# ---- checks


def _check_types(x: Tensor, weight: Tensor, bank: MaskBank, route: Route, bias: Tensor | None, dims: int) -> None:
    if not (isinstance(x, Tensor) and isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))):
        for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} is a {type(tensor).__name__}, expected a Tensor")
    if not isinstance(bank, MaskBank):
        raise TypeError(f"bank is a {type(bank).__name__}, expected a MaskBank")
    if not isinstance(route, Route):
        raise TypeError(f"route is a {type(route).__name__}, expected a Route (Route.build(index, num_masks))")
    if len(bank.shape) != dims:
        raise ValueError(f"bank is of weights of shape {tuple(bank.shape)}, expected {dims} dimensions")


def _check(x: Tensor, weight: Tensor, bank: MaskBank, route: Route, bias: Tensor | None, out_channels: int) -> int:
    """Everything the operations have in common; returns how often x is repeated."""
    words, shape = bank.words, bank.shape
    masks = words.shape[0]
    untied = weight.shape != shape
    if untied and weight.shape != (masks, *shape):
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, but the bank's masks are of {tuple(shape)}: expected that, "
            f"or ({masks}, ...) before it for untied weights"
        )
    if route.num_masks != masks:
        raise ValueError(f"route is for {route.num_masks} masks, but the bank holds {masks}")
    dtype = x.dtype
    if dtype not in _DTYPES:
        raise TypeError(f"x has dtype {dtype}, expected one of {', '.join(str(d) for d in _DTYPES)}")
    if bias is not None:
        expected = (masks, out_channels) if untied else (out_channels,)
        if bias.shape != expected:
            raise ValueError(f"bias has shape {tuple(bias.shape)}, expected {expected}")
    if weight.dtype != dtype:
        raise TypeError(f"weight has dtype {weight.dtype}, expected x's, {dtype}")
    if bias is not None and bias.dtype != dtype:
        raise TypeError(f"bias has dtype {bias.dtype}, expected x's, {dtype}")
    offsets = route.offsets
    # Where all are on the CPU, asking that is the quickest.
    if not (x.is_cpu and weight.is_cpu and words.is_cpu and offsets.is_cpu and (bias is None or bias.is_cpu)):
        for name, tensor in (("weight", weight), ("bank", words), ("route", offsets), ("bias", bias)):
            if tensor is not None and tensor.device != x.device:
                raise ValueError(f"{name} is on {tensor.device}, expected x's device, {x.device}")
    return route.repeat_for(x)


def _check_channels(x: Tensor, in_channels: int, groups: int, divided: int) -> None:
    if not hasattr(groups, "__index__") or groups < 1 or divided % groups:
        raise ValueError(f"groups is {groups!r}, expected a divisor of the weight's leading dimension {divided}")
    if x.dim() != 4 or x.shape[1] != in_channels:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (batch, {in_channels}, height, width)")


# The numbers of Python and of numpy, as torch takes both; int stands first because asking for the other takes longer.
_INTEGERS: tuple[Any, ...] = (int, Integral)


def _pair(name: str, value: IntPair, least: int) -> list[int]:
    pair = list(value) if isinstance(value, Sequence) else [value, value]
    if len(pair) != 2 or not all(isinstance(v, _INTEGERS) and v >= least for v in pair):
        raise ValueError(f"{name} is {value!r}, expected an integer >= {least} or two (height, width)")
    return pair


def _sides(
    padding: str | IntPair | Sequence[Sequence[int]], kernel: Sequence[int], stride: list[int], dilation: list[int]
) -> list[int]:
    """padding in any of its forms -> [top, bottom, left, right]."""
    if isinstance(padding, str):
        if padding == "valid":
            return [0, 0, 0, 0]
        if padding != "same":
            raise ValueError(f"padding is {padding!r}, expected 'same', 'valid' or integers")
        if stride != [1, 1]:
            raise ValueError(f"padding is 'same' with stride {stride}, expected stride 1")
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [side for t in total for side in (t // 2, t - t // 2)]
    sides = list(padding) if isinstance(padding, Sequence) else [padding, padding]
    pairs: list[list[Any]] = [list(side) if isinstance(side, Sequence) else [side, side] for side in sides]
    flat = [s for pair in pairs for s in pair]
    if [len(pair) for pair in pairs] != [2, 2] or not all(isinstance(s, _INTEGERS) and s >= 0 for s in flat):
        raise ValueError(
            f"padding is {padding}, expected an integer >= 0, (height, width) or ((top, bottom), (left, right))"
        )
    return flat


def _autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Under `torch.autocast`, cast as `F.linear` and `F.conv2d` do: floats but float64 to the autocast dtype."""
    if not torch._C._is_any_autocast_enabled() or not torch.is_autocast_enabled(kind := x.device.type):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(kind)

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor

    return cast(x), cast(weight), None if bias is None else cast(bias)


# ---- the derivative


def _run(
    operation: str,
    x: Tensor,
    weight: Tensor,
    bank: MaskBank,
    route: Route,
    bias: Tensor | None,
    repeat: int,
    geometry: tuple[Any, ...],
    backend: str,
) -> Tensor:
    name = _backend(operation, x, weight, backend)
    if weight.dim() > len(bank.shape) and name == "cpu" and not torch.compiler.is_compiling() and route.offsets[1] > 0:
        # The compiled operator refuses it too, as a RuntimeError: the stable ABI has no other.
        raise ValueError("index holds -1 (no mask), but the weights are untied: expected 0..K-1")
    if _needs_gradient(x, weight, bias):
        y: Tensor = apply(
            _Masked, x, weight, bias, bank.words, route.offsets, route.order, repeat, f"{operation}_{name}", geometry
        )
        return y
    operator = raw_operator(f"{operation}_{name}")
    result: Tensor = operator(x, weight, bank.words, route.offsets, route.order, repeat, bias, *geometry)
    return result


def run_into(
    operation: str,
    x: Tensor,
    weight: Tensor,
    words: Tensor,
    route: Route,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Any,
    relu: bool,
    geometry: tuple[Any, ...],
    room: tuple[int, int] | None,
    buffer: Tensor | None,
    backend: str,
    known: dict[Any, tuple[int, ...]] | None = None,
) -> Tensor:
    """act(scale · (x through its masks) + shift + residual), without gradients: what a fused model's layers call.

    Args:
        operation: "masked_linear", ...; `geometry` is what its raw operator takes.
        words: the bank's; they fit the weight.
        scale, shift: (O,), or (K, O) with one for each mask; None: 1 and 0.
        residual: added, None: nothing; a number, or a tensor of another shape or dtype than the result, by torch
            afterwards.
        relu: whether act is max(0, ·).
        room: the result is channels [room[0], room[0] + O) of a tensor of room[1] channels; that one is returned.
        buffer: that tensor, if another layer made it already.
        known: where the layer keeps the shapes of results by those of inputs that it checked before.

    A row without a mask that meets parameters for each mask is for the caller to refuse.

    Raises:
        TypeError, ValueError: x does not fit the weight or the route.
    """
    x, weight, _ = _autocast(x, weight, None)
    if x.dtype != weight.dtype or x.device != weight.device:
        raise TypeError(f"x is {x.dtype} on {x.device}, expected {weight.dtype} on {weight.device} as the weight")
    if route.num_masks != words.shape[0] or route.offsets.device != x.device:
        raise ValueError(f"route is {route}, expected one for {words.shape[0]} masks on {x.device}")
    repeat = route.repeat_for(x)
    if known is None or torch.compiler.is_compiling():
        size = _into_size(operation, x, weight, repeat, geometry)
    elif (size := known.get((x.shape, repeat), ())) == ():
        if len(known) > 100:
            known.clear()
        size = known[x.shape, repeat] = _into_size(operation, x, weight, repeat, geometry)
    wide = shapes.statistics_dtype(x.dtype)
    if scale is not None and scale.dtype != wide:
        scale = scale.to(wide)
    if shift is not None and shift.dtype != wide:
        shift = shift.to(wide)
    later = None
    if residual is not None and not (
        isinstance(residual, Tensor)
        and residual.shape == size
        and residual.dtype == x.dtype
        and residual.device == x.device
    ):
        residual, later = None, residual
    if room is None:
        y = whole = x.new_empty(size)
    else:
        whole = x.new_empty((size[0], room[1], *size[2:])) if buffer is None else buffer
        y = whole.narrow(1, room[0], size[1])
        if y.shape != size:
            raise ValueError(f"tensors of {tuple(y.shape)} and {tuple(size)} are concatenated along dimension 1")
    operator = raw_operator(f"{operation}_into_{_backend(operation, x, weight, backend)}")
    relu_here = relu and later is None
    operator(x, weight, words, route.offsets, route.order, repeat, scale, shift, residual, relu_here, y, *geometry)
    if later is not None:
        whole = whole + later
        whole = torch.relu(whole) if relu else whole
    return whole


def _into_size(operation: str, x: Tensor, weight: Tensor, repeat: int, geometry: tuple[Any, ...]) -> tuple[int, ...]:
    """The shape of `run_into`'s result. Raises ValueError where x does not fit the weight."""
    channels = weight.shape[-1 if operation == "masked_linear" else -3]
    if operation == "masked_linear":
        fits = x.dim() >= 2 and x.shape[-1] == channels
    else:
        expected = weight.shape[-4] if operation == "masked_conv_transpose2d" else channels * geometry[3]
        fits = x.dim() == 4 and x.shape[1] == expected
    if not fits:
        raise ValueError(f"x has shape {tuple(x.shape)}, which does not fit a weight of {tuple(weight.shape)}")
    size = shapes.result(operation, x, weight, repeat, geometry)
    if len(size) == 4 and min(size[2:]) < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}, which leaves nothing of the output")
    return size


def _needs_gradient(*tensors: Tensor | None) -> bool:
    # A tensor inside torch.func's transforms need not say that it requires a gradient.
    # So does a dual one, whose tangent a raw operator would lose: the Function refuses it in words.
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)`, which outside of transforms looks up its signature for keywords that none of ours has.

    Measured: 20 µs of a call of 32, and a GhostNet's training step makes 95 of them.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


class _Masked(torch.autograd.Function):
    """Any of the masked operations; `operator` is the raw operator's name, to which `_grad_...` is inserted."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        words: Tensor,
        offsets: Tensor,
        order: Tensor | None,
        repeat: int,
        operator: str,
        geometry: tuple[Any, ...],
    ) -> Tensor:
        return raw_operator(operator)(x, weight, words, offsets, order, repeat, bias, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, words, offsets, order, ctx.repeat, ctx.operator, ctx.geometry = inputs
        ctx.save_for_backward(x, weight, words, offsets, order)
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, words, offsets, order = ctx.saved_tensors
        dx = dw = db = None
        groups = (words, offsets, order, ctx.repeat)
        if ctx.needs_input_grad[0]:
            size = () if ctx.operator.startswith("masked_linear") else (x.shape,)
            dx = raw_operator(ctx.operator, "_grad_input")(dy, weight, *groups, *size, *ctx.geometry)
            dx = _once(dx, dy, x, weight)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            bias = bool(ctx.has_bias and ctx.needs_input_grad[2])
            dw, db = raw_operator(ctx.operator, "_grad_weight")(dy, x, *groups, weight.shape, bias, *ctx.geometry)
            dw = _once(dw, dy, x, weight)
            db = _once(db, dy, x, weight) if bias else None
        return dx, dw, db, None, None, None, None, None, None


class _Once(torch.autograd.Function):
    """A first derivative, which depends on the tensors behind it but refuses to be differentiated itself."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, *depends_on: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError("second derivatives of the masked operators are not implemented: differentiate once")


def _once(gradient: Tensor, *depends_on: Tensor) -> Tensor:
    # Gradients are enabled in a backward pass only if a second derivative may follow.
    return _Once.apply(gradient, *depends_on) if torch.is_grad_enabled() else gradient


_operators: dict[tuple[str, str], Any] = {}


def raw_operator(name: str, gradient: str = "") -> Any:
    """The raw operator `<operation>_<backend>`, or its derivative (`_grad_input`, …)."""
    # Looked up once; a trace has to see the lookup itself.
    if torch.compiler.is_compiling():
        return _look_up(name, gradient)
    found = _operators.get((name, gradient))
    if found is None:
        found = _operators[name, gradient] = _look_up(name, gradient)
    return found


def _look_up(name: str, gradient: str) -> Any:
    operation, _, backend = name.rpartition("_")
    return getattr(torch.ops.rtl_kernels, f"{operation}{gradient}_{backend}").default
