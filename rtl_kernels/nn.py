"""Modules: drop-in twins of linear and convolution layers with K masks, and the conversion of whole models.

A converted model is called through its wrapper, `RoutedModel`, which sorts the batch by mask once and gives every
masked module the same sorted `Route` for the pass. Masked modules and batch norms called on their own take the route as
a second argument, and then give and take rows in the order of the samples.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from . import functional
from .functional import _needs_gradient
from .masks import MaskBank, check_count, has_padding_bits
from .routing import Route
from .shapes import statistics_dtype

__all__ = [
    "FusedModel",
    "MaskedConv2d",
    "MaskedConvTranspose2d",
    "MaskedLinear",
    "RoutedModel",
    "SubsetBatchNorm2d",
    "convert",
    "extract",
    "fuse",
    "untie",
]

Scope = Callable[[str, nn.Module], bool] | Sequence[str] | None


class _Here(threading.local):
    """A thread's own: several may run one model, each with a route of its own."""

    route: Route | None = None


class _Pass:
    """What the modules of one converted model share: the route of the forward pass that is running."""

    def __init__(self) -> None:
        self.route: Route | None = None  # the last that began: what is compiled finds it here
        self.here = _Here()
        # For each optimiser that asks: the groups seen since its last step, bool (K + 1,), −1 first; None: no batch.
        self.seen: dict[int, Tensor | None] = {}

    def enter(self, route: Route | None) -> None:
        """Begin a pass, or end it with None."""
        self.route = route
        if not torch.compiler.is_compiling():
            self.here.route = route

    def running(self) -> Route | None:
        here = None if torch.compiler.is_compiling() else self.here.route
        return self.route if here is None else here

    def __getstate__(self) -> dict[str, Any]:
        return {"seen": self.seen}  # copies and files hold no running pass

    def __setstate__(self, state: dict[str, Any]) -> None:
        _Pass.__init__(self)
        self.seen = state["seen"]

    def record(self, route: Route) -> None:
        if torch.is_grad_enabled():
            for place, seen in self.seen.items():
                self.seen[place] = route.present if seen is None else seen | route.present


class _Routed:
    """A module that finds the route of the running pass; mixed in before its `nn.Module` class."""

    num_masks: int
    _pass: _Pass | None

    def _route(self, route: Route | None) -> Route:
        if route is None and self._pass is not None:
            route = self._pass.running()
        if route is None and torch._C._current_graph_task_id() != -1:
            raise ValueError(
                f"{type(self).__name__} was called in a backward pass, when the forward pass and its route had ended: "
                "where torch.utils.checkpoint is used inside the model, checkpoint the wrapper's whole call instead"
            )
        if route is None:
            raise ValueError(
                f"{type(self).__name__} was called without a route: call the model through the wrapper that "
                "rtl_kernels.nn.convert returned, or pass a Route"
            )
        if not isinstance(route, Route):
            raise TypeError(f"route is a {type(route).__name__}, expected a Route (Route.build(index, num_masks))")
        return route


class _Masked(_Routed):
    """What the three masked layers share: the buffer of mask bits and its bank.

    The buffer `mask_words` is part of the state dict; a state dict without it (a dense model's) loads as all ones.
    """

    weight: Tensor
    bias: Tensor | None
    mask_words: Tensor
    backend: str

    def _init_masks(self, num_masks: int) -> None:
        self.num_masks = num_masks
        self.backend = "auto"
        self._pass = None
        ones = MaskBank.ones(num_masks, self.weight.shape, self.weight.device)
        self._mask_shape = ones.shape
        cast(nn.Module, self).register_buffer("mask_words", ones.words)

    @property
    def untied(self) -> bool:
        """Whether every ticket has a weight of its own: (K, ...) instead of (...)."""
        return self.weight.dim() > len(self._mask_shape)

    @property
    def bank(self) -> MaskBank:
        """The layer's masks. Assign a bank of as many over the same weight to replace them: its bits are copied."""
        return MaskBank.unchecked(self.mask_words, self._mask_shape)

    @bank.setter
    def bank(self, bank: MaskBank) -> None:
        self._check_bank(bank, "bank")
        # Of the layer's own: into a buffer that layers shared, a state dict would load one's masks over another's.
        self.mask_words = bank.words.to(self.mask_words.device).clone(memory_format=torch.contiguous_format)

    def _check_bank(self, bank: MaskBank, name: str) -> None:
        if not isinstance(bank, MaskBank):
            raise TypeError(f"{name} is a {type(bank).__name__}, expected a MaskBank")
        if bank.shape != self._mask_shape or bank.num_masks != self.num_masks:
            raise ValueError(
                f"{name} is {bank.num_masks} masks of {tuple(bank.shape)}, but the layer has {self.num_masks} masks of "
                f"{tuple(self._mask_shape)}"
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if prefix + "mask_words" not in state_dict:
            # Beside the weight that is loaded: with assign=True both are taken as they are.
            weight = state_dict.get(prefix + "weight", self.weight)
            ones = MaskBank.ones(self.num_masks, self._mask_shape, weight.device)
            state_dict[prefix + "mask_words"] = ones.words
        errors: list[str] = args[-1]
        dtype = state_dict[prefix + "mask_words"].dtype
        if dtype != torch.int32:  # of a state dict cast as a whole, say: floats have no room for 32 bits
            errors.append(f"{prefix}mask_words has dtype {dtype}, expected torch.int32")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]
        if self.mask_words.device.type == "cpu" and has_padding_bits(self.mask_words, self._mask_shape):
            errors.append(f"{prefix}mask_words has bits set behind the end of a row, expected zeros there")

    def extra_repr(self) -> str:
        text: str = super().extra_repr()  # type: ignore[misc]
        return f"{text}, num_masks={self.num_masks}" + (", untied" if self.untied else "")


class MaskedLinear(_Masked, nn.Linear):  # type: ignore[misc]
    """`nn.Linear` with K masks over its weight; see `functional.masked_linear` for shapes, dtypes and errors."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, num_masks: int, **factory: Any
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, **factory)
        self._init_masks(num_masks)

    def forward(self, x: Tensor, route: Route | None = None) -> Tensor:
        return functional.linear_rows(x, self.weight, self.bank, self._route(route), self.bias, backend=self.backend)


class MaskedConv2d(_Masked, nn.Conv2d):
    """`nn.Conv2d` with K masks over its weight; see `functional.masked_conv2d` for shapes, dtypes and errors."""

    def __init__(self, *args: Any, num_masks: int, **kwargs: Any) -> None:
        nn.Conv2d.__init__(self, *args, **kwargs)
        self._init_masks(num_masks)

    def forward(self, x: Tensor, route: Route | None = None) -> Tensor:
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return functional.conv2d_rows(
            x,
            self.weight,
            self.bank,
            self._route(route),
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            backend=self.backend,
        )


class MaskedConvTranspose2d(_Masked, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` with K masks over its weight; see `functional.masked_conv_transpose2d`."""

    def __init__(self, *args: Any, num_masks: int, **kwargs: Any) -> None:
        nn.ConvTranspose2d.__init__(self, *args, **kwargs)
        self._init_masks(num_masks)

    def forward(  # type: ignore[override]
        self, x: Tensor, route: Route | Sequence[int] | None = None, output_size: Sequence[int] | None = None
    ) -> Tensor:
        if route is not None and not isinstance(route, Route):  # a converted model's call: torch's second argument
            route, output_size = None, route
        padding = cast(tuple[int, ...], self.padding)
        extra = self._output_padding(
            x,
            None if output_size is None else list(output_size),
            list(self.stride),
            list(padding),
            list(self.kernel_size),
            2,
            list(self.dilation),
        )
        return functional.conv_transpose2d_rows(
            x,
            self.weight,
            self.bank,
            self._route(route),
            self.bias,
            self.stride,
            padding,
            extra,
            self.groups,
            self.dilation,
            backend=self.backend,
        )


class SubsetBatchNorm2d(_Routed, nn.BatchNorm2d):
    """Batch norm that keeps statistics per ticket inside a mixed batch: one mixed pass equals K separate passes.

    Args:
        num_features: channels C.
        num_masks: K.
        per_ticket: statistics (K, C) per ticket; index −1 is refused. Otherwise one set (C,) for the whole batch, as
            `nn.BatchNorm2d`.
        affine_per_ticket: scale and shift (K, C) too (only with per_ticket).
        eps, momentum, affine, track_running_stats: as for `nn.BatchNorm2d`. A momentum of None averages over all
            batches, each ticket counting those it had samples in.

    A dense layer's state dict loads into one that is per ticket: every ticket starts with a copy.
    """

    def __init__(
        self,
        num_features: int,
        num_masks: int,
        *,
        per_ticket: bool = True,
        affine_per_ticket: bool = False,
        **kwargs: Any,
    ) -> None:
        nn.BatchNorm2d.__init__(self, num_features, **kwargs)
        self._init_subsets(num_masks, per_ticket, affine_per_ticket)

    def _init_subsets(self, num_masks: int, per_ticket: bool, affine_per_ticket: bool) -> None:
        if affine_per_ticket and not per_ticket:
            raise ValueError("affine_per_ticket is True with per_ticket=False: expected per_ticket=True")
        check_count("num_masks", num_masks)
        self.num_masks = num_masks
        self.per_ticket = per_ticket
        self.affine_per_ticket = affine_per_ticket
        self._pass = None
        if per_ticket:
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                buffer = getattr(self, name)
                if buffer is not None:
                    setattr(self, name, _replicate(buffer, num_masks))
        if affine_per_ticket:
            self._replicate_affine()

    def _replicate_affine(self) -> None:
        for name in ("weight", "bias"):
            parameter = getattr(self, name)
            if parameter is not None:
                setattr(self, name, _replicate_parameter(parameter, self.num_masks))

    def forward(self, x: Tensor, route: Route | None = None) -> Tensor:
        """x (rows, C, H, W) -> the same shape. Called with a route of its own, x is in the order of the samples.

        Raises:
            TypeError: `route` is no Route, or x of a dtype that the layer does not take.
            ValueError: x is not of four dimensions or has other channels, or the route (only per ticket) is missing, of
                another number of masks or of samples, holds −1, or in training gives a ticket one value a channel.
        """
        if not self.per_ticket:
            own = self.training or self.running_mean is None
            if own and functional.batch_norm_backend(x) != "reference" and x.shape[0] > 0:
                return self._forward_whole(x)
            return super().forward(x)
        self._check_input_dim(x)
        route = self._route(route)
        if route.num_masks != self.num_masks:
            raise ValueError(f"route is for {route.num_masks} masks, but the layer has statistics of {self.num_masks}")
        if route.repeat_for(x) > 1:
            x = x.repeat(route.num_masks, 1, 1, 1)
        y = self._forward_rows(route.arrange(x), route)
        return y if route.all_masks else route.restore(y)

    def _check_input_dim(self, x: Tensor) -> None:
        super()._check_input_dim(x)
        known = self.running_mean if self.weight is None else self.weight
        if known is not None and x.shape[1] != known.shape[-1]:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected (rows, {known.shape[-1]}, height, width)")
        if not x.is_floating_point():
            raise TypeError(f"x has dtype {x.dtype}, expected a floating-point one")
        if self.weight is not None and statistics_dtype(x.dtype) != statistics_dtype(self.weight.dtype):
            raise TypeError(f"weight has dtype {self.weight.dtype}, which does not go with x's, {x.dtype}")

    def _forward_whole(self, x: Tensor) -> Tensor:
        """One set of statistics for the whole batch, as `nn.BatchNorm2d` in training, by the kernels' batch norm."""
        self._check_input_dim(x)
        offsets = torch.tensor([0, 0, x.shape[0]], device=x.device)
        y, mean, variance = _batch_norm(x, self.weight, self.bias, offsets, self.eps)
        if self.training and self.running_mean is not None:
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            with torch.no_grad():
                self.num_batches_tracked += 1
                momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                _average(self.running_mean, mean[0], momentum)
                _average(self.running_var, variance[0], momentum)
        return y

    def _forward_rows(self, x: Tensor, route: Route) -> Tensor:
        if self.training or self.running_mean is None or self.running_var is None:
            _tickets(route)
            y, mean, variance = _batch_norm(x, self.weight, self.bias, route.offsets, self.eps)
            if self.training and self.running_mean is not None:
                self._track(mean, variance, route.present[1:])
            return y
        # With fixed statistics a batch norm is a scale and a shift for each ticket and channel. Half precision is
        # widened: x · scale and shift nearly cancel where a mean is large beside its deviation.
        wide = statistics_dtype(x.dtype)
        scale = torch.rsqrt(self.running_var.to(wide) + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        mean = self.running_mean.to(wide)
        shift = -mean * scale if self.bias is None else torch.addcmul(self.bias.to(wide), mean, scale, value=-1)
        ticket = _tickets(route)
        if functional.batch_norm_backend(x) == "cpu" and not _transformed():
            if _needs_gradient(x, scale, shift):
                return cast(Tensor, functional.apply(_ScaleRows, x, scale, shift, ticket, route.offsets))
            return cast(Tensor, torch.ops.rtl_kernels.cpu_scale_rows(x, scale, shift, route.offsets))
        scale, shift = (p.index_select(0, ticket)[:, :, None, None] for p in (scale, shift))
        return torch.addcmul(shift, x.to(wide), scale).to(x.dtype)

    def _track(self, mean: Tensor, variance: Tensor, present: Tensor) -> None:
        """running ← (1 − momentum) · running + momentum · batch, for the tickets that had samples."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        with torch.no_grad():
            self.num_batches_tracked += present
            weight = present.to(mean.dtype)
            weight *= (
                1 / self.num_batches_tracked.clamp(min=1).to(mean.dtype) if self.momentum is None else self.momentum
            )
            _average(self.running_mean, mean, weight[:, None])
            _average(self.running_var, variance, weight[:, None])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("running_mean", "running_var", "num_batches_tracked", "weight", "bias"):
            ours, theirs = getattr(self, name), state_dict.get(prefix + name)
            if ours is not None and theirs is not None and theirs.dim() == ours.dim() - 1:
                state_dict[prefix + name] = _replicate(theirs, self.num_masks)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_masks={self.num_masks}, per_ticket={self.per_ticket}" + (
            ", affine_per_ticket=True" if self.affine_per_ticket else ""
        )


def _average(running: Tensor, batch: Tensor, weight: Tensor | float) -> None:
    """running ← (1 − weight) · running + weight · batch, in the batch's dtype."""
    if running.dtype == batch.dtype:
        running.lerp_(batch, cast(Any, weight))
    else:
        running.copy_(torch.lerp(running.to(batch.dtype), batch, cast(Any, weight)))


def _tickets(route: Route) -> Tensor:
    """The mask of every row, refused where one has none; on the CPU a route is looked at once."""
    if torch.compiler.is_compiling() or not route.offsets.is_cpu or not route.all_masked:
        index: Tensor = torch.ops.rtl_kernels.refuse_dense(route.index, route.offsets, "per-ticket batch norm")
        route.all_masked = not torch.compiler.is_compiling()
        return index
    return route.index


def _transformed() -> bool:
    """Whether torch traces or transforms what runs, so that it has to be of operators with all their rules."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


class _ScaleRows(torch.autograd.Function):
    """x (rows, C, H, W) · scale + shift (K, C), each row's mask's own."""

    @staticmethod
    def forward(x: Tensor, scale: Tensor, shift: Tensor, ticket: Tensor, offsets: Tensor) -> Tensor:
        return cast(Tensor, torch.ops.rtl_kernels.cpu_scale_rows(x, scale, shift, offsets))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, scale, _, ticket, offsets = inputs
        ctx.save_for_backward(x, scale, ticket, offsets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, ticket, offsets = ctx.saved_tensors
        dx = dscale = dshift = None
        if ctx.needs_input_grad[0]:
            dx = torch.ops.rtl_kernels.cpu_scale_rows(dy, scale, torch.zeros_like(scale), offsets)
        if ctx.needs_input_grad[1]:
            dscale = torch.zeros_like(scale).index_add_(0, ticket, (dy.to(scale.dtype) * x).sum((2, 3)))
        if ctx.needs_input_grad[2]:
            dshift = torch.zeros_like(scale).index_add_(0, ticket, dy.to(scale.dtype).sum((2, 3)))
        return dx, dscale, dshift, None, None


def _batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, offsets: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise every group with its own statistics: y, and per group mean and unbiased variance (K, C)."""
    backend = functional.batch_norm_backend(x)
    if _needs_gradient(x, weight, bias):
        y, mean, variance, _ = functional.apply(_SubsetBatchNorm, x, weight, bias, offsets, eps, backend)
    else:
        forward = functional.raw_operator(f"subset_batch_norm_{backend}")
        y, mean, variance, _ = forward(x, weight, bias, offsets, eps)
    return y, mean, variance


class _SubsetBatchNorm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, offsets: Tensor, eps: float, backend: str
    ) -> Any:
        return functional.raw_operator(f"subset_batch_norm_{backend}")(x, weight, bias, offsets, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, _, offsets, ctx.eps, ctx.backend = inputs
        _, mean, variance, inverse_std = output
        ctx.mark_non_differentiable(mean, variance, inverse_std)
        ctx.save_for_backward(x, weight, offsets, mean, inverse_std)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, offsets, mean, inverse_std = ctx.saved_tensors
        grad = functional.raw_operator(f"subset_batch_norm_{ctx.backend}", "_grad")
        dx, dw, db = grad(dy, x, weight, offsets, mean, inverse_std, ctx.eps)
        return (dx, None, None, None, None, None) if weight is None else (dx, dw, db, None, None, None)


class Wrapper(nn.Module):
    """What is called as `net(x, index)`: gives `net.model`'s masked modules the route of the pass."""

    def __init__(self, model: nn.Module, num_masks: int) -> None:
        super().__init__()
        self.model = model
        self.num_masks = num_masks
        self._pass = _Pass()
        for module in model.modules():
            if isinstance(module, _Routed):
                module._pass = self._pass

    def forward(self, x: Tensor, index: Tensor | Sequence[int] | Route, *args: Any, **kwargs: Any) -> Any:
        """Run the model with a mask for every sample.

        Args:
            x: (B, ...), the model's first argument; the others are passed on as they are.
            index: integers (B,) in −1..K−1 (−1: no mask), or a Route, such as `Route.every(K, B)`.

        Returns:
            What the model returns, dimension 0 of every tensor with a row for each sample back in the samples' order;
            (K, B, ...) for `Route.every`.

        Raises:
            TypeError: x is no tensor.
            ValueError: the index is not for this batch or this number of masks; see also `Route.build`.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x is a {type(x).__name__}, expected a Tensor (batch, ...)")
        # Sorted where the index is: on the CPU its range is checked, before it goes to the device.
        route = index if isinstance(index, Route) else Route.build(index, self.num_masks).to(x.device)
        if route.num_masks != self.num_masks:
            raise ValueError(f"index is a route for {route.num_masks} masks, but the model has {self.num_masks}")
        if x.dim() == 0 or x.shape[0] != route.batch:
            raise ValueError(f"x has shape {tuple(x.shape)}, but index is for {route.batch} samples")
        return self._run(route, x, *args, **kwargs)

    def _run(self, route: Route, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._pass.record(route)
        self._pass.enter(route.sorted())
        try:
            y = self.model(route.arrange(x), *args, **kwargs)
        finally:
            self._pass.enter(None)
        rows = route.rows

        def restore(leaf: Any) -> Any:
            return route.restore(leaf) if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == rows else leaf

        return pytree.tree_map(restore, y)


class RoutedModel(Wrapper):
    """A converted model: `net(x, index)` sends sample b through mask index[b]. Made by `convert`.

    `net.model` is the converted model itself; its parameters keep their names, so a dense state dict loads into it.
    """

    def masked_modules(self) -> dict[str, _Masked]:
        """The masked layers by their names in `net.model`, in its order."""
        return {name: module for name, module in self.model.named_modules() if isinstance(module, _Masked)}

    @property
    def banks(self) -> dict[str, MaskBank]:
        """Every masked layer's bank by name. Assign a mapping of the same names to replace them all."""
        return {name: module.bank for name, module in self.masked_modules().items()}

    @banks.setter
    def banks(self, banks: dict[str, MaskBank]) -> None:
        modules = self.masked_modules()
        if banks.keys() != modules.keys():
            raise ValueError(
                f"banks names the layers {sorted(banks)}, but the model's masked layers are {sorted(modules)}"
            )
        for name, module in modules.items():  # all of them before any is replaced
            module._check_bank(banks[name], f"banks[{name!r}]")
        for name, module in modules.items():
            module.bank = banks[name]


_TWINS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: MaskedLinear,
    nn.Conv2d: MaskedConv2d,
    nn.ConvTranspose2d: MaskedConvTranspose2d,
}
_DENSE = {twin: dense for dense, twin in _TWINS.items()}


def convert(
    model: nn.Module,
    num_masks: int,
    scope: Scope = None,
    batch_norm: str = "shared",
    *,
    affine_per_ticket: bool = False,
) -> RoutedModel:
    """Give a model's linear and convolution layers K masks each, in place, all bits one, and return its wrapper.

    The layers stay the objects they were (parameters, names, hooks, optimisers that hold their parameters): only their
    class changes, to the masked twin.

    Args:
        model: any module. `nn.Linear`, `nn.Conv2d` and `nn.ConvTranspose2d` themselves are converted, not subclasses.
        num_masks: K.
        scope: which layers: a predicate (name, module) over `model.named_modules()`, or globs of names; None: all.
        batch_norm: "shared" or "per_ticket": how each `nn.BatchNorm2d` keeps statistics (`SubsetBatchNorm2d`).
        affine_per_ticket: with "per_ticket", scale and shift per ticket too.

    Raises:
        TypeError: `model` is no module, num_masks no integer, or `scope` a string.
        ValueError: num_masks < 1; nothing to mask is in scope, a glob matches no layer, a layer is masked already, or
            has parametrisations or a shape not yet known; batch_norm is neither, or "per_ticket" where another layer
            than `nn.BatchNorm2d` mixes samples; affine_per_ticket without it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected an nn.Module")
    check_count("num_masks", num_masks)
    if num_masks < 1:
        raise ValueError(f"num_masks is {num_masks}, expected at least 1")
    if batch_norm not in ("shared", "per_ticket"):
        raise ValueError(f"batch_norm is {batch_norm!r}, expected 'shared' or 'per_ticket'")
    if affine_per_ticket and batch_norm != "per_ticket":
        raise ValueError("affine_per_ticket is True with batch_norm='shared', expected 'per_ticket'")
    if isinstance(model, RoutedModel) or any(isinstance(m, _Routed) for m in model.modules()):
        raise ValueError("model is converted already, expected a dense one")
    targets = dict(_in_scope(model, scope))
    if not targets:
        raise ValueError("scope holds no nn.Linear, nn.Conv2d or nn.ConvTranspose2d of the model: nothing to mask")
    norms = [module for module in model.modules() if type(module) is nn.BatchNorm2d]
    for name, module in model.named_modules():
        if batch_norm == "per_ticket" and _mixes_samples(module) and module not in norms:
            raise ValueError(
                f"batch_norm is 'per_ticket', but {name} is a {type(module).__name__}, expected BatchNorm2d, or "
                "batch_norm 'shared'"
            )
    for name, module in targets.items():
        _refuse_unknown(name, module)
    for module in targets.values():
        _mask(module, num_masks)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            # torch's fused path for inference reads the weights itself, past the masks; without this flag it is off.
            module.activation_relu_or_gelu = 0
    for norm in norms:
        norm.__class__ = SubsetBatchNorm2d
        cast(SubsetBatchNorm2d, norm)._init_subsets(num_masks, batch_norm == "per_ticket", affine_per_ticket)
    return RoutedModel(model, num_masks)


def untie(net: RoutedModel) -> RoutedModel:
    """Give every ticket a copy of EVERY parameter, in place: one batched loop then equals K separate trainings.

    Masked layers' weights become (K, ...); linear and convolution layers without masks get all-one masks first; batch
    norms keep statistics, scale and shift per ticket. Optimisers must be made afterwards.

    Raises:
        TypeError: `net` is no `RoutedModel`.
        ValueError: the model has parameters in a module it does not know how to replicate, or is untied already.
    """
    _check_routed(net)
    known = (_Masked, SubsetBatchNorm2d)
    for name, module in net.model.named_modules():
        own = [key for key, _ in module.named_parameters(recurse=False)]
        if own and not isinstance(module, known) and type(module) not in _TWINS:
            raise ValueError(f"{name or 'model'} is a {type(module).__name__} with parameters {own}: cannot be untied")
        if parametrize.is_parametrized(module):
            raise ValueError(f"{name} has parametrisations: cannot be untied")
        if isinstance(module, _Masked) or type(module) in _TWINS:
            for key in ("weight", "bias"):
                if getattr(module, key) is not None and key not in own:
                    raise ValueError(
                        f"{name} computes its {key} anew in every pass (weight_norm, prune): cannot be untied"
                    )
        if _mixes_samples(module) and not isinstance(module, SubsetBatchNorm2d):
            raise ValueError(
                f"{name} is a {type(module).__name__}, which mixes samples of all tickets: cannot be untied"
            )
        if isinstance(module, _Masked) and module.untied:
            raise ValueError(f"{name} is untied already")
    replicas: dict[nn.Parameter, nn.Parameter] = {}  # what layers shared they go on sharing
    for module in net.model.modules():
        if type(module) in _TWINS:
            _mask(module, net.num_masks)
            cast(_Masked, module)._pass = net._pass
        if isinstance(module, _Masked):
            for key in ("weight", "bias"):
                parameter = getattr(module, key)
                if parameter is not None:
                    if parameter not in replicas:
                        replicas[parameter] = _replicate_parameter(parameter, net.num_masks)
                    setattr(module, key, replicas[parameter])
        elif isinstance(module, SubsetBatchNorm2d):
            if module.affine_per_ticket:
                continue
            if module.per_ticket:
                module._replicate_affine()
                module.affine_per_ticket = True
            else:
                module._init_subsets(net.num_masks, True, True)
                module._pass = net._pass
    return net


def extract(net: RoutedModel, ticket: int) -> nn.Module:
    """Ticket `ticket` alone: a plain dense copy of the model, its weights equal to the ticket's bit for bit.

    Masked layers become dense ones that hold m_k ⊙ θ (or m_k ⊙ θ_k), batch norms `nn.BatchNorm2d` with the ticket's
    statistics. The wrapper is left as it is.

    Raises:
        TypeError: `net` is no `RoutedModel`, or `ticket` no integer.
        IndexError: unless 0 <= ticket < K.
    """
    _check_routed(net)
    if not hasattr(ticket, "__index__"):
        raise TypeError(f"ticket is {ticket!r}, expected an integer")
    if not 0 <= ticket < net.num_masks:
        raise IndexError(f"ticket is {ticket}, but there are {net.num_masks} (0..{net.num_masks - 1})")
    model = copy.deepcopy(net).model
    for module in model.modules():
        if isinstance(module, _Masked):
            weight, bias, mask = module.weight, module.bias, module.bank.dense(ticket)
            if module.untied:
                weight, bias = weight[ticket], None if bias is None else bias[ticket]
            masked = torch.where(mask, weight.detach(), 0)
            layer = cast(nn.Module, module)
            for attribute in ("num_masks", "backend", "_pass", "_mask_shape"):
                delattr(layer, attribute)
            del layer._buffers["mask_words"]
            layer.__class__ = _DENSE[type(layer)]
            layer.weight = nn.Parameter(masked, module.weight.requires_grad)
            if bias is not None:
                layer.bias = nn.Parameter(bias.detach().clone(), cast(Tensor, module.bias).requires_grad)
        elif isinstance(module, SubsetBatchNorm2d):
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                if module.per_ticket and getattr(module, name) is not None:
                    setattr(module, name, getattr(module, name)[ticket].clone())
            for name in ("weight", "bias"):
                if module.affine_per_ticket and getattr(module, name) is not None:
                    own = getattr(module, name)
                    setattr(module, name, nn.Parameter(own[ticket].detach().clone(), own.requires_grad))
            for attribute in ("num_masks", "per_ticket", "affine_per_ticket", "_pass"):
                delattr(module, attribute)
            cast(nn.Module, module).__class__ = nn.BatchNorm2d
    return model


def _check_routed(net: object) -> None:
    if not isinstance(net, RoutedModel):
        raise TypeError(f"net is a {type(net).__name__}, expected the RoutedModel that rtl_kernels.nn.convert returns")


def _mask(module: nn.Module, num_masks: int) -> None:
    module.__class__ = _TWINS[type(module)]
    cast(_Masked, module)._init_masks(num_masks)


def _in_scope(model: nn.Module, scope: Scope) -> Iterator[tuple[str, nn.Module]]:
    candidates = [(name, module) for name, module in model.named_modules() if _is_candidate(module)]
    if scope is None or callable(scope):
        yield from ((name, module) for name, module in candidates if scope is None or scope(name, module))
        return
    if isinstance(scope, str):
        raise TypeError(f"scope is {scope!r}, expected a predicate or a list of globs such as [{scope!r}]")
    for glob in scope:
        if not any(fnmatchcase(name, glob) for name, _ in candidates):
            raise ValueError(f"scope holds {glob!r}, which matches no linear or convolution layer of the model")
    yield from ((name, module) for name, module in candidates if any(fnmatchcase(name, glob) for glob in scope))


def _is_candidate(module: nn.Module) -> bool:
    """Whether a layer can be masked, or could if it were not lazy or parametrised (which change its class)."""
    changed = isinstance(module, nn.modules.lazy.LazyModuleMixin) or parametrize.is_parametrized(module)
    return type(module) in _TWINS or (changed and isinstance(module, tuple(_TWINS)))


def _refuse_unknown(name: str, module: nn.Module) -> None:
    if parametrize.is_parametrized(module):
        raise ValueError(f"{name} has parametrisations: remove them before it is masked, or leave it out of scope")
    if isinstance(module.weight, nn.parameter.UninitializedParameter):
        raise ValueError(f"{name} is lazy: run the model once before it is converted")
    if not isinstance(module.weight, nn.Parameter):
        raise ValueError(f"{name} computes its weight anew in every pass (weight_norm, prune): remove that first")


def _mixes_samples(module: nn.Module) -> bool:
    """Whether a layer's result or statistics for one sample depend on the others of its batch."""
    norms = nn.modules.batchnorm
    return isinstance(module, norms._BatchNorm) or (isinstance(module, norms._NormBase) and module.track_running_stats)


def _replicate(tensor: Tensor, times: int) -> Tensor:
    return tensor.expand(times, *tensor.shape).clone()


def _replicate_parameter(parameter: Tensor, times: int) -> nn.Parameter:
    return nn.Parameter(_replicate(parameter.detach(), times), parameter.requires_grad)


from .fuse import FusedModel, fuse  # noqa: E402  (it is made of what stands above)
