"""Raw operators: schemas and batching rules. Shape functions: shapes.py. Mathematics: backends/reference.py.

Each masked operation has three raw operators a backend, named `rtl_kernels::<operation>_<backend>`:

    masked_linear(x, weight, words, offsets, order, repeat, bias)                       -> y
    masked_linear_grad_input(dy, weight, words, offsets, order, repeat)                 -> dx
    masked_linear_grad_weight(dy, x, words, offsets, order, repeat, weight_size, bias)  -> dw, db

and the convolutions likewise, with their geometry behind. A fourth is for inference, and fills y itself:

    masked_linear_into(x, weight, words, offsets, order, repeat, scale, shift, residual, relu, y)

        y ← act(scale · (x through m ⊙ w) + shift + residual)

They know nothing of autograd (functional.py puts it on top)
nor of `Route` and `MaskBank`, only of the tensors these hold. Common arguments:

    weight   (O, ...) shared, or (K, O, ...) untied.
    words    int32 (K, rows, words a row): a bank's bits.
    offsets  int64 (K + 2,): rows [offsets[g], offsets[g + 1]) go through mask g − 1 (g = 0: the dense weight).
    order    row r reads x[order[r]] and writes y[order[r]]; None: row r is sample r.
    repeat   1, or K with order None: row r reads x[r mod B] and writes y[r], and the groups are of B rows each.
    bias     (O,), or (K, O) for untied weights; in a gradient operator whether `db` is wanted (else it is empty).
    padding  of a convolution: top, bottom, left, right.
    scale,   (O,), or (K, O) with one for each mask (rows without a mask are an error then, on the CPU); in the dtype
    shift    that sums are made in; None: 1 and 0.
    residual as y; None: 0.
    relu     whether act is max(0, ·); else it is nothing.
    y        of the result's shape and x's dtype; like x and residual it may be a slice of another tensor's channels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import shapes

__all__ = ["OPERATIONS", "define"]

_GROUPS = "Tensor words, Tensor offsets, Tensor? order, SymInt repeat"
_CONV = "int[2] stride, int[4] padding, int[2] dilation, int groups"
_CONV_TRANSPOSE = "int[2] stride, int[2] padding, int[2] output_padding, int groups, int[2] dilation"

_INTO = "Tensor? scale, Tensor? shift, Tensor? residual, bool relu, Tensor(a!) y"

_SCHEMAS = {
    "masked_linear": f"(Tensor x, Tensor weight, {_GROUPS}, Tensor? bias) -> Tensor",
    "masked_linear_grad_input": f"(Tensor dy, Tensor weight, {_GROUPS}) -> Tensor",
    "masked_linear_grad_weight": f"(Tensor dy, Tensor x, {_GROUPS}, SymInt[] weight_size, bool bias) "
    "-> (Tensor, Tensor)",
    "masked_linear_into": f"(Tensor x, Tensor weight, {_GROUPS}, {_INTO}) -> ()",
}
for _operation, _geometry in (("masked_conv2d", _CONV), ("masked_conv_transpose2d", _CONV_TRANSPOSE)):
    _SCHEMAS |= {
        _operation: f"(Tensor x, Tensor weight, {_GROUPS}, Tensor? bias, {_geometry}) -> Tensor",
        f"{_operation}_grad_input": f"(Tensor dy, Tensor weight, {_GROUPS}, SymInt[] x_size, {_geometry}) -> Tensor",
        f"{_operation}_grad_weight": f"(Tensor dy, Tensor x, {_GROUPS}, SymInt[] weight_size, bool bias, {_geometry}) "
        "-> (Tensor, Tensor)",
        f"{_operation}_into": f"(Tensor x, Tensor weight, {_GROUPS}, {_INTO}, {_geometry}) -> ()",
    }
_SCHEMAS |= {
    "subset_batch_norm": "(Tensor x, Tensor? weight, Tensor? bias, Tensor offsets, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "subset_batch_norm_grad": "(Tensor dy, Tensor x, Tensor? weight, Tensor offsets, Tensor mean, Tensor inverse_std, "
    "float eps) -> (Tensor, Tensor, Tensor)",
}

OPERATIONS = tuple(_SCHEMAS)


def define(
    operation: str,
    backend: str,
    implementation: Callable[..., Any] | None,
    keys: str | Sequence[str],
    *,
    into: bool = True,
) -> Any:
    """Register one backend's implementation of a raw operator under dispatch `keys`; returns the operator.

    Without `implementation` a compiled library has registered it. Of a forward operation the operator that writes into
    y is made besides, unless the backend has one of its own: then `into` is False.
    """
    name = f"rtl_kernels::{operation}_{backend}"
    torch.library.define(name, _SCHEMAS[operation])
    if implementation is not None:
        torch.library.impl(name, keys, implementation)
    torch.library.register_fake(name, getattr(shapes, operation))
    operator = getattr(torch.ops.rtl_kernels, f"{operation}_{backend}").default
    if operation.endswith("_into"):
        return operator
    _register_loop_vmap(name)
    if into and f"{operation}_into" in _SCHEMAS:
        define(f"{operation}_into", backend, _into(operator, -1 if operation == "masked_linear" else 1), keys)
    return operator


# ---- what follows a layer at inference, for backends without a kernel of their own for it


def _into(operator: Callable[..., Tensor], channel: int) -> Callable[..., None]:
    def implementation(
        x: Tensor,
        weight: Tensor,
        words: Tensor,
        offsets: Tensor,
        order: Tensor | None,
        repeat: int,
        scale: Tensor | None,
        shift: Tensor | None,
        residual: Tensor | None,
        relu: bool,
        y: Tensor,
        *geometry: Any,
    ) -> None:
        z = operator(x, weight, words, offsets, order, repeat, None, *geometry).movedim(channel, -1)
        z = z.to(shapes.statistics_dtype(z.dtype))

        def of_rows(parameter: Tensor) -> Tensor:
            if parameter.dim() == 1:
                return parameter
            row = torch.arange(z.shape[0], device=z.device)
            mask = torch.searchsorted(offsets[1:], row, right=True) - 1
            mask = _refuse_dense(mask, offsets, "a scale or shift per mask")
            if order is not None:
                mask = torch.empty_like(mask).index_copy_(0, order, mask)
            return parameter[mask].reshape(z.shape[0], *(1 for _ in z.shape[2:]), z.shape[-1])

        if scale is not None:
            z = z * of_rows(scale)
        if shift is not None:
            z = z + of_rows(shift)
        if residual is not None:
            z = z + residual.movedim(channel, -1)
        y.copy_((torch.relu(z) if relu else z).movedim(-1, channel))

    return implementation


# ---- batching rule


def _register_loop_vmap(name: str) -> None:
    """vmap by a loop over the mapped dimension: a batch of routes or weights has no kernel of its own."""
    operator = getattr(torch.ops.rtl_kernels, name.split("::")[1]).default

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        def at(i: int) -> list[Any]:
            pairs = zip(args, in_dims, strict=True)
            return [arg.select(dim, i) if isinstance(arg, Tensor) and dim is not None else arg for arg, dim in pairs]

        results = [operator(*at(i)) for i in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])

    torch.library.register_vmap(name, rule)


# ---- routes

# The compiled library's counting sort of an index on the CPU, where backends/cpu.py has loaded it.
group_rows: Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]] | None = None


def _route(index: Tensor, num_masks: int) -> tuple[Tensor, Tensor, Tensor]:
    """index (B,) -> order (B,), offsets (K + 2,), sorted index (B,). See `Route.build` for what is checked where."""
    if index.device.type == "cpu" or os.environ.get("RTL_KERNELS_CHECK_INDEX") == "1":
        least, most = index.aminmax() if index.numel() else (0, 0)
        if least < -1 or most >= num_masks:
            outside = index[(index < -1) | (index >= num_masks)]
            raise IndexError(
                f"index holds {int(outside[0])}, but there are {num_masks} masks (0..{num_masks - 1}, or -1 for none)"
            )
    else:
        index = index.clamp(-1, num_masks - 1)
    if group_rows is not None and index.is_cpu:
        return group_rows(index, num_masks)
    ascending, order = torch.sort(index, stable=True)
    bounds = torch.arange(-1, num_masks + 1, device=index.device)
    return order, torch.searchsorted(ascending, bounds), ascending


def _route_fake(index: Tensor, num_masks: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(index), index.new_empty(num_masks + 2), torch.empty_like(index)


def _refuse_dense(index: Tensor, offsets: Tensor, what: str) -> Tensor:
    """A copy of `index` (rows,), refused on the CPU if it holds −1; clamped to 0 elsewhere (no synchronisation)."""
    if offsets.device.type == "cpu" and bool(offsets[1] > 0):
        raise ValueError(f"index holds -1 (no mask), which {what} has no meaning for: expected 0..K-1")
    return index.clamp(min=0)


torch.library.define("rtl_kernels::route", "(Tensor index, int num_masks) -> (Tensor, Tensor, Tensor)")
torch.library.impl("rtl_kernels::route", "CompositeExplicitAutograd", _route)
torch.library.register_fake("rtl_kernels::route", _route_fake)
_register_loop_vmap("rtl_kernels::route")
torch.library.define("rtl_kernels::refuse_dense", "(Tensor index, Tensor offsets, str what) -> Tensor")
torch.library.impl("rtl_kernels::refuse_dense", "CompositeExplicitAutograd", _refuse_dense)
torch.library.register_fake("rtl_kernels::refuse_dense", lambda index, offsets, what: torch.empty_like(index))
_register_loop_vmap("rtl_kernels::refuse_dense")
