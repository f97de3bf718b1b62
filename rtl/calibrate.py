"""Calibration: scores of classes made comparable with ½, and with one another, on data held out of training.

Tickets are trained apart, each against as many negatives as positives: one may score high where another scores low, and
at the natural rate of classes half a probability is not half. Scores here are log-odds, log p / (1 − p), of each class.
Every method is calibrated alike, from 4 numbers a class:

threshold: p = σ(a·z + b) for each class by itself, by logistic regression in which a class and the rest weigh equally
           (J. Platt, "Probabilistic Outputs for Support Vector Machines", 1999).
argmax:    the highest a·z + b, by the cross-entropy of their softmax ("vector scaling": C. Guo et al., "On Calibration
           of Modern Neural Networks", arXiv 1706.04599).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rtl.errors import InputError


@dataclass(frozen=True, eq=False)
class Calibration:
    """Slope and offset of each class, float64 (2, C), for the threshold and for argmax."""

    threshold: Tensor
    argmax: Tensor

    def probabilities(self, log_odds: Tensor) -> Tensor:
        """(N, C) log-odds to what is compared with ½, float64 in [0, 1]."""
        return (self.threshold[0] * log_odds + self.threshold[1]).sigmoid()

    def ranking(self, log_odds: Tensor) -> Tensor:
        """(N, C) log-odds to what is compared between classes, float64."""
        return self.argmax[0] * log_odds + self.argmax[1]


def calibrate(log_odds: Tensor, labels: Tensor) -> Calibration:
    """Fit a calibration.

    Args:
        log_odds: (N, C), of samples that nothing was trained on.
        labels: (N,) int64 in 0..C-1.

    Raises:
        InputError: a class without samples, or log-odds that are not finite.
    """
    log_odds = log_odds.double()
    count = torch.bincount(labels, minlength=log_odds.shape[1])
    if not log_odds.isfinite().all():
        raise InputError("log_odds holds NaN or infinity, expected finite scores: training diverged")
    if len(count) != log_odds.shape[1] or int(count.min()) == 0 or len(count) < 2:
        raise InputError(f"labels has {count.tolist()} samples of the classes, expected 2 or more classes, none empty")
    # Fitted in units of each class's own spread: else fits stop too early where scores hardly differ. A class whose
    # scores do not, as of a collapsed ticket, gets the slope 0.
    centre, spread = log_odds.mean(0), log_odds.std(0, correction=0)
    per_unit = torch.where(spread > 1e-6, 1 / spread.clamp(min=1e-6), 0.0)
    standard = (log_odds - centre) * per_unit

    def back(fitted: Tensor) -> Tensor:
        slope = fitted[0] * per_unit
        return torch.stack([slope, fitted[1] - slope * centre])

    return Calibration(back(_platt(standard, labels)), back(_vector_scaling(standard, labels)))


def _platt(scores: Tensor, labels: Tensor) -> Tensor:
    from sklearn.linear_model import LogisticRegression

    fitted = torch.empty(2, scores.shape[1], dtype=torch.float64)
    for k in range(scores.shape[1]):
        # Its penalty on the slope is negligible, and keeps classes that can be told apart exactly finite.
        model = LogisticRegression(C=1e4, class_weight="balanced").fit(scores[:, k : k + 1].numpy(), labels == k)
        fitted[0, k], fitted[1, k] = float(model.coef_[0, 0]), float(model.intercept_[0])
    return fitted


def _vector_scaling(scores: Tensor, labels: Tensor) -> Tensor:
    fitted = torch.stack([torch.ones(scores.shape[1]), torch.zeros(scores.shape[1])]).double().requires_grad_()
    optimizer = torch.optim.LBFGS([fitted], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        # The same small penalty, for the same reason.
        value = F.cross_entropy(fitted[0] * scores + fitted[1], labels) + 1e-6 * fitted.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return fitted.detach()
