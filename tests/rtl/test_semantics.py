"""rtl.semantics and rtl.alignment: WordNet from its files, and correlations against their definitions and scipy's."""

import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from rtl import semantics
from rtl.alignment import Alignment, alignment, spearman
from rtl.curve import Curve
from rtl.errors import InputError
from rtl.tickets import TicketNetwork, saved_levels

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
PACK = Path(os.environ.get("RTL_DATA", "")) / "wordnet" / "noun_hypernyms.json"
needs_pack = pytest.mark.skipif(not PACK.is_file(), reason="needs RTL_DATA with wordnet/noun_hypernyms.json")
DEBIAN = Path("/usr/share/wordnet/data.noun")
needs_debian = pytest.mark.skipif(not DEBIAN.is_file(), reason="needs Debian's wordnet-base")

# entity <- animal <- (dog, cat <- tiger), entity <- thing <- car; a second sense of cat below thing.
LINES = {
    "entity": (["entity"], []),
    "animal": (["animal", "beast"], ["entity"]),
    "dog": (["dog"], ["animal"]),
    "cat": (["cat", "true_cat", "moggy"], ["animal"]),
    "tiger": (["tiger"], ["cat"]),
    "thing": (["thing"], ["entity"]),
    "car": (["car"], ["thing"]),
    "cat2": (["cat"], ["thing"]),
}


@pytest.fixture
def database(tmp_path):
    """A folder in the form of wndb(5): offsets are bytes, word counts hexadecimal."""
    head = "  1 This software and database is being provided\n"
    offsets, text = {}, head
    for _ in range(2):  # the second time with offsets that are known
        text = head
        for key, (words, above) in LINES.items():
            place = f"{len(text.encode()):08d}"
            entries = " ".join(f"{word} 0" for word in words)
            pointers = "".join(f" @ {offsets.get(up, '0' * 8)} n 0000" for up in above) + " ~ 00000000 n 0000"
            offsets[key] = place
            text += f"{place} 03 n {len(words):02x} {entries} {len(above) + 1:03d}{pointers} | a gloss | of words  \n"
    (tmp_path / "data.noun").write_text(text)
    lemmas = {}
    for key, (words, _) in LINES.items():
        for word in words:
            lemmas.setdefault(word, []).append(offsets[key])
    index = "".join(f"{word} n {len(at)} 2 @ ~ {len(at)} 0 {' '.join(at)}  \n" for word, at in sorted(lemmas.items()))
    (tmp_path / "index.noun").write_text(head + index)
    return tmp_path


# Meaning


def test_path_similarity_is_one_over_one_plus_the_shortest_way(database):
    found = semantics.wordnet(["dog", "tiger", "car", "moggy"], database)
    expected = [[1, 1 / 4, 1 / 5, 1 / 3], [1 / 4, 1, 1 / 6, 1 / 2], [1 / 5, 1 / 6, 1, 1 / 5], [1 / 3, 1 / 2, 1 / 5, 1]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_a_sense_is_chosen_by_number_or_by_another_noun(database):
    first, second = (semantics.wordnet(["cat", "car"], database, senses=s) for s in (None, {"cat": "cat.n.02"}))
    assert (float(first[0, 1]), float(second[0, 1])) == (1 / 5, 1 / 3)
    assert float(semantics.wordnet(["hound", "cat"], database, senses={"hound": "dog"})[0, 1]) == 1 / 3


@pytest.mark.parametrize("noun", ["wolf", "cat.n.03", "cat.n.00"])
def test_an_unknown_noun_is_named(database, noun):
    with pytest.raises(
        InputError, match=rf"names holds '{noun}', but WordNet has no noun '{noun}': say what it stands"
    ):
        semantics.wordnet(["dog", noun], database)


def test_no_wordnet_says_where_it_looked_and_what_has_it(tmp_path):
    with pytest.raises(InputError, match=r"no WordNet in .*index.noun and data.noun.*wordnet-base"):
        semantics.wordnet(["dog"], tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_damaged_graph_is_named(tmp_path, content):
    (tmp_path / "noun_hypernyms.json").write_text(content)
    with pytest.raises(InputError, match=r"noun_hypernyms\.json .*: get it again"):
        semantics.read(tmp_path, ["dog"])


def test_wordnet_is_found_through_the_environment(database, monkeypatch):
    monkeypatch.setenv("WNSEARCHDIR", str(database))
    assert float(semantics.wordnet(["dog", "cat"])[0, 1]) == 1 / 3


@needs_pack
def test_the_packages_table_is_wordnets_own():
    assert torch.equal(semantics.known(CIFAR10), semantics.wordnet(CIFAR10, PACK.parent))
    assert torch.equal(semantics.known(CIFAR10), semantics.wordnet(CIFAR10, PACK.parents[1]))
    seal = semantics.wordnet(["seal", "aquarium_fish", "dog.n.01"], PACK.parent)
    assert float(seal[0, 2]) > float(seal[1, 2])


@needs_debian
def test_the_packages_table_is_debians_wordnets():
    assert torch.equal(semantics.known(CIFAR10), semantics.wordnet(CIFAR10, DEBIAN.parent))


@needs_debian
@needs_pack
def test_both_readers_agree_on_every_cifar_100_noun():
    classes = json.loads(PACK.read_text())["classes"]
    senses = {name: f"{c['lemma']}.n.{c['sense']:02d}" for name, c in classes.items()}
    names = list(classes)[::4]
    assert torch.equal(semantics.wordnet(names, PACK.parent), semantics.wordnet(names, DEBIAN.parent, senses))


def test_the_packages_table_knows_cifar_10_and_nothing_else():
    found = semantics.known(["truck", "cat", "dog"])
    assert found.diagonal().tolist() == [1, 1, 1]
    assert (float(found[0, 1]), float(found[1, 2])) == (1 / 18, 0.2)
    assert semantics.known(["cat", "wolf"]) is None


def test_an_embedding_gives_cosines():
    found = semantics.from_embedding(np.array([[1.0, 0], [2.0, 2.0], [0, -3.0]]))
    root = math.sqrt(0.5)
    expected = torch.tensor([[1, root, 0], [root, 1, -root], [0, -root, 1]], dtype=torch.float64)
    torch.testing.assert_close(found, expected)
    with pytest.raises(
        InputError, match=r"vectors has shape \(2, 2\), expected \(K, D\), finite and none of them zero"
    ):
        semantics.from_embedding(torch.tensor([[1.0, 2], [0, 0]]))


def test_an_embedding_of_many_dimensions_fits_though_its_products_are_symmetric_up_to_rounding_only(tmp_path):
    vectors = torch.randn((10, 100), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    curve = Curve(tuple("abcdefghij"), {"w": 9}, {"w": torch.full((1, 10, 10), 2)})
    cosines = semantics.from_embedding(vectors)
    assert torch.equal(cosines, cosines.T)
    given = vectors @ vectors.T
    assert not torch.equal(given, given.T)
    assert torch.equal(alignment(curve, given).semantic, given)
    file = tmp_path / "meaning.json"
    file.write_text(json.dumps({"names": curve.names, "matrix": given.tolist()}))
    assert torch.equal(semantics.read(file, curve.names), given)


def test_a_users_file_gives_a_matrix_or_an_embedding_in_the_tickets_order(tmp_path):
    file = tmp_path / "meaning.json"
    file.write_text(json.dumps({"names": ["c", "a", "b"], "matrix": [[1, 0.3, 0.2], [0.3, 1, 0.9], [0.2, 0.9, 1]]}))
    assert semantics.read(file, ["a", "b", "c"]).tolist() == [[1, 0.9, 0.3], [0.9, 1, 0.2], [0.3, 0.2, 1]]
    file.write_text(json.dumps({"names": ["c", "a"], "embedding": [[0, 1], [3, 4]]}))
    assert float(semantics.read(file, ["a", "c"])[0, 1]) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be used"),
        ("{", "cannot be used"),
        ('{"names": ["a", "b"]}', 'it has no "names" with a "matrix" or an "embedding"'),
        ('{"names": ["a"], "matrix": [[1]]}', "'b' is not in list"),
        ('{"names": ["a", "b"], "matrix": [[1, 0.5], [0.4, 1]]}', "not symmetric"),
        ('{"names": ["a", "b"], "matrix": [[1, NaN], [NaN, 1]]}', "not symmetric"),
        ('{"names": {"a": 0, "b": 1}, "matrix": [[1, 0.5], [0.5, 1]]}', "cannot be used"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, content, message):
    file = tmp_path / "meaning.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=message):
        semantics.read(file, ["a", "b"])


# Alignment


def symmetric(k, seed):
    values = torch.rand((k, k), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(8).round()
    return torch.triu(values, 1) + torch.triu(values, 1).T  # with ties


@pytest.mark.parametrize("k", [4, 9])
def test_rho_is_scipys_over_the_pairs(k):
    matrices, semantic = torch.stack([symmetric(k, s) for s in range(3)]), symmetric(k, 9)
    rho, _, _ = spearman(matrices, semantic, 20, 0)
    i, j = torch.triu_indices(k, k, 1)
    for n in range(3):
        expected = spearmanr(matrices[n][i, j], semantic[i, j]).statistic
        assert float(rho[n]) == pytest.approx(expected, abs=1e-12)


def test_few_tickets_are_permuted_all_ways():
    matrix, semantic = symmetric(5, 1), symmetric(5, 2)
    rho, p, count = spearman(matrix[None], semantic, 10, 0)
    i, j = torch.triu_indices(5, 5, 1)
    chance = []
    for order in itertools.permutations(range(5)):
        moved = semantic[list(order)][:, list(order)]
        chance.append(abs(spearmanr(matrix[i, j], moved[i, j]).statistic))
    assert count == 120
    assert float(p[0]) == pytest.approx(np.mean(np.array(chance) >= abs(float(rho[0])) - 1e-9))


def test_p_values_of_unrelated_matrices_are_uniform_and_of_equal_ones_small():
    semantic = symmetric(9, 0)
    _, p, _ = spearman(torch.stack([symmetric(9, s) for s in range(1, 301)]), semantic, 500, 0)
    assert 0.02 < float((p < 0.05).double().mean()) < 0.09
    assert 0.43 < float(p.mean()) < 0.57
    rho, p, _ = spearman(torch.stack([semantic, -semantic]), semantic, 500, 0)
    assert rho.tolist() == pytest.approx([1, -1])
    assert p.tolist() == pytest.approx([1 / 501] * 2, abs=0.003)
    rho, p, _ = spearman(torch.ones(1, 9, 9, dtype=torch.float64), semantic, 50, 0)
    assert math.isnan(rho)
    assert math.isnan(p)


def committed_curve(recipe):
    """The tickets that are committed, and their sparsities."""
    levels = saved_levels(Path(__file__).parents[2] / "results" / recipe)
    nets = [TicketNetwork.from_pretrained(level) for level in levels.values()]
    return Curve.of(nets[0].names, [net.net.banks for net in nets]), tuple(levels)


def test_real_masks_are_aligned_at_every_stage_and_depth():
    curve, levels = committed_curve("cifar10")
    found = alignment(curve, semantics.known(curve.names), permutations=2000)
    assert len(levels) > 1
    assert found.rho.shape == found.p_value.shape == (len(levels), 1 + len(curve.layers))
    assert found.sparsity == pytest.approx(levels, abs=1e-5)
    i, j = torch.triu_indices(10, 10, 1)
    for stage in range(len(levels)):
        for column, layer in ((0, None), (1, curve.layers[0]), (-1, curve.layers[-1])):
            expected = spearmanr(curve.jaccard(layer)[stage][i, j], found.semantic[i, j]).statistic
            assert float(found.rho[stage, column]) == pytest.approx(expected, abs=1e-12)
    again = Alignment.from_json(json.loads(json.dumps(found.to_json())))
    assert again.names == found.names
    torch.testing.assert_close(again.rho, found.rho, equal_nan=True)
    one = alignment(curve, semantics.known(curve.names), stages=[1], permutations=2000)
    torch.testing.assert_close(one.rho[0], found.rho[1], equal_nan=True)


def test_what_does_not_fit_is_refused():
    curve = Curve(("a", "b", "c"), {"w": 9}, {"w": torch.full((1, 3, 3), 2)})
    with pytest.raises(InputError, match=r"semantic has shape \(2, 2\), expected a symmetric \(3, 3\) matrix"):
        alignment(curve, torch.eye(2))
    with pytest.raises(InputError, match="symmetric"):
        alignment(curve, torch.arange(9.0).view(3, 3))
    with pytest.raises(InputError, match="curve is of 2 tickets"):
        alignment(Curve(("a", "b"), {"w": 9}, {"w": torch.full((1, 2, 2), 2)}), torch.eye(2))
