"""What a finished run says of files: each sample is routed to a ticket, and the ticket answers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rtl import route
from rtl.data import Data
from rtl.data.base import check_depth
from rtl.errors import InputError
from rtl.run import write_atomically
from rtl.tickets import TicketNetwork, saved_levels


@dataclass(frozen=True)
class Inputs:
    """How a run's samples are read from files.

    Attributes:
        shape: of one sample.
        mean, std: per channel, of values in [0, 1]; empty for none.
        class_names: of the labels.
        images: whether samples are pictures (1 or 3 channels of two dimensions), which image files hold.
    """

    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]

    @property
    def images(self) -> bool:
        return len(self.shape) == 3 and self.shape[0] in (1, 3)

    @classmethod
    def of(cls, data: Data) -> Inputs:
        return cls(tuple(data.inputs.shape[1:]), data.mean, data.std, data.class_names)

    def save(self, folder: Path) -> None:
        write_atomically(folder / "inputs.json", (json.dumps(dataclasses.asdict(self), indent=2) + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> Inputs:
        """What `save` wrote. Raises InputError if it is not there."""
        try:
            values = json.loads((folder / "inputs.json").read_text())
            return cls(**{name: tuple(values[name]) for name in ("shape", "mean", "std", "class_names")})
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"run's tickets in {str(folder)!r} do not say how samples are read ({error}): repeat its `rtl run`, "
                "which adds what an older version left out"
            ) from error

    def read(self, files: Sequence[Path], resize: bool = False) -> tuple[Data, list[str]]:
        """Samples of files and what to call each: pictures, or .npy arrays of one sample or of several.

        Raises InputError for a file that holds no sample of this shape.
        """
        samples, names = [], []
        for file in files:
            found = self._array(file) if file.suffix.lower() == ".npy" else self._picture(file, resize)[None]
            samples.append(found)
            names += [str(file)] if len(found) == 1 else [f"{file}[{i}]" for i in range(len(found))]
        inputs = torch.cat(samples)
        unknown = torch.zeros(len(inputs), dtype=torch.int64)
        return Data(inputs, unknown, mean=self.mean, std=self.std, name="files"), names

    def _picture(self, file: Path, resize: bool) -> Tensor:
        from PIL import Image, UnidentifiedImageError

        if not self.images:
            raise InputError(f"file is {str(file)!r}, but samples have shape {self.shape}: give .npy arrays")
        try:
            with Image.open(file) as opened:
                check_depth(opened, f"file is {str(file)!r}")
                image = opened.convert("L" if self.shape[0] == 1 else "RGB")
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise InputError(f"file is {str(file)!r}, which cannot be read as a picture ({error})") from error
        height, width = self.shape[1:]
        if resize:
            image = image.resize((width, height))
        if image.size != (width, height):
            raise InputError(
                f"file is {str(file)!r} of {image.width} × {image.height} pixels, but samples have {width} × {height}: "
                "crop it, or add --resize"
            )
        pixels = torch.from_numpy(np.array(image)).to(torch.float32) / 255
        return pixels[None] if self.shape[0] == 1 else pixels.permute(2, 0, 1).contiguous()

    def _array(self, file: Path) -> Tensor:
        try:
            array = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:  # EOFError: it is empty
            raise InputError(f"file is {str(file)!r}, which cannot be read as an array ({error})") from error
        if not isinstance(array, np.ndarray):
            raise InputError(f"file is {str(file)!r}, an archive of arrays: give each as a .npy file")
        if array.shape == self.shape:
            array = array[None]
        pixels = array.dtype == np.uint8  # which scale other whole numbers have is not known
        if array.shape[1:] != self.shape or len(array) == 0 or not (array.dtype.kind == "f" or pixels):
            raise InputError(
                f"file is {str(file)!r}, {array.dtype} of shape {array.shape}, but samples are floats (or uint8 "
                f"pixels) of shape {self.shape}, one or several"
            )
        with np.errstate(over="ignore"):  # said below
            values = torch.from_numpy(array.astype(np.float32))
        if not bool(values.isfinite().all()):
            raise InputError(f"file is {str(file)!r}, which holds NaN, infinity or what float32 cannot hold")
        return values / 255 if pixels else values


# What to do with tickets that name no class.
_INSTEAD = {
    "enhancement": "give `rtl enhance` the recording and its scene",
    "pixels": "its pictures are in the run's media and report.html",
}


def open_run(folder: Path, sparsity: float | None = None) -> tuple[TicketNetwork, Path]:
    """A finished run's tickets and their folder. `sparsity` None: the least.

    Raises InputError if the run has none, or not at this sparsity.
    """
    levels = saved_levels(folder)
    if not levels:
        raise InputError(f"run is {str(folder)!r}, which holds no tickets: finish its `rtl run`")
    chosen = min(levels) if sparsity is None else sparsity
    if chosen not in levels:
        raise InputError(f"sparsity is {chosen}, but the run has tickets at {', '.join(f'{s:g}' for s in levels)}")
    return TicketNetwork.from_pretrained(levels[chosen]), levels[chosen]


def predict(
    folder: Path, files: Sequence[Path], sparsity: float | None = None, by: str = "confidence", resize: bool = False
) -> list[dict[str, Any]]:
    """Route the samples of files and let their tickets answer.

    Args:
        folder: of a finished run.
        files: pictures, or .npy arrays.
        sparsity: which of its tickets; None: the least sparse.
        by: "confidence", "centroid", or the context: the name of a ticket for all of them.
        resize: bring pictures to the samples' size.

    Returns:
        For each sample "sample", "ticket", "probability" (that this is its ticket), "answer" and "score": one-vs-rest,
        whether the ticket takes the sample for its own, and its probability; multi-class, the class and its
        probability.

    Raises:
        InputError: no such run, router or ticket, or a file that does not fit.
    """
    net, place = open_run(folder, sparsity)
    if net.task not in ("one_vs_rest", "multi_class"):
        instead = _INSTEAD.get(net.task, "call the network itself (rtl.TicketNetwork.from_pretrained)")
        raise InputError(f"run's task is {net.task!r}, whose tickets name no class: {instead}")
    inputs = Inputs.load(place)
    if by in route.METHODS:
        router = route.Router.load(place, by)
        data, names = inputs.read(files, resize)
        routing = router(net, data)
    else:
        net.position(by)
        data, names = inputs.read(files, resize)
        routing = route.by_context(net, [by] * len(data))
    answers = _answers(net, data, routing.ticket, inputs.class_names)
    return [
        {"sample": name, "ticket": net.names[ticket], "probability": p, "answer": answer, "score": score}
        for name, ticket, p, (answer, score) in zip(
            names, routing.ticket.tolist(), routing.probability.tolist(), answers, strict=True
        )
    ]


@torch.no_grad()
def _answers(net: TicketNetwork, data: Data, ticket: Tensor, classes: Sequence[str]) -> list[tuple[str, float]]:
    net.eval()
    found: list[tuple[str, float]] = []
    for index in torch.arange(len(data)).split(512):
        output = net(data.batch(index)[0], ticket[index])
        if net.task == "one_vs_rest":
            logits = torch.tensor(net.outputs)[ticket[index]]
            for k, score in zip(
                ticket[index].tolist(), output.gather(1, logits[:, None]).sigmoid()[:, 0].tolist(), strict=True
            ):
                found.append((net.names[k] if score >= 0.5 else f"not {net.names[k]}", score))
        else:
            scores, labels = output.softmax(1).max(1)
            found += [
                (classes[k] if classes else str(k), s) for k, s in zip(labels.tolist(), scores.tolist(), strict=True)
            ]
    return found
