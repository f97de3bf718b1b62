"""rtl.evaluate: the paper's columns under both decision rules, by hand and by scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, precision_score, recall_score
from toys import TinyConv, identity_network, images, seeded

import rtl_kernels as rk
from rtl.data import Data
from rtl.errors import InputError
from rtl.evaluate import classification_metrics, evaluate, predict, ticket_logits
from rtl.fit import masked_copy
from rtl.partition import LabelRule, Partition, by_label
from rtl.tickets import TicketNetwork

RULES = ("threshold", "argmax")


def expected(scores, labels):
    """All metrics by scikit-learn; a class's balanced accuracy is that of its own yes or no."""
    classes = range(scores.shape[1])
    truth = np.stack([labels == k for k in classes], 1)
    best = scores.argmax(1)
    known = labels >= 0
    values = {"accuracy": accuracy_score(labels[known], best[known])}
    predicted = {"threshold": scores >= 0.5, "argmax": np.stack([best == k for k in classes], 1)}
    for rule, guess in predicted.items():
        own = [balanced_accuracy_score(truth[:, k], guess[:, k]) for k in classes]
        values[f"balanced_accuracy.{rule}"] = np.mean(own)
        values[f"precision.{rule}"] = precision_score(truth, guess, average="macro", zero_division=0)
        values[f"recall.{rule}"] = recall_score(truth, guess, average="macro", zero_division=0)
    return values


def test_both_rules_by_hand():
    scores = np.array([[0.9, 0.6], [0.4, 0.3], [0.2, 0.8], [0.7, 0.5]])
    labels = np.array([0, 0, 1, 1])
    found = classification_metrics(scores, labels)
    # threshold: class 0 says yes to samples 0, 3; class 1 to 0, 2, 3. argmax: 0, 0, 1, 0.
    assert found.per_class["recall.threshold"] == [1 / 2, 2 / 2]
    assert found.per_class["precision.threshold"] == [1 / 2, 2 / 3]
    assert found.per_class["balanced_accuracy.threshold"] == [(1 / 2 + 1 / 2) / 2, (1 + 1 / 2) / 2]
    assert found.per_class["recall.argmax"] == [2 / 2, 1 / 2]
    assert found.per_class["precision.argmax"] == [2 / 3, 1 / 1]
    assert found.per_class["balanced_accuracy.argmax"] == [(1 + 1 / 2) / 2, (1 / 2 + 1) / 2]
    assert found.metrics["accuracy"] == 3 / 4
    assert found.metrics["recall.threshold"] == 3 / 4


@pytest.mark.parametrize("negatives", [False, True], ids=["every sample has a class", "some have none"])
def test_both_rules_equal_scikit_learns(negatives):
    generator = np.random.default_rng(0)
    labels = generator.integers(-1 if negatives else 0, 4, 200)
    scores = generator.random((200, 4)) * 0.6 + 0.3 * (labels[:, None] == np.arange(4))
    found = classification_metrics(scores, labels).metrics
    assert found == pytest.approx(expected(scores, labels), abs=1e-12)
    assert found["precision.threshold"] != pytest.approx(found["precision.argmax"], abs=0.01)


def test_the_papers_reading_of_argmax_recall_and_balanced_accuracy_holds():
    labels = np.repeat(np.arange(10), 1000)
    generator = np.random.default_rng(0)
    wrong = (labels + generator.integers(1, 10, len(labels))) % 10
    best = np.where(np.arange(len(labels)) % 1000 < 480, labels, wrong)
    found = classification_metrics(np.eye(10)[best], labels).metrics
    assert found["recall.argmax"] == pytest.approx(0.480)
    assert found["accuracy"] == pytest.approx(0.480)
    assert found["balanced_accuracy.argmax"] == pytest.approx(0.711, abs=5e-4)


def test_a_class_never_predicted_has_precision_0_and_one_without_samples_recall_0():
    found = classification_metrics(np.array([[0.9, 0.1, 0.7], [0.8, 0.2, 0.1]]), np.array([0, 1]))
    for rule in RULES:
        assert found.per_class[f"precision.{rule}"][1] == 0
        assert found.per_class[f"recall.{rule}"] == [1, 0, 0]


def test_a_score_of_one_half_is_a_yes():
    assert classification_metrics(np.array([[0.5, 0.4]]), np.array([0])).metrics["recall.threshold"] == 0.5


# Networks


def logits(n=60, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=generator)
    inputs = torch.randn(n, classes, generator=generator) + 1.5 * torch.nn.functional.one_hot(labels, classes)
    return Data(inputs, labels, tuple("abcdef"[:classes]))


def test_one_vs_rest_tickets_are_scored_on_every_sample():
    data = logits()
    found = evaluate(identity_network(), data, batch_size=7)
    assert found.metrics == pytest.approx(expected(data.inputs.sigmoid().numpy(), data.targets.numpy()))


@pytest.mark.parametrize("alone", [False, True], ids=["one network", "a network a ticket"])
def test_of_several_sure_tickets_the_surest_is_taken_though_their_sigmoids_are_all_one(alone):
    data = Data(torch.tensor([[20.0, 30, 25], [18, 17, 40], [50, 60, 70]]), torch.tensor([1, 2, 0]), tuple("abc"))
    assert (data.inputs.sigmoid() == 1).all()
    nets = [identity_network("abc"[k], outputs=(k,), classes=3) for k in range(3)] if alone else identity_network()
    found = evaluate(nets, data)
    assert found.metrics["accuracy"] == pytest.approx(2 / 3)
    assert found.per_class["recall.argmax"] == [0, 1, 1]
    assert found.metrics["recall.threshold"] == 1


def test_the_order_of_tickets_does_not_matter_but_each_reads_its_own_logit():
    data = logits()
    straight = evaluate(identity_network(), data)
    assert evaluate(identity_network("cab", outputs=(2, 0, 1)), data) == straight
    assert evaluate(identity_network("abc", outputs=(2, 0, 1)), data) == straight  # outputs, not names, say who is who


def test_networks_of_one_ticket_each_are_scored_as_one():
    data = logits()
    nets = [identity_network("abc"[k], outputs=(k,), classes=3) for k in (1, 2, 0)]
    assert evaluate(nets, data) == evaluate(identity_network(), data)


def test_a_partition_says_whose_samples_are_whose_and_the_rest_are_negatives_for_all():
    data = logits(classes=4)
    parts = by_label(data, {"bd": ["b", "d"], "a": ["a"]})
    found = evaluate(identity_network(("bd", "a"), outputs=(0, 1), classes=4), parts)
    labels = parts.index.numpy()
    assert (labels == -1).any()
    assert found.metrics == pytest.approx(expected(data.inputs[:, :2].sigmoid().numpy(), labels))


def test_some_of_the_tickets_take_the_other_subsets_samples_as_negatives():
    data = logits()
    found = evaluate(identity_network("ca", outputs=(2, 0), classes=3), by_label(data))
    labels = np.array([{0: 0, 2: 1, 1: -1}[int(label)] for label in data.targets])
    assert found.metrics == pytest.approx(expected(data.inputs[:, [0, 2]].sigmoid().numpy(), labels))


def test_a_label_without_a_ticket_is_refused_and_says_what_to_do():
    with pytest.raises(InputError, match=r"label 2, which no ticket stands for: pass parts.apply\(test\)"):
        evaluate(identity_network("ab", classes=3), logits())


def test_no_samples_are_refused():
    data = logits()
    with pytest.raises(InputError, match="test holds no samples"):
        evaluate(identity_network(), data.select(torch.tensor([], dtype=torch.int64)))


def test_a_multi_class_network_is_scored_by_its_softmax():
    data = logits()
    found = evaluate(identity_network(("all",), task="multi_class", classes=3), data)
    assert found.metrics == pytest.approx(expected(data.inputs.softmax(1).numpy(), data.targets.numpy()))


def test_multi_class_tickets_each_predict_in_their_own_subset():
    data = logits()
    masks = torch.stack([torch.eye(3), torch.ones(3, 3) - torch.eye(3)]).bool()  # the second ticket has no weight left
    net = identity_network(("x", "y"), outputs=(1, 0), task="multi_class", classes=3, masks=masks)
    index = torch.arange(60) % 2
    found = evaluate(net, Partition(data, ("y", "x"), index, LabelRule((), ())), batch_size=7)
    outputs = data.inputs * (index == 1)[:, None]  # subset 1 is the first ticket's
    assert found.metrics == pytest.approx(expected(outputs.softmax(1).numpy(), data.targets.numpy()))
    with pytest.raises(InputError, match=r"each serve a subset: pass parts.apply\(test\)"):
        evaluate(net, data)
    with pytest.raises(InputError, match="subset -1, which no ticket stands for"):
        evaluate(net, Partition(data, ("y", "x"), index - 1, LabelRule((), ())))
    alone = [identity_network(("xy"[k],), (1 - k,), "multi_class", 3, masks=masks[k : k + 1]) for k in (0, 1)]
    assert evaluate(alone, Partition(data, ("y", "x"), index, LabelRule((), ()))) == found
    with pytest.raises(InputError, match=r"each serve a subset: pass parts.apply\(test\)"):
        evaluate(alone, data)


def test_what_is_no_network_of_tickets_is_refused():
    net, data = identity_network(), logits()
    with pytest.raises(InputError, match=r"net is a RoutedModel, expected what rtl.retrain gives"):
        evaluate(net.net, data)
    with pytest.raises(InputError, match="test is a Tensor, expected a Data, or a Partition"):
        evaluate(net, data.inputs)
    with pytest.raises(InputError, match="net is empty"):
        evaluate([], data)
    with pytest.raises(InputError, match=r"net has 2 tickets for subset 0.*several seeds', one by one"):
        evaluate([net, net], data)


def test_subsets_of_classes_are_evaluated_by_themselves():
    data = logits()
    net = identity_network(("x", "y"), task="multi_class", classes=3, masks=torch.ones(2, 3, 3, dtype=torch.bool))
    parts = Partition(data, ("x", "y"), torch.arange(60) % 2, LabelRule((), ()))
    with pytest.raises(InputError, match="per is given, but net is of task 'multi_class'"):
        evaluate(net, parts, per=parts)


def test_regression_is_the_mean_squared_error_of_each_samples_own_ticket():
    torch.manual_seed(0)
    data = Data(torch.randn(20, 2), torch.randn(20, 2))
    masks = torch.stack([torch.eye(2), torch.ones(2, 2) - torch.eye(2)]).bool()
    net = identity_network("xy", task="regression", masks=masks)
    index = torch.arange(20) % 2
    found = evaluate(net, Partition(data, ("x", "y"), index, LabelRule((), ())))
    errors = ((data.inputs * (index == 0)[:, None] - data.targets) ** 2).mean(1)
    assert found.metrics == pytest.approx({"mse": float(errors.mean())})
    assert found.per_class["mse"] == pytest.approx([float(errors[index == k].mean()) for k in (0, 1)])


def test_networks_of_one_ticket_each_predict_in_their_own_subsets():
    torch.manual_seed(0)
    data = Data(torch.randn(9, 2), torch.randn(9, 2))
    masks = torch.stack([torch.eye(2), torch.ones(2, 2) - torch.eye(2)]).bool()
    index = torch.tensor([0, 1, 1, 0, 1, 0, 0, 0, 1])
    parts = Partition(data, ("x", "y"), index, LabelRule((), ()))
    together = identity_network("xy", task="regression", masks=masks)
    alone = [identity_network("xy"[k], (k,), task="regression", classes=2, masks=masks[k : k + 1]) for k in (1, 0)]
    assert evaluate(alone, parts, batch_size=2) == evaluate(together, parts)
    assert torch.equal(predict(alone, parts, 2), predict([together], parts))
    assert torch.equal(predict(alone, parts), data.inputs * (index == 0)[:, None])
    first = Partition(data, ("x", "y"), index * 0, LabelRule((), ()))  # nothing for the other network
    assert torch.equal(predict(alone, first), data.inputs)


def test_one_network_for_all_samples_is_judged_in_each_subset_it_does_not_know_of():
    data = Data(torch.randn(6, 2), torch.zeros(6, 2))
    per = Partition(data, ("x", "y", "none"), torch.tensor([0, 0, 1, 1, 1, -1]), LabelRule((), ()))
    net = identity_network(("all",), task="regression", classes=2)
    found = evaluate(net, data, per=per)
    errors = data.inputs.square().mean(1)
    assert found.metrics["mse"] == pytest.approx(float(errors.mean()))
    assert found.per_class["mse"][:2] == pytest.approx([float(errors[:2].mean()), float(errors[2:5].mean())])
    assert np.isnan(found.per_class["mse"][2])
    assert evaluate(net, data).per_class == {}
    with pytest.raises(InputError, match="per is of 6 samples, but test holds 5"):
        evaluate(net, data.select(torch.arange(5)), per=per)


def test_an_unknown_task_is_refused():
    with pytest.raises(InputError, match="net is of task 'magic', expected one of one_vs_rest"):
        evaluate(identity_network(task="magic"), logits())


def test_one_pass_of_all_tickets_scores_as_a_pass_for_each_ticket():
    torch.manual_seed(0)
    net = masked_copy(seeded(TinyConv), 3, "per_ticket")
    net.banks = {layer: rk.MaskBank.from_dense(torch.rand(3, *bank.shape) < 0.5) for layer, bank in net.banks.items()}
    for module in net.modules():
        if isinstance(module, rk.nn.SubsetBatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    tickets = TicketNetwork(net, ("c", "a", "b"), (2, 0, 1), "one_vs_rest", 0.5)
    tickets.train()
    data = images()
    logits = ticket_logits(tickets, data, batch_size=20)
    scores = logits.sigmoid()
    assert not net.training  # scored in evaluation mode
    assert evaluate(tickets, data, logits=logits) == evaluate(tickets, data)
    assert evaluate(tickets, data, logits=logits.flip(1)) != evaluate(tickets, data)  # they are what is judged
    with torch.no_grad():
        for k, (name, output) in enumerate(zip(tickets.names, tickets.outputs, strict=True)):
            alone = tickets(data.inputs, ticket=name)[:, output].sigmoid()
            torch.testing.assert_close(scores[:, k], alone, rtol=0, atol=1e-6)
    assert (scores[:, 0] - scores[:, 1]).abs().max() > 0.01
