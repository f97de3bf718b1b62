"""rtl.calibrate: scores of classes comparable with one half, and with one another."""

import pytest
import torch
from toys import identity_network

from rtl.calibrate import calibrate
from rtl.data import Data
from rtl.errors import InputError
from rtl.evaluate import evaluate, log_odds


def scored(samples=4000, classes=3, seed=0):
    """Log-odds of good scores that each class sees through its own slope and offset, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (samples,), generator=generator)
    good = torch.randn(samples, classes, generator=generator) + 2 * torch.nn.functional.one_hot(labels, classes)
    slope, offset = torch.tensor([1.0, 0.2, 5.0]), torch.tensor([3.0, -4.0, 0.5])
    return good, good * slope + offset, labels


def test_calibration_undoes_what_each_class_does_to_its_scores():
    good, seen, labels = scored()
    fitted = calibrate(seen, labels)
    accuracy = (fitted.ranking(seen).argmax(1) == labels).double().mean()
    assert (seen.argmax(1) == labels).double().mean() < 0.6
    assert accuracy == pytest.approx(float((good.argmax(1) == labels).double().mean()), abs=0.005)
    slope = fitted.argmax[0] * torch.tensor([1.0, 0.2, 5.0])  # of the good scores: one for all classes
    assert slope.max() / slope.min() < 1.1


def test_the_threshold_balances_what_is_missed_on_both_sides():
    _, seen, labels = scored()
    predicted = calibrate(seen, labels).probabilities(seen) >= 0.5
    for k in range(3):
        true_positive = predicted[labels == k, k].double().mean()
        true_negative = (~predicted[labels != k, k]).double().mean()
        assert true_positive == pytest.approx(float(true_negative), abs=0.03)
        assert true_positive > 0.8


@pytest.mark.parametrize("unit", [1e-4, 1e4])
def test_calibration_does_not_depend_on_the_scores_unit(unit):
    _, seen, labels = scored()
    one, other = calibrate(seen, labels), calibrate(seen * unit, labels)
    torch.testing.assert_close(other.ranking(seen * unit), one.ranking(seen), atol=0.01, rtol=0)
    torch.testing.assert_close(other.probabilities(seen * unit), one.probabilities(seen), atol=1e-3, rtol=0)


def test_a_class_whose_scores_are_all_equal_is_left_to_the_others():
    _, seen, labels = scored()
    seen[:, 0] = 3.0
    fitted = calibrate(seen, labels)
    assert fitted.argmax[0, 0] == fitted.threshold[0, 0] == 0  # nothing is known of what other scores would mean
    ranked = fitted.ranking(seen).argmax(1)
    assert (ranked == labels).double().mean() > 0.6
    assert set(ranked.tolist()) == {0, 1, 2}
    torch.testing.assert_close(fitted.probabilities(seen)[:, 0], torch.full((len(seen),), 0.5).double())


def test_calibrating_twice_gives_equal_bits():
    _, seen, labels = scored(500)
    first, second = calibrate(seen, labels), calibrate(seen, labels)
    assert torch.equal(first.argmax, second.argmax)
    assert torch.equal(first.threshold, second.threshold)


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (torch.full((4, 2), float("nan")), torch.tensor([0, 1, 0, 1]), "log_odds holds NaN or infinity"),
        (torch.zeros(4, 3), torch.tensor([0, 1, 0, 1]), r"labels has \[2, 2, 0\] samples of the classes"),
        (torch.zeros(4, 2), torch.tensor([0, 1, 2, 1]), r"labels has \[1, 2, 1\] samples"),
        (torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64), "expected 2 or more classes"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(scores, labels, message):
    with pytest.raises(InputError, match=message):
        calibrate(scores, labels)


@pytest.mark.parametrize("task", ["one_vs_rest", "multi_class"])
def test_log_odds_are_those_of_the_scores_that_are_evaluated(task):
    """Tickets: their own logits. One network: log p / (1 - p) of its softmax."""
    _, seen, labels = scored(50)
    data = Data(seen, labels, ("a", "b", "c"))
    names = "abc" if task == "one_vs_rest" else ("all",)
    net = identity_network(names, task=task, classes=3)
    expected = seen if task == "one_vs_rest" else seen.double().softmax(1).logit()
    torch.testing.assert_close(log_odds(net, data).double(), expected.double(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("task", ["one_vs_rest", "multi_class"])
def test_evaluation_goes_by_calibrated_scores(task):
    good, seen, labels = scored()
    data = Data(seen, labels, ("a", "b", "c"))
    net = identity_network("abc" if task == "one_vs_rest" else ("all",), task=task, classes=3)
    before = evaluate(net, data).metrics
    after = evaluate(net, data, calibration=calibrate(log_odds(net, data), labels)).metrics
    assert after["accuracy"] > before["accuracy"] + 0.15
    assert after["balanced_accuracy.threshold"] > before["balanced_accuracy.threshold"] + 0.05
    if task == "one_vs_rest":
        expected = float((good.argmax(1) == labels).double().mean())
        assert after["accuracy"] == pytest.approx(expected, abs=0.01)


def test_the_softmax_of_a_certain_network_has_finite_log_odds():
    net = identity_network(("all",), task="multi_class", classes=3)
    data = Data(torch.tensor([[200.0, 0.0, -200.0]]), torch.tensor([0]), ("a", "b", "c"))
    assert log_odds(net, data).isfinite().all()


def test_tickets_of_a_task_without_classes_are_refused():
    data = Data(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(InputError, match="networks of task 'regression'"):
        log_odds(identity_network("abc", task="regression"), data)
