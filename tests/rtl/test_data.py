import os
import pickle
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import TensorDataset

from rtl.data import Data, cifar10, cifar100, data_root, digits, from_dataset
from rtl.errors import InputError
from rtl.partition import by_label


def needs(pack):
    file = Path(os.environ.get("RTL_DATA") or "nowhere") / pack / "train_0.webp"
    return pytest.mark.skipif(not file.is_file(), reason=f"RTL_DATA names no folder with the real {pack}")


def pixels(count=6):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 4, 5), generator=generator, dtype=torch.uint8)


def coloured(count=6):
    return Data(
        pixels(count),
        torch.arange(count) % 2,
        ("cat", "dog"),
        {"scene": [f"s{i}" for i in range(count)]},
        (0.5, 0.4, 0.3),
        (0.2, 0.1, 0.3),
        "coloured",
    )


# Data


@given(st.lists(st.integers(0, 5), max_size=8))
def test_a_batch_is_the_samples_at_the_index_divided_by_255_and_normalised(index):
    data = coloured()
    positions = torch.tensor(index, dtype=torch.int64)
    inputs, targets = data.batch(positions)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (data.mean, data.std))
    expected = (data.inputs[positions].double() / 255 - mean) / std
    assert inputs.dtype == torch.float32
    torch.testing.assert_close(inputs.double(), expected, rtol=1e-6, atol=1e-5)
    assert targets.tolist() == [i % 2 for i in index]


def test_float_inputs_are_normalised_in_their_own_unit():
    inputs = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
    data = Data(inputs, torch.tensor([0, 1]), mean=(1.0, 10.0), std=(2.0, 5.0))
    torch.testing.assert_close(data.batch(torch.tensor([1, 0]))[0], torch.tensor([[1.0, 4.0], [0.0, 0.0]]))


def test_without_statistics_floats_come_back_as_they_are_and_pixels_between_0_and_1():
    inputs = torch.randn(3, 2)
    assert torch.equal(Data(inputs, torch.zeros(3, 1)).batch(torch.tensor([2]))[0], inputs[2:])
    raw = torch.tensor([[0, 51, 255]], dtype=torch.uint8)
    got, _ = Data(raw, torch.tensor([0])).batch(torch.tensor([0]))
    torch.testing.assert_close(got, torch.tensor([[0.0, 0.2, 1.0]]))


def test_making_a_batch_leaves_the_data_unchanged():
    data = Data(torch.ones(2, 3), torch.tensor([0, 1]), mean=(1.0,) * 3, std=(2.0,) * 3)
    data.batch(torch.tensor([0, 1]))[0].fill_(7)
    assert torch.equal(data.inputs, torch.ones(2, 3))


def test_a_selection_carries_targets_metadata_names_and_statistics_along():
    picked = coloured().select(torch.tensor([4, 1, 4]))
    assert torch.equal(picked.inputs, pixels()[[4, 1, 4]])
    assert picked.targets.tolist() == [0, 1, 0]
    assert picked.metadata == {"scene": ["s4", "s1", "s4"]}
    whole = coloured()
    assert (picked.class_names, picked.mean, picked.std, picked.name) == (
        whole.class_names,
        whole.mean,
        whole.std,
        whole.name,
    )


def test_data_survives_pickling_and_replacement_of_its_statistics():
    data = coloured()
    data.batch(torch.tensor([0]))
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(again.batch(torch.tensor([3]))[0], data.batch(torch.tensor([3]))[0])
    bare = replace(data, mean=(), std=())
    torch.testing.assert_close(bare.batch(torch.tensor([3]))[0], data.inputs[3:4] / 255)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"inputs": torch.zeros(6, 3, 4, 5, dtype=torch.float64)}, "inputs is torch.float64"),
        ({"inputs": np.zeros((6, 3, 4, 5), dtype=np.float32)}, "inputs is a ndarray, expected a tensor"),
        ({"targets": [0] * 6}, "targets is a list, expected a tensor"),
        ({"mean": torch.full((3,), 0.5)}, "mean is a Tensor, expected a tuple of floats"),
        ({"std": 0.5}, "std is a float, expected a tuple of floats"),
        ({"inputs": torch.zeros(6)}, r"inputs is .* \(6,\)"),
        ({"inputs": torch.zeros(5, 3, 4, 5)}, "targets holds 6 samples, but inputs 5"),
        ({"inputs": torch.full((6, 3, 4, 5), float("nan"))}, "inputs holds NaN"),
        ({"targets": torch.full((6,), float("inf"))}, "targets holds NaN or infinity"),
        ({"targets": torch.zeros(6, dtype=torch.int32)}, "targets is torch.int32"),
        ({"targets": torch.zeros(6, 2, dtype=torch.int64)}, "targets is torch.int64"),
        ({"targets": torch.tensor([0, 1, 2, 0, 0, 0])}, "the label 2, but class_names has 2"),
        ({"targets": torch.tensor([0, 1, -1, 0, 0, 0])}, "the label -1"),
        ({"metadata": {"scene": ["a"]}}, r"metadata\['scene'\] has 1 values for 6"),
        ({"mean": (0.5,), "std": (0.5,)}, "mean has 1 values, but inputs 3 channels"),
        ({"mean": (0.5,)}, "mean has 1 values and std 3"),
        ({"std": (0.5, 0.0, 0.5)}, "std is"),
    ],
)
def test_data_that_does_not_fit_together_is_refused_in_one_line(change, words):
    with pytest.raises(InputError, match=words) as caught:
        replace(coloured(), **change)
    assert "\n" not in str(caught.value)


# from_dataset


def test_a_dataset_of_images_becomes_channels_first_pixels():
    array = pixels(2).permute(0, 2, 3, 1).numpy()
    data = from_dataset([(Image.fromarray(array[0]), 1), (Image.fromarray(array[1]), np.int64(0))], ["a", "b"])
    assert torch.equal(data.inputs, pixels(2))
    assert data.targets.tolist() == [1, 0]
    assert data.class_names == ("a", "b")


def test_a_dataset_of_arrays_is_read_as_images_and_of_tensors_as_it_is():
    array = pixels(1).permute(0, 2, 3, 1).numpy()
    assert torch.equal(from_dataset([(array[0], 0)]).inputs, pixels(1))
    assert from_dataset([(array[0, :, :, 0], 0)]).inputs.shape == (1, 1, 4, 5)
    assert from_dataset([(np.ones(7), 0)]).inputs.shape == (1, 7)
    tensors = TensorDataset(torch.randn(3, 2, 2).double(), torch.randn(3, 2))
    data = from_dataset(tensors)
    torch.testing.assert_close(data.inputs, tensors.tensors[0].float())
    assert torch.equal(data.targets, tensors.tensors[1])
    assert data.name == "TensorDataset"


def test_a_palette_image_is_read_by_its_colours():
    image = Image.new("RGB", (2, 2), (255, 0, 9)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert from_dataset([(image, 0)]).inputs[0, :, 0, 0].tolist() == [255, 0, 9]


def test_the_class_names_of_a_torchvision_dataset_are_taken_over():
    class Listing(list):
        classes = ("cat", "dog")

    assert from_dataset(Listing([(torch.zeros(1), 1)])).class_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        (iter([]), "length and integer indexing"),
        ([], "empty"),
        ([(torch.zeros(2), 0), (torch.zeros(3), 0)], r"the input of dataset\[1\] is .*\(3,\)"),
        ([(torch.zeros(2), 0), (torch.zeros(2), 0.5)], r"the label of dataset\[1\] is torch.float32"),
        ([(torch.zeros(2, dtype=torch.int64), 0)], "torch.int64"),
        ([(np.zeros(2, dtype=object), 0)], "ndarray of object"),
        ([("cat.png", 0)], "is a str"),
        ([(torch.zeros(2), 0, "north")], r"dataset\[0\] is a tuple of 3, but a pair \(input, label\) is needed"),
        ("images", r"dataset\[0\] is a str, but a pair"),
        ([(Image.fromarray(np.full((2, 2), 300, dtype=np.uint16)), 0)], r"dataset\[0\] is a picture, of mode I;16"),
        ([(torch.zeros(2), "cat")], r"the label of dataset\[0\] is 'cat'"),
    ],
)
def test_a_dataset_that_cannot_be_read_is_refused(dataset, words):
    with pytest.raises(InputError, match=words):
        from_dataset(dataset)


# data_root


def test_the_data_root_is_the_argument_then_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("RTL_DATA", str(tmp_path / "set"))
    (tmp_path / "set").mkdir()
    assert data_root(tmp_path) == tmp_path
    assert data_root(None) == tmp_path / "set"


def test_a_missing_data_root_says_what_to_give(tmp_path, monkeypatch):
    monkeypatch.delenv("RTL_DATA", raising=False)
    with pytest.raises(InputError, match=r"--data DIR.*RTL_DATA"):
        data_root(None)
    with pytest.raises(InputError, match="does not exist"):
        data_root(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    monkeypatch.setenv("RTL_DATA", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"RTL_DATA is .* is not a folder"):
        data_root(None)


# digits


def test_the_digits_are_split_without_overlap_in_proportion_and_normalised():
    train, test = digits(test_fraction=0.25, seed=3)
    assert len(train) + len(test) == 1797
    assert len({x.numpy().tobytes() for part in (train, test) for x in part.inputs}) == 1797
    for label in range(10):
        share = (test.targets == label).sum() / ((test.targets == label).sum() + (train.targets == label).sum())
        assert abs(share - 0.25) < 0.01
    assert train.inputs.shape[1:] == (1, 8, 8)
    assert train.inputs.aminmax() == (0.0, 1.0)
    assert train.class_names == tuple("0123456789")
    batch, _ = train.batch(torch.arange(len(train)))
    assert abs(batch.mean()) < 1e-5
    assert abs(batch.std() - 1) < 1e-3
    assert (test.mean, test.std) == (train.mean, train.std)


def test_the_digits_are_the_same_at_any_thread_count():
    threads, found = torch.get_num_threads(), set()
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            train, _ = digits()
            found.add((train.mean, train.std, by_label(train).fingerprint))
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


def test_the_digits_split_depends_on_the_seed_alone():
    assert torch.equal(digits(seed=1)[1].inputs, digits(seed=1)[1].inputs)
    assert not torch.equal(digits(seed=1)[1].inputs, digits(seed=2)[1].inputs)
    with pytest.raises(InputError, match="test_fraction is 1"):
        digits(test_fraction=1)


# CIFAR, mosaics


def write_mosaics(folder: Path, classes=10, lack=0):
    """Two train mosaics and one for testing, of 2×3 tiles; returns all tiles, (18, 3, 32, 32)."""
    folder.mkdir(parents=True, exist_ok=True)
    tiles = np.random.default_rng(0).integers(0, 256, (3, 2, 3, 32, 32, 3), dtype=np.uint8)
    for name, tile in zip(("train_0", "train_1", "test"), tiles, strict=True):
        mosaic = tile.transpose(0, 2, 1, 3, 4).reshape(64, 96, 3)
        Image.fromarray(mosaic).save(folder / f"{name}.webp", lossless=True, exact=True)
    np.savez(
        folder / "labels.npz",
        train_labels=np.arange(12 - lack) % classes,
        test_labels=np.arange(6),
        class_names=[f"class {i}" for i in range(classes)],
        coarse_names=["even", "odd"],
        fine_to_coarse=np.arange(classes) % 2,
    )
    return torch.from_numpy(tiles.reshape(18, 32, 32, 3)).permute(0, 3, 1, 2)


def test_mosaics_are_cut_row_by_row_with_exact_pixels(tmp_path):
    tiles = write_mosaics(tmp_path / "cifar10")
    for root in (tmp_path, tmp_path / "cifar10"):
        train, test = cifar10(root)
        assert train.inputs.dtype == torch.uint8
        assert torch.equal(train.inputs, tiles[:12])
        assert torch.equal(test.inputs, tiles[12:])
        assert train.targets.tolist() == [*range(10), 0, 1]
        assert train.class_names[3] == "class 3"


def test_parts_reads_the_first_mosaics_only(tmp_path):
    tiles = write_mosaics(tmp_path / "cifar10")
    train, test = cifar10(tmp_path, parts=1)
    assert torch.equal(train.inputs, tiles[:6])
    assert train.targets.tolist() == [*range(6)]
    assert len(test) == 6
    for parts in (0, 3):
        with pytest.raises(InputError, match=f"parts is {parts}, .*1..2"):
            cifar10(tmp_path, parts=parts)


def test_coarse_labels_name_the_superclass(tmp_path):
    write_mosaics(tmp_path / "cifar100", classes=100)
    train, _ = cifar100(tmp_path, coarse=True)
    assert train.class_names == ("even", "odd")
    assert train.targets.tolist() == [0, 1] * 6


def test_a_folder_with_something_else_says_what_was_looked_for(tmp_path):
    with pytest.raises(InputError, match=r"no CIFAR-10 in .*labels\.npz.*data_batch_1.*cifar-10-batches-py"):
        cifar10(tmp_path)
    write_mosaics(tmp_path / "a", classes=100)
    with pytest.raises(InputError, match="has 100 classes, but CIFAR-10 10"):
        cifar10(tmp_path / "a")
    write_mosaics(tmp_path / "b", lack=1)
    with pytest.raises(InputError, match=r"12 images, but labels\.npz 11 labels"):
        cifar10(tmp_path / "b")
    (tmp_path / "b" / "train_0.webp").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"train_0\.webp' cannot be decoded"):
        cifar10(tmp_path / "b", parts=1)
    (tmp_path / "b" / "labels.npz").write_bytes(b"no archive")
    with pytest.raises(InputError, match=r"labels\.npz' cannot be read"):
        cifar10(tmp_path / "b")
    (tmp_path / "b" / "test.webp").unlink()
    with pytest.raises(InputError, match=r"no test\.webp"):
        cifar10(tmp_path / "b")


# CIFAR, torchvision's layout


def python2_pickle(array: np.ndarray, **lists) -> bytes:
    """{"data": array, **lists} as Python 2 and numpy of its time wrote it: the form of the published files."""

    def string(text: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(text)) + text

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    out = b"\x80\x02}(" + string(b"data") + b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
    out += number(0) + b"\x85" + string(b"b") + b"\x87R(" + number(1) + number(array.shape[0]) + number(array.shape[1])
    out += b"\x86cnumpy\ndtype\n" + string(b"u1") + number(0) + number(1) + b"\x87R("
    out += number(3) + string(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb\x89" + string(array.tobytes())
    out += b"tb"
    for key, values in lists.items():
        items = b"".join(string(v) if isinstance(v, bytes) else number(v) for v in values)
        out += string(key.encode()) + b"](" + items + b"e"
    return out + b"u."


def python3_pickle(array: np.ndarray, **lists) -> bytes:
    return pickle.dumps({b"data": array, **{key.encode(): value for key, value in lists.items()}}, protocol=2)


def write_batches(folder: Path, write, samples=2):
    folder.mkdir(parents=True, exist_ok=True)
    inputs = np.random.default_rng(1).integers(0, 256, (6, samples, 3072), dtype=np.uint8)
    names = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")
    for i, name in enumerate(names):
        (folder / name).write_bytes(write(inputs[i], labels=[i, i + 1]))
    (folder / "batches.meta").write_bytes(write(inputs[0], label_names=[b"class %d" % i for i in range(10)]))
    return torch.from_numpy(inputs.reshape(6 * samples, 3, 32, 32))


@pytest.mark.parametrize("write", [python2_pickle, python3_pickle])
def test_torchvision_batches_are_read_as_written(tmp_path, write):
    inputs = write_batches(tmp_path / "cifar-10-batches-py", write)
    train, test = cifar10(tmp_path)
    assert torch.equal(train.inputs, inputs[:10])
    assert torch.equal(test.inputs, inputs[10:])
    assert train.targets.tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert train.class_names == tuple(f"class {i}" for i in range(10))
    assert len(cifar10(tmp_path / "cifar-10-batches-py", parts=2)[0]) == 4


def test_an_array_stored_column_by_column_is_read_in_the_right_order(tmp_path):
    inputs = write_batches(tmp_path, lambda array, **lists: python3_pickle(np.asfortranarray(array), **lists))
    assert torch.equal(cifar10(tmp_path)[0].inputs, inputs[:10])


def test_torchvision_cifar100_has_fine_and_coarse_labels(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    array = np.zeros((2, 3072), dtype=np.uint8)
    for name in ("train", "test"):
        (folder / name).write_bytes(python2_pickle(array, fine_labels=[99, 3], coarse_labels=[19, 0]))
    fine, coarse = [b"fine %d" % i for i in range(100)], [b"coarse %d" % i for i in range(20)]
    (folder / "meta").write_bytes(python2_pickle(array, fine_label_names=fine, coarse_label_names=coarse))
    assert cifar100(tmp_path)[0].targets.tolist() == [99, 3]
    train, _ = cifar100(tmp_path, coarse=True)
    assert train.targets.tolist() == [19, 0]
    assert train.class_names[19] == "coarse 19"


@pytest.mark.parametrize("module", ["os", "posix", "builtins", "numpy", "numpy.core.multiarray", "_codecs", "copyreg"])
def test_a_pickle_that_asks_for_anything_else_is_refused_before_it_runs(tmp_path, module):
    write_batches(tmp_path / "c", python3_pickle)
    marker = tmp_path / "ran"
    for name in ("system", "eval", "load", "scalar", "decode", "_reconstructor"):
        attack = f"c{module}\n{name}\n(Vtouch {marker}\ntR.".encode()
        (tmp_path / "c" / "data_batch_1").write_bytes(attack)
        with pytest.raises(InputError, match=f"data_batch_1' is refused .*{module}.{name}"):
            cifar10(tmp_path / "c")
    assert not marker.exists()


def test_a_malicious_object_in_a_batch_does_not_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    write_batches(tmp_path / "c", python3_pickle)
    (tmp_path / "c" / "test_batch").write_bytes(pickle.dumps({b"data": Attack(), b"labels": []}))
    with pytest.raises(InputError, match=r"asks to run .*system"):
        cifar10(tmp_path / "c")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is refused"),
        (b"no pickle", "is refused"),
        (pickle.dumps([1]), "holds no 'data'"),
        (python3_pickle(np.zeros((2, 3072))), "dtype .*f8"),
        (python3_pickle(np.zeros((2, 5), np.uint8), labels=[1, 2]), r"shape \(2, 5\), but \(2, 3072\)"),
        (python3_pickle(np.zeros((2, 3072), np.uint8), labels=[1]), r"but \(1, 3072\)"),
        (pickle.dumps({b"data": [1], b"labels": [1]}), "data of shape None"),
        (python3_pickle(np.zeros((2, 3072), np.uint8), labels=[1, 10]), "the label 10"),
    ],
    ids=["empty", "text", "list", "floats", "width", "labels lack", "data is a list", "label outside"],
)
def test_a_broken_batch_is_refused_in_one_line(tmp_path, content, words):
    write_batches(tmp_path, python3_pickle)
    (tmp_path / "data_batch_2").write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        cifar10(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_batch_is_named(tmp_path):
    write_batches(tmp_path, python3_pickle)
    (tmp_path / "data_batch_4").unlink()
    with pytest.raises(InputError, match="data_batch_4' is missing"):
        cifar10(tmp_path)
    assert len(cifar10(tmp_path, parts=3)[0]) == 6


# The real data


@needs("cifar10")
def test_the_first_cifar10_mosaic_is_balanced_and_has_the_published_statistics():
    train, test = cifar10(None, parts=1)
    assert len(train) == 10_000
    assert torch.bincount(train.targets).tolist() == [1000] * 10
    assert torch.bincount(test.targets).tolist() == [800] * 10
    assert train.class_names[0] == "airplane"
    assert train.class_names[9] == "truck"
    inputs, _ = train.batch(torch.arange(10_000))
    torch.testing.assert_close(inputs.mean(dim=(0, 2, 3)), torch.zeros(3), rtol=0, atol=0.02)
    torch.testing.assert_close(inputs.std(dim=(0, 2, 3)), torch.ones(3), rtol=0, atol=0.02)


@needs("cifar100")
def test_cifar100_has_a_hundred_balanced_classes_in_twenty_superclasses():
    train, test = cifar100(None, parts=1)
    assert torch.bincount(train.targets).tolist() == [100] * 100
    assert torch.bincount(test.targets).tolist() == [50] * 100
    inputs, _ = train.batch(torch.arange(10_000))
    torch.testing.assert_close(inputs.mean(dim=(0, 2, 3)), torch.zeros(3), rtol=0, atol=0.02)
    coarse, _ = cifar100(None, parts=1, coarse=True)
    assert torch.bincount(coarse.targets).tolist() == [500] * 20
    trees = {
        coarse.class_names[c]
        for c, f in zip(coarse.targets, train.targets, strict=True)
        if train.class_names[f] == "oak_tree"
    }
    assert trees == {"trees"}
