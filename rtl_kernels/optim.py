"""Optimiser steps that leave pruned weights, and what the optimiser keeps of them, exactly where they were.

A zero gradient is not enough: momentum, weight decay and Adam's running moments move a weight under it. So the UPDATE
is masked: whatever the optimiser did to weights outside the batch's masks is undone, in the parameter and in every
tensor of its state.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

from .masks import MaskBank
from .nn import RoutedModel, SubsetBatchNorm2d, _Masked

__all__ = ["masked_step"]


def masked_step(optimizer: torch.optim.Optimizer, model: RoutedModel) -> torch.optim.Optimizer:
    """Make `optimizer.step()` leave what is outside the batch's masks, and its state, as it was, to the last bit.

    A weight may move if the mask of a sample seen since the last step keeps it (every weight, if a sample had index
    −1). Untied parameters of tickets without samples stay too. Parameters without masks move as they always do.

    Args:
        optimizer: any `torch.optim` optimiser over the model's parameters. It is given hooks and returned, so that
            schedulers and gradient scalers work as before. A model may have several.
        model: the wrapper `convert` returned; call this after `untie`.

    Raises:
        TypeError: `model` is not a wrapper.
        ValueError: the optimiser holds no masked weight of the model, or masks its step already. Its `step` refuses a
            closure, as what may move has to be known before it runs.
    """
    if not isinstance(model, RoutedModel):
        raise TypeError(f"model is a {type(model).__name__}, expected the wrapper that rtl_kernels.nn.convert returned")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(module.weight) in held for module in model.masked_modules().values()):
        raise ValueError("optimizer holds no masked weight of the model: make it from model.parameters() after convert")
    # A second pair of hooks would save what the first has set to zero, and put that back.
    hooks = optimizer._optimizer_step_pre_hooks.values()
    if any(isinstance(getattr(hook, "__self__", None), _MaskedStep) for hook in hooks):
        raise ValueError("optimizer was given to masked_step before, expected one call for an optimiser")
    step = _MaskedStep(model)
    optimizer.register_step_pre_hook(step.before)
    optimizer.register_step_post_hook(step.after)
    weakref.finalize(optimizer, model._pass.seen.pop, step.place)
    return optimizer


class _MaskedStep:
    def __init__(self, model: RoutedModel) -> None:
        self.model = model
        seen = model._pass.seen
        self.place = next(place for place in itertools.count() if place not in seen)
        seen[self.place] = None
        self.saved: list[tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]] = []
        # What `_frozen` gave for a set of groups, while the layers' bits and weights are those it was computed from.
        self.known: dict[tuple[bool, ...], dict[Tensor, Tensor]] = {}
        self.computed_from: list[tuple[Tensor, Tensor]] = []

    def before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.saved = []
        if len(args) > 1 or kwargs.get("closure") is not None:
            raise ValueError("closure is given, but a masked step has to know its batch before it: expected none")
        held = {p for group in optimizer.param_groups for p in group["params"]}
        with torch.no_grad():
            for parameter, frozen in self._frozen().items():
                if parameter.grad is None or parameter not in held:
                    continue
                state = {
                    key: value.clone()
                    for key, value in optimizer.state.get(parameter, {}).items()
                    if isinstance(value, Tensor) and value.shape == parameter.shape
                }
                self.saved.append((parameter, frozen, parameter.clone(), state))
                if not state:  # what this step may create has to come out as it starts: as if both were zero
                    parameter.masked_fill_(frozen, 0)
                    parameter.grad.masked_fill_(frozen, 0)

    def after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        with torch.no_grad():
            for parameter, frozen, value, state in self.saved:
                torch.where(frozen, value, parameter, out=parameter)
                for key, old in state.items():
                    new = optimizer.state[parameter][key]
                    torch.where(frozen, old, new, out=new)
        self.saved = []
        self.model._pass.seen[self.place] = None

    def _frozen(self) -> dict[Tensor, Tensor]:
        """For each parameter with masks a bool tensor of its shape: True where it must not move."""
        present = self.model._pass.seen[self.place]
        if present is None:  # no batch since the last step
            present = torch.zeros(self.model.num_masks + 1, dtype=torch.bool)
        layers = list(self.model.masked_modules().values())
        if not present.is_cpu or not all(layer.mask_words.is_cpu for layer in layers):  # looking would synchronise
            return self._compute_frozen(present)
        # Bits are compared, not versions, which neither `.data` nor NumPy counts up: 1/32 of a weight's bytes.
        if len(layers) != len(self.computed_from) or not all(
            layer.weight is weight and torch.equal(layer.mask_words, words)
            for layer, (words, weight) in zip(layers, self.computed_from, strict=True)
        ):
            self.known = {}
            self.computed_from = [(layer.mask_words.clone(), layer.weight) for layer in layers]
        groups = tuple(present.tolist())
        if groups not in self.known:
            # In turn, K sets of groups come by; no more are kept than that, nor more than 64 MiB of bits as bytes.
            size = sum(layer.weight.numel() for layer in layers)
            while self.known and len(self.known) >= min(self.model.num_masks + 1, max(1, 2**26 // max(1, size))):
                del self.known[next(iter(self.known))]
            self.known[groups] = self._compute_frozen(present)
        return self.known[groups]

    def _compute_frozen(self, present: Tensor) -> dict[Tensor, Tensor]:
        frozen: dict[Tensor, Tensor] = {}
        for module in self.model.model.modules():
            pairs: list[tuple[Tensor, Tensor]] = []
            if isinstance(module, _Masked):
                pairs = _frozen_masked(module, present.to(module.weight.device))
            elif isinstance(module, SubsetBatchNorm2d) and module.affine_per_ticket:
                pairs = [(p, _absent(p, present.to(p.device))) for p in (module.weight, module.bias) if p is not None]
            for parameter, still in pairs:  # a parameter of two layers moves where either's masks keep it
                frozen[parameter] = frozen[parameter] & still if parameter in frozen else still
        return frozen


def _absent(parameter: Tensor, present: Tensor) -> Tensor:
    """Everything of the tickets without samples, for a parameter (K, ...)."""
    return ~present[1:].view(-1, *[1] * (parameter.dim() - 1)).expand(parameter.shape)


def _frozen_masked(module: _Masked, present: Tensor) -> list[tuple[Tensor, Tensor]]:
    bank = module.bank
    words = bank.words.masked_fill(~present[1:, None, None], 0)
    if module.untied:
        kept = MaskBank(words, bank.shape).to_dense()
        bias = [] if module.bias is None else [(module.bias, _absent(module.bias, present))]
        return [(module.weight, ~kept), *bias]
    kept = MaskBank(words, bank.shape).union().dense(0)
    return [(module.weight, ~(kept | present[0]))]
