"""rtl.diagnose: Jaccard similarity as sets define it, over all weights and layer by layer."""

import json
import math

import pytest
import torch

import rtl_kernels as rk
from rtl.curve import mean_to_others
from rtl.diagnose import Similarity, diagnose, similarity
from rtl.errors import InputError
from rtl.tickets import TicketMasks, Tickets


def masks(k=4, sparsity=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"first": (4, 9), "second": (3, 5, 7)}
    banks = {n: rk.MaskBank.from_dense(torch.rand((k, *s), generator=generator) < 0.5) for n, s in shapes.items()}
    return TicketMasks(tuple("abcd"[:k]), sparsity, banks)


def sets(bank):
    return [{tuple(p) for p in mask.nonzero().tolist()} for mask in bank.to_dense()]


def jaccard(a, b):
    return len(a & b) / len(a | b)


def test_similarity_is_that_of_sets_in_each_layer_and_over_all():
    tickets = masks()
    found = similarity(tickets)
    by_layer = {layer: sets(bank) for layer, bank in tickets.banks.items()}
    everything = [{(layer, p) for layer, s in by_layer.items() for p in s[k]} for k in range(4)]
    for i in range(4):
        for j in range(4):
            assert float(found.matrix[i, j]) == pytest.approx(jaccard(everything[i], everything[j]), abs=1e-15)
            for layer, s in by_layer.items():
                assert float(found.by_layer[layer][i, j]) == pytest.approx(jaccard(s[i], s[j]), abs=1e-15)
    assert list(found.by_layer) == ["first", "second"]
    assert found.names == ("a", "b", "c", "d")
    assert found.matrix.dtype == torch.float64


def test_a_tickets_score_is_its_mean_over_the_others_and_the_mean_is_over_pairs():
    matrix = torch.tensor([[1, 0.5, 0.2], [0.5, 1, 0.3], [0.2, 0.3, 1]], dtype=torch.float64)
    torch.testing.assert_close(mean_to_others(matrix), torch.tensor([0.35, 0.4, 0.25], dtype=torch.float64))
    assert Similarity(("a", "b", "c"), matrix, {}).mean == pytest.approx((0.5 + 0.2 + 0.3) / 3)


def test_a_single_ticket_has_no_similarity():
    found = similarity(masks(1))
    assert math.isnan(found.mean)
    assert found.matrix.tolist() == [[1.0]]


def test_every_reported_sparsity_is_diagnosed():
    levels = {s: masks(sparsity=s, seed=i) for i, s in enumerate((0.25, 0.5))}
    found = diagnose(Tickets(("a", "b", "c", "d"), levels, 141, {}, {}))
    assert list(found) == [0.25, 0.5]
    for s in levels:
        assert torch.equal(found[s].matrix, similarity(levels[s]).matrix)
    assert len(found.curve) == 2  # no rounds are known: the reported sparsities
    assert torch.equal(found.curve.jaccard()[1], found[0.5].matrix)
    assert (found.alarms, found.layer_alarms) == ([], [])
    with pytest.raises(InputError, match=r"tickets is a TicketMasks, expected what rtl.extract gives"):
        diagnose(levels[0.5])


def test_it_goes_through_json_unchanged():
    found = similarity(masks())
    again = Similarity.from_json(json.loads(json.dumps(found.to_json())))
    assert again.names == found.names
    assert torch.equal(again.matrix, found.matrix)
    assert list(again.by_layer) == list(found.by_layer)
    assert all(torch.equal(again.by_layer[layer], m) for layer, m in found.by_layer.items())
