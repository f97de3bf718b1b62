"""MaskBank: bits, counts, similarity, files."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import rtl_kernels as rk
from rtl_kernels import masks, testing

shapes = st.lists(st.integers(1, 5), min_size=0, max_size=3).flatmap(
    lambda rest: st.tuples(st.integers(1, 5), st.integers(1, 70), *map(st.just, rest))
)


@st.composite
def dense_masks(draw):
    num_masks, shape = draw(st.integers(1, 6)), draw(shapes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    density = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    return torch.rand(num_masks, *shape, generator=generator) < density


# ---- bits


@given(dense_masks())
def test_packing_and_unpacking_gives_the_masks_back(dense):
    bank = rk.MaskBank.from_dense(dense)
    assert torch.equal(bank.to_dense(), dense)
    assert (bank.num_masks, tuple(bank.shape)) == (len(dense), tuple(dense.shape[1:]))
    for mask in range(len(dense)):
        assert torch.equal(bank.dense(mask), dense[mask])


@given(dense_masks())
def test_words_are_int32_rows_of_whole_words_with_zero_padding(dense):
    words = rk.MaskBank.from_dense(dense).words
    row = math.prod(dense.shape[2:])
    assert words.dtype == torch.int32
    assert words.shape == (*dense.shape[:2], -(-row // 32))
    assert torch.equal(masks.unpack_bits(words, words.shape[-1] * 32)[..., row:].any(), torch.tensor(False))


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 100])
def test_bit_j_of_word_w_is_position_32w_plus_j(length):
    for position in {0, 1, 30, 31, 32, 63, 64, 99} & set(range(length)):
        bits = torch.zeros(length, dtype=torch.bool)
        bits[position] = True
        expected = [0] * -(-length // 32)
        expected[position // 32] = 1 << position % 32
        assert [w & 0xFFFFFFFF for w in masks.pack_bits(bits).tolist()] == expected


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1))
def test_popcount_counts_the_bits_of_any_word(values):
    counted = masks.popcount(torch.tensor(values, dtype=torch.int32))
    assert counted.tolist() == [(v & 0xFFFFFFFF).bit_count() for v in values]


@pytest.mark.parametrize("value", [-1, -(2**31), 2**31 - 1, 0, 1, -2])
def test_popcount_counts_the_sign_bit(value):
    assert masks.popcount(torch.tensor([value], dtype=torch.int32)).item() == (value & 0xFFFFFFFF).bit_count()


@pytest.mark.parametrize("shape", [(3, 4), (2, 33), (4, 2, 3, 3), (5,), (2, 0), (0, 4)])
def test_ones_keep_everything_and_nothing_more(shape):
    bank = rk.MaskBank.ones(3, shape)
    assert bank.counts().tolist() == [math.prod(shape)] * 3
    assert torch.equal(bank.to_dense(), torch.ones(3, *shape, dtype=torch.bool))


def test_a_bank_takes_a_thirty_second_of_float32_masks():
    bank = rk.MaskBank.ones(4, (64, 64, 3, 3))
    assert bank.words.numel() * bank.words.element_size() * 32 == 4 * 64 * 64 * 9 * 4


# ---- counts and similarity


@given(dense_masks())
def test_counts_density_union_and_overlap_equal_the_dense_computation(dense):
    bank, flat = rk.MaskBank.from_dense(dense), dense.flatten(1)
    assert torch.equal(bank.counts(), flat.sum(1))
    assert torch.equal(bank.density(), flat.double().mean(1))
    assert torch.equal(bank.union().dense(0), dense.any(0))
    assert bank.union().num_masks == 1
    assert torch.equal(bank.overlap(), (flat[:, None] & flat[None]).sum(-1))


def dense_jaccard(flat):
    both, either = (flat[:, None] & flat[None]).sum(-1), (flat[:, None] | flat[None]).sum(-1)
    return torch.where(either == 0, 1.0, both.double() / either.clamp(min=1))


@given(dense_masks())
def test_jaccard_of_a_layer_equals_the_dense_computation(dense):
    assert torch.equal(rk.MaskBank.from_dense(dense).jaccard(), dense_jaccard(dense.flatten(1)))


@given(st.integers(1, 4).flatmap(lambda k: st.lists(st.tuples(st.just(k), shapes), min_size=1, max_size=4)))
def test_jaccard_over_layers_is_of_all_weights_together_and_not_a_mean(layers):
    generator = torch.Generator().manual_seed(len(layers))
    dense = [torch.rand(k, *shape, generator=generator) < 0.3 for k, shape in layers]
    flat = torch.cat([d.flatten(1) for d in dense], 1)
    banks = [rk.MaskBank.from_dense(d) for d in dense]
    assert torch.equal(rk.jaccard(banks), dense_jaccard(flat))
    assert torch.equal(rk.overlap(banks), (flat[:, None] & flat[None]).sum(-1))


def test_union_leaves_the_bank_alone():
    bank = rk.MaskBank.from_dense(torch.eye(1, 5, dtype=torch.bool)[:, None])
    bank.union().words.fill_(0)
    assert bank.counts().tolist() == [1]


def test_banks_of_different_numbers_of_masks_have_no_overlap():
    with pytest.raises(ValueError, match=r"banks holds banks of \[2, 3\] masks, expected one equal number"):
        rk.overlap([rk.MaskBank.ones(2, (3, 4)), rk.MaskBank.ones(3, (3, 4))])
    with pytest.raises(ValueError, match="expected one equal number"):
        rk.jaccard([])


def test_select_takes_masks_by_number_in_the_order_given_as_copies():
    dense = torch.rand(4, 3, 40) < 0.5
    bank = rk.MaskBank.from_dense(dense)
    chosen = bank.select([2, 0, 2])
    assert torch.equal(chosen.to_dense(), dense[[2, 0, 2]])
    chosen.words.zero_()
    assert torch.equal(bank.to_dense(), dense)
    with pytest.raises(IndexError, match=r"mask is 4, but there are 4 masks \(0..3\)"):
        bank.select([0, 4])
    with pytest.raises(IndexError, match="mask is -1"):
        bank.dense(-1)
    with pytest.raises(ValueError, match="masks is empty, expected at least one mask"):
        bank.select([])


@testing.for_devices
def test_a_bank_moves_between_devices(device):
    bank = rk.MaskBank.from_dense(torch.rand(2, 3, 40) < 0.5)
    moved = bank.to(device)
    assert moved.device.type == device
    assert torch.equal(moved.to_dense().cpu(), bank.to_dense())
    assert torch.equal(moved.counts().cpu(), bank.counts())


# ---- files


@given(dense_masks())
def test_a_saved_bank_loads_as_it_was(tmp_path_factory, dense):
    path = tmp_path_factory.mktemp("banks") / "bank.safetensors"
    bank = rk.MaskBank.from_dense(dense)
    bank.save(path)
    loaded = rk.MaskBank.load(path)
    assert torch.equal(loaded.words, bank.words)
    assert loaded.shape == bank.shape
    assert [p.name for p in path.parent.iterdir()] == ["bank.safetensors"]


def test_named_banks_load_by_name_even_if_two_names_share_one(tmp_path):
    bank, other = rk.MaskBank.ones(2, (3, 4)), rk.MaskBank.from_dense(torch.rand(2, 5, 6, 1, 1) < 0.5)
    rk.save_banks({"b": bank, "a": other, "again": bank}, tmp_path / "banks")
    loaded = rk.load_banks(str(tmp_path / "banks"))
    assert loaded.keys() == {"a", "b", "again"}
    for name, saved in (("b", bank), ("a", other), ("again", bank)):
        assert torch.equal(loaded[name].words, saved.words)
        assert loaded[name].shape == saved.shape


def test_equal_banks_give_equal_files(tmp_path):
    bank = rk.MaskBank.from_dense(torch.rand(2, 5, 6) < 0.5)
    rk.save_banks({"a": bank, "b": bank}, tmp_path / "one")
    rk.save_banks({"b": bank, "a": bank}, tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_loading_one_bank_from_a_file_of_several_says_how_to(tmp_path):
    rk.save_banks({"a": rk.MaskBank.ones(2, (3, 4))}, tmp_path / "banks")
    with pytest.raises(ValueError, match=r"holds the banks \['a'\]: use load_banks"):
        rk.MaskBank.load(tmp_path / "banks")


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        rk.MaskBank.load(tmp_path / "none")


WORDS = torch.zeros(2, 3, 1, dtype=torch.int32)


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"w": torch.zeros(3)}, None),
        ({"w": torch.zeros(3)}, {"mask_shapes": "{}}"}),
        ({".words": WORDS}, {"mask_shapes": "[3, 4]"}),
        ({"x.words": WORDS}, {"mask_shapes": json.dumps({"": [3, 4]})}),
        ({".words": WORDS}, {"mask_shapes": json.dumps({"": [3, 40]})}),
        ({".words": WORDS.float()}, {"mask_shapes": json.dumps({"": [3, 4]})}),
        ({".words": WORDS - 1}, {"mask_shapes": json.dumps({"": [3, 4]})}),
    ],
    ids=["no-metadata", "not-json", "not-a-dict", "no-words", "wrong-shape", "wrong-dtype", "padding-bits"],
)
def test_a_file_of_something_else_is_refused_by_name(tmp_path, tensors, metadata):
    path = tmp_path / "other.safetensors"
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"other.safetensors', which is not a file of mask banks"):
        rk.MaskBank.load(path)


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_a_file_cut_short_is_refused_by_name(tmp_path, keep):
    path = tmp_path / "cut.safetensors"
    rk.MaskBank.ones(2, (3, 40)).save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cut.safetensors', which is not a file of mask banks"):
        rk.MaskBank.load(path)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "bank"
    old = rk.MaskBank.ones(2, (3, 4))
    old.save(path)

    def fail(tensors, file, **rest):
        with open(file, "wb") as half:
            half.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(masks, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        rk.MaskBank.ones(5, (3, 4)).save(path)
    assert rk.MaskBank.load(path).num_masks == 2
    assert [p.name for p in tmp_path.iterdir()] == ["bank"]


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    done = []

    def watched(name):
        real = getattr(os, name)
        return lambda *arguments: done.append(name) or real(*arguments)

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, watched(name))
    rk.MaskBank.ones(2, (3, 4)).save(tmp_path / "bank")
    assert done == ["fsync", "replace"]


def test_a_process_killed_while_it_writes_leaves_the_old_file(tmp_path):
    path = tmp_path / "bank"
    rk.MaskBank.ones(2, (3, 4)).save(path)
    script = f"""
import os, signal
from rtl_kernels import MaskBank, masks
masks.os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
MaskBank.ones(5, (3, 4)).save({str(path)!r})
"""
    killed = subprocess.run([sys.executable, "-c", script], cwd=os.getcwd(), check=False)
    assert killed.returncode == -9
    assert rk.MaskBank.load(path).num_masks == 2


# ---- errors


def test_masks_must_be_bool_and_at_least_one():
    with pytest.raises(TypeError, match=r"masks is a torch.float32 tensor, expected a bool tensor \(K, \*weight.shape"):
        rk.MaskBank.from_dense(torch.ones(2, 3, 4))
    with pytest.raises(TypeError, match="masks is a list, expected a bool tensor"):
        rk.MaskBank.from_dense([[True]])
    with pytest.raises(ValueError, match=r"masks has shape \(0, 3, 4\), expected .* with K >= 1"):
        rk.MaskBank.from_dense(torch.ones(0, 3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"masks has shape \(3,\)"):
        rk.MaskBank.from_dense(torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="num_masks is 0, expected at least 1"):
        rk.MaskBank.ones(0, (3, 4))


def test_words_must_fit_the_shape():
    with pytest.raises(TypeError, match=r"words is a torch.int64 tensor, expected an int32 tensor"):
        rk.MaskBank(WORDS.long(), (3, 4))
    with pytest.raises(ValueError, match=r"words has shape \(2, 3, 1\), but .* \(3, 33\) take \(K, 3, 2\) with K >= 1"):
        rk.MaskBank(WORDS, (3, 33))
    with pytest.raises(ValueError, match="take"):
        rk.MaskBank(WORDS[0], (3, 4))
    with pytest.raises(ValueError, match="take"):
        rk.MaskBank(WORDS[:0], (3, 4))


@pytest.mark.parametrize("bit", [4, 5, 31])
def test_words_with_padding_bits_are_refused(bit):
    words = WORDS.clone()
    words[1, 2, 0] = 1 << bit if bit < 31 else -(2**31)
    with pytest.raises(ValueError, match="words has bits set behind the 4 of a row, expected zeros there"):
        rk.MaskBank(words, (3, 4))
