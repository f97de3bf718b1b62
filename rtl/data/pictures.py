"""Photographs as data: a sample a pixel, where it is and its colour; with the region it is in, where a mask says so.

Masks: ADE20K's `NAME_seg.png` (B. Zhou et al., "Semantic Understanding of Scenes through the ADE20K Dataset",
arXiv 1608.05442), and plain label images. 0, or black, is a pixel without label: it goes to the nearest region.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rtl.data.base import Data, read_csv
from rtl.errors import InputError

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
MASK_ENDINGS = ("_mask.png", "_seg.png")
MOST_COLOURS = 256  # of an RGB mask; a photograph has more


@dataclass(frozen=True, eq=False)
class Picture:
    """One image.

    Attributes:
        name: of the file, without its ending.
        height, width: pixels, after scaling.
        data: row by row, inputs (N, 2) float32, x and y in [-1, 1] at the pixels' centres (the longer side spans all of
            it); targets (N, 3) float32, RGB in [0, 1]; metadata "region", the name of each pixel's region, where there
            was a mask.
    """

    name: str
    height: int
    width: int
    data: Data


def picture(
    image: str | os.PathLike[str],
    mask: str | os.PathLike[str] | None = None,
    longest_side: int | None = None,
    names: Mapping[int, str] | None = None,
) -> Picture:
    """Read an image, and the regions in it if there is a mask.

    Args:
        image: anything Pillow reads, 8 or 16 bits a channel, grey or in colour. Turned as its EXIF data says;
            transparency is left out.
        mask: of the same size. Grey, palette or 16-bit images hold a number a pixel; `*_seg.png` is read as ADE20K's
            (the class is 256 · (R div 10) + G, instances of one class are merged); any other RGB image as one region
            a colour. 0 or black: no label.
        longest_side: pixels to reduce to, where there are more: the image by averaging, the mask by its nearest label.
        names: of the labels; those of one name are one region. Default: "class-N".

    Raises:
        InputError: a file that cannot be read, a mask of another size, one without any label, or an RGB mask with the
            colours of a photograph.
    """
    image = Path(image)
    if longest_side is not None and longest_side < 2:
        raise InputError(f"longest_side is {longest_side}, expected 2 pixels or more, or None")
    colours = _colours(image)
    labels = None if mask is None else _labels(Path(mask))
    if labels is not None and labels.shape != colours.shape[:2]:
        sizes = [f"{a.shape[1]}x{a.shape[0]}" for a in (labels, colours)]
        raise InputError(f"mask {str(mask)!r} is {sizes[0]} pixels, but the image {sizes[1]}: give one of its size")
    return _picture(image.stem, colours, labels, longest_side, names or {})


def sample_pictures(longest_side: int | None = None) -> list[Picture]:
    """The two photographs that come with scikit-learn, 640×427, without masks: a temple and a flower."""
    from sklearn.datasets import load_sample_images

    found = load_sample_images()
    return [
        _picture(Path(name).stem, pixels.astype(np.float32) / 255, None, longest_side, {})
        for name, pixels in zip(found.filenames, found.images, strict=True)
    ]


def pictures(root: str | os.PathLike[str], names: Sequence[str] = (), longest_side: int | None = None) -> list[Picture]:
    """Every image with a mask in a folder, sorted by name.

    Args:
        root: a folder with a folder `segmentation`, or the folder itself. An image is `NAME.png` (.jpg, ...), its mask
            `NAME_mask.png` or ADE20K's `NAME_seg.png` beside it, in subfolders too; or, as the ADE20K benchmark has
            them, `images/.../NAME.jpg` and `annotations/.../NAME.png`. A file `classes.csv` (columns image,
            mask_value, name) names the labels; of several words for one thing, with commas between, the first is taken.
        names: the images to read; empty: all.
        longest_side: as in `picture`.

    Raises:
        InputError: no such folder, no image with a mask in it, two images or masks of one name, or an image that is not
            there; see also `picture`.
    """
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise InputError(f"data is {str(folder)!r}, which is no folder: give one with images and masks")
    folder = folder / "segmentation" if (folder / "segmentation").is_dir() else folder
    pairs = _pairs(folder)
    if not pairs:
        raise InputError(
            f"data is {str(folder)!r}, which has no image with a mask: looked for NAME.png with NAME_mask.png or "
            "NAME_seg.png, and for images/NAME.jpg with annotations/NAME.png"
        )
    unknown = sorted(set(names) - set(pairs))
    if unknown:
        raise InputError(f"images holds {unknown[0]!r}, but {str(folder)!r} has {_some(sorted(pairs))}")
    classes = _classes(folder / "classes.csv")
    return [
        picture(*pairs[name], longest_side=longest_side, names=classes.get(name)) for name in sorted(names or pairs)
    ]


def _picture(
    name: str, colours: np.ndarray, labels: np.ndarray | None, longest_side: int | None, names: Mapping[int, str]
) -> Picture:
    from PIL import Image

    height, width = colours.shape[:2]
    scale = 1.0 if longest_side is None else min(1.0, longest_side / max(height, width))
    if scale < 1:
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
        planes = [Image.fromarray(colours[:, :, c]) for c in range(3)]  # one float32 plane each
        colours = np.stack([np.asarray(p.resize((width, height), Image.Resampling.BOX)) for p in planes], 2)
        if labels is not None:
            labels = np.asarray(Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST))
    metadata = {}
    if labels is not None:
        filled = _filled(labels, name)
        known = {label: names.get(label, f"class-{label}") for label in np.unique(filled).tolist()}
        metadata["region"] = [known[label] for label in filled.flatten().tolist()]
    targets = torch.from_numpy(colours.reshape(-1, 3).clip(0, 1))
    return Picture(name, height, width, Data(coordinates(height, width), targets, metadata=metadata, name=name))


def coordinates(height: int, width: int) -> Tensor:
    """Pixel centres row by row, (height · width, 2) float32: x and y, the longer side from -1 to 1."""
    half = max(height, width) / 2
    y = (torch.arange(height) + 0.5 - height / 2) / half
    x = (torch.arange(width) + 0.5 - width / 2) / half
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)], 2).reshape(-1, 2)


def _colours(file: Path) -> np.ndarray:
    """(H, W, 3) float32 in [0, 1]."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
            image.load()
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"image is {str(file)!r}, which cannot be read as one: {error}") from error
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.float32)
        if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
            raise InputError(f"image is {str(file)!r}, of mode {image.mode}: give one of 8 or 16 bits a channel")
        return np.repeat((grey / 65535)[:, :, None], 3, axis=2)
    return np.asarray(image.convert("RGB")).astype(np.float32) / 255


def _labels(file: Path) -> np.ndarray:
    """(H, W) int32, 0 for no label."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            image.load()
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"mask is {str(file)!r}, which cannot be read as an image: {error}") from error
    if image.mode in ("1", "L", "P", "I") or image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.int32)
    if image.mode not in ("RGB", "RGBA"):
        raise InputError(f"mask is {str(file)!r}, of mode {image.mode}: give a grey, palette or RGB image")
    red, green, blue = np.moveaxis(np.asarray(image.convert("RGB")).astype(np.int32), 2, 0)
    if file.stem.endswith("_seg"):
        return red // 10 * 256 + green
    colours, numbers = np.unique(red * 65536 + green * 256 + blue, return_inverse=True)
    if len(colours) > MOST_COLOURS:
        raise InputError(
            f"mask is {str(file)!r}, which has {len(colours)} colours, expected one a region ({MOST_COLOURS} at most): "
            "is it the photograph?"
        )
    numbers = numbers.reshape(red.shape).astype(np.int32)
    return numbers if colours[0] == 0 else numbers + 1


def _filled(labels: np.ndarray, name: str) -> np.ndarray:
    """Labels with every 0 replaced by the nearest label (Euclidean)."""
    from scipy.ndimage import distance_transform_edt

    if not labels.any():
        raise InputError(f"the mask of {name!r} labels no pixel (all are 0): give one with regions, or none")
    if labels.all():
        return labels
    rows, columns = distance_transform_edt(labels == 0, return_distances=False, return_indices=True)
    return labels[rows, columns]


def _pairs(folder: Path) -> dict[str, tuple[Path, Path]]:
    """(image, mask) by name. Raises InputError if a name has two images, or two masks."""
    places = [  # of images, without their endings
        (mask.with_name(mask.name.removesuffix(ending)), mask)
        for ending in MASK_ENDINGS
        for mask in sorted(folder.rglob(f"*{ending}"))
    ]
    annotations = folder / "annotations"
    for mask in sorted(annotations.rglob("*.png")):
        places.append((folder / "images" / mask.relative_to(annotations).with_suffix(""), mask))
    found: dict[str, tuple[Path, Path]] = {}
    for place, mask in places:
        for image in (place.with_name(place.name + ending) for ending in IMAGE_ENDINGS):
            if image.is_file():
                before = found.setdefault(place.name, (image, mask))
                for one, other in zip(before, (image, mask), strict=True):
                    if one != other:
                        raise InputError(
                            f"data is {str(folder)!r}, which has {str(one.relative_to(folder))!r} and "
                            f"{str(other.relative_to(folder))!r} for the image {place.name!r}: rename or remove one"
                        )
    return found


def _classes(file: Path) -> dict[str, dict[int, str]]:
    """Names of the labels of each image."""
    found: dict[str, dict[int, str]] = {}
    if file.is_file():
        for number, line in read_csv(file, ("image", "mask_value", "name")):
            if not line["mask_value"].isdecimal() or not line["name"]:
                raise InputError(
                    f"{file} has mask_value {line['mask_value']!r}, name {line['name']!r} in line {number}, expected a "
                    "number and a name"
                )
            found.setdefault(line["image"], {})[int(line["mask_value"])] = line["name"].split(",")[0]
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
