"""Curves and pictures of a run for TensorBoard, an extra: `pip install 'rtl-kernels[tensorboard]'`.

Losses come while tickets train, by epoch, also from worker processes; similarity, round by round, and its matrices as
pictures, when an extraction has ended; metrics, by permille of sparsity, and sample pictures, at the end. A run that is
resumed adds to what is there.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rtl.curve import mean_to_others
from rtl.errors import InputError
from rtl.progress import Event
from rtl.tickets import Tickets

_CELL = 16  # pixels of a matrix's cell


class Board:
    """A folder of TensorBoard events; a context manager. Raises InputError if TensorBoard is not installed."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError(
                f"tensorboard is asked for, but not installed ({error}): pip install 'rtl-kernels[tensorboard]'"
            ) from error
        self._writer = SummaryWriter(str(folder))

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def event(self, event: Event) -> None:
        """What `Progress.listen` is given."""
        for name, value in event.values.items():
            self._scalar(f"{event.label}/{name}", value, event.done)

    def tickets(self, name: str, tickets: Tickets) -> None:
        """Similarity of an extraction's tickets after every round, and its matrices. Nothing for a single ticket."""
        curve = tickets.curve
        if curve is None or len(curve.names) < 2:
            return
        jaccard = curve.jaccard()
        lines = {"similarity/mean": mean_to_others(jaccard).mean(1)}
        lines["similarity/independent masks"] = mean_to_others(curve.independent()).mean(1)
        lines["similarity/identical masks"] = mean_to_others(curve.identical()).mean(1)
        lines |= {f"similarity/{ticket}": mean_to_others(jaccard)[:, k] for k, ticket in enumerate(curve.names)}
        lines |= {f"similarity/layers/{layer}": mean_to_others(curve.jaccard(layer)).mean(1) for layer in curve.layers}
        lines["sparsity"] = curve.sparsity.mean(1)
        for line, values in lines.items():
            for number, value in enumerate(values.tolist()):
                self._scalar(f"{name}{line}", value, number)
        for number in range(len(curve)):
            self._image(f"{name}similarity/matrix", heat(jaccard[number]), number)

    def results(self, rows: Sequence[Mapping[str, Any]], details: Mapping[str, Any]) -> None:
        """Metrics of every method, and pictures of samples that tickets get right and wrong."""
        for row in rows:
            label = f"seed-{row['seed']}/{row['method']}" + (f" ({row['variant']})" if row["variant"] else "")
            for name, value in row["metrics"].items():
                self._scalar(f"results/{name}/{label}", value, round(1000 * row["sparsity"]))
        for level, examples in details.get("examples", {}).items():
            for one in examples:
                if "picture" in one:
                    tag = f"examples/{one['ticket']}/{one['kind']}"
                    self._image(tag, _decoded(one["picture"]), round(1000 * float(level)))

    def _scalar(self, tag: str, value: float, step: int) -> None:
        self._writer.add_scalar(tag, value, step)

    def _image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        self._writer.add_image(tag, pixels, step, dataformats="HWC")


def heat(matrix: Tensor) -> np.ndarray:
    """A similarity matrix (K, K) as a picture, uint8 (16 K, 16 K, 3): viridis over the range off the diagonal."""
    import matplotlib

    off = ~torch.eye(len(matrix), dtype=torch.bool)
    low, high = matrix[off].aminmax()
    share = ((matrix - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).numpy()
    colours = matplotlib.colormaps["viridis"](share)[:, :, :3]
    return (np.kron(colours, np.ones((_CELL, _CELL, 1))) * 255).round().astype(np.uint8)


def _decoded(uri: str) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        return np.array(image.convert("RGB"))
