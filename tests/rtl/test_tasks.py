"""rtl.tasks: whose samples a ticket sees, what they should give, and the loss."""

import pytest
import torch
import torch.nn.functional as F
from toys import blobs

from rtl.data import Data
from rtl.errors import InputError
from rtl.partition import LabelRule, Partition, by_label, whole
from rtl.tasks import TASKS, MultiClass, OneVsRest, Pixels, Regression, psnr


def draw(task, parts, ticket, seed=0):
    return task.draw(parts, ticket, torch.Generator().manual_seed(seed))


def test_one_vs_rest_draws_every_positive_once_and_as_many_distinct_negatives_of_other_subsets():
    parts = by_label(blobs((10, 30, 30)))
    for ticket, size in ((0, 10), (1, 30)):
        index = draw(OneVsRest(), parts, ticket)
        own = parts.index[index] == ticket
        assert len(index) == len(index.unique()) == 2 * size
        assert torch.equal(index[own].sort().values, parts[ticket])
        assert int((~own).sum()) == size


def test_one_vs_rest_draws_fresh_negatives_every_epoch_from_all_other_subsets():
    parts = by_label(blobs((10, 40, 40)))
    generator = torch.Generator().manual_seed(0)
    epochs = [OneVsRest().draw(parts, 0, generator) for _ in range(20)]
    negatives = [set(e[parts.index[e] != 0].tolist()) for e in epochs]
    assert len({frozenset(n) for n in negatives}) == 20
    seen = set.union(*negatives)
    assert {int(parts.index[i]) for i in seen} == {1, 2}
    assert len(seen) > 60


def test_positives_and_negatives_are_shuffled_together():
    parts = by_label(blobs((40, 40)))
    own = parts.index[draw(OneVsRest(), parts, 0)] == 0
    assert 10 < int(own[:40].sum()) < 30


def test_one_vs_rest_takes_all_others_where_they_are_fewer_than_the_positives():
    parts = by_label(blobs((30, 4, 3)))
    index = draw(OneVsRest(), parts, 0)
    assert len(index) == 37
    assert int((parts.index[index] != 0).sum()) == 7


def test_samples_of_no_subset_are_never_drawn():
    data = blobs((20, 20, 20))
    parts = by_label(data, {"first": ["a"], "second": ["b"]})
    for task in (OneVsRest(), MultiClass()):
        assert (parts.index[draw(task, parts, 0)] >= 0).all()


def test_the_same_generator_state_draws_the_same_samples():
    parts = by_label(blobs())
    for task in TASKS.values():
        assert torch.equal(draw(task, parts, 1, seed=5), draw(task, parts, 1, seed=5))
        assert not torch.equal(draw(task, parts, 1, seed=5), draw(task, parts, 1, seed=6))


def test_one_vs_rest_of_one_subset_is_refused_and_says_what_to_use():
    with pytest.raises(InputError, match=r"'all'.*two subsets or more.*MultiClass"):
        draw(OneVsRest(), whole(blobs()), 0)


def test_one_vs_rest_targets_are_one_in_the_tickets_own_subset():
    parts = by_label(blobs())
    index = torch.arange(30)
    assert torch.equal(OneVsRest().target(parts, 2, index), (parts.index[:30] == 2).float())


def test_one_vs_rest_loss_is_the_cross_entropy_of_the_tickets_own_logit():
    torch.manual_seed(0)
    output, ticket, target = torch.randn(5, 3), torch.tensor([2, 0, 1, 1, 2]), torch.tensor([1.0, 0, 1, 0, 0])
    losses = OneVsRest().losses(output, target, ticket)
    assert losses.shape == (5,)
    for b in range(5):
        p = output[b, ticket[b]].sigmoid()
        torch.testing.assert_close(losses[b], -(p if target[b] else 1 - p).log())


@pytest.mark.parametrize(("task", "of"), [(OneVsRest(), "ticket"), (MultiClass(), "label")])
def test_a_model_with_too_few_logits_is_refused(task, of):
    target = torch.tensor([1.0, 0, 1]) if of == "ticket" else torch.tensor([0, 1, 2])
    with pytest.raises(
        InputError, match=rf"outputs of shape \(3, 2\), but there is a {of} 2: expected a logit for each"
    ):
        task.losses(torch.randn(3, 2), target, torch.tensor([0, 1, 2]))
    with pytest.raises(InputError, match=r"outputs of shape \(3,\)"):
        task.losses(torch.randn(3), target, torch.tensor([0, 1, 2]))


def test_multi_class_needs_labels():
    parts = whole(Data(torch.randn(4, 2), torch.randn(4)))
    with pytest.raises(InputError, match=r"targets are torch.float32, expected labels .* or rtl.tasks.Regression\(\)"):
        draw(MultiClass(), parts, 0)


def test_multi_class_learns_the_datas_own_labels_in_the_subset():
    data = blobs((20, 20, 20))
    parts = by_label(data, {"two": ["a", "c"], "one": ["b"]})
    index = draw(MultiClass(), parts, 0)
    assert torch.equal(index.sort().values, parts[0])
    assert set(MultiClass().target(parts, 0, index).tolist()) == {0, 2}
    output, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    expected = F.cross_entropy(output, target, reduction="none")
    assert torch.equal(MultiClass().losses(output, target, torch.zeros(4, dtype=torch.int64)), expected)


def test_regression_is_each_samples_mean_squared_error():
    torch.manual_seed(0)
    data = Data(torch.randn(6, 2), torch.randn(6, 3))
    parts = Partition(data, ("x", "y"), torch.tensor([0, 1, 0, 1, 0, 1]), LabelRule((), ()))
    index = draw(Regression(), parts, 0)
    assert sorted(index.tolist()) == [0, 2, 4]
    target = Regression().target(parts, 0, index)
    output = torch.randn(3, 3)
    expected = ((output - target) ** 2).mean(1)
    torch.testing.assert_close(Regression().losses(output, target, torch.zeros(3, dtype=torch.int64)), expected)


def test_regression_refuses_an_output_of_another_shape_instead_of_broadcasting():
    with pytest.raises(InputError, match=r"\(3, 1\).*\(3,\)"):
        Regression().losses(torch.zeros(3), torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64))


def test_pixels_are_drawn_again_only_after_all_others_of_the_region():
    parts = by_label(blobs((10, 30)))
    index = draw(Pixels(25), parts, 0)
    assert len(index) == 25
    for part in index.split(10):
        assert len(part.unique()) == len(part)
        assert (parts.index[part] == 0).all()
    assert index[:10].tolist() != index[10:20].tolist()
    assert torch.equal(draw(Pixels(), parts, 1).sort().values, parts[1])
    assert len(draw(Pixels(7), parts, 1).unique()) == 7


def test_pixels_by_area_add_up_to_what_was_asked_for():
    parts = by_label(blobs((1, 50, 9)))
    for samples in (1, 7, 60, 200):
        counts = [len(draw(Pixels(samples, by_area=True), parts, k)) for k in range(3)]
        assert sum(counts) == samples
        assert all(abs(n - samples * share / 60) <= 1 for n, share in zip(counts, (1, 50, 9), strict=True))


@pytest.mark.parametrize("arguments", [{"samples": 0}, {"by_area": True}])
def test_pixels_without_a_number_to_draw_are_refused(arguments):
    with pytest.raises(InputError, match=r"samples is 0|samples None"):
        Pixels(**arguments)


def test_pixels_are_judged_by_what_is_shown_and_taught_by_what_is_given():
    output, target = torch.tensor([[1.5, 0.5, -1.0]]), torch.tensor([[1.0, 0.5, 0.0]])
    assert float(Pixels().measure(output, target)) == 0
    assert float(Pixels().losses(output, target, torch.zeros(1))) == pytest.approx((0.25 + 1) / 3)


def test_psnr_is_ten_times_the_logarithm_of_the_inverse_error():
    assert psnr(0.01) == pytest.approx(20)
    assert Pixels().summary(1.0) == 0
    assert psnr(0.0) == 100
