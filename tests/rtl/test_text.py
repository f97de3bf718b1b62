"""rtl.text and partition.by_text: classes whose names are alike become one subset."""

import builtins
import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from rtl.data import Data
from rtl.errors import InputError
from rtl.partition import by_text
from rtl.recipes.published import clusters
from rtl.text import embed, ngrams

NAMES = ("pine_tree", "oak_tree", "palm_tree", "sea_lion", "sea_horse", "sea_urchin", "treehouse")
NEEDS = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("wordllama", "umap"))), reason="needs the extra 'text'"
)


def named(names=NAMES, each=3):
    labels = torch.arange(len(names)).repeat(each)
    return Data(torch.zeros(len(labels), 1), labels, names)


def axes(texts):
    """Trees, seas, and between them the house, nearer to the trees."""
    close = {"tree": (1.0, 0.0), "sea": (0.0, 1.0), "house": (0.8, 0.6)}
    rows = [next(v for k, v in reversed(close.items()) if k in text) for text in texts]
    return np.array(rows) + 1e-3 * np.arange(len(texts))[:, None]


def clustered(lines=None, **options):
    show = (lambda _: None) if lines is None else lines.append
    arguments = {"encoder": axes, "dimensions": None, "min_cluster_size": 3, "show": show}
    return by_text(named(), **(arguments | options))


def test_clusters_become_subsets_and_noise_goes_to_the_nearest():
    parts = clustered()
    subset = [parts.names[int(k)] for k in parts.apply(named(each=1)).index]
    assert len(parts) == 2
    assert len(set(subset[:3])) == len(set(subset[3:6])) == 1
    assert subset[0] != subset[3]
    assert subset[6] == subset[0]
    assert parts.counts() == {subset[0]: 12, subset[3]: 9}


def test_a_subset_is_named_after_the_class_in_its_middle_and_the_composition_is_shown():
    lines = []
    parts = clustered(lines)
    assert len(lines) == len(parts)
    for line, name in zip(lines, parts.names, strict=True):
        assert line.startswith(f"{name} (")
    assert any("and 3 more (12 samples): pine_tree, oak_tree, palm_tree, treehouse" in line for line in lines)


def test_classes_of_one_name_keep_all_their_samples():
    names = ("pine_tree", "oak_tree", "palm_tree", "sea_lion", "sea_horse", "sea_lion")
    parts = by_text(named(names), encoder=axes, dimensions=None, min_cluster_size=3, show=[].append)
    assert sorted(parts.counts().values()) == [9, 9]


def test_the_composition_is_printed_unless_told_otherwise(capsys):
    by_text(named(), encoder=axes, dimensions=None, min_cluster_size=3)
    assert "sea_lion, sea_horse, sea_urchin" in capsys.readouterr().out


def test_spelling_alone_clusters_names_that_share_a_word():
    parts = clustered(encoder="ngrams", min_cluster_size=2)
    subset = parts.apply(named(each=1)).index
    assert subset[3] == subset[4] == subset[5] != subset[0]
    vectors = embed([n.replace("_", " ") for n in NAMES], "ngrams")
    assert (vectors @ vectors.T)[0, 1] > 2 * (vectors @ vectors.T)[0, 3]
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1)


def test_wordnet_clusters_cifar_100_much_as_the_paper_does():
    root = os.environ.get("RTL_DATA")
    if not root or not (Path(root) / "wordnet").is_dir():
        pytest.skip("needs WordNet: set RTL_DATA to a data root that holds wordnet")
    label = {name: k for k, members in enumerate(clusters("cifar100").values()) for name in members}
    names = tuple(sorted(label))
    parts = by_text(named(names, each=1), encoder="wordnet", dimensions=None, show=[].append)
    assert len(parts) > 4
    assert adjusted_rand_score([label[name] for name in names], parts.index) > 0.5  # 0 by chance


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "clip"}, "encoder is 'clip', expected one of wordllama, wordnet, ngrams, or a function"),
        ({"encoder": lambda texts: np.zeros((len(texts), 2))}, "no vector zero"),
        ({"encoder": lambda texts: np.ones((2, 2))}, r"shape \(2, 2\), expected \(7, D\)"),
        ({"encoder": lambda texts: np.full((7, 2), np.nan)}, "finite"),
        ({"encoder": lambda texts: [[1.0], [1.0, 2.0]]}, "encoder gave a list that is no array"),
        ({"dimensions": 0}, r"dimensions is 0, but 1\.\.5 is needed"),
        ({"neighbors": 1}, r"neighbors is 1, but 2\.\.6 is needed"),
        ({"min_cluster_size": 1}, r"min_cluster_size is 1, but 2\.\.7 is needed"),
        ({"min_cluster_size": 7}, "HDBSCAN finds no cluster"),
    ],
)
def test_what_cannot_be_clustered_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        clustered(**options)


def test_data_without_class_names_are_refused():
    with pytest.raises(InputError, match="has 0 class names"):
        by_text(named(()), encoder=axes)


@pytest.mark.parametrize(("package", "options"), [("wordllama", {"encoder": "wordllama"}), ("umap", {"dimensions": 2})])
def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch, package, options):
    found = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return found(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"pip install 'rtl-kernels\[text\]'"):
        clustered(**options)


@NEEDS
def test_the_extra_clusters_by_meaning_and_downloads_nothing(monkeypatch):
    import socket

    def refused(*_):
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refused)
    names = ("cat", "dog", "wolf", "horse", "truck", "car", "bus", "van")
    vectors = embed(names, "wordllama")
    alike = vectors @ vectors.T
    assert alike[:4, :4].mean() > alike[:4, 4:].mean() + 0.1
    first, second = (by_text(named(names), dimensions=2, neighbors=3, min_cluster_size=3, show=[].append) for _ in "ab")
    assert torch.equal(first.index, second.index)


def test_ngrams_need_no_extra():
    assert ngrams(["cat", "car"]).shape[0] == 2
