import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rtl.data import Data
from rtl.data.pictures import coordinates
from rtl.errors import InputError
from rtl.partition import Partition, by_cluster, by_label, by_metadata, by_region

NAMES = ("cat", "dog", "ship", "truck")


def labelled(labels, names=NAMES, metadata=None):
    targets = torch.tensor(labels, dtype=torch.int64)
    return Data(torch.zeros(len(labels), 2), targets, names, metadata or {}, name="labelled")


def blobs(per_blob=20, seed=0):
    """Three tight groups of points, far apart, in turn: sample i lies in blob i % 3."""
    points = np.random.default_rng(seed).normal(size=(3 * per_blob, 2)) * 0.1
    points += np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])[np.arange(3 * per_blob) % 3]
    return Data(torch.from_numpy(points).float(), torch.zeros(3 * per_blob, dtype=torch.int64), name="blobs")


def first_column(data):
    return data.inputs[:, :1]


# Partition


@given(st.lists(st.integers(0, 3), max_size=30))
def test_subsets_are_disjoint_ascending_and_hold_every_sample_of_a_class(labels):
    data = labelled([0, 1, 2, 3, *labels])
    parts = by_label(data)
    positions = [parts[k] for k in range(len(parts))]
    assert sorted(torch.cat(positions).tolist()) == list(range(len(data)))
    for name, found in zip(parts.names, positions, strict=True):
        assert found.dtype == torch.int64
        assert found.tolist() == sorted(found.tolist())
        assert torch.equal(parts[name], found)
        assert all(NAMES[label] == name for label in data.targets[found])
        assert parts.counts()[name] == len(found)


def test_an_unknown_subset_is_refused_with_the_names_there_are():
    parts = by_label(labelled([0, 1, 2, 3]))
    assert parts.position("ship") == 2
    with pytest.raises(InputError, match="name is 'plane', but the subsets are cat, dog, ship, truck"):
        parts["plane"]
    for number in (4, -1):
        with pytest.raises(IndexError, match=r"0\.\.3"):
            parts[number]
    assert len(list(parts)) == 4  # iteration stops there


@pytest.mark.parametrize(
    ("names", "index", "words"),
    [
        ((), [0, 0], "names is"),
        (("a", "a"), [0, 0], "names is"),
        (("a", ""), [0, 0], "names is"),
        (("a", "b"), [0, 2], "index holds 2, but there are 2 subsets"),
        (("a", "b"), [0, -2], "index holds -2"),
        (("a", "b"), [0], r"index is torch.int64 of shape \(1,\)"),
        (("a", "b"), [0.0, 1.0], "index is torch.float32"),
    ],
)
def test_a_partition_that_does_not_fit_its_data_is_refused(names, index, words):
    with pytest.raises(InputError, match=words):
        Partition(labelled([0, 1]), names, torch.tensor(index), len)


def test_new_data_goes_to_the_same_subsets_some_of_which_may_be_empty():
    parts = by_label(labelled([0, 1, 2, 3]))
    test = parts.apply(labelled([3, 3, 1]))
    assert test.names == parts.names
    assert test.index.tolist() == [3, 3, 1]
    assert test.counts() == {"cat": 0, "dog": 1, "ship": 0, "truck": 2}


@pytest.mark.parametrize(
    "make",
    [
        by_label,
        lambda data: by_label(data, {"animal": ["cat", 1]}),
        lambda data: by_metadata(data, "scene"),
        lambda data: by_cluster(data, 2),
        lambda data: by_cluster(data, 2, features=first_column),
        lambda data: by_cluster(data, method="hdbscan", min_cluster_size=3),
    ],
    ids=["label", "group", "metadata", "kmeans", "kmeans features", "hdbscan"],
)
def test_a_rule_survives_pickling_and_repeats_the_partition_it_made(make):
    inputs = torch.tensor([[0.0, 0], [0, 1], [0, 2], [50, 0], [50, 1], [50, 2]])
    scene = {"scene": ["in", "out", "in", None, "out", "in"]}
    data = Data(inputs, torch.tensor([0, 1, 2, 3, 0, 0]), NAMES, scene)
    parts = make(data)
    assert torch.equal(parts.apply(data).index, parts.index)
    assert torch.equal(pickle.loads(pickle.dumps(parts)).rule(data), parts.index)


# by_label


def test_groups_name_classes_by_name_or_label_and_leave_the_rest_out():
    parts = by_label(labelled([0, 1, 2, 3, 3]), {"vehicle": ["ship", 3], "pet": [0]})
    assert parts.names == ("vehicle", "pet")
    assert parts.index.tolist() == [1, -1, 0, 0, 0]
    assert parts.counts() == {"vehicle": 3, "pet": 1}


def test_classes_without_names_are_called_by_their_label():
    parts = by_label(labelled([1, 0, 2], names=()))
    assert parts.names == ("0", "1", "2")
    assert parts.apply(labelled([2, 7], names=())).index.tolist() == [2, -1]


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ({"a": ["cat"], "b": ["dog", "cat"]}, "the class 'cat' in 'a' and in 'b'"),
        ({"a": ["plane"]}, r"groups\['a'\] holds 'plane', but the classes are cat, dog"),
        ({"a": [4]}, r"groups\['a'\] holds 4"),
        ({"a": [-1]}, r"groups\['a'\] holds -1"),
        ({"a": ["cat"], "b": ["truck"]}, "the subset 'b' no sample"),
        ({"a": ["cat"], "b": []}, "the subset 'b' no sample"),
        ({}, "groups gives no subset"),
    ],
)
def test_groups_that_cannot_be_are_refused(groups, words):
    with pytest.raises(InputError, match=words):
        by_label(labelled([0, 1, 2]), groups)


def test_classes_of_one_name_are_told_apart_by_label_alone():
    data = labelled([0, 1, 2], names=("crane", "dog", "crane"))  # a bird and a machine
    with pytest.raises(InputError, match="calls several classes 'crane': give groups, with labels in them"):
        by_label(data)
    with pytest.raises(InputError, match=r"groups\['bird'\] holds 'crane', as several classes are called"):
        by_label(data, {"bird": ["crane"]})
    assert by_label(data, {"bird": [0], "machine": [2], "pet": ["dog"]}).index.tolist() == [0, 2, 1]


def test_a_class_without_samples_is_named():
    with pytest.raises(InputError, match="the subset 'ship' no sample"):
        by_label(labelled([0, 1, 3]))


def test_labels_of_other_classes_and_targets_that_are_no_labels_are_refused():
    parts = by_label(labelled([0, 1, 2, 3]))
    with pytest.raises(InputError, match="give data with the same classes"):
        parts.apply(labelled([0], names=("dog", "cat")))
    numbers = Data(torch.zeros(2, 2), torch.zeros(2))
    for use in (by_label, parts.apply):
        with pytest.raises(InputError, match="float32 targets, but labels"):
            use(numbers)


# by_metadata


def test_metadata_gives_a_subset_for_each_value_in_order():
    data = labelled([0] * 5, metadata={"scene": ["park", "bus", "park", "", None]})
    parts = by_metadata(data, "scene")
    assert parts.names == ("bus", "park")
    assert parts.index.tolist() == [1, 0, 1, -1, -1]
    new = labelled([0, 0], metadata={"scene": ["bus", "moon"]})
    assert parts.apply(new).index.tolist() == [0, -1]


class ByName(list):
    """A column that, as pandas does, looks its elements up by a name of theirs, here counted from the end."""

    def __getitem__(self, name):
        return super().__getitem__(len(self) - 1 - name)


@pytest.mark.parametrize("column", [[10, 9, 11], np.array([10, 9, 11]), torch.tensor([10, 9, 11]), ByName([10, 9, 11])])
def test_numbers_in_metadata_are_sorted_as_numbers(column):
    data = labelled([0, 0, 0], metadata={"year": column})
    parts = by_metadata(data, "year")
    assert parts.names == ("9", "10", "11")
    assert parts.index.tolist() == [1, 0, 2]
    some = data.select(torch.tensor([2, 0]))
    assert parts.apply(some).index.tolist() == [2, 1]
    assert by_metadata(some, "year").names == ("10", "11")


def test_a_number_that_is_missing_is_of_no_subset():
    parts = by_metadata(labelled([0] * 4, metadata={"year": np.array([9, np.nan, 8, np.nan])}), "year")
    assert parts.names == ("8.0", "9.0")
    assert parts.index.tolist() == [1, -1, 0, -1]


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("room", "key is 'room', but the metadata of 'labelled' has scene"),
        ("mixed", "cannot be sorted"),
        ("none", "no subset"),
    ],
)
def test_metadata_that_gives_no_subsets_is_refused(key, words):
    metadata = {"scene": ["a", "b"]} if key == "room" else {"mixed": ["a", 1], "none": [None, ""]}
    with pytest.raises(InputError, match=words):
        by_metadata(labelled([0, 0], metadata=metadata), key)


# by_cluster


@pytest.mark.parametrize("arguments", [{"num_clusters": 3}, {"method": "hdbscan"}], ids=["kmeans", "hdbscan"])
def test_clusters_are_the_groups_in_the_data_and_take_in_new_samples(arguments):
    parts = by_cluster(blobs(), **arguments)
    assert parts.names == ("cluster-0", "cluster-1", "cluster-2")
    of_blob = parts.index[:3]
    assert sorted(of_blob.tolist()) == [0, 1, 2]
    assert torch.equal(parts.index, of_blob.repeat(20))
    assert torch.equal(parts.apply(blobs(per_blob=5, seed=9)).index, of_blob.repeat(5))


def test_clusters_are_of_the_normalised_inputs():
    # The second channel is wide but uninformative: once normalised, the first decides.
    inputs = torch.tensor([[0.0, 0], [0, 900], [1, 0], [1, 900]])
    data = Data(inputs, torch.zeros(4, dtype=torch.int64), mean=(0.5, 450), std=(0.001, 10000))
    index = by_cluster(data, 2).index
    assert index[0] == index[1] != index[2]
    assert index[2] == index[3]


def test_hdbscan_noise_goes_to_the_nearest_centroid():
    data = blobs()
    far = Data(torch.cat([data.inputs, torch.tensor([[40.0, 0.0]])]), torch.zeros(61, dtype=torch.int64))
    parts = by_cluster(far, method="hdbscan")
    assert len(parts) == 3
    assert parts.index[60] == parts.index[1]


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_features_can_be_given_but_then_say_nothing_of_new_data(kind):
    parts = by_cluster(labelled([0] * 4), 2, features=kind([[0.0], [9.0], [0.1], [9.1]]))
    assert parts.index[0] == parts.index[2] != parts.index[1]
    with pytest.raises(InputError, match="give by_cluster a function"):
        parts.apply(labelled([0]))


def test_the_same_seed_gives_the_same_clusters():
    data = Data(torch.rand(200, 5, generator=torch.Generator().manual_seed(0)), torch.zeros(200, 1))
    assert torch.equal(by_cluster(data, 7, seed=4).index, by_cluster(data, 7, seed=4).index)
    assert not torch.equal(by_cluster(data, 7, seed=4).index, by_cluster(data, 7, seed=5).index)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "num_clusters is None"),
        ({"num_clusters": 61}, r"num_clusters is 61, .*1\.\.60"),
        ({"num_clusters": 2, "method": "hdbscan"}, "HDBSCAN finds it"),
        ({"method": "hdbscan", "min_cluster_size": 1}, "min_cluster_size is 1"),
        ({"method": "hdbscan", "min_cluster_size": 50}, "HDBSCAN finds no cluster"),
        ({"method": "spectral"}, "method is 'spectral'"),
        ({"num_clusters": 2, "features": torch.zeros(59, 2)}, r"features has the shape \(59, 2\)"),
        ({"num_clusters": 2, "features": torch.zeros(60)}, r"features has the shape \(60,\)"),
        ({"num_clusters": 2, "features": torch.full((60, 1), float("nan"))}, "features holds NaN"),
    ],
)
def test_clustering_that_cannot_be_done_is_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        by_cluster(blobs(), **arguments)


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_more_clusters_than_distinct_samples_are_refused():
    with pytest.raises(InputError, match="the subset 'cluster-1' no sample"):
        by_cluster(labelled([0] * 4), 2)


def test_new_data_of_another_width_is_refused():
    parts = by_cluster(blobs(), 3)
    with pytest.raises(InputError, match="features has 3 columns, but the centroids 2"):
        parts.apply(Data(torch.zeros(1, 3), torch.tensor([0])))


# Regions of an image


def pixels(colours, height=6):
    """Three stripes of equal colour, of 6, 3 and 1 columns."""
    row = torch.tensor([colours[0]] * 6 + [colours[1]] * 3 + [colours[2]])
    return Data(coordinates(height, 10), row.repeat(height, 1))


STRIPES = pixels([[0.1, 0.1, 0.1], [0.9, 0.1, 0.1], [0.1, 0.1, 0.9]])


def test_regions_are_stretches_of_one_colour_the_largest_first():
    parts = by_region(STRIPES, 3)
    assert parts.names == ("region-0", "region-1", "region-2")
    assert parts.index.view(6, 10).tolist() == [[0] * 6 + [1] * 3 + [2]] * 6


def test_regions_of_one_colour_are_apart_by_position_alone():
    same = pixels([[0.5, 0.5, 0.5]] * 3)
    halves = by_region(same, 2).index.view(6, 10)
    assert sorted([halves[0, :5].unique().tolist(), halves[0, 5:].unique().tolist()]) == [[0], [1]]
    assert by_region(STRIPES, 3, position=0.0).counts() == {"region-0": 36, "region-1": 18, "region-2": 6}


def test_one_region_is_the_image_and_new_pixels_go_to_the_nearest_centre():
    assert by_region(STRIPES, 1).counts() == {"region-0": 60}
    parts = by_region(STRIPES, 3)
    assert torch.equal(parts.apply(STRIPES.select(torch.arange(10))).index, parts.index[:10])
    assert torch.equal(by_region(STRIPES, 3).index, parts.index)


def test_regions_of_what_is_no_image_or_of_too_few_pixels_are_refused():
    with pytest.raises(InputError, match=r"but pixels, .* are needed"):
        by_region(blobs())
    for number in (0, 61):
        with pytest.raises(InputError, match=f"num_regions is {number}, but there are 60 different pixels"):
            by_region(STRIPES, number)
