"""rtl.extract: Algorithm 1 — exact, nested, rewound, resumable, and the same however it is run."""

import dataclasses
import json
import shutil
import sys
from itertools import pairwise

import pytest
import torch
from torch import nn
from toys import TinyConv, Wide, blobs, dense_masks, flat_masks, images, mlp, quiet, seeded, tree

import rtl
from rtl.errors import InputError
from rtl.extract import Extraction, PrunePlan, extract, prune
from rtl.fit import Fit, digest, split
from rtl.partition import by_label, whole
from rtl.tasks import MultiClass, OneVsRest

module = sys.modules["rtl.extract"]  # `rtl.extract` is the function
PLAN = PrunePlan(remove=20, until=0.75, report_at=(0.25, 0.75))  # of 72: 54, 34, 18
FIT = Fit(epochs=2, batch_size=16, lr=0.02)


@pytest.fixture
def parts():
    return by_label(blobs())


class Watch:
    """Every network that extraction trains: its weights before the first step of each round, and its optimiser."""

    def __init__(self, monkeypatch):
        self.starts, self.masks, self.optimizers, self.nets = [], [], [], []
        original = module.new_optimizer

        def new_optimizer(net, fit):
            self.starts.append({name: t.clone() for name, t in net.model.state_dict().items()})
            self.masks.append({layer: bank.to_dense() for layer, bank in net.banks.items()})
            self.nets.append(net)
            self.optimizers.append(original(net, fit))
            return self.optimizers[-1]

        monkeypatch.setattr(module, "new_optimizer", new_optimizer)


# The plan


@pytest.mark.parametrize(
    ("plan", "kept"),
    [
        (PLAN, [54, 34, 18]),
        (PrunePlan(10, 0.75, (0.25, 0.5, 0.75)), [62, 54, 44, 36, 26, 18]),
        (PrunePlan(0.25, 0.75, (0.5,)), [54, 40, 36, 27, 20, 18]),
        (PrunePlan(100, 0.5), [36]),
        (PrunePlan(5, 0.0), []),
        (PrunePlan(1, 0.02), [71]),
    ],
)
def test_a_round_removes_its_number_or_fraction_and_is_cut_short_at_a_reported_sparsity(plan, kept):
    assert plan.rounds(72) == kept


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"remove": 0}, "remove is 0"),
        ({"remove": 1.5}, "remove is 1.5"),
        ({"remove": 0.0}, "remove is 0.0"),
        ({"remove": float("nan")}, "remove is nan"),
        ({"until": 1.0}, r"until is 1.0, expected a sparsity in \[0, 1\)"),
        ({"until": -0.1}, "until is -0.1"),
        ({"until": float("nan")}, "until is nan"),
        ({"report_at": (0.5, 1.0)}, "report_at is 1.0"),
        ({"until": 0.5, "report_at": (0.75,)}, r"report_at holds 0.75, which is beyond until \(0.5\)"),
        ({"report_at": ()}, "report_at is empty"),
        ({"report_at": 0.5}, r"report_at is 0.5, expected a tuple, \(0.5,\), or None"),
    ],
)
def test_a_bad_plan_is_refused_by_name(arguments, message):
    with pytest.raises(InputError, match=message):
        PrunePlan(**arguments)


def test_a_plan_that_leaves_no_weight_is_refused():
    with pytest.raises(InputError, match=r"until is 0\.99, which leaves none of 20 weights"):
        PrunePlan(until=0.99).rounds(20)


# Pruning


def test_pruning_ranks_magnitudes_over_all_layers_together():
    weights = {"first": torch.tensor([[0.1, -5.0], [0.2, 0.3]]), "second": torch.tensor([-4.0, 6.0, 0.25])}
    masks = {layer: torch.ones_like(w, dtype=torch.bool) for layer, w in weights.items()}
    kept = prune(weights, masks, 4)
    assert kept["first"].tolist() == [[False, True], [False, True]]
    assert kept["second"].tolist() == [True, True, False]


def test_of_equal_magnitudes_the_first_stays():
    weights = {"first": torch.tensor([1.0, -1, 1]), "second": torch.tensor([1.0, 1])}
    masks = {layer: torch.ones_like(w, dtype=torch.bool) for layer, w in weights.items()}
    kept = prune(weights, masks, 4)
    assert kept["first"].tolist() == [True] * 3
    assert kept["second"].tolist() == [True, False]


def test_a_pruned_weight_stays_pruned_whatever_its_magnitude_and_zeros_may_survive():
    kept = prune({"w": torch.tensor([9.0, 0, 0.1, 0])}, {"w": torch.tensor([False, True, True, True])}, 2)
    assert kept["w"].tolist() == [False, True, True, False]


def test_pruning_changes_no_mask_in_place():
    masks = {"w": torch.ones(3, dtype=torch.bool)}
    prune({"w": torch.arange(3.0)}, masks, 1)
    assert masks["w"].all()


def test_pruning_refuses_weights_that_are_not_finite_but_only_where_they_survive():
    weights = {"w": torch.tensor([float("nan"), 1.0])}
    assert prune(weights, {"w": torch.tensor([False, True])}, 1)["w"].tolist() == [False, True]
    with pytest.raises(InputError, match="diverged, use a smaller lr"):
        prune(weights, {"w": torch.tensor([True, True])}, 1)


def test_pruning_refuses_to_keep_more_than_survive():
    with pytest.raises(InputError, match="keep is 2, but only 1 weights survive"):
        prune({"w": torch.ones(2)}, {"w": torch.tensor([True, False])}, 2)


# Algorithm 1


def algorithm_1(model, parts, ticket, rounds, fit, run):
    """One ticket's masks after each round, in plain PyTorch: no masked module, no masked optimiser."""
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    theta0 = {name: t.clone() for name, t in model.state_dict().items()}
    masks = {name: torch.ones_like(model.get_submodule(name).weight, dtype=torch.bool) for name in names}
    history = []
    for number, keep in enumerate(rounds):
        model.load_state_dict(theta0)
        weights = {name: model.get_submodule(name).weight for name in names}
        for name in names:
            weights[name].data.mul_(masks[name])
        optimizer = torch.optim.Adam(model.parameters(), lr=fit.lr)
        generator = run.generator("extract", parts.names[ticket], number)
        for _ in range(fit.epochs):
            for index in split(fit.task.draw(parts, ticket, generator), fit.batch_size):
                target = (parts.index[index] == ticket).double()
                logit = model(parts.data.inputs[index])[:, ticket]
                optimizer.zero_grad()
                nn.functional.binary_cross_entropy_with_logits(logit, target).backward()
                for name in names:
                    weights[name].grad.mul_(masks[name])
                optimizer.step()
        alive = torch.cat([masks[n].flatten() for n in names])
        magnitude = torch.cat([weights[n].detach().abs().flatten() for n in names])
        threshold = magnitude[alive].sort(descending=True).values[keep - 1]
        masks = {n: masks[n] & (weights[n].detach().abs() >= threshold) for n in names}
        history.append(masks)
    return history


def test_masks_are_those_of_algorithm_1_in_plain_pytorch(tmp_path, parts):
    run = quiet(tmp_path)
    model = Wide(mlp())
    extraction = Extraction(model, parts, PLAN, FIT, run)
    rtl.extract(model, parts, PLAN, FIT, run)
    for ticket in range(3):
        expected = algorithm_1(Wide(mlp()), parts, ticket, extraction.rounds, FIT, extraction.run)
        for number, masks in enumerate(expected):
            found = extraction.run.load(extraction.key(ticket, number)).tensors
            for layer, mask in masks.items():
                assert torch.equal(rtl.tickets.rk.MaskBank(found[layer], mask.shape).dense(0), mask)


def test_every_round_keeps_exactly_the_plans_number_and_masks_are_nested(tmp_path, parts):
    run = quiet(tmp_path)
    tickets = extract(mlp(), parts, PLAN, FIT, run)
    extraction = Extraction(mlp(), parts, PLAN, FIT, run)
    for ticket in range(3):
        before = torch.ones(72, dtype=torch.bool)
        for number, keep in enumerate([54, 34, 18]):
            words = extraction.run.load(extraction.key(ticket, number)).tensors
            banks = {layer: rtl.tickets.rk.MaskBank(words[layer], one.shape) for layer, one in extraction.ones.items()}
            after = torch.cat([bank.dense(0).flatten() for bank in banks.values()])
            assert int(after.sum()) == keep
            assert not (after & ~before).any()
            before = after
    assert list(tickets.levels) == [0.25, 0.75]
    for level, keep in ((0.25, 54), (0.75, 18)):
        assert flat_masks(tickets.at(level)).sum(1).tolist() == [keep] * 3


def test_each_round_starts_at_theta0_under_the_masks_of_the_round_before(tmp_path, parts, monkeypatch):
    watch = Watch(monkeypatch)
    model = mlp()
    extract(model, parts, PLAN, FIT, quiet(tmp_path))
    theta0 = model.state_dict()
    assert [int(sum(m.sum() for m in masks.values())) for masks in watch.masks] == [72, 54, 34] * 3
    for start in watch.starts:
        for name, value in theta0.items():
            assert torch.equal(start[name], value)


def test_a_level_computes_with_mask_times_theta0(tmp_path, parts):
    model = mlp()
    masks = extract(model, parts, PLAN, FIT, quiet(tmp_path)).at(0.75)
    net = rtl.fit.masked_copy(model, 3, "shared")
    net.banks = dict(masks.banks)
    for k in range(3):
        plain = rtl.tickets.rk.nn.extract(net, k)
        for layer, mask in dense_masks(masks.banks, k).items():
            assert torch.equal(plain.get_submodule(layer).weight, mask * model.get_submodule(layer).weight)


def test_batch_norm_statistics_are_rewound_too(tmp_path, monkeypatch):
    watch = Watch(monkeypatch)
    model = seeded(TinyConv)
    extract(model, by_label(images()), PrunePlan(60, 0.5), Fit(epochs=1, batch_size=16, lr=0.01), quiet(tmp_path))
    assert len(watch.starts) == 6
    for start in watch.starts:
        assert torch.equal(start["features.1.running_mean"], torch.zeros(4))
        assert int(start["features.1.num_batches_tracked"]) == 0
    assert watch.nets[-1].model.features[1].running_mean.abs().sum() > 0


def test_pruned_weights_and_their_adam_state_never_move_in_training(tmp_path, parts, monkeypatch):
    watch = Watch(monkeypatch)
    model = mlp()
    extract(model, parts, PLAN, FIT, quiet(tmp_path))
    net, optimizer = watch.nets[-1], watch.optimizers[-1]  # the last ticket's last round, which began with 34 weights
    for layer, mask in watch.masks[-1].items():
        weight, mask = net.masked_modules()[layer].weight, mask[0]
        assert torch.equal(weight[~mask], model.get_submodule(layer).weight[~mask])
        assert (weight[mask] != model.get_submodule(layer).weight[mask]).any()
        for key in ("exp_avg", "exp_avg_sq"):
            assert not optimizer.state[weight][key][~mask].any()


def test_the_model_passed_in_is_left_untouched(tmp_path, parts):
    model = mlp().eval()
    before = digest(model.state_dict())
    extract(model, parts, PLAN, FIT, quiet(tmp_path))
    assert digest(model.state_dict()) == before
    assert type(model.layers[0]) is nn.Linear
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_samples_presented_are_counted_up_to_each_sparsity(tmp_path):
    parts = by_label(blobs((10, 20, 40)))
    tickets = extract(mlp(), parts, PLAN, FIT, quiet(tmp_path))
    epoch = 2 * 10 + 2 * 20 + (40 + 30)
    assert tickets.samples == {0.25: 2 * epoch, 0.75: 3 * 2 * epoch}
    assert tickets.prunable == 72
    assert tickets.names == ("a", "b", "c")


def test_params_is_the_size_of_the_union(tmp_path, parts):
    masks = extract(mlp(), parts, PLAN, FIT, quiet(tmp_path)).at(0.75)
    assert masks.params == int(flat_masks(masks).any(0).sum())
    assert 18 < masks.params < 54


# However it is run


def test_one_and_two_workers_give_the_same_masks_bit_for_bit(tmp_path, parts):
    for workers in (1, 2):
        extract(mlp(), parts, PLAN, FIT, quiet(tmp_path / str(workers), workers=workers))
    one, two = tree(tmp_path / "1"), tree(tmp_path / "2")
    assert one.keys() == two.keys()
    masks = [name for name in one if name.endswith(".safetensors")]
    assert len(masks) == 9
    assert all(one[name] == two[name] for name in masks)


@pytest.mark.parametrize(
    ("model", "parts", "fit"),
    [
        (lambda: Wide(mlp()), by_label(blobs()), FIT),
        (lambda: Wide(seeded(TinyConv)), by_label(images()), Fit(epochs=1, batch_size=16, lr=0.01)),
    ],
    ids=["mlp", "convolutions with batch norm"],
)
def test_batched_extraction_gives_the_masks_of_one_ticket_at_a_time_in_float64(tmp_path, model, parts, fit):
    plan = PrunePlan(0.3, 0.75, (0.25, 0.75))
    alone = extract(model(), parts, plan, fit, quiet(tmp_path / "alone"))
    batched = extract(model(), parts, plan, fit, quiet(tmp_path / "batched"), batched=True)
    for level in (0.25, 0.75):
        assert torch.equal(flat_masks(batched.at(level)), flat_masks(alone.at(level)))
    assert not torch.equal(flat_masks(alone.at(0.75))[0], flat_masks(alone.at(0.75))[1])
    assert batched.samples == alone.samples


def test_batched_extraction_refuses_subsets_of_different_numbers_of_batches_and_writes_nothing(tmp_path):
    parts = by_label(blobs((10, 40, 40)))
    with pytest.raises(InputError, match=r"different numbers of batches \(\{'a': 2, 'b': 5, 'c': 5\}\).*batched=False"):
        extract(mlp(), parts, PLAN, FIT, quiet(tmp_path), batched=True)
    assert tree(tmp_path) == {}


# Resuming


def resumed_after(run, rounds):
    """Forget all but the first `rounds` rounds of every ticket, as if killed then."""
    for manifest in sorted(run.path.glob("extract/*/round-*.json")):
        if int(manifest.stem[-3:]) >= rounds:
            manifest.unlink()
            manifest.with_suffix(".safetensors").unlink()


@pytest.mark.parametrize("batched", [False, True])
def test_killed_after_any_round_it_resumes_to_the_same_masks(tmp_path, parts, batched):
    first = quiet(tmp_path / "first")
    extract(mlp(), parts, PLAN, FIT, first, batched=batched)
    for rounds in range(4):
        again = quiet(tmp_path / f"again-{rounds}")
        shutil.copytree(first.path, again.path)
        resumed_after(again, rounds)
        extract(mlp(), parts, PLAN, FIT, again, batched=batched)
        one, two = tree(first.path), tree(again.path)
        assert one.keys() == two.keys()
        assert all(one[name] == two[name] for name in one if name.endswith(".safetensors"))


def test_interrupted_inside_a_round_it_resumes_to_the_same_masks_and_does_not_repeat_finished_rounds(
    tmp_path, parts, monkeypatch
):
    whole_run = quiet(tmp_path / "whole")
    extract(mlp(), parts, PLAN, FIT, whole_run)
    original, count = module.step, [0]

    def step(*arguments):
        count[0] += 1
        if count[0] == 17:  # a round of a ticket is 2 epochs of 5 batches
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(module, "step", step)
    run = quiet(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        extract(mlp(), parts, PLAN, FIT, run)
    assert len(list(run.path.rglob("round-*.json"))) == 1
    extract(mlp(), parts, PLAN, FIT, run)
    assert count[0] == 17 + 90 - 10
    one, two = tree(whole_run.path), tree(run.path)
    assert all(one[name] == two[name] for name in one if name.endswith(".safetensors"))


@pytest.mark.parametrize("number", [4, 20, 72])
def test_interrupted_inside_a_long_round_it_goes_on_after_its_last_epoch_to_the_same_bits(
    tmp_path, monkeypatch, number
):
    parts, plan = by_label(images()), PrunePlan(60, 0.5, (0.25, 0.5))
    fit = Fit(epochs=4, batch_size=16, lr=0.01, augment="crop_flip")  # of 3 batches; drawn from the global generator
    whole_run, run = quiet(tmp_path / "whole"), quiet(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(rtl.checkpoint, "save", lambda *_: pytest.fail("a short round leaves no checkpoints"))
        patch.setattr(module, "CHECKPOINT_SECONDS", 3600.0)
        extract(seeded(TinyConv), parts, plan, fit, whole_run)
    original, count = module.step, [0]

    def step(*arguments):
        count[0] += 1
        if count[0] == number:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(module, "step", step)
    monkeypatch.setattr(module, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        extract(seeded(TinyConv), parts, plan, fit, run)
    assert len(list(run.path.rglob("checkpoint-*.json"))) == 1
    extract(seeded(TinyConv), parts, plan, fit, run)
    assert count[0] == number + 2 * 3 * 4 * 3 - 3 * ((number - 1) // 3)  # of all rounds no finished epoch again
    one, two = tree(whole_run.path), tree(run.path)
    assert one.keys() == two.keys()
    for name in one:
        if name.endswith(".safetensors"):
            assert one[name] == two[name], name
    infos = [
        {str(f.relative_to(r.path)): json.loads(f.read_text())["info"] for f in r.path.rglob("round-*.json")}
        for r in (whole_run, run)
    ]
    for name, info in infos[0].items():
        assert info | {"seconds": 0} == infos[1][name] | {"seconds": 0}
        assert infos[1][name]["seconds"] > 0


@pytest.mark.parametrize(
    ("what", "changed"),
    [
        ("plan.remove", {"plan": PrunePlan(21, 0.75, (0.25, 0.75))}),
        ("fit.lr", {"fit": Fit(epochs=2, batch_size=16, lr=0.01)}),
        ("fit.epochs", {"fit": Fit(epochs=3, batch_size=16, lr=0.02)}),
        ("theta0", {"model": seeded(rtl.models.mlp, 6, [8], 3, seed=1)}),
        ("subsets", {"parts": by_label(blobs((40, 40, 30)))}),
        ("data", {"parts": by_label(dataclasses.replace(blobs(), inputs=blobs().inputs * 1.001))}),
        ("data", {"parts": by_label(dataclasses.replace(blobs(), targets=blobs().targets.flip(0)))}),
        ("data", {"parts": by_label(dataclasses.replace(blobs(), mean=(1.0,) * 6, std=(1.0,) * 6))}),
        ("batched", {"batched": True}),
    ],
)
def test_another_extraction_in_the_same_run_is_refused_and_the_old_one_unharmed(tmp_path, parts, what, changed):
    arguments = {"model": mlp(), "parts": parts, "plan": PrunePlan(40, 0.5), "fit": FIT}
    if what == "plan.remove":
        arguments["plan"] = PLAN
    extract(**arguments, run=quiet(tmp_path))
    before = tree(tmp_path)
    with pytest.raises(InputError, match=rf"{what}[^;]* was .*, now .*use another --out or delete the folder"):
        extract(**(arguments | changed), run=quiet(tmp_path))
    assert tree(tmp_path) == before


def test_another_seed_in_the_same_run_is_refused(tmp_path, parts):
    extract(mlp(), parts, PrunePlan(40, 0.5), FIT, quiet(tmp_path))
    with pytest.raises(InputError, match="seed was 0, now 1"):
        extract(mlp(), parts, PrunePlan(40, 0.5), FIT, quiet(tmp_path, seed=1))


# Edges and bad input


def test_a_sparsity_of_zero_trains_nothing_and_keeps_everything(tmp_path, parts):
    tickets = extract(mlp(), parts, PrunePlan(until=0.0), FIT, quiet(tmp_path))
    assert flat_masks(tickets.at(0.0)).all()
    assert tickets.samples == {0.0: 0}


def test_a_single_ticket_and_subsets_smaller_than_a_batch_are_fine(tmp_path):
    data = blobs((2, 3, 40))
    single = extract(mlp(), whole(data), PLAN, Fit(2, 16, 0.02, MultiClass()), quiet(tmp_path / "single"))
    assert flat_masks(single.at(0.75)).sum(1).tolist() == [18]
    small = extract(mlp(), by_label(data), PLAN, FIT, quiet(tmp_path / "small"))
    assert flat_masks(small.at(0.75)).sum(1).tolist() == [18] * 3


def test_subset_names_that_are_no_file_names_are_fine(tmp_path):
    parts = by_label(blobs(), {"../a b/": ["a"], "ü": ["b"], "config": ["c"]})
    tickets = extract(mlp(), parts, PrunePlan(40, 0.5), FIT, quiet(tmp_path / "run"))
    assert tickets.names == ("../a b/", "ü", "config")
    assert {p.name for p in tmp_path.iterdir()} == {"run"}


def test_what_cannot_be_extracted_is_refused_before_anything_is_written(tmp_path, parts):
    run = quiet(tmp_path)
    with pytest.raises(InputError, match="cannot be pruned"):
        extract(nn.ReLU(), parts, PLAN, FIT, run)
    with pytest.raises(InputError, match="leaves none of 72 weights"):
        extract(mlp(), parts, PrunePlan(until=0.999), FIT, run)
    with pytest.raises(InputError, match="two subsets or more"):
        extract(mlp(), whole(parts.data), PLAN, Fit(task=OneVsRest()), run)
    with pytest.raises(InputError, match="parts is a Data, expected a Partition"):
        extract(mlp(), parts.data, PLAN, FIT, run)
    with pytest.raises(InputError, match=r"run is a PosixPath, expected rtl.Run\(folder\)"):
        extract(mlp(), parts, PLAN, FIT, tmp_path)
    assert tree(tmp_path) == {}


def test_training_that_diverges_is_refused(tmp_path, parts):
    with pytest.raises(InputError, match="diverged, use a smaller lr"):
        extract(mlp(), parts, PLAN, Fit(epochs=2, batch_size=16, lr=1e30), quiet(tmp_path))


def test_an_unreported_sparsity_is_refused_naming_those_there_are(tmp_path, parts):
    tickets = extract(mlp(), parts, PLAN, FIT, quiet(tmp_path))
    with pytest.raises(InputError, match=r"sparsity is 0\.5, but the tickets were kept at 0\.25, 0\.75"):
        tickets.at(0.5)


# Switches


def test_pruning_by_layer_takes_the_same_share_of_every_layer_and_the_exact_number():
    generator = torch.Generator().manual_seed(0)
    shapes = {"small": (3, 3), "large": (10, 9), "scaled": (5, 4)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    weights["scaled"] *= 100  # by global ranking it would lose nothing
    masks = {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()}
    everything = before = 119
    for keep in (100, 61, 60, 17, 3):
        pruned = prune(weights, masks, keep, "layer")
        assert sum(int(m.sum()) for m in pruned.values()) == keep
        for name, mask in pruned.items():
            assert not (mask & ~masks[name]).any()  # nested
            alive = int(masks[name].sum())
            assert abs(int(mask.sum()) - alive * keep / before) < 1
            if mask.any() and (masks[name] & ~mask).any():
                assert weights[name][mask].abs().min() >= weights[name][masks[name] & ~mask].abs().max()
        masks, before = pruned, keep
    assert everything > before


def test_a_plan_by_layer_leaves_every_layer_its_share(tmp_path, parts):
    plan = dataclasses.replace(PLAN, scope="layer")
    tickets = extract(mlp(), parts, plan, FIT, quiet(tmp_path))
    for level in (0.25, 0.75):
        for bank in tickets.at(level).banks.values():
            assert (bank.density() - (1 - level)).abs().max() < 0.05
    by_all = extract(mlp(), parts, PLAN, FIT, quiet(tmp_path / "global")).at(0.75)
    assert max(float((bank.density() - 0.25).abs().max()) for bank in by_all.banks.values()) > 0.1


def dense_algorithm_1(model, parts, ticket, rounds, fit, run):
    """One ticket's masks after each round, where a round trains all weights, in plain PyTorch."""
    names = [f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    theta0 = {name: t.clone() for name, t in model.state_dict().items()}
    alive, history = torch.ones(72, dtype=torch.bool), []
    for number, keep in enumerate(rounds):
        model.load_state_dict(theta0)
        optimizer = torch.optim.Adam(model.parameters(), lr=fit.lr)
        generator = run.generator("extract", parts.names[ticket], number)
        for _ in range(fit.epochs):
            for index in split(fit.task.draw(parts, ticket, generator), fit.batch_size):
                logit, target = model(parts.data.inputs[index])[:, ticket], (parts.index[index] == ticket).double()
                optimizer.zero_grad()
                nn.functional.binary_cross_entropy_with_logits(logit, target).backward()
                optimizer.step()
        magnitude = torch.cat([model.get_parameter(n).detach().abs().flatten() for n in names])
        alive = alive & (magnitude >= magnitude[alive].sort(descending=True).values[keep - 1])
        history.append(alive)
    return history


def test_dense_rounds_train_every_weight_and_prune_the_survivors(tmp_path, parts):
    run, model = quiet(tmp_path), Wide(mlp())
    extraction = Extraction(model, parts, dataclasses.replace(PLAN, trained="dense"), FIT, run)
    tickets = rtl.extract(model, parts, extraction.plan, FIT, run)
    for ticket in range(3):
        expected = dense_algorithm_1(Wide(mlp()), parts, ticket, extraction.rounds, FIT, extraction.run)
        assert torch.equal(flat_masks(tickets.at(0.25))[ticket], expected[0])
        assert torch.equal(flat_masks(tickets.at(0.75))[ticket], expected[2])


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"scope": "all"}, "scope is 'all', expected one of global, layer"), ({"trained": "x"}, "trained is 'x'")],
)
def test_an_unknown_switch_is_refused(changed, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(PLAN, **changed)


def test_batched_extraction_prunes_nothing_that_the_model_calls_dense(tmp_path):
    parts = by_label(images())
    tickets = extract(seeded(TinyConv), parts, PrunePlan(60, 0.5), FIT, quiet(tmp_path), batched=True)
    assert flat_masks(tickets.at(0.5)).sum(1).tolist() == [90, 90, 90]  # of the two convolutions' 180 alone


@pytest.mark.parametrize("batched", [False, True])
def test_the_weights_that_gave_the_reported_masks_are_kept(tmp_path, monkeypatch, batched):
    parts, plan = by_label(images()), PrunePlan(60, 0.5, (0.25, 0.5))
    watch = Watch(monkeypatch)
    model = seeded(TinyConv)
    extraction = Extraction(model, parts, plan, FIT, quiet(tmp_path), batched=batched)
    rtl.extract(model, parts, plan, FIT, quiet(tmp_path), batched=batched)
    theta0 = model.state_dict()
    for level in (0.25, 0.5):
        own = [extraction.weights_at(level, ticket) for ticket in range(3)]
        assert all(own_k.keys() == theta0.keys() for own_k in own)
        for k, state in enumerate(own):
            weights = {n: state[f"{n}.weight"] for n in ("features.0", "features.3")}
            before = {0.25: torch.ones(180, dtype=torch.bool), 0.5: flat_masks(extraction.tickets().at(0.25))[k]}
            masks, alive = {}, before[level].split([36, 144])
            for (name, weight), flat in zip(weights.items(), alive, strict=True):
                masks[name] = flat.view(weight.shape)
            expected = prune(weights, masks, {0.25: 135, 0.5: 90}[level])  # they are those that were ranked
            assert torch.equal(
                flat_masks(extraction.tickets().at(level))[k], torch.cat([m.flatten() for m in expected.values()])
            )
    assert watch.nets


def test_shared_extracted_weights_are_the_mean_move_of_the_tickets_that_moved(tmp_path):
    parts, model = by_label(images()), seeded(TinyConv)
    extraction = Extraction(model, parts, PrunePlan(60, 0.5, (0.5,)), FIT, quiet(tmp_path))
    rtl.extract(model, parts, extraction.plan, FIT, quiet(tmp_path))
    own, shared = [extraction.weights_at(0.5, k) for k in range(3)], extraction.weights_at(0.5)
    theta0 = model.state_dict()
    for k in range(3):  # a row of the classifier is one ticket's alone
        torch.testing.assert_close(shared["classifier.weight"][k], own[k]["classifier.weight"][k])
        assert (shared["classifier.weight"][k] != theta0["classifier.weight"][k]).any()
    moved = torch.stack([one["features.3.weight"] != theta0["features.3.weight"] for one in own])
    two = moved.sum(0) == 2  # pruned from the third
    assert two.any()
    expected = sum(torch.where(m, o["features.3.weight"], 0) for m, o in zip(moved, own, strict=True)) / 2
    torch.testing.assert_close(shared["features.3.weight"][two], expected[two])
    assert torch.equal(shared["features.1.num_batches_tracked"], theta0["features.1.num_batches_tracked"])
    assert torch.equal(extraction.weights_at(0.5)["features.0.weight"], shared["features.0.weight"])


def test_the_learning_rate_falls_over_each_round_from_lr_to_nearly_nothing(tmp_path, parts, monkeypatch):
    rates = []
    original = module.step

    def step(net, optimizer, *arguments):
        rates.append(optimizer.param_groups[0]["lr"])
        return original(net, optimizer, *arguments)

    monkeypatch.setattr(module, "step", step)
    extract(
        mlp(),
        whole(parts.data),
        PLAN,
        dataclasses.replace(FIT, task=MultiClass(), lr_schedule="cosine"),
        quiet(tmp_path),
    )
    steps = 2 * -(-120 // 16)
    assert len(rates) == 3 * steps
    assert rates[:steps] == rates[steps : 2 * steps]
    assert rates[0] == FIT.lr
    assert rates[steps // 2] == pytest.approx(FIT.lr / 2)
    assert rates[steps - 1] < 0.02 * FIT.lr
    assert all(a > b for a, b in pairwise(rates[:steps]))
