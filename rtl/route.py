"""Which ticket serves an input: by its context, by the nearest centroid, or by the tickets' own confidence.

By context, somebody says (a name, an id, metadata): `by_context`. Otherwise each ticket gets a score for each sample,
and the largest of scale · score + bias_k is taken (`Router`):

    centroid     −‖f(x) − c_k‖², f the partition's features (inputs where it has none): needs no labels
    confidence   what ticket k says of x, all tickets on each sample in one pass: its logit, one-vs-rest; the greatest
                 logarithm of its softmax, where tickets tell classes apart within their subsets

Scale and bias are fitted on held-out samples, whose subsets the partition's rule knows, by their log-loss (temperature
and bias of C. Guo et al., "On Calibration of Modern Neural Networks", arXiv 1706.04599). So the probabilities mean
something, and a ticket that is loud on everything is not heard on everything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor

from rtl.data import Data
from rtl.errors import InputError, expect
from rtl.evaluate import batches, ticket_logits
from rtl.partition import ClusterRule, Features, Partition, features_of
from rtl.run import write_atomically
from rtl.tasks import TASKS, Measured, OneVsRest
from rtl.tickets import Ticket, TicketNetwork

METHODS = ("centroid", "confidence")


@dataclass(frozen=True, eq=False)
class Routing:
    """Tickets for N samples.

    Attributes:
        ticket: number of the ticket in the network, int64 (N,).
        probability: that the ticket is the right one, float64 (N,).
    """

    ticket: Tensor
    probability: Tensor


def by_context(net: TicketNetwork, context: Sequence[Ticket] | Partition) -> Routing:
    """The tickets that somebody names: B names or numbers, or the subsets a partition's rule gives its samples.

    Raises InputError for a sample that is in none of the network's subsets.
    """
    if isinstance(context, Partition):
        ticket = numbers(net, context.index)
        if bool((ticket < 0).any()):
            raise InputError(f"context has {int((ticket < 0).sum())} samples that are in no ticket's subset")
    else:
        ticket = torch.tensor([net.position(name) for name in context], dtype=torch.int64)
    return Routing(ticket, torch.ones(len(ticket), dtype=torch.float64))


@dataclass(frozen=True, eq=False)
class Router:
    """Chooses the ticket of the largest scale · score + bias. Made by `by_centroid` and `by_confidence`.

    Attributes:
        method: "centroid" or "confidence".
        names: of the network's K tickets.
        scale, bias: what scores are calibrated with, and K values; 1 and zeros before.
        centroids: float64 (K, D), for "centroid".
        features: a function from data to (N, D); None: the normalised inputs, flattened.
    """

    method: Literal["centroid", "confidence"]
    names: tuple[str, ...]
    scale: float
    bias: Tensor
    centroids: Tensor | None = None
    features: Features | None = None

    def scores(self, net: TicketNetwork, data: Data, logits: Tensor | None = None) -> Tensor:
        """What is compared, before calibration: float64 (N, K), larger is better; `logits` as in `confidence`."""
        expect("data", data, Data, "an rtl.data.Data, normalised as the training data: see Router.__call__")
        if self.names != net.names:
            raise InputError(f"net has the tickets {', '.join(net.names)}, but the router {', '.join(self.names)}")
        if self.method == "confidence":
            return confidence(net, data, logits)
        assert self.centroids is not None
        points = features_of(data, self.features)
        if points.shape[1] != self.centroids.shape[1]:
            raise InputError(
                f"data has {points.shape[1]} features a sample, but the centroids {self.centroids.shape[1]}"
            )
        return -torch.cdist(points, self.centroids).square()

    def __call__(self, net: TicketNetwork, data: Data) -> Routing:
        """Tickets for unlabelled samples: of `data` the targets are not looked at. For inputs x alone it is
        `Data(x, torch.zeros(len(x)), mean=train.mean, std=train.std)`, normalised as the training data were.
        """
        probability, ticket = self.probabilities(self.scores(net, data)).max(1)
        return Routing(ticket, probability)

    def probabilities(self, scores: Tensor) -> Tensor:
        """Of scores (N, K): float64 (N, K), each row's sum 1."""
        return (self.scale * scores + self.bias).softmax(1)

    def calibrated(self, net: TicketNetwork, held_out: Partition, logits: Tensor | None = None) -> Router:
        """The router with scale and bias fitted on samples that no ticket was trained on.

        Args:
            net: the tickets.
            held_out: `parts.apply(data)`; samples in no ticket's subset are left out.
            logits: as in `confidence`.

        Raises:
            InputError: a ticket has no held-out sample.
        """
        return self._fitted(self.scores(net, held_out.data, logits), numbers(net, held_out.index))

    def _fitted(self, scores: Tensor, truth: Tensor) -> Router:
        scores, truth = scores[truth >= 0], truth[truth >= 0]
        empty = [name for k, name in enumerate(self.names) if not bool((truth == k).any())]
        if empty:
            raise InputError(f"held_out has no sample of {', '.join(empty)}: give some of every ticket")
        spread = float(scores.std(correction=0).clamp(min=1e-12))  # so that the fit does not depend on scores' unit
        log_scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(scores.shape[1], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([log_scale, bias], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            logits = log_scale.exp() / spread * scores + bias
            # A weak prior keeps biases finite where held-out samples are separated perfectly.
            value = torch.nn.functional.cross_entropy(logits, truth) + 1e-4 * (bias.square().sum() + log_scale.square())
            value.backward()
            return value

        optimizer.step(loss)
        scale = float(log_scale.detach().exp()) / spread
        return Router(self.method, self.names, scale, bias.detach(), self.centroids, self.features)

    def save(self, folder: str | Path) -> None:
        """Write router-METHOD.safetensors and router-METHOD.json. Raises InputError if it has features of its own."""
        if self.features is not None:
            raise InputError("features is a function, which cannot be saved: make the router again where it is used")
        tensors = {"bias": self.bias} | ({} if self.centroids is None else {"centroids": self.centroids})
        description = {"method": self.method, "names": self.names, "scale": self.scale}
        file = Path(folder) / f"router-{self.method}.json"
        file.unlink(missing_ok=True)
        write_atomically(file.with_suffix(".safetensors"), safetensors.torch.save(tensors))
        write_atomically(file, (json.dumps(description, indent=2) + "\n").encode())

    @classmethod
    def load(cls, folder: str | Path, method: str) -> Router:
        """What `save` wrote. Raises InputError if it is not there."""
        file = Path(folder) / f"router-{method}.json"
        try:
            description: dict[str, Any] = json.loads(file.read_text())
            tensors = safetensors.torch.load_file(file.with_suffix(".safetensors"))
            return cls(
                description["method"],
                tuple(description["names"]),
                float(description["scale"]),
                tensors["bias"],
                tensors.get("centroids"),
            )
        except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
            raise InputError(f"folder is {str(folder)!r}, which holds no router by {method}: {error}") from error


def by_centroid(net: TicketNetwork, parts: Partition, features: Features | None = None) -> Router:
    """The nearest centroid, uncalibrated: those of the partition's clusters, or the means of its subsets.

    Args:
        net: tickets for subsets of `parts`.
        parts: the training partition.
        features: a function from data to (N, D); None: the partition's own, where it was made by clustering, else the
            normalised inputs, flattened.

    Raises:
        InputError: features that belong to the training data alone (`by_cluster` was given an array).
    """
    rule = parts.rule
    if isinstance(rule, ClusterRule) and features is None:
        if rule.fixed:
            raise InputError("parts was clustered by an array, which says nothing of new data: pass features=")
        features, centroids = rule.features, rule.centroids
    else:
        points = features_of(parts.data, features)
        centroids = torch.stack([points[parts.index == k].mean(0) for k in range(len(parts))])
    chosen = centroids[list(net.outputs)]
    return Router("centroid", net.names, 1.0, torch.zeros(len(chosen), dtype=torch.float64), chosen, features)


def by_confidence(net: TicketNetwork) -> Router:
    """The ticket that is surest, uncalibrated. Raises InputError for regression, which gives no confidence."""
    if net.task not in ("one_vs_rest", "multi_class"):
        raise InputError(
            f"net's task is {net.task!r}, whose tickets say nothing of how sure they are: route by centroid"
        )
    return Router("confidence", net.names, 1.0, torch.zeros(len(net.names), dtype=torch.float64))


@torch.no_grad()
def confidence(net: TicketNetwork, data: Data, logits: Tensor | None = None) -> Tensor:
    """Every ticket's confidence in every sample, one pass for all tickets: float64 (N, K).

    `logits`: `ticket_logits` of these one-vs-rest tickets and samples, if they are known.
    """
    if net.task == "one_vs_rest":
        return (ticket_logits(net, data) if logits is None else logits).double()
    net.eval()
    found = []
    for index in batches(data, None, len(net.names)):
        found.append(net.every(data.batch(index)[0]).log_softmax(2).amax(2).T.double())  # (K, B, C) -> (B, K)
    return torch.cat(found)


def compare(
    net: TicketNetwork, routers: Sequence[Router], held_out: Partition, seed: int = 0, logits: Tensor | None = None
) -> dict[str, dict[str, float]]:
    """Each router beside the oracle, which routes every sample to its own subset's ticket.

    Two-fold: calibrated on one half of every ticket's samples in `held_out` (two or more), measured on the other, and
    the other way round. Samples in no ticket's subset are left out. `logits` as in `confidence`.

    Returns:
        By "oracle" and the routers' methods: "routing" (share of samples that get their own ticket), "calibration"
        (expected calibration error over 10 bins of the routing's probability), and the end task's metric: "accuracy"
        (one-vs-rest: the routed ticket is the sample's own, its score ½ or more; multi-class: the label), or without
        classes the task's own (`rtl.tasks.Measured`).

    Raises:
        InputError: a half without a sample of some ticket, or a task that is not known.
    """
    data, truth = held_out.data, numbers(net, held_out.index)
    known = torch.nonzero(truth >= 0).flatten()
    order = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))]
    order = order[truth[order].sort(stable=True).indices]
    halves = order[::2], order[1::2]  # of every ticket's samples half
    rows = torch.cat(halves)
    if logits is None and net.task == "one_vs_rest":
        logits = ticket_logits(net, data)
    metric, values, summary = _task_values(net, held_out, truth, logits)
    own = summary(float(values[rows, truth[rows]].mean()))
    results = {"oracle": {"routing": 1.0, "calibration": 0.0, metric: own}}
    for router in routers:
        scores = router.scores(net, data, logits)
        ticket, probability = torch.empty_like(truth), torch.empty(len(truth), dtype=torch.float64)
        for fit_on, measure in (halves, halves[::-1]):
            fitted = router._fitted(scores[fit_on], truth[fit_on])
            probability[measure], ticket[measure] = fitted.probabilities(scores[measure]).max(1)
        right = (ticket == truth)[rows].double()
        results[router.method] = {
            "routing": float(right.mean()),
            "calibration": _calibration_error(probability[rows], right),
            metric: summary(float(values[rows, ticket[rows]].mean())),
        }
    return results


@torch.no_grad()
def _task_values(
    net: TicketNetwork, parts: Partition, truth: Tensor, logits: Tensor | None
) -> tuple[str, Tensor, Callable[[float], float]]:
    """The end task's metric of every sample through every ticket, float64 (N, K), and what its mean is reported as."""
    task, data = TASKS.get(net.task), parts.data
    if task is None:
        raise InputError(f"net is of task {net.task!r}, expected one of {', '.join(TASKS)}")
    if isinstance(task, OneVsRest):
        assert logits is not None
        own = torch.arange(len(net.names)) == truth[:, None]
        return "accuracy", (own & (logits.sigmoid() >= 0.5)).double(), float
    net.eval()
    found = []
    for index in batches(data, None, len(net.names)):
        output = net.every(data.batch(index)[0])  # (K, B, ...)
        if isinstance(task, Measured):
            outputs = zip(output, net.outputs, strict=True)
            values = torch.stack([task.measure(one, task.target(parts, subset, index)) for one, subset in outputs])
        else:
            values = output.argmax(2) == data.targets[index]
        found.append(values.T.double())
    if isinstance(task, Measured):
        return task.metric, torch.cat(found), task.summary
    return "accuracy", torch.cat(found), float


def numbers(net: TicketNetwork, index: Tensor) -> Tensor:
    """Subsets, positions in the partition (N,), as numbers of the network's tickets, -1 where none stands for one."""
    table = torch.full((max([*net.outputs, int(index.max()) if len(index) else 0]) + 2,), -1)
    for number, subset in enumerate(net.outputs):
        table[subset] = number
    return table[index]  # -1 is the last entry, which no subset has


def _calibration_error(probability: Tensor, right: Tensor, bins: int = 10) -> float:
    which = (probability * bins).long().clamp(max=bins - 1)
    total = 0.0
    for b in range(bins):
        inside = which == b
        if bool(inside.any()):
            total += float(inside.double().mean()) * abs(float(probability[inside].mean() - right[inside].mean()))
    return total
