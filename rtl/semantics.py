"""How alike the tickets' names are in meaning: WordNet's path similarity, or a matrix or embedding of one's own.

Path similarity is 1 / (1 + length of the shortest way between two nouns over their hypernyms). That of CIFAR-10's class
names comes with the package; other nouns are looked up in WordNet files the user has. WordNet 3.0, G. A. Miller,
Communications of the ACM 38(11), 1995; its licence stands in `rtl/data/wordnet_cifar10.json`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rtl.alignment import symmetric
from rtl.errors import InputError

_CIFAR10 = Path(__file__).parent / "data" / "wordnet_cifar10.json"
_DEBIAN = Path("/usr/share/wordnet")


def known(names: Sequence[str]) -> Tensor | None:
    """Path similarity of names that are all CIFAR-10 classes, float64 (K, K), from the package's table; else None."""
    table = json.loads(_CIFAR10.read_text())
    if not set(names) <= set(table["names"]):
        return None
    index = [table["names"].index(name) for name in names]
    return torch.tensor(table["path_similarity"], dtype=torch.float64)[index][:, index]


def wordnet(
    names: Sequence[str], folder: str | os.PathLike[str] | None = None, senses: Mapping[str, str] | None = None
) -> Tensor:
    """Path similarity between nouns, float64 (K, K), with ones on the diagonal.

    Args:
        names: nouns, words joined by underscores or spaces.
        folder: WordNet's database (`index.noun` and `data.noun`, as in Debian's wordnet-base), or a folder with
            `noun_hypernyms.json`, or a data root with such a folder named `wordnet`. None: what the environment
            variables WNSEARCHDIR or RTL_DATA name, or /usr/share/wordnet.
        senses: what a name stands for where it is not its first sense: {"seal": "seal.n.09"} or another noun.

    Raises:
        InputError: no such files, or a name that WordNet does not have as a noun.
    """
    find, hypernyms = _reader(folder)
    above = []
    for name in names:
        wanted = (senses or {}).get(name, name)
        synset = find(wanted)
        if synset is None:
            raise InputError(
                f"names holds {name!r}, but WordNet has no noun {wanted!r}: say what it stands for, for example "
                f"senses={{{name!r}: 'dog.n.01'}}"
            )
        above.append(_distances(synset, hypernyms))
    matrix = torch.zeros(len(names), len(names), dtype=torch.float64)
    for i, first in enumerate(above):
        for j, second in enumerate(above):
            ways = [steps + second[synset] for synset, steps in first.items() if synset in second]
            matrix[i, j] = 1 / (1 + min(ways)) if ways else 0.0
    return matrix


def from_embedding(vectors: Tensor | np.ndarray) -> Tensor:
    """Cosine similarity of K vectors (K, D), float64 (K, K). Raises InputError for other shapes, zeros or NaN."""
    points = torch.as_tensor(vectors).to(torch.float64)
    if points.dim() != 2 or not bool(torch.isfinite(points).all()) or bool((points.norm(dim=1) == 0).any()):
        raise InputError(f"vectors has shape {tuple(points.shape)}, expected (K, D), finite and none of them zero")
    unit = points / points.norm(dim=1, keepdim=True)
    cosine = unit @ unit.T
    return (cosine + cosine.T) / 2  # which differ in their last bits


def read(source: str | os.PathLike[str], names: Sequence[str]) -> Tensor:
    """Semantic similarity of `names`, float64 (K, K), from a path a user names.

    Args:
        source: a folder for `wordnet`; or a JSON file with "names" and either "matrix" (symmetric) or "embedding" (a
            vector a name), in any order.
        names: of the tickets.

    Raises:
        InputError: neither, or names the file does not have.
    """
    path = Path(source)
    if path.is_dir():
        return wordnet(names, path)
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict) or "names" not in content or not {"matrix", "embedding"} & content.keys():
            raise ValueError('it has no "names" with a "matrix" or an "embedding"')
        index = [content["names"].index(name) for name in names]
        if "embedding" in content:
            return from_embedding(torch.tensor(content["embedding"], dtype=torch.float64)[index])
        matrix = torch.tensor(content["matrix"], dtype=torch.float64)[index][:, index]
    except (OSError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise InputError(
            f"semantics is {str(path)!r}, which cannot be used ({error}): give a WordNet folder or JSON"
        ) from error
    if not symmetric(matrix):
        raise InputError(f"semantics is {str(path)!r}, whose matrix is not symmetric or not finite")
    return matrix


Find = Callable[[str], "str | None"]
Hypernyms = Callable[[str], "list[str]"]


def _reader(folder: str | os.PathLike[str] | None) -> tuple[Find, Hypernyms]:
    """Functions from a noun ("seal", "seal.n.09") to its synset, and from a synset to those above it."""
    if folder is not None:
        places = [Path(folder)]
    else:
        places = [Path(os.environ[name]) for name in ("WNSEARCHDIR", "RTL_DATA") if os.environ.get(name)] + [_DEBIAN]
    for place in [below for given in places for below in (given, given / "wordnet")]:
        if (place / "data.noun").is_file() and (place / "index.noun").is_file():
            return _princeton(place)
        if (place / "noun_hypernyms.json").is_file():
            return _graph(place / "noun_hypernyms.json")
    raise InputError(
        f"no WordNet in {', '.join(map(repr, map(str, places)))}: looked for index.noun and data.noun, or "
        "noun_hypernyms.json; Debian has them as wordnet-base"
    )


def _graph(file: Path) -> tuple[Find, Hypernyms]:
    content = _graph_content(file)

    def find(noun: str) -> str | None:
        noun = noun.replace(" ", "_")
        if noun in content["classes"]:
            return str(content["classes"][noun]["synset"])
        return next((name for name in (noun, f"{noun}.n.01") if name in content["synsets"]), None)

    return find, lambda synset: list(content["synsets"][synset]["hypernyms"])


@cache
def _graph_content(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error}): get it again") from error
    if not isinstance(content, dict) or not {"classes", "synsets"} <= content.keys():
        raise InputError(f"{file} has no classes and synsets: get it again")
    return content


def _princeton(folder: Path) -> tuple[Find, Hypernyms]:
    """wndb(5): index.noun gives a lemma's offsets into data.noun in order of sense; a line there lists pointers."""
    index, data = _index(folder / "index.noun"), folder / "data.noun"

    def find(noun: str) -> str | None:
        lemma, sense = noun.lower().replace(" ", "_"), 1
        word, dot, number = lemma.rpartition(".n.")
        if dot and number.isdigit():
            lemma, sense = word, int(number)
        offsets = index.get(lemma, ())
        return offsets[sense - 1] if 1 <= sense <= len(offsets) else None

    def hypernyms(offset: str) -> list[str]:
        with data.open("rb") as file:
            file.seek(int(offset))
            fields = file.readline().decode("ascii").split("|")[0].split()
        first = 4 + 2 * int(fields[3], 16)  # words, each with its lexical id, then pointers of four fields
        pointers = [fields[first + 1 + 4 * n : first + 5 + 4 * n] for n in range(int(fields[first]))]
        return [target for symbol, target, kind, _ in pointers if symbol in ("@", "@i") and kind == "n"]

    return find, hypernyms


@cache
def _index(file: Path) -> dict[str, tuple[str, ...]]:
    offsets = {}
    for line in file.read_text(encoding="ascii").splitlines():
        if not line.startswith(" "):  # the licence
            fields = line.split()
            offsets[fields[0]] = tuple(fields[-int(fields[2]) :])
    return offsets


def _distances(synset: str, hypernyms: Hypernyms) -> dict[str, int]:
    """Steps up from a synset to each one above it."""
    found, level, steps = {synset: 0}, [synset], 0
    while level:
        steps += 1
        level = [above for below in level for above in hypernyms(below) if above not in found]
        found |= dict.fromkeys(level, steps)
    return found
