"""The paper's columns: for classes, under both decision rules; for pictures, PSNR; for speech, SI-SNRi.

threshold: one-vs-rest, a class is predicted where its score is 0.5 or more (sigmoid of a ticket's logit; softmax of a
           multi-class network's): none, one or several classes a sample.
argmax:    the class of the highest score, one a sample; for tickets, of the highest logit: sigmoids near 1 are equal.

Balanced accuracy is the mean over classes of (TPR + TNR) / 2, precision and recall are means over classes, on all
samples of the test set; a class that is never predicted has precision 0, one without samples has recall 0.

A task without classes judges its outputs itself (`rtl.tasks.Measured`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from rtl.calibrate import Calibration
from rtl.data import Data
from rtl.errors import InputError, expect
from rtl.partition import Partition, whole
from rtl.tasks import TASKS, Measured, OneVsRest
from rtl.tickets import TicketNetwork


@dataclass(frozen=True)
class Evaluation:
    """metrics: one number each. "accuracy", and "balanced_accuracy", "precision" and "recall" each with ".threshold" or
    ".argmax" behind it; without classes the task's own (`Measured.metric`), such as "psnr". per_class: the same before
    the mean, for each class, or for each subset of a task without classes.
    """

    metrics: dict[str, float]
    per_class: dict[str, list[float]] = field(default_factory=dict)


def evaluate(
    net: TicketNetwork | Sequence[TicketNetwork],
    test: Data | Partition,
    *,
    per: Partition | None = None,
    batch_size: int | None = None,
    calibration: Calibration | None = None,
    logits: Tensor | None = None,
) -> Evaluation:
    """Metrics of a network of tickets, or of several networks with one ticket each (IMP multiple), on test data.

    Args:
        net: one-vs-rest tickets (all of them on every sample, in one pass), a multi-class network of one ticket, or
            tickets that each predict in their own subset (multi-class or without classes), which needs a Partition.
        test: samples. With `Data`, label k belongs to the ticket that learnt subset k; a `Partition` says which subset
            each sample is of (-1 belongs to none: a negative for every ticket, left out of accuracy).
        per: without classes, the subsets of the same samples that get figures of their own, NaN for an empty one.
            None: those of `test`, where it is a Partition. With classes evaluate one subset's samples alone:
            `parts.apply(data.select(parts.apply(data)["north"]))`.
        batch_size: samples a forward pass sees. None: so many that all tickets together compute 512 rows, which stay in
            a processor's cache (for ten tickets that took half the time of 5,120 rows).
        calibration: of these networks' scores (`rtl.calibrate`), for classes; None: scores as they are.
        logits: of one network of one-vs-rest tickets: its `ticket_logits` of these samples, if they are known.

    Raises:
        InputError: nothing to evaluate or to evaluate on, a label that no ticket stands for, two tickets of one subset,
            a task that is not known, or `per` with classes.
    """
    nets = _networks(net)
    expect("test", test, (Data, Partition), "a Data, or a Partition of it such as parts.apply(data)")
    data, index = (test.data, test.index) if isinstance(test, Partition) else (test, None)
    task = TASKS.get(nets[0].task)
    if task is None:
        raise InputError(f"net is of task {nets[0].task!r}, expected one of {', '.join(TASKS)}")
    if len(data) == 0:
        raise InputError("test holds no samples")
    if per is not None and not isinstance(task, Measured):
        raise InputError(f"per is given, but net is of task {nets[0].task!r}: evaluate each subset's samples alone")
    if isinstance(task, OneVsRest):
        outputs = [output for one in nets for output in one.outputs]
        labels = _labels(data, index, sorted(outputs))
        logits = _ticket_logits(nets, data, batch_size) if logits is None else logits[:, np.argsort(outputs)]
        if calibration is None:
            return classification_metrics(logits.sigmoid().numpy(), labels, logits.numpy())
        return _calibrated(calibration, logits, labels)
    if isinstance(task, Measured):
        return _measured(task, nets, test, per or (test if isinstance(test, Partition) else None), batch_size)
    output = predict(nets, test, batch_size)
    if calibration is None:
        return classification_metrics(output.softmax(1).numpy(), data.targets.numpy())
    return _calibrated(calibration, _class_log_odds(output), data.targets.numpy())


def _networks(net: TicketNetwork | Sequence[TicketNetwork]) -> list[TicketNetwork]:
    nets: list[TicketNetwork] = [net] if isinstance(net, nn.Module) else list(net)
    if not nets:
        raise InputError("net is empty, expected a network or more")
    for one in nets:
        expect("net", one, TicketNetwork, "what rtl.retrain gives, or several of them")
    outputs = [output for one in nets for output in one.outputs]
    repeated = sorted({output for output in outputs if outputs.count(output) > 1})
    if repeated:
        raise InputError(
            f"net has {outputs.count(repeated[0])} tickets for subset {repeated[0]}, expected one for each: evaluate "
            "networks that are no parts of one, such as several seeds', one by one"
        )
    return nets


def _measured(
    task: Measured, nets: Sequence[TicketNetwork], test: Data | Partition, per: Partition | None, batch_size: int | None
) -> Evaluation:
    parts = test if isinstance(test, Partition) else whole(test)
    values = torch.zeros(len(parts.data), dtype=torch.float64)
    for index, output in _outputs(nets, test, batch_size):
        values[index] = task.measure(output, task.target(parts, 0, index)).double()
    per_class = {}
    if per is not None:
        if len(per.data) != len(values):
            raise InputError(f"per is of {len(per.data)} samples, but test holds {len(values)}: give the same ones")
        means = [float(values[per[k]].mean()) for k in range(len(per))]
        per_class = {task.metric: [task.summary(mean) for mean in means]}
    return Evaluation({task.metric: task.summary(float(values.mean()))}, per_class)


def log_odds(net: TicketNetwork | Sequence[TicketNetwork], data: Data, *, batch_size: int | None = None) -> Tensor:
    """log p / (1 − p) of every class for every sample, (N, C): what `rtl.calibrate.calibrate` takes.

    Arguments as for `evaluate`, which scores samples by the same numbers. Raises InputError for a task without classes.
    """
    nets = _networks(net)
    if nets[0].task == "one_vs_rest":
        return _ticket_logits(nets, data, batch_size)
    if nets[0].task != "multi_class" or len(nets) > 1:
        raise InputError(f"net is {len(nets)} networks of task {nets[0].task!r}, expected tickets, or one multi_class")
    return _class_log_odds(predict(nets, data, batch_size))


def batches(data: Data, batch_size: int | None, tickets: int) -> Iterator[Tensor]:
    """Positions of samples to send through all tickets at once: see `evaluate` on batch_size."""
    yield from torch.arange(len(data)).split(batch_size or max(16, 512 // tickets))


def _calibrated(calibration: Calibration, log_odds: Tensor, labels: np.ndarray) -> Evaluation:
    scores, ranking = calibration.probabilities(log_odds), calibration.ranking(log_odds)
    return classification_metrics(scores.numpy(), labels, ranking.numpy())


def _class_log_odds(logits: Tensor) -> Tensor:
    """Of a softmax over (N, C) logits: z_k − log Σ_{j≠k} exp z_j, which no rounding makes infinite."""
    others = torch.eye(logits.shape[1], dtype=torch.bool)
    return logits - logits[:, None, :].masked_fill(others, -torch.inf).logsumexp(2)


def _ticket_logits(nets: Sequence[TicketNetwork], data: Data, batch_size: int | None) -> Tensor:
    """Of all tickets of all networks, (N, K) by rising output."""
    outputs = [output for one in nets for output in one.outputs]
    return torch.cat([ticket_logits(one, data, batch_size) for one in nets], 1)[:, np.argsort(outputs)]


@torch.no_grad()
def ticket_logits(net: TicketNetwork, data: Data, batch_size: int | None = None) -> Tensor:
    """Every one-vs-rest ticket's logit for every sample, (N, K) in the order of `net.names`."""
    net.eval()
    outputs = torch.tensor(net.outputs)
    parts = []
    for index in batches(data, batch_size, len(net.names)):
        logits = net.every(data.batch(index)[0])  # (K, B, C)
        own = logits.gather(2, outputs[:, None, None].expand(-1, len(index), 1)).squeeze(2)
        parts.append(own.T)
    return torch.cat(parts)


def predict(nets: Sequence[TicketNetwork], test: Data | Partition, batch_size: int | None = None) -> Tensor:
    """The output for each sample of the ticket of its subset, (N, ...); arguments and errors as for `evaluate`."""
    found = list(_outputs(nets, test, batch_size))
    order = torch.cat([index for index, _ in found])
    return torch.cat([output for _, output in found])[order.argsort()]


@torch.no_grad()
def _outputs(
    nets: Sequence[TicketNetwork], test: Data | Partition, batch_size: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of every sample once: positions (B,), and the output of the ticket of each sample's subset."""
    data, index = (test.data, test.index) if isinstance(test, Partition) else (test, None)
    if index is None:
        if len(nets) > 1 or len(nets[0].names) > 1:
            raise InputError("test is Data, but these tickets each serve a subset: pass parts.apply(test)")
        index = torch.full((len(data),), nets[0].outputs[0])
    unknown = sorted(set(index.unique().tolist()) - {subset for net in nets for subset in net.outputs})
    if unknown:
        raise InputError(
            f"test holds samples of subset {unknown[0]}, which no ticket stands for: leave them out, or give a network "
            "that learnt from all data the Data itself"
        )
    for net in nets:
        net.eval()
        mask = {subset: k for k, subset in enumerate(net.outputs)}
        own = torch.isin(index, torch.tensor(net.outputs)).nonzero().flatten()
        for batch in own.split(batch_size or 512) if len(own) else ():
            masks = torch.tensor([mask[int(i)] for i in index[batch]])
            yield batch, net(data.batch(batch)[0], masks)


def classification_metrics(scores: np.ndarray, labels: np.ndarray, ranking: np.ndarray | None = None) -> Evaluation:
    """Both rules' metrics from scores (N, C) in [0, 1] and labels (N,) in 0..C-1, or -1 for none of the classes.

    `ranking` (N, C), any numbers, is what argmax goes by; None: the scores.
    """
    from sklearn.metrics import multilabel_confusion_matrix

    classes = np.arange(scores.shape[1])
    truth = labels[:, None] == classes
    known = labels >= 0
    best = (scores if ranking is None else ranking).argmax(1)
    metrics = {"accuracy": float((best == labels)[known].mean())}
    per_class: dict[str, list[float]] = {}
    for rule, predicted in (("threshold", scores >= 0.5), ("argmax", best[:, None] == classes)):
        tn, fp, fn, tp = (
            multilabel_confusion_matrix(truth, predicted)[:, i, j].astype(np.float64) for i in (0, 1) for j in (0, 1)
        )
        recall = tp / np.maximum(tp + fn, 1)
        specificity = tn / np.maximum(tn + fp, 1)
        columns = {
            "balanced_accuracy": (recall + specificity) / 2,
            "precision": tp / np.maximum(tp + fp, 1),
            "recall": recall,
        }
        for name, values in columns.items():
            metrics[f"{name}.{rule}"] = float(values.mean())
            per_class[f"{name}.{rule}"] = values.tolist()
    return Evaluation(metrics, per_class)


def _labels(data: Data, index: Tensor | None, subsets: Sequence[int]) -> np.ndarray:
    """Column of each sample's own ticket."""
    labels = data.targets if index is None else index
    column = {subset: k for k, subset in enumerate(subsets)}
    found = labels.unique().tolist()
    unknown = [label for label in found if label not in column and label >= 0]
    if unknown and index is None:
        raise InputError(f"test holds the label {unknown[0]}, which no ticket stands for: pass parts.apply(test)")
    return np.array([column.get(int(label), -1) for label in labels])
