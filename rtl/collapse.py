"""Collapse, seen without labels: over-pruned tickets begin to share weights, or cease to, unlike in all rounds before.

What is followed is the log-odds of sharing: of the weights that either of two tickets keeps, ln(kept by both / kept by
one), with ½ added to both counts (Haldane, Anscombe) and averaged over a ticket's partners. It is the logit of Jaccard,
so that a step means as much near 1 (CIFAR-10's masks) as near ½. Its slope is taken per halving of density: a plan that
removes a constant number takes ever larger fractions. Tickets that specialise, or are pruned at random, fall.

The rule, for one ticket: with s the slope of a round, s̃ and σ the median and the scaled median absolute deviation
of the WINDOW slopes before it (σ at least the slope's counting error, and at least FLOOR), two cumulative sums (Page,
Biometrika 41, 1954), both from 0 and both held at 0 from below:

    spike   S ← max(0, S + s / σ − ½)           sharing grows though density falls: for classifiers
    fall    F ← max(0, F + (s̃ − s) / σ − ½)     falls faster than it used to: for implicit representations

An alarm is S or F above LIMIT. No round adds more than LIMIT, so that one alone gives no alarm: σ is of a few slopes,
and a single one is often far from all before it. The sums need WARM_UP slopes first. If slopes were independent normal
deviates about 0 of known σ, a sum with allowance ½ and limit 3 would pass it by chance once in about 117 rounds (336
for 4, 930 for 5). 3 was chosen, with the rest of the rule, on three seeds of the digits, as the limit under which most
tickets were warned in time (`benchmarks.collapse`; its results say how it does on others, on CIFAR-10 and on an image).

The departure is the round after which the sum was last 0: masks up to there are good, later ones led to the alarm.
Rounds cut short (less than half the step of the round before) are passed over: removing few weights from a freshly
trained network shares more for that reason alone, and the next round takes it back.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rtl.curve import Curve
from rtl.errors import InputError

WINDOW = 8
WARM_UP = 6
LIMIT = 3.0
FLOOR = 0.02  # log-odds per halving
LOST = 0.2  # of what a ticket had learnt: its performance has fallen
PREMATURE = 4.0  # times the density at the fall


class CollapseWarning(UserWarning):
    """Tickets share weights as they did not in all rounds before: past here their performance is in doubt."""


@dataclass(frozen=True)
class Alarm:
    """One ticket's alarm.

    Attributes:
        ticket: its name.
        layer: where it was seen; None: over all prunable weights.
        direction: "spike" or "fall" of similarity.
        sparsity: of the ticket when the alarm was given, and `round`, that round's number from 0.
        good_round: the last round before the departure, and `good_sparsity`, of the ticket then.
    """

    ticket: str
    layer: str | None
    direction: Literal["spike", "fall"]
    round: int
    sparsity: float
    good_round: int
    good_sparsity: float

    def __str__(self) -> str:
        where = "" if self.layer is None else f" in {self.layer}"
        moves = "grows though density falls" if self.direction == "spike" else "falls faster than before"
        return (
            f"ticket {self.ticket!r}: mask similarity{where} {moves} ({self.direction}) at {self.sparsity:.1%} "
            f"sparsity; last good masks at {self.good_sparsity:.1%}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values, which `Alarm(**values)` reads back."""
        return asdict(self)


def alarms(curve: Curve, layer: str | None = None, limit: float = LIMIT) -> list[Alarm]:
    """The first alarm of every ticket that has one, in the tickets' order, by the rule above. A single ticket has none.

    A ticket whose masks stop changing (it was stopped) is followed no further, nor compared with.

    Args:
        curve: the masks' overlaps.
        layer: one layer, or None for all prunable weights together.
        limit: what a sum has to pass: higher is later, and less often false.
    """
    found = []
    for k, name in enumerate(curve.names):
        hit = _first_alarm(curve, k, layer, limit)
        if hit is not None:
            direction, number, good = hit
            sparsity = curve.sparsity[:, k]
            found.append(Alarm(name, layer, direction, number, float(sparsity[number]), good, float(sparsity[good])))
    return found


@dataclass(frozen=True)
class Verdict:
    """How one ticket's alarm stands to its performance.

    Attributes:
        ticket: its name.
        alarm: the sparsity at which it was given, or None.
        fall: the evaluated sparsity at which performance had fallen (`fall`), or None.
        kind: "early" (at or before the fall), "premature" (so long before it that the ticket was PREMATURE times as
            dense or more), "late" (after it), "miss" (a fall alone), "false" (an alarm alone) or "quiet" (neither).
        lead: how often density halved between alarm and fall, where there are both; negative if the alarm was late.
    """

    ticket: str
    alarm: float | None
    fall: float | None
    kind: Literal["early", "premature", "late", "miss", "false", "quiet"]
    lead: float | None


def verdicts(
    alarm_at: Mapping[str, float], performance: Mapping[str, Mapping[float, float]], floor: Mapping[str, float]
) -> list[Verdict]:
    """Each ticket's alarm against the fall of its performance.

    Args:
        alarm_at: the sparsity of the alarm, for tickets that had one.
        performance: by ticket, by sparsity: higher is better.
        floor: by ticket, the performance of what has learnt nothing.
    """
    results = []
    for ticket, values in performance.items():
        at, fell = alarm_at.get(ticket), fall(values, floor[ticket])
        lead = None if at is None or fell is None else math.log2((1 - at) / (1 - fell))
        kind: Literal["early", "premature", "late", "miss", "false", "quiet"]
        if at is None:
            kind = "quiet" if fell is None else "miss"
        elif lead is None:
            kind = "false"
        else:
            kind = "late" if lead < -1e-9 else "early" if 2**lead < PREMATURE - 1e-9 else "premature"
        results.append(Verdict(ticket, at, fell, kind, lead))
    return results


def fall(values: Mapping[float, float], floor: float) -> float | None:
    """The first evaluated sparsity from which on a ticket has lost more than LOST of what it had learnt, or None.

    What it had learnt is the median of its performance at sparsities up to ½, less `floor`: a drop below the best of
    many measurements would be found in noise alone. Raises InputError if there is none up to ½.
    """
    plateau = [values[s] for s in values if s <= 0.5]
    if not plateau:
        raise InputError(f"performance is known at {sorted(values)}, expected some sparsity up to 0.5")
    learnt = statistics.median(plateau) - floor
    found = None
    for sparsity in sorted(values, reverse=True):
        if values[sparsity] - floor >= (1 - LOST) * learnt:
            break
        found = sparsity
    return found


def _first_alarm(
    curve: Curve, k: int, layer: str | None, limit: float
) -> tuple[Literal["spike", "fall"], int, int] | None:
    slopes: list[float] = []
    spike, fall = _Sum(limit), _Sum(limit)
    for before, now, slope, error in _steps(curve, k, layer):
        past = torch.tensor(slopes[-WINDOW:], dtype=torch.float64)
        if len(past) >= WARM_UP:
            usual = float(past.quantile(0.5))
            sigma = max(1.4826 * float((past - usual).abs().quantile(0.5)), error, FLOOR)
            if spike.add(slope / sigma, before) > limit:
                return "spike", now, spike.since
            if fall.add((usual - slope) / sigma, before) > limit:
                return "fall", now, fall.since
        slopes.append(slope)
    return None


class _Sum:
    """Page's sum of standardised steps, each of which adds `limit` at most, and the round after which it was last 0."""

    def __init__(self, limit: float) -> None:
        self.value, self.since, self.limit = 0.0, 0, limit

    def add(self, step: float, before: int) -> float:
        if self.value == 0:
            self.since = before
        self.value = max(0.0, self.value + min(step - 0.5, self.limit))
        return self.value


def _steps(curve: Curve, k: int, layer: str | None) -> list[tuple[int, int, float, float]]:
    """Of ticket k, the steps that count: rounds before and after, slope per halving, its counting error.

    The error is Woolf's, of a log-odds, times the root of the share removed: masks are nested, the rest is the same.
    """
    both = curve.overlap(layer).double()
    own = both.diagonal(dim1=1, dim2=2)
    either = own[:, :, None] + own[:, None, :] - both
    odds = ((both + 0.5) / (either - both + 0.5)).log()[:, k]  # (R, K)
    variance = (1 / (both + 0.5) + 1 / (either - both + 0.5))[:, k]
    halvings = -curve.density(layer)[:, k].clamp(min=1e-12).log2()
    kept = curve.overlap().diagonal(dim1=1, dim2=2)
    moved = kept.diff(dim=0) < 0  # (R - 1, K): in the round from r to r + 1
    steps: list[tuple[int, int, float, float]] = []
    before, last = 0, 0.0
    for now in range(1, len(curve)):
        if not bool(moved[now - 1, k]):
            break
        partners = _partners(moved[before:now], k)
        step = float(halvings[now] - halvings[before])
        if not bool(partners.any()):
            break
        if step < last / 2 or step <= 0:
            continue
        slope = float((odds[now] - odds[before])[partners].mean()) / step
        error = math.sqrt((1 - 2**-step) * float(variance[now][partners].mean())) / step
        steps.append((before, now, slope, error))
        before, last = now, step
    return steps


def _partners(moved: Tensor, k: int) -> Tensor:
    """Tickets other than k that were pruned in all of these rounds, bool (K,)."""
    partners = moved.all(0)
    partners[k] = False
    return partners
