"""Algorithm 2: joint retraining of the tickets' shared weights, masks frozen.

θ ← θ0;  M ← max_k M_k, batches of every subset repeated cyclically until all have M
for each epoch:
    for m = 1..M:
        for k = 1..K:
            one gradient step on B_m^k through m_k ⊙ θ, the update masked by m_k
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import torch
from torch import nn

import rtl_kernels as rk
from rtl import checkpoint
from rtl.errors import InputError, expect
from rtl.fit import Batch, Fit, digest, masked_copy, new_optimizer, set_rate, split, step
from rtl.partition import Partition
from rtl.run import Artefact, Run
from rtl.tickets import TicketMasks, TicketNetwork

CHECKPOINT = "checkpoint"  # their name in the run


def retrain(
    model: nn.Module, tickets: TicketMasks, parts: Partition, fit: Fit, run: Run, *, checkpoint_seconds: float = 30.0
) -> TicketNetwork:
    """Algorithm 2. Train the weights all tickets share, from those `model` has now (θ0); nothing flows back to masks.

    Args:
        model: the dense model the tickets were extracted from, at θ0; left as it is.
        tickets: masks at one sparsity; each name has to be one of the subsets of `parts`.
        parts: the subsets D_k.
        fit: training; its schedule says how tickets take turns.
        run: where the result, and a checkpoint every `checkpoint_seconds`, is kept: calling again resumes.

    Returns:
        The network in evaluation mode.

    Raises:
        InputError: the run holds another retraining, a ticket names no subset, masks that are not of this model, a
            mixed batch with no sample for some ticket, or training diverged.
    """
    expect("tickets", tickets, TicketMasks, "masks at one sparsity, such as tickets.at(0.75)")
    expect("parts", parts, Partition, "a Partition, such as rtl.partition.by_label(data)")
    expect("run", run, Run, "rtl.Run(folder)")
    subsets = [parts.position(name) for name in tickets.names]
    recalibrated = fit.batch_norm == "recalibrated"
    net = _converted(model, tickets, "shared" if recalibrated else fit.batch_norm, fit.affine_per_ticket)
    # What the task or the schedule refuses, it refuses before anything is written.
    lengths = [sum(len(index) for _, _, index in batch) for batch in schedule(parts, subsets, fit, torch.Generator())]
    run = run.child(f"retrain/{tickets.sparsity:g}")
    run.configure(
        {
            "fit": fit.described(),
            "tickets": tickets.names,
            "subsets": parts.counts(),
            "data": parts.fingerprint,
            "masks": digest({layer: bank.words for layer, bank in tickets.banks.items()}),
            "theta0": digest(model.state_dict()),
        }
    )

    def train() -> Artefact:
        optimizer = new_optimizer(net, fit)
        info = checkpoint.resume(run, CHECKPOINT, fit.epochs, net, optimizer)[1].info
        samples, seconds, losses = info.get("samples", 0), info.get("seconds", 0.0), list(info.get("losses", []))
        began = saved = time.perf_counter()
        net.train()
        label = f"{len(subsets)} tickets" if len(subsets) > 1 else tickets.names[0]
        with run.track(label, fit.epochs, sum(lengths)) as progress:
            progress.skip(len(losses))
            for epoch in range(len(losses), fit.epochs):
                torch.manual_seed(run.seed_for("retrain", epoch))  # dropout's numbers do not depend on resuming either
                total, steps = torch.zeros(()), 0
                batches = schedule(parts, subsets, fit, run.generator("retrain", *tickets.names, epoch))
                for batch in batches:
                    set_rate(optimizer, fit, (epoch + steps / len(lengths)) / fit.epochs)
                    total += step(net, optimizer, fit, parts, batch)
                    steps += 1
                    samples += sum(len(index) for _, _, index in batch)
                losses.append(float(total) / steps)
                if not math.isfinite(losses[-1]):
                    raise InputError(f"loss is {losses[-1]} after epoch {epoch + 1}: it diverged, use a smaller lr")
                progress.advance(note=f"loss {losses[-1]:.3g}", loss=losses[-1])
                if time.perf_counter() - saved >= checkpoint_seconds and epoch + 1 < fit.epochs:
                    saved = time.perf_counter()
                    info = {"samples": samples, "seconds": seconds + saved - began, "losses": losses}
                    checkpoint.save(run, CHECKPOINT, epoch + 1, net, optimizer, info)
        result = net
        if recalibrated:
            result = _converted(model, tickets, "per_ticket", False)
            result.model.load_state_dict(net.model.state_dict())
            batches = schedule(parts, subsets, fit, run.generator("recalibrate", *tickets.names))
            _recalibrate(result, parts, batches)
            samples += sum(lengths)
        info = {"samples": samples, "seconds": seconds + time.perf_counter() - began, "losses": losses}
        return Artefact(result.model.state_dict(), info)

    done = run.stage("network", train)
    checkpoint.discard(run, CHECKPOINT, fit.epochs)
    if recalibrated:
        net = _converted(model, tickets, "per_ticket", False)
    net.model.load_state_dict(done.tensors)
    net.eval()
    spent = done.info["samples"], done.info["seconds"]
    return TicketNetwork(net, tickets.names, subsets, fit.task.name, tickets.sparsity, *spent)


def schedule(parts: Partition, subsets: list[int], fit: Fit, generator: torch.Generator) -> Iterator[Batch]:
    """One epoch's steps, each a batch of one ticket ("sequential") or of all of them ("mixed", "pooled")."""
    if fit.schedule == "pooled":
        drawn = [fit.task.draw(parts, subset, generator) for subset in subsets]
        owner = torch.cat([torch.full((len(own),), k) for k, own in enumerate(drawn)])
        pool = torch.cat(drawn)
        for chosen in split(torch.randperm(len(pool), generator=generator), fit.batch_size):
            turn = [(k, subset, pool[chosen[owner[chosen] == k]]) for k, subset in enumerate(subsets)]
            yield [one for one in turn if len(one[2])]
        return
    size = fit.share(len(subsets))
    batches = [split(fit.task.draw(parts, subset, generator), size) for subset in subsets]
    for m in range(max(len(own) for own in batches)):
        turn = [(k, subset, batches[k][m % len(batches[k])]) for k, subset in enumerate(subsets)]
        yield from ([one] for one in turn) if fit.schedule == "sequential" else [turn]


def retrained(run: Run, sparsity: float) -> bool:
    """Whether `retrain` into this run at this sparsity would find its result there."""
    return run.child(f"retrain/{sparsity:g}").done("network")


def presented(parts: Partition, subsets: list[int], fit: Fit) -> dict[int, int]:
    """Samples that one epoch of joint retraining presents to each of the subsets."""
    counts = dict.fromkeys(subsets, 0)
    for batch in schedule(parts, subsets, fit, torch.Generator()):
        for _, subset, index in batch:
            counts[subset] += len(index)
    return counts


def _converted(model: nn.Module, tickets: TicketMasks, batch_norm: str, affine_per_ticket: bool) -> rk.nn.RoutedModel:
    net = masked_copy(model, len(tickets.names), batch_norm, affine_per_ticket)
    try:
        net.banks = dict(tickets.banks)
    except ValueError as error:
        raise InputError(f"tickets are not of this model: {error}") from error
    return net


@torch.no_grad()
def _recalibrate(net: rk.nn.RoutedModel, parts: Partition, batches: Iterator[Batch]) -> None:
    """Measure every batch norm's statistics anew, per ticket, as the mean over `batches`; nothing else moves."""
    net.eval()
    norms = [module for module in net.modules() if isinstance(module, rk.nn.SubsetBatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # of torch.nn.BatchNorm2d: a cumulative mean
        norm.train()
    for batch in batches:
        masks = torch.cat([torch.full((len(index),), mask) for mask, _, index in batch])
        net(parts.data.batch(torch.cat([index for _, _, index in batch]))[0], masks)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
