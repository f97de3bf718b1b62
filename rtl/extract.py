"""Algorithm 1: adaptive ticket extraction by iterative magnitude pruning with rewinding, one ticket for each subset.

m_k ← 1 for every k
repeat until every m_k has the target sparsity:
    for each k:
        θ ← θ0
        train f(·; m_k ⊙ θ) for T steps on D_k
        m_k ← m_k without its smallest-magnitude surviving weights

Similarity between the tickets is followed over the rounds, and a `CollapseWarning` given where it says that they
collapse (`rtl.collapse`); on request they stop there.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import rtl_kernels as rk
from rtl import checkpoint
from rtl.collapse import Alarm, CollapseWarning, alarms
from rtl.curve import Curve
from rtl.errors import InputError, expect
from rtl.fit import Batch, Fit, digest, masked_copy, new_optimizer, rewind, set_rate, split, state, step
from rtl.partition import Partition
from rtl.run import Artefact, Run, slug
from rtl.tickets import TicketMasks, Tickets
from rtl.workers import global_seed

SCOPES = ("global", "layer")
TRAINED = ("masked", "dense")

CHECKPOINT_SECONDS = 120.0  # of a round that is killed so much is done again, or the epoch it was in

THETA = "theta/"  # before the names of weights in a round's artefact, beside the masks' words by layer

Masks = Mapping[str, Tensor]  # one ticket's, by layer: bool of the weight's shape
Banks = dict[str, rk.MaskBank]  # by layer


@dataclass(frozen=True)
class PrunePlan:
    """How sparsity grows, round by round, over all prunable weights of a ticket together.

    Args:
        remove: weights removed a round: a number, or a fraction of those that survive.
        until: the target sparsity. The step that reaches it, or a reported sparsity, is cut short to be exact.
        report_at: sparsities whose masks are kept; None: the target alone.
        stop_on_collapse: stop a ticket at its collapse alarm (`rtl.collapse`): levels beyond keep its last good masks.
            Tickets then wait for one another after every round.
        scope: "global": the smallest weights of all layers together go; "layer": of every layer the same share.
        trained: what a round trains: the "masked" network f(·; m_k ⊙ θ), or the "dense" one f(·; θ), of whose weights
            only the surviving ones are then compared.

    Raises:
        InputError: `remove` is neither a count >= 1 nor a fraction in (0, 1), a sparsity is outside [0, 1), or another
            value is none of the above.
    """

    remove: int | float = 4096
    until: float = 0.75
    report_at: tuple[float, ...] | None = None
    stop_on_collapse: bool = False
    scope: str = "global"
    trained: str = "masked"

    def __post_init__(self) -> None:
        if isinstance(self.report_at, int | float):
            raise InputError(f"report_at is {self.report_at}, expected a tuple, ({self.report_at},), or None")
        if not self.levels:
            raise InputError("report_at is empty, expected one sparsity or more, or None")
        count = isinstance(self.remove, int)
        if (count and self.remove < 1) or (not count and not 0 < self.remove < 1):
            raise InputError(
                f"remove is {self.remove}, expected a number of weights (1 or more) or a fraction in (0, 1)"
            )
        for name, known in (("scope", SCOPES), ("trained", TRAINED)):
            if getattr(self, name) not in known:
                raise InputError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")
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
        run: where rounds are kept, and every `CHECKPOINT_SECONDS` what a round has reached (unless batched): calling
            again with the same arguments resumes.
        batched: train all tickets in one batch through untied weights, in this process, instead of one at a time in
            `run.workers` processes. Masks agree up to rounding. For very small models.

    Warns:
        CollapseWarning: similarity between the tickets says that some collapse (`rtl.diagnose(tickets).alarms`).

    Raises:
        InputError: nothing to prune, the run holds another extraction, training diverged, or `batched` with subsets
            whose epochs have different numbers of batches (one optimiser counts the steps of all).
    """
    extraction = Extraction(model, parts, plan, fit, run, batched=batched)
    if batched:
        _extract_batched(extraction)
        extraction.warn(3)
    else:
        extract_all([extraction], run)
    return extraction.tickets()


class Extraction:
    """One prepared extraction, checked and bound to its run; arguments and errors as for `extract`."""

    def __init__(
        self, model: nn.Module, parts: Partition, plan: PrunePlan, fit: Fit, run: Run, *, batched: bool = False
    ) -> None:
        expect("parts", parts, Partition, "a Partition, such as rtl.partition.by_label(data)")
        expect("run", run, Run, "rtl.Run(folder)")
        net = masked_copy(model, 1, "shared")
        self.ones = net.banks
        self.prunable = sum(bank.shape.numel() for bank in self.ones.values())
        self.rounds = plan.rounds(self.prunable)
        self.reported = {kept_at(self.prunable, level) for level in plan.levels}
        # What the task refuses, it refuses before anything is written.
        drawn = {k: fit.task.draw(parts, k, torch.Generator()) for k in range(len(parts))}
        if batched:
            _side_by_side(parts, {k: split(order, fit.batch_size) for k, order in drawn.items()})
        self.epoch_samples = [len(order) for order in drawn.values()]  # of each ticket
        self.model, self.parts, self.plan, self.fit = model, parts, plan, fit
        self.run = run.child("extract")
        self.run.configure(
            {
                "plan": plan,
                "fit": fit.described_for_extraction(),
                "subsets": parts.counts(),
                "data": parts.fingerprint,
                "theta0": digest(model.state_dict()),
                "batched": batched,
            }
        )
        if not self.run.done("about"):  # for whoever follows the run from outside
            self.run.save("about", Artefact(info={"prunable": self.prunable, "rounds": self.rounds}))

    def key(self, ticket: int, number: int) -> str:
        """Where round `number` of a ticket is kept."""
        return f"{slug(self.parts.names[ticket])}/round-{number:03d}"

    def unfinished(self) -> list[int]:
        """Tickets with rounds left to do."""
        rounds = range(len(self.rounds))
        return [k for k in range(len(self.parts)) if not all(self.run.done(self.key(k, number)) for number in rounds)]

    def history(self) -> list[list[Artefact]]:
        """Every ticket's finished rounds, as many as all have that were not stopped."""
        histories: list[list[Artefact]] = []
        for k in range(len(self.parts)):
            count = 0
            while count < len(self.rounds) and self.run.done(self.key(k, count)):
                count += 1
            histories.append([self.run.load(self.key(k, number)) for number in range(count)])
        return histories

    def curve(self, histories: Sequence[Sequence[Artefact]]) -> Curve:
        """What the tickets share after each round; a ticket that has fewer rounds keeps its last masks."""
        return Curve.of(
            self.parts.names,
            [
                self._banks([own[min(number, len(own) - 1)] for own in histories])
                for number in range(max(map(len, histories)))
            ],
        )

    def stopped(self, histories: Sequence[Sequence[Artefact]]) -> dict[str, Alarm]:
        """The tickets that are to stop, by name."""
        if not self.plan.stop_on_collapse or not any(histories):
            return {}
        return {alarm.ticket: alarm for alarm in alarms(self.curve(histories))}

    @property
    def samples(self) -> int:
        """Samples that all rounds of all tickets together present, if none stops at its collapse alarm."""
        return len(self.rounds) * self.fit.epochs * sum(self.epoch_samples)

    @property
    def finished_samples(self) -> int:
        """Of those, what does not come again: rounds of tickets without rounds left to do, or that wait each round."""
        count = 0
        for k, samples in enumerate(self.epoch_samples):
            done = sum(self.run.done(self.key(k, number)) for number in range(len(self.rounds)))
            if done == len(self.rounds) or self.waits:
                count += done * self.fit.epochs * samples
        return count

    @property
    def waits(self) -> bool:
        """Whether its tickets wait for one another after every round, because some may have to stop."""
        return self.plan.stop_on_collapse and len(self.parts) > 1

    def weights_at(self, level: float, ticket: int | None = None) -> dict[str, Tensor]:
        """The dense model's state at the end of the round that gave the masks at a reported sparsity.

        Args:
            level: the sparsity.
            ticket: whose; None: of all, every number moved from θ0 by the mean of the moves of the tickets that moved
                it at all. A pruned weight, and what belongs to another ticket's logit, does not move.

        Raises InputError if tickets may have stopped before that round.
        """
        if self.plan.stop_on_collapse:
            raise InputError("stop_on_collapse is True, but a ticket that stopped has no weights of a later round")
        theta0 = {name: t.detach().clone() for name, t in self.model.state_dict().items()}
        kept = kept_at(self.prunable, level)
        if kept == self.prunable:
            return theta0
        number = self.rounds.index(kept)
        if ticket is not None:
            found = self.run.load(self.key(ticket, number)).tensors
            return {name: found[THETA + name] for name in theta0}
        every = [self.run.load(self.key(k, number)).tensors for k in range(len(self.parts))]
        for name, start in theta0.items():
            if start.is_floating_point():  # counters stay
                moves = torch.stack([tensors[THETA + name] - start for tensors in every])
                theta0[name] = start + moves.sum(0) / (moves != 0).sum(0).clamp(min=1)
        return theta0

    def tickets(self) -> Tickets:
        """The finished masks at every reported sparsity."""
        levels, samples, seconds = {}, {}, {}
        histories = self.history()
        stopped = self.stopped(histories)
        for level in self.plan.levels:
            kept = kept_at(self.prunable, level)
            last = 0 if kept == self.prunable else self.rounds.index(kept) + 1
            spent = [stage.info for own in histories for stage in own[:last]]
            good = [
                own[: min(last, stopped[name].good_round + 1) if name in stopped else last][-1:]
                for name, own in zip(self.parts.names, histories, strict=True)
            ]
            levels[level] = TicketMasks(self.parts.names, level, self._banks([one[0] if one else None for one in good]))
            samples[level] = sum(info["samples"] for info in spent)
            seconds[level] = sum(info["seconds"] for info in spent)
        curve = self.curve(histories) if self.rounds else None
        stages = {
            level: found
            for level in self.plan.levels
            if (found := self.stages(kept_at(self.prunable, level), histories)) is not None
        }
        return Tickets(self.parts.names, levels, self.prunable, samples, seconds, curve, stages, stopped)

    def stages(self, kept: int, histories: Sequence[Sequence[Artefact]]) -> Curve | None:
        """What the tickets would share if they were pruned after each epoch of the round that leaves `kept` weights.

        None where not all tickets have that round, or it was made before stages were kept.
        """
        number = self.rounds.index(kept) if kept in self.rounds else len(self.rounds)
        if any(
            len(own) <= number or "epoch-1/" + next(iter(self.ones)) not in own[number].tensors for own in histories
        ):
            return None
        return Curve.of(
            self.parts.names,
            [self._banks([own[number] for own in histories], f"epoch-{e + 1}/") for e in range(self.fit.epochs)],
        )

    def warn(self, stacklevel: int) -> None:
        """Give a CollapseWarning where the finished rounds' similarity calls for one, at the line of who extracts."""
        found = alarms(self.curve(self.history())) if self.rounds and len(self.parts) > 1 else []
        if found:
            first = min(found, key=lambda alarm: alarm.round)
            then = (
                "they stop at their last good masks"
                if self.plan.stop_on_collapse
                else "performance past it is in doubt"
            )
            warnings.warn(
                CollapseWarning(f"{len(found)} of {len(self.parts)} tickets collapse: {then}; the first: {first}"),
                stacklevel=stacklevel,
            )

    def _banks(self, stages: Sequence[Artefact | None], of: str = "") -> dict[str, rk.MaskBank]:
        """One mask a ticket, by layer; None keeps everything. `of`: which epoch's masks, with a slash behind."""
        banks = {}
        for layer, one in self.ones.items():
            words = [one.words if stage is None else stage.tensors[of + layer] for stage in stages]
            banks[layer] = rk.MaskBank(torch.cat(words), one.shape)
        return banks


def extract_all(extractions: Sequence[Extraction], run: Run) -> None:
    """Bring several extractions to their end, all their tickets handed to the same workers."""
    together = [e for e in extractions if e.waits]
    alone = [e for e in extractions if e not in together]
    jobs = [(e, ticket, range(len(e.rounds))) for e in alone for ticket in e.unfinished()]
    _extract_tickets(jobs, run)
    for number in range(max((len(e.rounds) for e in together), default=0)):
        jobs = []
        for e in together:
            histories = [own[:number] for own in e.history()]
            going = [k for k, name in enumerate(e.parts.names) if name not in e.stopped(histories)]
            going = [k for k in going if number < len(e.rounds) and not e.run.done(e.key(k, number))]
            jobs += [(e, ticket, range(number, number + 1)) for ticket in going]
        _extract_tickets(jobs, run)
    for e in extractions:
        e.warn(4)


def _extract_tickets(jobs: Sequence[tuple[Extraction, int, range]], run: Run) -> None:
    extractions = list(dict.fromkeys(e for e, _, _ in jobs))
    numbered = [(extractions.index(e), ticket, numbers) for e, ticket, numbers in jobs]
    if numbered:
        run.map(functools.partial(_extract_ticket, extractions), numbered, label="extract")


def _extract_ticket(extractions: Sequence[Extraction], _: Run, job: tuple[int, int, range]) -> None:
    """Algorithm 1 for one k: the subsets are independent of one another within a round, and so over all rounds."""
    extraction, ticket, numbers = extractions[job[0]], job[1], job[2]
    run, plan, fit, parts = extraction.run, extraction.plan, extraction.fit, extraction.parts
    net = masked_copy(extraction.model, 1, "shared")
    theta0, rounds, name, survivors = state(net), extraction.rounds, parts.names[ticket], net.banks
    if numbers.start:
        survivors = extraction._banks([run.load(extraction.key(ticket, numbers.start - 1))])
    with run.track(name, len(numbers) * fit.epochs, extraction.epoch_samples[ticket]) as progress:
        for number in numbers:
            if plan.trained == "masked":
                net.banks = survivors

            stem = f"{slug(name)}/checkpoint-{number:03d}"

            def one_round(
                number: int = number, keep: int = rounds[number], survivors: Banks = survivors, stem: str = stem
            ) -> Artefact:
                began = saved = time.perf_counter()
                rewind(net, theta0)  # θ ← θ0
                optimizer, generator = new_optimizer(net, fit), run.generator("extract", name, number)
                done, reached = checkpoint.resume(run, stem, fit.epochs, net, optimizer, generator)
                samples, loss = reached.info.get("samples", 0), reached.info.get("loss", 0.0)
                began -= reached.info.get("seconds", 0.0)
                kept = range(done if keep in extraction.reported else 0)
                stages: list[Masks] = [{layer: reached.tensors[f"{e}/{layer}"] for layer in survivors} for e in kept]
                progress.skip(done)
                net.train()
                for epoch in range(done, fit.epochs):  # train f(·; m_k ⊙ θ) on D_k
                    order = fit.task.draw(parts, ticket, generator)
                    batches = split(order, fit.batch_size)
                    for m, index in enumerate(batches):
                        set_rate(optimizer, fit, (epoch + m / len(batches)) / fit.epochs)
                        loss = float(step(net, optimizer, fit, parts, [(0, ticket, index)]))
                    samples += len(order)
                    if keep in extraction.reported:
                        stages.append(pruned(net, 0, survivors, keep, plan.scope))
                    progress.advance(note=f"round {number + 1} of {len(rounds)}, loss {loss:.3g}", loss=loss)
                    if time.perf_counter() - saved >= CHECKPOINT_SECONDS and epoch + 1 < fit.epochs:
                        saved = time.perf_counter()
                        info = {"samples": samples, "loss": loss, "seconds": saved - began}
                        own = {f"{e}/{layer}": m for e, stage in enumerate(stages) for layer, m in stage.items()}
                        checkpoint.save(run, stem, epoch + 1, net, optimizer, info, generator, own)
                masks = pruned(net, 0, survivors, keep, plan.scope)
                theta = state(net) if keep in extraction.reported else {}
                return _artefact(masks, stages, theta, keep, samples, loss, time.perf_counter() - began)

            if run.done(extraction.key(ticket, number)):
                progress.skip(fit.epochs)
            survivors = extraction._banks([run.stage(extraction.key(ticket, number), one_round)])
            checkpoint.discard(run, stem, fit.epochs)


def _extract_batched(extraction: Extraction) -> None:
    """Algorithm 1 for all k at once: one batch holds a batch of every subset, and every ticket has its own weights."""
    run, plan, fit, parts = extraction.run, extraction.plan, extraction.fit, extraction.parts
    net = rk.nn.untie(masked_copy(extraction.model, len(parts), "per_ticket", True))
    theta0, rounds = state(net), extraction.rounds
    survivors = {layer: bank for layer, bank in net.banks.items() if layer in extraction.ones}
    untouched = {layer: bank for layer, bank in net.banks.items() if layer not in extraction.ones}  # masks by `untie`
    with run.track("all tickets", len(rounds) * fit.epochs, sum(extraction.epoch_samples)) as progress:
        for number, keep in enumerate(rounds):
            histories = [own[:number] for own in extraction.history()]
            stopped = extraction.stopped(histories)
            going = [k for k, name in enumerate(parts.names) if name not in stopped]
            if number:
                survivors = extraction._banks([own[-1] for own in histories])
            if plan.trained == "masked":
                net.banks = survivors | untouched
            if all(run.done(extraction.key(ticket, number)) for ticket in going):
                progress.skip(fit.epochs)
                continue
            began, samples, loss = time.perf_counter(), dict.fromkeys(going, 0), 0.0
            rewind(net, theta0)
            optimizer = new_optimizer(net, fit)
            stages: dict[int, list[Masks]] = {k: [] for k in going}
            generators = {k: run.generator("extract", parts.names[k], number) for k in going}
            net.train()
            with global_seed(run.seed_for("extract", number)):  # dropout's numbers do not depend on resuming
                for epoch in range(fit.epochs):
                    orders = {k: fit.task.draw(parts, k, generators[k]) for k in going}
                    batches = _side_by_side(parts, {k: split(o, fit.batch_size) for k, o in orders.items()})
                    for m, batch in enumerate(batches):
                        set_rate(optimizer, fit, (epoch + m / len(batches)) / fit.epochs)
                        loss = float(step(net, optimizer, fit, parts, batch))
                    samples = {k: samples[k] + len(order) for k, order in orders.items()}
                    if keep in extraction.reported:
                        for k in going:
                            stages[k].append(pruned(net, k, survivors, keep, plan.scope))
                    progress.advance(note=f"round {number + 1} of {len(rounds)}, loss {loss:.3g}", loss=loss)
            trained = state(net) if keep in extraction.reported else {}
            seconds = (time.perf_counter() - began) / len(going)
            for ticket in going:
                masks = pruned(net, ticket, survivors, keep, plan.scope)
                theta = {name: t[ticket] for name, t in trained.items()}
                artefact = _artefact(masks, stages[ticket], theta, keep, samples[ticket], loss, seconds)
                run.save(extraction.key(ticket, number), artefact)


def _side_by_side(parts: Partition, batches: Mapping[int, Sequence[Tensor]]) -> list[Batch]:
    """The steps of one epoch, each a batch of every ticket in `batches` (ticket -> its batches)."""
    counts = {parts.names[k]: len(own) for k, own in batches.items()}
    if len(set(counts.values())) != 1:
        raise InputError(
            f"batched is True, but the subsets' epochs have different numbers of batches ({counts}): extract one "
            "ticket at a time (batched=False)"
        )
    return [
        [(k, k, index) for k, index in zip(batches, row, strict=True)] for row in zip(*batches.values(), strict=True)
    ]


def prune(weights: Masks, masks: Masks, keep: int, scope: str = "global") -> Masks:
    """The masks without their smallest-magnitude weights, so that `keep` weights survive.

    Args:
        weights: by layer, any float dtype.
        masks: by layer, bool: what survives now, at least `keep` weights.
        scope: "global": the smallest over all layers together; "layer": every layer loses the same share of what
            survives in it, up to one weight (the largest remainders make up the exact count).

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
    if scope == "layer":
        return {layer: _largest(weights[layer], masks[layer], n) for layer, n in _shares(masks, keep).items()}
    parts = _largest(magnitude, alive, keep).split([mask.numel() for mask in masks.values()])
    return {layer: part.view(mask.shape) for (layer, mask), part in zip(masks.items(), parts, strict=True)}


def _largest(weights: Tensor, alive: Tensor, keep: int) -> Tensor:
    """The `keep` largest magnitudes of those alive, bool of the same shape."""
    ranked = weights.abs().masked_fill(~alive, -1).flatten().sort(descending=True, stable=True).indices
    return torch.zeros_like(alive).flatten().index_fill_(0, ranked[:keep], True).view(alive.shape)


def _shares(masks: Masks, keep: int) -> dict[str, int]:
    """How many weights each layer keeps when all lose the same share."""
    alive = {layer: int(mask.sum()) for layer, mask in masks.items()}
    everything = sum(alive.values())
    exact = {layer: (everything - keep) * n / max(1, everything) for layer, n in alive.items()}
    removed = {layer: int(n) for layer, n in exact.items()}
    rest = everything - keep - sum(removed.values())
    for layer in sorted(exact, key=lambda layer: removed[layer] - exact[layer])[:rest]:
        removed[layer] += 1
    return {layer: n - removed[layer] for layer, n in alive.items()}


def pruned(net: rk.nn.RoutedModel, ticket: int, survivors: Banks, keep: int, scope: str) -> Masks:
    """A ticket's masks if, of its survivors, `keep` weights were left by the magnitudes they have now."""
    weights = {
        layer: module.weight.detach()[ticket] if module.untied else module.weight.detach()
        for layer, module in net.masked_modules().items()
    }
    return prune(weights, {layer: bank.dense(ticket) for layer, bank in survivors.items()}, keep, scope)


def _artefact(
    masks: Masks, stages: Sequence[Masks], theta: Masks, kept: int, samples: int, loss: float, seconds: float
) -> Artefact:
    words = {layer: rk.MaskBank.from_dense(mask[None]).words for layer, mask in masks.items()}
    for number, stage in enumerate(stages, 1):  # what each epoch would have given
        words |= {f"epoch-{number}/{layer}": rk.MaskBank.from_dense(mask[None]).words for layer, mask in stage.items()}
    tensors = words | {THETA + name: t for name, t in theta.items()}
    return Artefact(tensors, {"kept": kept, "samples": samples, "loss": loss, "seconds": seconds})
