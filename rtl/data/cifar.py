"""CIFAR-10 and CIFAR-100, from torchvision's files or from mosaics of lossless WebP.

The data: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rtl.data.base import Data, data_root
from rtl.errors import InputError

SIDE = 32  # pixels


@dataclass(frozen=True)
class _Layout:
    """Where one of the two data sets lies, and what its files call things."""

    name: str
    classes: int
    folder: str  # of mosaics
    torchvision: str  # folder of pickles
    batches: tuple[str, ...]
    test: str
    meta: str
    labels: bytes
    names: bytes
    mean: tuple[float, ...]  # of all train pixels / 255
    std: tuple[float, ...]


_CIFAR10 = _Layout(
    "CIFAR-10",
    10,
    "cifar10",
    "cifar-10-batches-py",
    tuple(f"data_batch_{i}" for i in range(1, 6)),
    "test_batch",
    "batches.meta",
    b"labels",
    b"label_names",
    (0.49139968, 0.48215841, 0.44653091),
    (0.24703223, 0.24348513, 0.26158784),
)
_CIFAR100 = _Layout(
    "CIFAR-100",
    100,
    "cifar100",
    "cifar-100-python",
    ("train",),
    "test",
    "meta",
    b"fine_labels",
    b"fine_label_names",
    (0.50707516, 0.48654887, 0.44091784),
    (0.26733429, 0.25643846, 0.27615047),
)


def cifar10(root: str | os.PathLike[str] | None, parts: int | None = None) -> tuple[Data, Data]:
    """CIFAR-10 as (train, test).

    Args:
        root: a folder of mosaics (`labels.npz`, `train_0.webp` on, `test.webp`) or of torchvision's batches
            (`data_batch_1` to `5`, `test_batch`, `batches.meta`), or the data root with such a folder inside, named
            `cifar10` or `cifar-10-batches-py`. None: the environment variable RTL_DATA.
        parts: how many of the train mosaics or batches to read, from the first on. None: all.

    Returns:
        Inputs (N, 3, 32, 32) uint8, targets (N,) int64, with the data set's per-channel mean and deviation. Pickles
        are read without running anything in them.

    Raises:
        InputError: no such folder, files that do not fit one another, or more parts than there are.
    """
    return _cifar(_CIFAR10, root, parts, coarse=False)


def cifar100(root: str | os.PathLike[str] | None, parts: int | None = None, coarse: bool = False) -> tuple[Data, Data]:
    """CIFAR-100 as (train, test): as `cifar10`, from folders `cifar100` or `cifar-100-python` (one train batch).

    Args:
        root, parts: as in `cifar10`.
        coarse: label with the 20 superclasses instead of the 100 classes.
    """
    return _cifar(_CIFAR100, root, parts, coarse)


def _cifar(layout: _Layout, root: str | os.PathLike[str] | None, parts: int | None, coarse: bool) -> tuple[Data, Data]:
    given = data_root(root)
    folders = (given, given / layout.folder, given / layout.torchvision, given / layout.folder / layout.torchvision)
    for folder in folders:
        if (folder / "labels.npz").is_file():
            return _from_mosaics(layout, folder, parts, coarse)
        if (folder / layout.meta).is_file():
            return _from_batches(layout, folder, parts, coarse)
    raise InputError(
        f"no {layout.name} in {str(given)!r}: looked for labels.npz with train_0.webp, or {layout.meta} with "
        f"{layout.batches[0]}, there and in {', '.join(str(f.relative_to(given)) for f in folders[1:])} below it"
    )


def _data(layout: _Layout, inputs: Tensor, labels: Tensor, names: Sequence[str]) -> Data:
    return Data(inputs, labels, tuple(names), mean=layout.mean, std=layout.std, name=layout.name)


def _check_parts(parts: int | None, available: int, unit: str, folder: Path) -> int:
    if parts is None:
        return available
    if not 1 <= parts <= available:
        raise InputError(f"parts is {parts}, but {str(folder)!r} has {available} {unit}: give 1..{available} or None")
    return parts


# Mosaics: each file a grid of 32×32 RGB tiles, row by row, labels in that order.


def _from_mosaics(layout: _Layout, folder: Path, parts: int | None, coarse: bool) -> tuple[Data, Data]:
    mosaics: list[Path] = []
    while (folder / f"train_{len(mosaics)}.webp").is_file():
        mosaics.append(folder / f"train_{len(mosaics)}.webp")
    test = folder / "test.webp"
    if not mosaics or not test.is_file():
        raise InputError(f"{str(folder)!r} has labels.npz but no {'test' if mosaics else 'train_0'}.webp: add it")
    try:
        with np.load(folder / "labels.npz") as archive:
            table = {key: archive[key] for key in archive.files}
        train_labels, test_labels = (torch.from_numpy(table[f"{p}_labels"]).to(torch.int64) for p in ("train", "test"))
        classes = len(table["class_names"])
        names = [str(name) for name in table["coarse_names" if coarse else "class_names"]]
        if coarse:
            to_coarse = torch.from_numpy(table["fine_to_coarse"]).to(torch.int64)
            train_labels, test_labels = to_coarse[train_labels], to_coarse[test_labels]
    except Exception as error:  # a file from elsewhere can be wrong in any way
        raise InputError(f"{str(folder / 'labels.npz')!r} cannot be read ({error!r}): get the file again") from error
    if classes != layout.classes:
        raise InputError(f"{str(folder)!r} has {classes} classes, but {layout.name} {layout.classes}: give its folder")
    chosen = _check_parts(parts, len(mosaics), "train mosaics", folder)
    train_inputs, test_inputs = _tiles(mosaics[:chosen]), _tiles([test])
    if chosen < len(mosaics):
        train_labels = train_labels[: len(train_inputs)]
    return (
        _data(layout, train_inputs, _check_count(train_labels, train_inputs, folder / "train_*.webp"), names),
        _data(layout, test_inputs, _check_count(test_labels, test_inputs, test), names),
    )


def _check_count(labels: Tensor, inputs: Tensor, files: Path) -> Tensor:
    if len(labels) != len(inputs):
        raise InputError(f"{str(files)!r} holds {len(inputs)} images, but labels.npz {len(labels)} labels: get both")
    return labels


def _tiles(paths: Sequence[Path]) -> Tensor:
    """The tiles of all mosaics, (N, 3, 32, 32) uint8, with one mosaic decoded at a time."""
    from PIL import Image

    try:
        grids = []  # rows, columns of tiles
        for path in paths:
            with Image.open(path) as image:
                grids.append((image.height // SIDE, image.width // SIDE))
        inputs = torch.empty((sum(r * c for r, c in grids), 3, SIDE, SIDE), dtype=torch.uint8)
        filled = 0
        for path, (rows, columns) in zip(paths, grids, strict=True):
            with Image.open(path) as image:
                pixels = torch.from_numpy(np.array(image.convert("RGB")))
            tiles = pixels[: rows * SIDE, : columns * SIDE].reshape(rows, SIDE, columns, SIDE, 3)
            count = rows * columns
            inputs[filled : filled + count].view(rows, columns, 3, SIDE, SIDE).copy_(tiles.permute(0, 2, 4, 1, 3))
            filled += count
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be decoded ({error}): get the file again") from error
    return inputs


# torchvision's layout: pickled dictionaries with bytes as keys.


def _from_batches(layout: _Layout, folder: Path, parts: int | None, coarse: bool) -> tuple[Data, Data]:
    chosen = _check_parts(parts, len(layout.batches), "train batches", folder)
    labels, names = layout.labels, layout.names
    if coarse:
        labels, names = labels.replace(b"fine", b"coarse"), names.replace(b"fine", b"coarse")
    class_names = [name.decode() for name in _entry(_unpickle(folder / layout.meta), names, folder / layout.meta)]
    train = [_read_batch(folder / batch, labels) for batch in layout.batches[:chosen]]
    test_inputs, test_labels = _read_batch(folder / layout.test, labels)
    return (
        _data(layout, torch.cat([x for x, _ in train]), torch.cat([y for _, y in train]), class_names),
        _data(layout, test_inputs, test_labels, class_names),
    )


def _read_batch(path: Path, labels: bytes) -> tuple[Tensor, Tensor]:
    content = _unpickle(path)
    stored, targets = _entry(content, b"data", path), torch.tensor(_entry(content, labels, path), dtype=torch.int64)
    pixels = stored.pixels if isinstance(stored, _Array) else None
    if pixels is None or pixels.shape != (len(targets), 3 * SIDE * SIDE):
        shape = None if pixels is None else pixels.shape
        raise InputError(f"{str(path)!r} has data of shape {shape}, but ({len(targets)}, 3072) is needed: get it again")
    return torch.from_numpy(pixels).view(-1, 3, SIDE, SIDE), targets


def _entry(content: Any, key: bytes, path: Path) -> Any:
    if not isinstance(content, dict) or key not in content:
        raise InputError(f"{str(path)!r} holds no {key.decode()!r}, so it is not a CIFAR file: get the file again")
    return content[key]


class _Dtype:
    """Stands in for `numpy.dtype` in a pickle: only 8-bit unsigned integers, the type of pixels."""

    def __init__(self, code: bytes | str, *flags: Any) -> None:
        if code not in (b"u1", "u1"):
            raise InputError(f"an array of dtype {code!r}, but pixels are uint8")

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like, which single bytes do not have."""


class _Array:
    """Stands in for the `numpy.ndarray` that a pickle would build."""

    pixels: np.ndarray | None = None

    def __init__(self, *initial: Any) -> None:
        """numpy pickles an array as an empty one first, whose state follows."""

    def __setstate__(self, state: tuple[int, tuple[int, ...], _Dtype, bool, bytes]) -> None:
        _, shape, _, fortran, content = state
        order: Any = "F" if fortran else "C"
        self.pixels = np.ascontiguousarray(np.frombuffer(bytearray(content), np.uint8).reshape(shape, order=order))


def _latin1(text: str, encoding: str) -> bytes:
    """Stands in for `_codecs.encode`, as which Python 3 writes bytes in protocol 2."""
    return text.encode("latin1")


_STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _latin1,
}


class _Unpickler(pickle.Unpickler):
    """Reads containers, numbers, strings and uint8 arrays. Whatever else a pickle asks to import is refused.

    The few names that such pickles do need are given our stand-ins, so that a pickle calls nothing outside this file.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise InputError(f"it asks to run {module}.{name}, which no CIFAR file needs")
        return _STAND_INS[module, name]


def _unpickle(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return _Unpickler(file, encoding="bytes").load()
    except FileNotFoundError:
        raise InputError(f"{str(path)!r} is missing: a folder of CIFAR batches needs it") from None
    except Exception as error:  # a pickle from elsewhere can be wrong in any way
        raise InputError(f"{str(path)!r} is refused ({error}): get the file from its source again") from error
