"""What every recipe reads: samples and targets held in memory, and the folder that real data lies in."""

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rtl.errors import InputError, expect


@dataclass(frozen=True, eq=False)
class Data:
    """Samples with their targets.

    Args:
        inputs: (N, ...) float32, or uint8 for pixels 0..255. Finite.
        targets: (N,) int64 labels, or (N, ...) float32. Finite.
        class_names: the name of each label; empty when there are none.
        metadata: for each key one value a sample, e.g. the acoustic scene of a clip.
        mean, std: per channel (dimension 1 of `inputs`), in units of `inputs`, of pixels / 255 for uint8; empty for
            none. `inputs` are kept as given, `batch` normalises.
        name: of the data set, for reports.

    Raises:
        InputError: a length, dtype, label or value that does not fit the above.
    """

    inputs: Tensor
    targets: Tensor
    class_names: tuple[str, ...] = ()
    metadata: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    name: str = "data"

    def __post_init__(self) -> None:
        for argument in ("inputs", "targets"):
            expect(argument, getattr(self, argument), Tensor, "a tensor")
        for argument in ("mean", "std"):
            expect(argument, getattr(self, argument), (tuple, list), "a tuple of floats, one a channel")
        if self.inputs.dtype not in (torch.float32, torch.uint8) or self.inputs.dim() < 2:
            raise InputError(f"inputs is {_describe(self.inputs)}, but float32 or uint8 of shape (N, ...) is needed")
        labels = self.targets.dtype == torch.int64 and self.targets.dim() == 1
        if not labels and (self.targets.dtype != torch.float32 or self.targets.dim() < 1):
            raise InputError(
                f"targets is {_describe(self.targets)}, but int64 labels of shape (N,) or float32 (N, ...) are needed"
            )
        if len(self.targets) != len(self):
            raise InputError(f"targets holds {len(self.targets)} samples, but inputs {len(self)}: give one each")
        for argument, values in (("inputs", self.inputs), ("targets", self.targets)):
            if values.is_floating_point() and not torch.isfinite(values).all():
                raise InputError(f"{argument} holds NaN or infinity: remove those samples")
        if labels:
            self._check_labels()
        for key, column in self.metadata.items():
            if len(column) != len(self):
                raise InputError(
                    f"metadata[{key!r}] has {len(column)} values for {len(self)} samples: give one for each sample"
                )
        self._check_statistics()

    def _check_labels(self) -> None:
        if len(self) == 0:
            return
        low, high = (int(label) for label in torch.aminmax(self.targets))
        if low < 0:
            raise InputError(f"targets holds the label {low}: labels are 0 or above")
        if self.class_names and high >= len(self.class_names):
            raise InputError(f"targets holds the label {high}, but class_names has {len(self.class_names)} names")

    def _check_statistics(self) -> None:
        if len(self.mean) != len(self.std):
            raise InputError(f"mean has {len(self.mean)} values and std {len(self.std)}: give one of each a channel")
        channels = self.inputs.shape[1]
        if self.mean and len(self.mean) != channels:
            raise InputError(f"mean has {len(self.mean)} values, but inputs {channels} channels (dimension 1)")
        if not all(s > 0 for s in self.std):
            raise InputError(f"std is {self.std}: every value has to be above 0")

    def __len__(self) -> int:
        return len(self.inputs)

    @cached_property
    def _affine(self) -> tuple[Tensor, Tensor] | None:
        """(scale, shift), shaped to broadcast: the normalised input is `raw * scale - shift`. None for no change."""
        unit = 255.0 if self.inputs.dtype == torch.uint8 else 1.0
        if not self.mean and unit == 1.0:
            return None
        mean = torch.tensor(self.mean or (0.0,), dtype=torch.float64)
        std = torch.tensor(self.std or (1.0,), dtype=torch.float64)
        shape = (-1,) + (1,) * (self.inputs.dim() - 2)
        scale, shift = (1 / (unit * std)).reshape(shape), (mean / std).reshape(shape)
        return scale.to(self.inputs.device, torch.float32), shift.to(self.inputs.device, torch.float32)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The samples at `index`, ready for a model.

        Args:
            index: (B,) int64, positions 0..N-1 in any order, repeats allowed; on the device of `inputs`.

        Returns:
            Normalised inputs (B, ...) float32 (uint8 pixels are divided by 255 in any case), and their targets.
        """
        inputs, targets = self.inputs.index_select(0, index), self.targets.index_select(0, index)
        if self._affine is not None:
            scale, shift = self._affine
            inputs = inputs.to(torch.float32).mul_(scale).sub_(shift)
        return inputs, targets

    def select(self, index: Tensor) -> "Data":
        """The samples at `index` ((B,) int64, in that order) as data of their own, nothing normalised yet."""
        positions = index.tolist()
        columns = {key: listed(column) for key, column in self.metadata.items()}
        return Data(
            self.inputs.index_select(0, index),
            self.targets.index_select(0, index),
            self.class_names,
            {key: [column[i] for i in positions] for key, column in columns.items()},
            self.mean,
            self.std,
            self.name,
        )


def listed(column: Any) -> list[Any]:
    """A column of metadata as plain values by position: an element of a tensor is unequal to any number in a dict,
    and pandas looks up a name.
    """
    return column.tolist() if isinstance(column, (Tensor, np.ndarray)) else list(column)


def from_dataset(dataset: Any, class_names: Sequence[str] | None = None) -> Data:
    """Reads a map-style torch Dataset of (input, label) pairs into memory.

    Args:
        dataset: has `len` and integer indexing. An input is a PIL image, a numpy array or a tensor, all of one shape:
            images, (H, W) arrays and (H, W, C) arrays become (C, H, W) as in torchvision; tensors and other arrays
            keep their shape. uint8 stays uint8, floating point becomes float32. A label is an integer, or a float or
            float tensor.
        class_names: the name of each label. None: `dataset.classes` where it has that, as torchvision's do, else none.

    Metadata and normalisation are added by `dataclasses.replace(data, metadata={"site": [...]}, mean=..., std=...)`.

    Raises:
        InputError: no map-style dataset, an empty one, or samples of several shapes, or of a dtype that is not named
            above.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise InputError(f"dataset is a {type(dataset).__name__}, but one with a length and integer indexing is needed")
    if len(dataset) == 0:
        raise InputError(f"dataset ({type(dataset).__name__}) is empty: give one with samples")
    inputs = targets = None
    for i in range(len(dataset)):
        pair = dataset[i]
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            count = f" of {len(pair)}" if isinstance(pair, tuple | list) else ""
            raise InputError(f"dataset[{i}] is a {type(pair).__name__}{count}, but a pair (input, label) is needed")
        sample, label = pair
        value, target = _input_tensor(sample, i), _target_tensor(label, i)
        if inputs is None or targets is None:
            inputs = torch.empty((len(dataset), *value.shape), dtype=value.dtype)
            targets = torch.empty((len(dataset), *target.shape), dtype=target.dtype)
        for what, found, all_found in (("input", value, inputs), ("label", target, targets)):
            if found.shape != all_found.shape[1:] or found.dtype != all_found.dtype:
                raise InputError(
                    f"the {what} of dataset[{i}] is {_describe(found)}, but that of dataset[0] is "
                    f"{_describe(all_found[0])}: bring all samples to one shape and dtype"
                )
        inputs[i], targets[i] = value, target
    assert inputs is not None
    assert targets is not None
    names = getattr(dataset, "classes", ()) if class_names is None else class_names
    return Data(inputs, targets, tuple(names), name=type(dataset).__name__)


def data_root(path: str | os.PathLike[str] | None) -> Path:
    """The folder that holds the data: `path`, or where that is None the environment variable RTL_DATA.

    Raises:
        InputError: neither is given, or there is no such folder.
    """
    source = "the data root" if path is not None else "the environment variable RTL_DATA"
    path = path if path is not None else os.environ.get("RTL_DATA")
    if not path:
        raise InputError("no data root: give one (--data DIR), or set the environment variable RTL_DATA to it")
    folder = Path(path).expanduser()
    if not folder.is_dir():
        reason = "is not a folder" if folder.exists() else "does not exist"
        raise InputError(f"{source} is {str(folder)!r}, which {reason}: give a folder that holds the data")
    return folder


def read_csv(file: Path, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """The lines of a CSV file below its headings: the number of each in the file, and its values, "" for none.

    Raises InputError: the file is no CSV in UTF-8 (with or without the mark that Excel begins with), or lacks one of
    `columns`.
    """
    with open(file, newline="", encoding="utf-8-sig") as text:
        reader = csv.DictReader(text, restval="")
        try:
            missing = [column for column in columns if column not in (reader.fieldnames or ())]
            if missing:
                expected = f"{', '.join(columns[:-1])} and {columns[-1]}"
                raise InputError(f"{file} lacks the column {missing[0]}, expected {expected}")
            return [(reader.line_num, line) for line in reader]
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{file} cannot be read as CSV in UTF-8: {error}") from error


def check_depth(image: Any, what: str) -> None:
    """Raise InputError, beginning with `what`, for a PIL picture of more than 8 bits: converting it cuts off at 255."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        raise InputError(f"{what}, of mode {image.mode}: give one of 8 bits a channel, or an array of floats")


def _input_tensor(sample: Any, position: int) -> Tensor:
    from PIL import Image

    if isinstance(sample, Image.Image):
        check_depth(sample, f"the input of dataset[{position}] is a picture")
        sample = np.asarray(sample if sample.mode in ("L", "RGB") else sample.convert("RGB"))
    if isinstance(sample, np.ndarray) and sample.dtype.kind in "uf":
        value = torch.tensor(sample)
        value = value[None] if value.dim() == 2 else value.permute(2, 0, 1) if value.dim() == 3 else value
    elif isinstance(sample, Tensor):
        value = sample.detach()
    else:
        what = f"a {type(sample).__name__}" + (f" of {sample.dtype}" if isinstance(sample, np.ndarray) else "")
        raise InputError(
            f"the input of dataset[{position}] is {what}, but an image, or an array or a tensor of uint8 or floating "
            "point is needed: convert it"
        )
    if value.is_floating_point():
        return value.to(torch.float32)
    if value.dtype != torch.uint8:
        raise InputError(
            f"the input of dataset[{position}] is {value.dtype}, but uint8 or floating point is needed: convert it"
        )
    return value


def _target_tensor(label: Any, position: int) -> Tensor:
    try:
        value = torch.as_tensor(label)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"the label of dataset[{position}] is {label!r}, but an integer, a float or a tensor is needed: convert it"
        ) from None
    return value.to(torch.float32 if value.is_floating_point() else torch.int64)


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"
