"""Algorithm 1: adaptive ticket extraction by iterative magnitude pruning with rewinding, one ticket for each subset.

m_k ← 1 for every k
repeat until every m_k has the target sparsity:
    for each k:
        θ ← θ0
        train f(·; m_k ⊙ θ) for T steps on D_k
        m_k ← m_k without its smallest-magnitude surviving weights
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import rtl_kernels as rk
from rtl.errors import InputError
from rtl.fit import Batch, Fit, digest, masked_copy, new_optimizer, rewind, split, state, step
from rtl.partition import Partition
from rtl.run import Artefact, Run, slug
from rtl.tickets import TicketMasks, Tickets
from rtl.workers import global_seed

Masks = Mapping[str, Tensor]  # one ticket's, by layer: bool of the weight's shape


@dataclass(frozen=True)
class PrunePlan:
    """How sparsity grows, round by round, over all prunable weights of a ticket together.

    Args:
        remove: weights removed a round: a number, or a fraction of those that survive.
        until: the target sparsity. The step that reaches it, or a reported sparsity, is cut short to be exact.
        report_at: sparsities whose masks are kept; None: the target alone.

    Raises:
        InputError: `remove` is neither a count >= 1 nor a fraction in (0, 1), or a sparsity is outside [0, 1).
    """

    remove: int | float = 4096
    until: float = 0.75
    report_at: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.levels:
            raise InputError("report_at is empty, expected one sparsity or more, or None")
        count = isinstance(self.remove, int)
        if (count and self.remove < 1) or (not count and not 0 < self.remove < 1):
            raise InputError(
                f"remove is {self.remove}, expected a number of weights (1 or more) or a fraction in (0, 1)"
            )
        for name, values in (("until", [self.until]), ("report_at", self.levels)):
            for value in values:
                if not 0 <= value < 1:
                    raise InputError(f"{name} is {value}, expected a sparsity in [0, 1)")
        if max(self.levels) > self.until:
            raise InputError(f"report_at holds {max(self.levels)}, which is beyond until ({self.until})")

    @property
    def levels(self) -> tuple[float, ...]:
        """The reported sparsities, ascending."""
        return (self.until,) if self.report_at is None else tuple(sorted(set(self.report_at)))

    def rounds(self, prunable: int) -> list[int]:
        """Weights each ticket keeps after each round, of `prunable`. Raises InputError if that leaves none."""
        kept, rounds = prunable, []
        for target in (kept_at(prunable, level) for level in sorted({*self.levels, self.until})):
            while kept > target:
                removed = self.remove if isinstance(self.remove, int) else max(1, round(self.remove * kept))
                kept = max(target, kept - removed)
                rounds.append(kept)
        if kept == 0:
            raise InputError(f"until is {self.until}, which leaves none of {prunable} weights: expected less")
        return rounds


def kept_at(prunable: int, sparsity: float) -> int:
    """Weights a ticket of this sparsity keeps."""
    return prunable - round(sparsity * prunable)


def extract(
    model: nn.Module, parts: Partition, plan: PrunePlan, fit: Fit, run: Run, *, batched: bool = False
) -> Tickets:
    """Algorithm 1. Extract one ticket for each subset of `parts`, all from the weights `model` has now (θ0).

    Args:
        model: a dense model, left as it is. `model.prunable(name, module)` says what may be pruned (default: all linear
            and convolution layers).
        parts: the subsets D_k.
        plan: how sparsity grows.
        fit: one round's training; its schedule does not matter here.
        run: where rounds are kept: calling again with the same arguments resumes.
        batched: train all tickets in one batch through untied weights, in this process, instead of one at a time in
            `run.workers` processes. Masks agree up to rounding. For GPUs and very small models.

    Raises:
        InputError: nothing to prune, the run holds another extraction, training diverged, or `batched` with subsets
            whose epochs have different numbers of batches (one optimiser counts the steps of all).
    """
    extraction = Extraction(model, parts, plan, fit, run, batched=batched)
    if batched:
        _extract_batched(extraction)
    else:
        extract_all([extraction], run)
    return extraction.tickets()


class Extraction:
    """One prepared extraction, checked and bound to its run; arguments and errors as for `extract`."""

    def __init__(
        self, model: nn.Module, parts: Partition, plan: PrunePlan, fit: Fit, run: Run, *, batched: bool = False
    ) -> None:
        net = masked_copy(model, 1, "shared")
        self.ones = net.banks
        self.prunable = sum(bank.shape.numel() for bank in self.ones.values())
        self.rounds = plan.rounds(self.prunable)
        # What the task refuses, it refuses before anything is written.
        epoch = [split(fit.task.draw(parts, k, torch.Generator()), fit.batch_size) for k in range(len(parts))]
        if batched:
            _side_by_side(parts, epoch)
        self.model, self.parts, self.plan, self.fit = model, parts, plan, fit
        self.run = run.child("extract")
        self.run.configure(
            {
                "plan": plan,
                "fit": fit.described(),
                "subsets": parts.counts(),
                "data": parts.fingerprint,
                "theta0": digest(model.state_dict()),
                "batched": batched,
            }
        )

    def key(self, ticket: int, number: int) -> str:
        """Where round `number` of a ticket is kept."""
        return f"{slug(self.parts.names[ticket])}/round-{number:03d}"

    def unfinished(self) -> list[int]:
        """Tickets with rounds left to do."""
        rounds = range(len(self.rounds))
        return [k for k in range(len(self.parts)) if not all(self.run.done(self.key(k, number)) for number in rounds)]

    def tickets(self) -> Tickets:
        """The finished masks at every reported sparsity."""
        levels, samples, seconds = {}, {}, {}
        for level in self.plan.levels:
            kept = kept_at(self.prunable, level)
            last = 0 if kept == self.prunable else self.rounds.index(kept) + 1
            done = [[self.run.load(self.key(k, number)) for number in range(last)] for k in range(len(self.parts))]
            banks = {}
            for layer, one in self.ones.items():
                words = [history[-1].tensors[layer] if history else one.words for history in done]
                banks[layer] = rk.MaskBank(torch.cat(words), one.shape)
            levels[level] = TicketMasks(self.parts.names, level, banks)
            samples[level] = sum(stage.info["samples"] for history in done for stage in history)
            seconds[level] = sum(stage.info["seconds"] for history in done for stage in history)
        return Tickets(self.parts.names, levels, self.prunable, samples, seconds)


def extract_all(extractions: Sequence[Extraction], run: Run) -> None:
    """Bring several extractions to their end, all their tickets handed to the same workers."""
    jobs = [(number, ticket) for number, extraction in enumerate(extractions) for ticket in extraction.unfinished()]
    run.map(functools.partial(_extract_ticket, extractions), jobs, label="extract")


def _extract_ticket(extractions: Sequence[Extraction], _: Run, job: tuple[int, int]) -> None:
    """Algorithm 1 for one k: the subsets are independent of one another within a round, and so over all rounds."""
    extraction, ticket = extractions[job[0]], job[1]
    run, fit, parts = extraction.run, extraction.fit, extraction.parts
    net = masked_copy(extraction.model, 1, "shared")
    theta0, rounds, name = state(net), extraction.rounds, parts.names[ticket]
    with run.track(name, len(rounds) * fit.epochs) as progress:
        for number, keep in enumerate(rounds):

            def one_round(number: int = number, keep: int = keep) -> Artefact:
                began, samples, loss = time.perf_counter(), 0, 0.0
                rewind(net, theta0)  # θ ← θ0
                optimizer, generator = new_optimizer(net, fit), run.generator("extract", name, number)
                net.train()
                for _ in range(fit.epochs):  # train f(·; m_k ⊙ θ) on D_k
                    order = fit.task.draw(parts, ticket, generator)
                    for index in split(order, fit.batch_size):
                        loss = float(step(net, optimizer, fit.task, parts, [(0, ticket, index)]))
                    samples += len(order)
                    progress.advance(note=f"round {number + 1} of {len(rounds)}, loss {loss:.3g}")
                weights = {layer: module.weight.detach() for layer, module in net.masked_modules().items()}
                masks = prune(weights, {layer: bank.dense(0) for layer, bank in net.banks.items()}, keep)
                return _artefact(masks, keep, samples, loss, time.perf_counter() - began)

            if run.done(extraction.key(ticket, number)):
                progress.advance(fit.epochs)
            artefact = run.stage(extraction.key(ticket, number), one_round)
            net.banks = {layer: rk.MaskBank(artefact.tensors[layer], bank.shape) for layer, bank in net.banks.items()}


def _extract_batched(extraction: Extraction) -> None:
    """Algorithm 1 for all k at once: one batch holds a batch of every subset, and every ticket has its own weights."""
    run, fit, parts = extraction.run, extraction.fit, extraction.parts
    net = rk.nn.untie(masked_copy(extraction.model, len(parts), "per_ticket", True))
    theta0, rounds, tickets = state(net), extraction.rounds, range(len(parts))
    with run.track("all tickets", len(rounds) * fit.epochs) as progress:
        for number, keep in enumerate(rounds):
            if all(run.done(extraction.key(ticket, number)) for ticket in tickets):
                progress.advance(fit.epochs)
            else:
                began, samples, loss = time.perf_counter(), [0] * len(parts), 0.0
                rewind(net, theta0)
                optimizer = new_optimizer(net, fit)
                generators = [run.generator("extract", name, number) for name in parts.names]
                net.train()
                with global_seed(run.seed_for("extract", number)):  # dropout's numbers do not depend on resuming
                    for _ in range(fit.epochs):
                        orders = [fit.task.draw(parts, ticket, generators[ticket]) for ticket in tickets]
                        for batch in _side_by_side(parts, [split(order, fit.batch_size) for order in orders]):
                            loss = float(step(net, optimizer, fit.task, parts, batch))
                        samples = [n + len(order) for n, order in zip(samples, orders, strict=True)]
                        progress.advance(note=f"round {number + 1} of {len(rounds)}, loss {loss:.3g}")
                seconds = (time.perf_counter() - began) / len(parts)
                for ticket in tickets:
                    weights = {layer: m.weight.detach()[ticket] for layer, m in net.masked_modules().items()}
                    masks = prune(weights, {layer: bank.dense(ticket) for layer, bank in net.banks.items()}, keep)
                    artefact = _artefact(masks, keep, samples[ticket], loss, seconds)
                    run.save(extraction.key(ticket, number), artefact)
            loaded = [run.load(extraction.key(ticket, number)).tensors for ticket in tickets]
            net.banks = {
                layer: rk.MaskBank(torch.cat([words[layer] for words in loaded]), bank.shape)
                for layer, bank in net.banks.items()
            }


def _side_by_side(parts: Partition, batches: Sequence[Sequence[Tensor]]) -> list[Batch]:
    counts = {name: len(own) for name, own in zip(parts.names, batches, strict=True)}
    if len(set(counts.values())) != 1:
        raise InputError(
            f"batched is True, but the subsets' epochs have different numbers of batches ({counts}): extract one "
            "ticket at a time (batched=False)"
        )
    return [[(k, k, index) for k, index in enumerate(row)] for row in zip(*batches, strict=True)]


def prune(weights: Masks, masks: Masks, keep: int) -> Masks:
    """The masks without their smallest-magnitude weights, over all layers together, so that `keep` weights survive.

    Args:
        weights: by layer, any float dtype.
        masks: by layer, bool: what survives now, at least `keep` weights.

    Returns:
        New masks, nested in the old ones. Of equal magnitudes the one that comes first, in the order of layers and
        positions, stays.

    Raises:
        InputError: a weight is not finite, or fewer than `keep` survive.
    """
    magnitude = torch.cat([weights[layer].abs().flatten() for layer in masks])
    alive = torch.cat([mask.flatten() for mask in masks.values()])
    if not bool(magnitude[alive].isfinite().all()):
        raise InputError("weights are not finite after training: it diverged, use a smaller lr")
    if int(alive.sum()) < keep:
        raise InputError(f"keep is {keep}, but only {int(alive.sum())} weights survive")
    ranked = magnitude.masked_fill(~alive, -1).sort(descending=True, stable=True).indices
    survivors = torch.zeros_like(alive).index_fill_(0, ranked[:keep], True)
    parts = survivors.split([mask.numel() for mask in masks.values()])
    return {layer: part.view(mask.shape) for (layer, mask), part in zip(masks.items(), parts, strict=True)}


def _artefact(masks: Masks, kept: int, samples: int, loss: float, seconds: float) -> Artefact:
    words = {layer: rk.MaskBank.from_dense(mask[None]).words for layer, mask in masks.items()}
    return Artefact(words, {"kept": kept, "samples": samples, "loss": loss, "seconds": seconds})
