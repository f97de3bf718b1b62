"""rtl.retrain: Algorithm 2 — whose turn it is, what may move, and the same weights after any interruption."""

import dataclasses
import math
import sys

import pytest
import torch
from torch import nn
from torch.func import functional_call
from toys import TinyConv, Wide, blobs, dense_masks, images, mlp, quiet, seeded, tree

import rtl
import rtl_kernels as rk
from rtl.baselines import imp_multiple
from rtl.errors import InputError
from rtl.fit import Fit, digest, masked_copy
from rtl.partition import by_label, whole
from rtl.retrain import presented, retrain, schedule
from rtl.tasks import MultiClass, OneVsRest
from rtl.tickets import TicketMasks, Tickets

module = sys.modules["rtl.retrain"]  # `rtl.retrain` is the function
FIT = Fit(epochs=3, batch_size=16, lr=0.01)


@pytest.fixture
def parts():
    return by_label(blobs((10, 40, 20)))  # epochs of 20, 70 (40 and the 30 others) and 40 samples: 2, 5, 3 batches


def random_masks(model, names="abc", density=0.5, seed=0, sparsity=0.5):
    generator = torch.Generator().manual_seed(seed)
    ones = masked_copy(model, len(names), "shared").banks
    banks = {
        layer: rk.MaskBank.from_dense(torch.rand((len(names), *bank.shape), generator=generator) < density)
        for layer, bank in ones.items()
    }
    return TicketMasks(tuple(names), sparsity, banks)


def watch_steps(monkeypatch, before=lambda *_: None, after=lambda *_: None):
    original = module.step

    def step(net, optimizer, task, parts, batch):
        before(net, optimizer, batch)
        loss = original(net, optimizer, task, parts, batch)
        after(net, optimizer, batch)
        return loss

    monkeypatch.setattr(module, "step", step)


def interrupt_at(monkeypatch, number):
    count = [0]

    def interrupt(*_):
        count[0] += 1
        if count[0] == number:
            raise KeyboardInterrupt

    watch_steps(monkeypatch, before=interrupt)


# Whose turn it is


def epoch(parts, subsets, fit, seed=0):
    return list(schedule(parts, subsets, fit, torch.Generator().manual_seed(seed)))


def test_sequential_turns_go_through_the_tickets_batch_by_batch(parts):
    steps = epoch(parts, [0, 1, 2], FIT)
    assert [[k for k, _, _ in batch] for batch in steps] == [[0], [1], [2]] * 5


def test_batches_of_smaller_subsets_are_repeated_cyclically(parts):
    steps = epoch(parts, [0, 1, 2], FIT)
    of = [[batch[0][2].tolist() for batch in steps if batch[0][0] == k] for k in range(3)]
    assert len({tuple(b) for b in of[1]}) == 5
    assert of[0] == (of[0][:2] * 3)[:5]
    assert of[2] == (of[2][:3] * 2)[:5]
    assert len({i for batch in of[2][:3] for i in batch}) == 40 == len({i for batch in of[2] for i in batch})
    assert {int(parts.index[i]) for i in of[0][0] + of[0][1]} >= {0}


def test_every_ticket_sees_its_own_subset(parts):
    for batch in epoch(parts, [2, 0], FIT):
        (k, subset, _) = batch[0]
        assert subset == [2, 0][k]
    positives = torch.cat([b[0][2] for b in epoch(parts, [2, 0], FIT)[::2]]).unique()
    assert set(parts[2].tolist()) <= set(positives.tolist())


def test_mixed_turns_hold_every_ticket_once_in_as_many_steps_and_samples(parts):
    parts = by_label(blobs((48, 48, 48)))
    fit = Fit(batch_size=24, schedule="mixed")
    mixed, sequential = epoch(parts, [0, 1, 2], fit), epoch(parts, [0, 1, 2], Fit(batch_size=24))
    assert all([k for k, _, _ in batch] == [0, 1, 2] for batch in mixed)
    assert all(len(index) == 8 for batch in mixed for _, _, index in batch)
    assert len(mixed) == len(sequential) == 12
    assert sum(len(i) for b in mixed for _, _, i in b) == sum(len(i) for b in sequential for _, _, i in b) == 3 * 96


def test_mixed_steps_and_samples_equal_the_sequential_ones_up_to_rounding_for_unequal_subsets(parts):
    parts = by_label(blobs((50, 90, 70)))
    counts = {}
    for name in ("sequential", "mixed"):
        steps = epoch(parts, [0, 1, 2], Fit(batch_size=15, schedule=name))
        counts[name] = len(steps), sum(len(i) for b in steps for _, _, i in b)
    assert counts["mixed"][0] == counts["sequential"][0] == 36
    assert abs(counts["mixed"][1] / counts["sequential"][1] - 1) < 0.05


@pytest.mark.parametrize("size", [3, 4, 6, 7, 16, 17, 64])
def test_mixed_steps_are_never_more_than_the_sequential_ones_and_hold_the_rounded_up_share(size):
    parts = by_label(blobs((50, 50, 50)))
    mixed, sequential = (epoch(parts, [0, 1, 2], Fit(batch_size=size, schedule=s)) for s in ("mixed", "sequential"))
    assert len(mixed) <= len(sequential)
    assert sum(len(i) for b in mixed for _, _, i in b) == sum(len(i) for b in sequential for _, _, i in b) == 300
    assert {len(index) for batch in mixed[:-1] for _, _, index in batch} == {math.ceil(size / 3)}


def test_pooled_steps_show_every_drawn_sample_once_and_a_ticket_as_often_as_it_has_samples(parts):
    steps = epoch(parts, [2, 0], Fit(batch_size=16, schedule="pooled", task=MultiClass()))
    assert [sum(len(index) for _, _, index in batch) for batch in steps] == [16, 14]  # 20 samples and 10
    for k, subset in enumerate((2, 0)):
        seen = torch.cat([index for batch in steps for own, _, index in batch if own == k])
        assert torch.equal(seen.sort().values, parts[subset])
    assert all(subset == [2, 0][k] and len(index) for batch in steps for k, subset, index in batch)
    assert any(len(batch) == 2 for batch in steps)


def test_a_pooled_step_leaves_out_tickets_without_a_sample(parts):
    steps = epoch(parts, [0, 1], Fit(batch_size=2, schedule="pooled", task=MultiClass()))
    assert {len(batch) for batch in steps} == {1, 2}


# Algorithm 2


def algorithm_2(model, masks, parts, fit, run):
    """θ after Algorithm 2 in plain PyTorch: a masked forward, then an update undone where the ticket has no weight."""
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.Adam(parameters.values(), lr=fit.lr)
    for number in range(fit.epochs):
        for ((k, subset, index),) in schedule(parts, [0, 1, 2], fit, run.generator("retrain", *masks.names, number)):
            keep = {f"{layer}.weight": mask for layer, mask in dense_masks(masks.banks, k).items()}
            masked = {name: p * keep[name] if name in keep else p for name, p in parameters.items()}
            logit = functional_call(model, masked, (parts.data.inputs[index],))[:, subset]
            target = (parts.index[index] == subset).double()
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(logit, target).backward()
            old = {
                n: (p.detach().clone(), {k: v.clone() for k, v in optimizer.state[p].items()})
                for n, p in parameters.items()
            }
            optimizer.step()
            for name, mask in keep.items():
                value, state = old[name]
                parameters[name].data.copy_(torch.where(mask, parameters[name], value))
                for key in ("exp_avg", "exp_avg_sq"):
                    new = optimizer.state[parameters[name]][key]
                    new.copy_(torch.where(mask, new, state.get(key, torch.zeros_like(new))))
    return parameters


def test_weights_are_those_of_algorithm_2_in_plain_pytorch(tmp_path, parts):
    masks = random_masks(Wide(mlp()))
    net = retrain(Wide(mlp()), masks, parts, FIT, quiet(tmp_path))
    expected = algorithm_2(Wide(mlp()), masks, parts, FIT, quiet(tmp_path))
    found = dict(net.net.model.named_parameters())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=1e-8
        )  # Adam amplifies rounding where gradients vanish
    assert any((found[n] - p).abs().max() > 0.01 for n, p in Wide(mlp()).named_parameters())


@pytest.mark.parametrize("name", ["sequential", "mixed"])
def test_a_step_moves_only_weights_and_state_that_its_tickets_keep(tmp_path, parts, monkeypatch, name):
    masks = random_masks(mlp(), density=0.3)
    seen = {}
    moved = []

    def snapshot(net, optimizer):
        state = {}
        for layer, m in net.masked_modules().items():
            entries = optimizer.state.get(m.weight, {})
            zeros = torch.zeros_like(m.weight)
            state[layer] = [
                m.weight.detach().clone(),
                *(entries.get(k, zeros).clone() for k in ("exp_avg", "exp_avg_sq")),
            ]
        return state

    def before(net, optimizer, batch):
        seen["state"] = snapshot(net, optimizer)

    def after(net, optimizer, batch):
        for layer, tensors in snapshot(net, optimizer).items():
            keep = torch.stack([masks.banks[layer].dense(k) for k, _, _ in batch]).any(0)
            for old, new in zip(seen["state"][layer], tensors, strict=True):
                assert not ((old != new) & ~keep).any()
            moved.append(bool((seen["state"][layer][0] != tensors[0]).any()))

    watch_steps(monkeypatch, before, after)
    retrain(mlp(), masks, parts, Fit(epochs=1, batch_size=16, lr=0.01, schedule=name), quiet(tmp_path))
    assert len(moved) == 2 * {"sequential": 15, "mixed": 12}[name]
    assert all(moved)


def test_weights_that_no_ticket_keeps_are_theta0_at_the_end(tmp_path, parts):
    masks = random_masks(mlp(), density=0.3)
    net = retrain(mlp(), masks, parts, FIT, quiet(tmp_path))
    for layer, bank in masks.banks.items():
        union = bank.to_dense().any(0)
        theta0 = mlp().get_submodule(layer).weight
        assert torch.equal(net.net.masked_modules()[layer].weight[~union], theta0[~union])
        assert (net.net.masked_modules()[layer].weight[union] != theta0[union]).any()


def test_it_starts_at_theta0_and_leaves_masks_and_the_model_untouched(tmp_path, parts, monkeypatch):
    model, starts = mlp().eval(), []
    watch_steps(monkeypatch, before=lambda net, *_: starts.append(digest(dict(net.model.named_parameters()))))
    masks = random_masks(model)
    words = {layer: bank.words.clone() for layer, bank in masks.banks.items()}
    before = digest(model.state_dict())
    net = retrain(model, masks, parts, FIT, quiet(tmp_path))
    assert starts[0] == before == digest(model.state_dict())
    assert starts[1] != before
    for layer, bank in masks.banks.items():
        assert torch.equal(bank.words, words[layer])
        assert torch.equal(net.net.banks[layer].words, words[layer])


def test_another_sparsity_starts_at_theta0_too(tmp_path, parts, monkeypatch):
    run = quiet(tmp_path)
    retrain(mlp(), random_masks(mlp()), parts, FIT, run)
    starts = []
    watch_steps(monkeypatch, before=lambda net, *_: starts.append(digest(dict(net.model.named_parameters()))))
    retrain(mlp(), random_masks(mlp(), seed=1, sparsity=0.75), parts, FIT, run)
    assert starts[0] == digest(mlp().state_dict())


def test_the_network_is_ready_to_use_and_knows_what_it_took(tmp_path, parts):
    net = retrain(mlp(), random_masks(mlp(), "ca"), parts, FIT, quiet(tmp_path))
    assert not net.training
    assert not net.net.training
    assert net.names == ("c", "a")
    assert net.outputs == (2, 0)
    assert net.samples == 3 * (40 + 20 + 16)  # a has two batches, of 16 and 4; the first comes again
    assert net.seconds > 0


def test_batch_norm_statistics_are_of_each_tickets_own_samples_unless_shared(tmp_path):
    parts = by_label(images())
    fits = {mode: Fit(epochs=1, batch_size=16, lr=0.01, batch_norm=mode) for mode in ("per_ticket", "shared")}
    means, weights = {}, {}
    for mode, fit in fits.items():
        net = retrain(seeded(TinyConv), random_masks(seeded(TinyConv)), parts, fit, quiet(tmp_path / mode))
        means[mode] = net.net.model.features[1].running_mean
        weights[mode] = dict(net.net.model.named_parameters())
    torch.testing.assert_close(weights["shared"], weights["per_ticket"])  # a sequential step is one ticket's
    assert means["shared"].shape == (4,)
    assert means["per_ticket"].shape == (3, 4)
    assert (means["per_ticket"][0] - means["per_ticket"][1]).abs().max() > 1e-4


def test_recalibrated_statistics_are_each_tickets_own_under_weights_trained_with_shared_ones(tmp_path):
    parts, model = by_label(images()), seeded(TinyConv)
    masks = random_masks(model)
    fits = {mode: Fit(epochs=2, batch_size=16, lr=0.01, batch_norm=mode) for mode in ("shared", "recalibrated")}
    shared, net = (retrain(model, masks, parts, fit, quiet(tmp_path / mode)) for mode, fit in fits.items())
    for (name, trained), (other, kept) in zip(shared.net.named_parameters(), net.net.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(trained, kept)
    # Of the first norm, whose inputs no other norm's statistics change: the mean over the recalibration's batches.
    norm, index = net.net.model.features[1], {}
    generator = quiet(tmp_path / "recalibrated").child("retrain/0.5").generator("recalibrate", *masks.names)
    for ((k, _, chosen),) in schedule(parts, [0, 1, 2], fits["recalibrated"], generator):
        index.setdefault(k, []).append(chosen)
    for k in range(3):
        convolution = net.export(masks.names[k]).features[0]
        outputs = [convolution(parts.data.inputs[chosen]) for chosen in index[k]]
        expected = torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0)
        torch.testing.assert_close(norm.running_mean[k], expected, rtol=1e-4, atol=1e-5)
        expected = torch.stack([y.var((0, 2, 3)) for y in outputs]).mean(0)
        torch.testing.assert_close(norm.running_var[k], expected, rtol=1e-4, atol=1e-5)
    assert norm.momentum == 0.1
    assert net.samples == shared.samples + shared.samples // 2  # one more epoch is presented
    again = retrain(model, masks, parts, fits["recalibrated"], quiet(tmp_path / "recalibrated"))  # loaded
    assert digest(again.state_dict()) == digest(net.state_dict())


def plain_adam(model, masks, parts, fit, run):
    """θ after Algorithm 2 with the gradient masked and the update left to Adam, in plain PyTorch."""
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.Adam(parameters.values(), lr=fit.lr)
    for number in range(fit.epochs):
        for ((k, subset, index),) in schedule(parts, [0, 1, 2], fit, run.generator("retrain", *masks.names, number)):
            keep = {f"{layer}.weight": mask for layer, mask in dense_masks(masks.banks, k).items()}
            masked = {name: p * keep[name] if name in keep else p for name, p in parameters.items()}
            logit = functional_call(model, masked, (parts.data.inputs[index],))[:, subset]
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(logit, (parts.index[index] == subset).double()).backward()
            optimizer.step()
    return parameters


def test_masked_gradients_alone_let_adam_move_what_a_ticket_has_pruned(tmp_path, parts):
    masks, fit = random_masks(Wide(mlp())), dataclasses.replace(FIT, masked="gradient")
    run = quiet(tmp_path).child("retrain/0.5")
    net = retrain(Wide(mlp()), masks, parts, fit, quiet(tmp_path))
    expected = plain_adam(Wide(mlp()), masks, parts, fit, run)
    for name, value in expected.items():
        torch.testing.assert_close(net.net.model.get_parameter(name), value, rtol=0, atol=1e-8)
    update = retrain(Wide(mlp()), masks, parts, FIT, quiet(tmp_path / "update"))
    ours, theirs = (dict(n.net.model.named_parameters()) for n in (net, update))
    assert max((ours[name] - theirs[name]).abs().max() for name in expected) > 1e-3


def test_the_learning_rate_falls_over_the_whole_retraining_and_resumes_where_it_was(tmp_path, parts, monkeypatch):
    rates, fit = [], dataclasses.replace(FIT, lr_schedule="cosine")
    with monkeypatch.context() as patch:
        watch_steps(patch, before=lambda net, optimizer, _: rates.append(optimizer.param_groups[0]["lr"]))
        expected = retrain(mlp(), random_masks(mlp()), parts, fit, quiet(tmp_path / "whole"))
    assert rates == pytest.approx([FIT.lr * (1 + math.cos(math.pi * i / 45)) / 2 for i in range(45)])
    run = quiet(tmp_path / "run")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 20)
        with pytest.raises(KeyboardInterrupt):
            retrain(mlp(), random_masks(mlp()), parts, fit, run, checkpoint_seconds=0)
    resumed = retrain(mlp(), random_masks(mlp()), parts, fit, run, checkpoint_seconds=0)
    assert digest(resumed.state_dict()) == digest(expected.state_dict())


def test_augmented_samples_are_the_same_after_an_interruption_and_change_the_weights(tmp_path, monkeypatch):
    parts, model = by_label(images()), seeded(TinyConv)
    fit = Fit(epochs=3, batch_size=16, lr=0.01, augment="crop_flip")
    expected = retrain(model, random_masks(model), parts, fit, quiet(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 14)
        with pytest.raises(KeyboardInterrupt):
            retrain(model, random_masks(model), parts, fit, quiet(tmp_path / "run"), checkpoint_seconds=0)
    resumed = retrain(model, random_masks(model), parts, fit, quiet(tmp_path / "run"), checkpoint_seconds=0)
    assert digest(resumed.state_dict()) == digest(expected.state_dict())
    plain = retrain(model, random_masks(model), parts, dataclasses.replace(fit, augment="none"), quiet(tmp_path / "p"))
    assert digest(plain.state_dict()) != digest(expected.state_dict())


def test_presented_counts_what_an_epoch_gives_each_subset(parts):
    found = presented(parts, [0, 1, 2], FIT)
    counted = dict.fromkeys((0, 1, 2), 0)
    for ((_, subset, index),) in epoch(parts, [0, 1, 2], FIT):
        counted[subset] += len(index)
    assert found == counted
    assert presented(parts, [1], FIT) == {1: 70}


# Resuming


class Dropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("name", ["sequential", "mixed"])
@pytest.mark.parametrize("stop", [1, 16, 20, 31, 40])
def test_interrupted_at_any_step_it_resumes_to_the_same_weights_bit_for_bit(tmp_path, parts, monkeypatch, stop, name):
    fit = Fit(epochs=3, batch_size=15, lr=0.01, schedule=name)
    model, masks = seeded(TinyConv), random_masks(seeded(TinyConv))
    parts = by_label(images((10, 35, 30)))
    retrain(model, masks, parts, fit, quiet(tmp_path / "whole"))
    run = quiet(tmp_path / "run")
    with monkeypatch.context() as patch:
        interrupt_at(patch, stop)
        with pytest.raises(KeyboardInterrupt):
            retrain(model, masks, parts, fit, run, checkpoint_seconds=0)
    retrain(model, masks, parts, fit, run, checkpoint_seconds=0)
    one, two = tree(tmp_path / "whole"), tree(tmp_path / "run")
    assert one.keys() == two.keys()  # no checkpoint is left either
    assert one["retrain/0.5/network.safetensors"] == two["retrain/0.5/network.safetensors"]


def test_what_dropout_draws_does_not_depend_on_resuming(tmp_path, parts, monkeypatch):
    model, masks = seeded(Dropout), random_masks(seeded(Dropout))
    expected = retrain(model, masks, parts, FIT, quiet(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 20)
        with pytest.raises(KeyboardInterrupt):
            retrain(model, masks, parts, FIT, quiet(tmp_path / "run"), checkpoint_seconds=0)
    found = retrain(model, masks, parts, FIT, quiet(tmp_path / "run"))
    assert digest(found.state_dict()) == digest(expected.state_dict())


def test_it_resumes_at_the_checkpoint_and_not_at_the_start(tmp_path, parts, monkeypatch):
    run = quiet(tmp_path)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 40)
        with pytest.raises(KeyboardInterrupt):
            retrain(mlp(), random_masks(mlp()), parts, FIT, run, checkpoint_seconds=0)
    steps = []
    watch_steps(monkeypatch, before=lambda *_: steps.append(1))
    net = retrain(mlp(), random_masks(mlp()), parts, FIT, run)
    assert len(steps) == 15
    assert net.samples == 3 * sum(len(i) for b in epoch(parts, [0, 1, 2], FIT) for _, _, i in b)


def test_a_finished_retraining_is_loaded(tmp_path, parts, monkeypatch):
    first = retrain(mlp(), random_masks(mlp()), parts, FIT, quiet(tmp_path))
    watch_steps(monkeypatch, before=lambda *_: pytest.fail("trained again"))
    again = retrain(mlp(), random_masks(mlp()), parts, FIT, quiet(tmp_path))
    assert digest(again.state_dict()) == digest(first.state_dict())
    assert (again.samples, again.seconds) == (first.samples, first.seconds)


@pytest.mark.parametrize(
    ("what", "changed"),
    [
        ("fit.lr", {"fit": Fit(epochs=3, batch_size=16, lr=0.02)}),
        ("fit.schedule", {"fit": Fit(epochs=3, batch_size=16, lr=0.01, schedule="mixed")}),
        ("masks", {"tickets": random_masks(mlp(), seed=1)}),
        ("tickets", {"tickets": random_masks(mlp(), "acb")}),
        ("theta0", {"model": seeded(rtl.models.mlp, 6, [8], 3, seed=1)}),
        ("data", {"parts": by_label(blobs((10, 40, 20), seed=1))}),
    ],
)
def test_another_retraining_in_the_same_run_is_refused_and_the_old_one_unharmed(tmp_path, parts, what, changed):
    arguments = {"model": mlp(), "tickets": random_masks(mlp()), "parts": parts, "fit": FIT}
    retrain(**arguments, run=quiet(tmp_path))
    before = tree(tmp_path)
    with pytest.raises(InputError, match=rf"\b{what}\b[^;]* was .*use another --out or delete the folder"):
        retrain(**(arguments | changed), run=quiet(tmp_path))
    assert tree(tmp_path) == before


# Edges and bad input


def test_one_ticket_is_fine(tmp_path, parts):
    for name, subsets, task, ticket in (
        ("one", parts, OneVsRest(), "b"),
        ("all", whole(parts.data), MultiClass(), "all"),
    ):
        masks = random_masks(mlp(), [ticket])
        for how in ("sequential", "mixed"):
            fit = Fit(epochs=1, batch_size=16, task=task, schedule=how)
            assert retrain(mlp(), masks, subsets, fit, quiet(tmp_path / name / how)).names == (ticket,)


def test_one_ticket_gives_the_same_weights_under_both_schedules(tmp_path, parts):
    nets = [
        retrain(mlp(), random_masks(mlp(), "b"), parts, Fit(2, 16, 0.01, schedule=how), quiet(tmp_path / how))
        for how in ("sequential", "mixed")
    ]
    assert digest(nets[0].state_dict()) == digest(nets[1].state_dict())


def test_a_subset_with_fewer_samples_than_a_batch_is_fine(tmp_path):
    parts = by_label(blobs((2, 3, 40)))
    for how in ("sequential", "mixed"):
        net = retrain(mlp(), random_masks(mlp()), parts, Fit(1, 64, 0.01, schedule=how), quiet(tmp_path / how))
        assert all(p.isfinite().all() for p in net.parameters())


def test_what_cannot_be_retrained_is_refused_before_anything_is_written(tmp_path, parts):
    run = quiet(tmp_path)
    with pytest.raises(InputError, match="name is 'z', but the subsets are a, b, c"):
        retrain(mlp(), random_masks(mlp(), "az"), parts, FIT, run)
    with pytest.raises(InputError, match="tickets are not of this model"):
        retrain(seeded(rtl.models.mlp, 6, [9], 3), random_masks(mlp()), parts, FIT, run)
    with pytest.raises(InputError, match="tickets are not of this model"):
        retrain(seeded(rtl.models.mlp, 6, [8, 8], 3), random_masks(mlp()), parts, FIT, run)
    with pytest.raises(InputError, match="two subsets or more"):
        retrain(mlp(), random_masks(mlp(), ["all"]), whole(parts.data), FIT, run)
    with pytest.raises(InputError, match="batch_size is 2, expected 3 or more: with schedule 'mixed'"):
        retrain(mlp(), random_masks(mlp()), parts, Fit(batch_size=2, schedule="mixed"), run)
    every_level = Tickets(tuple("abc"), {}, 72, {}, {})
    with pytest.raises(InputError, match=r"tickets is a Tickets, expected masks at one sparsity, such as tickets.at"):
        retrain(mlp(), every_level, parts, FIT, run)
    with pytest.raises(InputError, match="tickets is a Tickets, expected masks at one sparsity"):
        imp_multiple(mlp(), every_level, parts, FIT, run, "a")
    with pytest.raises(InputError, match="parts is a Data, expected a Partition"):
        retrain(mlp(), random_masks(mlp()), parts.data, FIT, run)
    with pytest.raises(InputError, match=r"run is a PosixPath, expected rtl.Run"):
        retrain(mlp(), random_masks(mlp()), parts, FIT, tmp_path)
    assert tree(tmp_path) == {}


def test_training_that_diverges_is_refused(tmp_path, parts):
    with pytest.raises(InputError, match=r"loss is (nan|inf) after epoch \d.*use a smaller lr"):
        retrain(mlp(), random_masks(mlp()), parts, Fit(epochs=3, batch_size=16, lr=1e30), quiet(tmp_path))
