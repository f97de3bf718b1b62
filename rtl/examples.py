"""Test samples that tickets get right and wrong, for people to look at."""

from __future__ import annotations

import base64
import io
from typing import Any

import torch
from torch import Tensor

from rtl.data import Data

KINDS = ("right", "missed", "false alarm")


def pick(names: tuple[str, ...], scores: Tensor, truth: Tensor, each: int = 4) -> list[dict[str, Any]]:
    """For each one-vs-rest ticket its surest right answers, and its worst wrong ones of both kinds.

    Args:
        names: of the K tickets.
        scores: probabilities (N, K).
        truth: number of each sample's own ticket, int64 (N,), -1 for none.
        each: most of every kind.

    Returns:
        "ticket", "kind" (right: its own and taken; missed: its own, not taken; false alarm: another's, taken),
        "sample" (position), "score" and "own" (name of the sample's own ticket, or "").
    """
    found = []
    for k, name in enumerate(names):
        score, own = scores[:, k], truth == k
        taken = score >= 0.5
        for kind, mask, order in (
            (KINDS[0], own & taken, -score),
            (KINDS[1], own & ~taken, score),
            (KINDS[2], ~own & taken, -score),
        ):
            ranked = order.masked_fill(~mask, float("inf")).argsort(stable=True)[: min(each, int(mask.sum()))]
            for i in ranked.tolist():
                whose = names[int(truth[i])] if int(truth[i]) >= 0 else ""
                found.append({"ticket": name, "kind": kind, "sample": i, "score": float(score[i]), "own": whose})
    return found


def with_pictures(chosen: list[dict[str, Any]], data: Data) -> list[dict[str, Any]]:
    """The chosen samples with a "picture" each, a PNG as a data URI, where `data` holds images of 1 or 3 channels.

    Of raw inputs, before normalisation: pixels as they are, other values over each sample's own range.
    """
    if data.inputs.dim() != 4 or data.inputs.shape[1] not in (1, 3):
        return chosen
    return [one | {"picture": _png(data.inputs[one["sample"]])} for one in chosen]


def _png(values: Tensor) -> str:
    from PIL import Image

    if values.dtype != torch.uint8:
        low, high = values.aminmax()
        values = ((values - low) / (high - low).clamp(min=1e-12) * 255).round().to(torch.uint8)
    array = values.permute(1, 2, 0).contiguous().numpy()
    buffer = io.BytesIO()
    Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(buffer, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
