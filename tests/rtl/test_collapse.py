"""rtl.curve and rtl.collapse: both baselines, the alarm on drawn, random and real curves, and what extraction does."""

import dataclasses
import json
import math
import sys
import warnings
from pathlib import Path

import pytest
import torch
from test_diagnose import jaccard, masks, sets
from toys import blobs, flat_masks, mlp, quiet

import rtl.run
import rtl_kernels as rk
from rtl.collapse import Alarm, CollapseWarning, Verdict, alarms, fall, verdicts
from rtl.curve import Curve, mean_to_others
from rtl.diagnose import diagnose
from rtl.errors import InputError
from rtl.extract import PrunePlan, extract
from rtl.fit import Fit
from rtl.partition import by_label
from rtl.tickets import TicketNetwork, saved_levels

CURVES = Path(__file__).parent / "fixtures" / "curves"
RESULTS = Path(__file__).parents[2] / "results"
extract_module = sys.modules["rtl.extract"]


def real(name):
    """Masks of a run of this repository: `digits-fine` and `digits-to-98` of small_conv, `inr` of a 34-64-64-3 MLP."""
    return Curve.from_json(json.loads((CURVES / f"{name}.json").read_text()))


def drawn(values, k=4, size=200_000, keep=0.85, noise=0.0, seed=0):
    """A curve of one layer with these pairwise similarities, one a round; every round keeps `keep` of what was left."""
    generator = torch.Generator().manual_seed(seed)
    overlaps = []
    for number, value in enumerate(values):
        kept = round(size * keep ** (number + 1))
        odds = math.log(value / (1 - value)) + noise * torch.randn((k, k), generator=generator).double()
        wanted = ((odds + odds.T) / 2).sigmoid()
        both = (2 * kept * wanted / (1 + wanted)).round().long()
        overlaps.append(both.fill_diagonal_(kept))
    return Curve(tuple("abcdefgh"[:k]), {"w": size}, {"w": torch.stack(overlaps)})


def falling(rounds, slope=0.04, start=0.9):
    odds = math.log(start / (1 - start))
    return [1 / (1 + math.exp(-(odds - slope * number))) for number in range(rounds)]


# The curve and its baselines


def test_a_curve_is_the_similarity_of_sets_round_by_round():
    rounds = [masks(seed=seed) for seed in range(2)]
    curve = Curve.of(rounds[0].names, [one.banks for one in rounds])
    for r, one in enumerate(rounds):
        by_layer = {layer: sets(bank) for layer, bank in one.banks.items()}
        for i in range(4):
            everything = [{(layer, p) for layer, s in by_layer.items() for p in s[k]} for k in range(4)]
            assert float(curve.sparsity[r, i]) == pytest.approx(1 - len(everything[i]) / 141)
            for j in range(4):
                assert float(curve.jaccard()[r, i, j]) == pytest.approx(jaccard(everything[i], everything[j]))
                for layer, s in by_layer.items():
                    assert float(curve.jaccard(layer)[r, i, j]) == pytest.approx(jaccard(s[i], s[j]))
    assert torch.equal(mean_to_others(curve.jaccard())[0], diagnose_level(rounds[0]))


def diagnose_level(one):
    return mean_to_others(rk.jaccard(list(one.banks.values())))


def test_the_baselines_are_what_drawn_masks_of_the_same_sizes_have():
    generator = torch.Generator().manual_seed(1)
    densities = {"wide": (0.9, 0.2), "deep": (0.1, 0.4)}  # of two tickets: layers differ, so the whole is no average

    def draw(kept, size):
        return torch.rand((2, size), generator=generator).argsort(1).argsort(1) < torch.tensor(kept)[:, None] * size

    banks = {layer: rk.MaskBank.from_dense(draw(kept, 20_000).view(2, 100, 200)) for layer, kept in densities.items()}
    curve = Curve.of("ab", [banks])
    for layer in (None, "wide", "deep"):
        assert float(curve.independent(layer)[0, 0, 1]) == pytest.approx(float(curve.jaccard(layer)[0, 0, 1]), abs=0.01)
    nested = {}
    for layer, kept in densities.items():
        order = torch.rand(20_000, generator=generator).argsort().argsort()
        nested[layer] = rk.MaskBank.from_dense(
            torch.stack([order < share * 20_000 for share in kept]).view(2, 100, 200)
        )
    alike = Curve.of("ab", [nested])
    for layer in (None, "wide", "deep"):
        assert torch.equal(alike.identical(layer), alike.jaccard(layer))
        assert float(alike.identical(layer)[0, 0, 1]) < 0.5


def test_the_committed_tickets_lie_between_the_baselines():
    for recipe in ("digits", "cifar10"):
        levels = saved_levels(RESULTS / recipe)
        nets = [TicketNetwork.from_pretrained(level) for level in levels.values()]
        curve = Curve.of(nets[0].names, [net.net.banks for net in nets])
        details = json.loads((RESULTS / recipe / "details.json").read_text())
        written = {float(level): values["matrix"] for level, values in details["similarity"].items()}
        assert written.keys() == levels.keys()
        for r, level in enumerate(levels):
            assert torch.equal(curve.jaccard()[r], torch.tensor(written[level], dtype=torch.float64))
        for r in range(len(curve)):
            low, high = mean_to_others(curve.independent()[r]), mean_to_others(curve.identical()[r])
            assert (low < mean_to_others(curve.jaccard()[r])).all()
            assert (mean_to_others(curve.jaccard()[r]) < high).all()


def test_empty_layers_are_alike_and_a_curve_goes_through_json_unchanged():
    banks = {"gone": rk.MaskBank.from_dense(torch.zeros(2, 3, 4, dtype=torch.bool)), "w": rk.MaskBank.ones(2, (2, 2))}
    curve = Curve.of("ab", [banks, banks])
    for values in (curve.jaccard("gone"), curve.independent("gone"), curve.identical("gone")):
        assert torch.equal(values, torch.ones(2, 2, 2, dtype=torch.float64))
    again = Curve.from_json(json.loads(json.dumps(real("digits-fine").to_json())))
    assert again.layers == real("digits-fine").layers
    assert torch.equal(again.jaccard(), real("digits-fine").jaccard())
    with pytest.raises(ValueError, match="rounds is empty"):
        Curve.of("ab", [])


# The alarm


@pytest.mark.parametrize("noise", [0.0, 0.01])
@pytest.mark.parametrize(
    "values", [falling(25), falling(25, slope=0.005, start=0.97), [0.6] * 25], ids=["falling", "slow", "flat"]
)
def test_a_steady_curve_gives_no_alarm(values, noise):
    assert alarms(drawn(values, noise=noise)) == []


def test_random_pruning_gives_no_alarm_though_similarity_falls_from_1_to_almost_0():
    generator = torch.Generator().manual_seed(0)
    score, rounds = torch.rand((4, 100, 300), generator=generator), []
    for number in range(1, 24):
        rounds.append({"w": rk.MaskBank.from_dense(score < 0.85**number)})
    curve = Curve.of("abcd", rounds)
    assert mean_to_others(curve.jaccard())[-1].max() < 0.02
    assert alarms(curve) == []


@pytest.mark.parametrize("start", [0.97, 0.7])
def test_a_spike_is_seen_whatever_the_level_it_starts_from(start):
    values = falling(14, start=start)
    last = math.log(values[-1] / (1 - values[-1]))
    values += [1 / (1 + math.exp(-(last + 0.1 * n))) for n in range(1, 8)]
    found = alarms(drawn(values, noise=0.005))
    assert [alarm.ticket for alarm in found] == list("abcd")
    for alarm in found:
        assert alarm.direction == "spike"
        assert alarm.good_round == 13
        assert 14 <= alarm.round <= 17
        assert alarm.good_sparsity == pytest.approx(1 - 0.85**14, abs=1e-4)
        assert alarm.sparsity == pytest.approx(1 - 0.85 ** (alarm.round + 1), abs=1e-4)


def test_a_fall_is_seen():
    values = falling(14)
    last = math.log(values[-1] / (1 - values[-1]))
    values += [1 / (1 + math.exp(-(last - 0.2 * n))) for n in range(1, 8)]
    found = alarms(drawn(values, noise=0.005))
    assert {(alarm.ticket, alarm.direction, alarm.good_round) for alarm in found} == {(t, "fall", 13) for t in "abcd"}


def test_one_ticket_among_others_is_named_alone():
    steady = drawn(falling(22), k=8, noise=0.003)
    start = falling(14)
    odd = drawn([*start, *(start[-1] + 0.01 * n for n in range(1, 9))], k=8, noise=0.003)
    overlaps = steady.overlaps["w"].clone()
    overlaps[:, 2], overlaps[:, :, 2] = odd.overlaps["w"][:, 2], odd.overlaps["w"][:, :, 2]
    found = alarms(dataclasses.replace(steady, overlaps={"w": overlaps}))
    assert [(alarm.ticket, alarm.direction) for alarm in found] == [("c", "spike")]


def test_a_round_cut_short_is_passed_over():
    sizes = [85_000, 72_250, 61_400, 52_200, 44_300, 43_900, 37_600, 32_000, 31_800, 27_200, 23_100, 22_900, 19_600]
    values = [0.9, 0.88, 0.86, 0.84, 0.82, 0.86, 0.80, 0.78, 0.83, 0.76, 0.74, 0.80, 0.72]
    overlaps = []
    for kept, value in zip(sizes, values, strict=True):
        overlaps.append(torch.full((3, 3), round(2 * kept * value / (1 + value))).fill_diagonal_(kept))
    curve = Curve(("a", "b", "c"), {"w": 100_000}, {"w": torch.stack(overlaps)})
    assert alarms(curve) == []


@pytest.mark.parametrize(("jump", "direction"), [(0.5, "spike"), (-0.5, "fall")])
def test_one_round_alone_gives_no_alarm_however_far_from_the_others(jump, direction):
    values = falling(14)
    odds = math.log(values[-1] / (1 - values[-1]))
    once, twice = (
        alarms(drawn([*values, *(1 / (1 + math.exp(-(odds + jump * min(n, rounds)))) for n in range(1, 5))]))
        for rounds in (1, 2)
    )
    assert once == []
    assert {(alarm.direction, alarm.round) for alarm in twice} == {(direction, 15)}


def test_a_single_ticket_and_few_rounds_have_none():
    assert alarms(drawn([0.5] * 20, k=1)) == []
    assert alarms(drawn([0.9, 0.5, 0.9, 0.5])) == []


def test_real_masks_of_the_digits_warn_of_the_spike_that_begins_at_97_percent():
    curve = real("digits-fine")
    lowest = float(curve.sparsity[int(mean_to_others(curve.jaccard()).mean(1).argmin()), 0])
    assert lowest == pytest.approx(0.964, abs=0.001)
    found = alarms(curve)
    assert len(found) >= 8
    for alarm in found:
        assert alarm.direction == "spike"
        assert 0.96 < alarm.good_sparsity < 0.98
        assert 0.97 < alarm.sparsity < 0.99


def test_real_masks_that_have_not_turned_do_not_warn():
    curve = real("digits-to-98")
    assert float(curve.sparsity[-1, 0]) > 0.98
    assert alarms(curve) == []


def test_real_masks_of_an_image_warn_of_a_fall_where_one_regions_similarity_falls_faster():
    records = json.loads((RESULTS / "collapse" / "details.json").read_text())["records"]
    one = next(record for record in records if (record["task"], record["seed"]) == ("inr", 1))
    curve = Curve.from_json(one["curve"])
    (alarm,) = alarms(curve)
    assert (alarm.ticket, alarm.direction) == ("person", "fall")
    k = curve.names.index("person")
    halvings = -(1 - curve.sparsity[:, k]).log2()
    logit = mean_to_others(curve.jaccard())[:, k].logit()

    def slope(first, last):
        return float((logit[last] - logit[first]) / (halvings[last] - halvings[first]))

    before, after = slope(alarm.good_round - 8, alarm.good_round), slope(alarm.good_round, alarm.round)
    assert after < 1.2 * before < 0


def test_an_alarm_depends_on_no_later_round():
    curve = real("digits-fine")
    whole = {alarm.ticket: alarm for alarm in alarms(curve)}
    seen = {}
    for rounds in range(1, len(curve) + 1):
        cut = dataclasses.replace(curve, overlaps={n: o[:rounds] for n, o in curve.overlaps.items()})
        for alarm in alarms(cut):
            seen.setdefault(alarm.ticket, (rounds, alarm))
    assert {ticket: alarm for ticket, (_, alarm) in seen.items()} == whole
    assert all(rounds == alarm.round + 1 for rounds, alarm in seen.values())


def test_a_higher_limit_is_later_and_a_layer_is_followed_by_the_same_rule():
    curve = real("digits-fine")
    early, late = ({a.ticket: a.round for a in alarms(curve, limit=limit)} for limit in (3.0, 7.0))
    assert late.keys() <= early.keys()
    assert all(early[ticket] <= late[ticket] for ticket in late)
    assert sum(early.values()) < sum({**early, **late}.values())
    layer = curve.layers[1]
    found = alarms(curve, layer)
    assert found
    assert {alarm.layer for alarm in found} == {layer}


def test_an_alarm_says_what_it_saw_and_goes_through_json():
    alarm = Alarm("cat", "conv1", "fall", 9, 0.8, 7, 0.75)
    assert str(alarm) == (
        "ticket 'cat': mask similarity in conv1 falls faster than before (fall) at 80.0% sparsity; last good masks at "
        "75.0%"
    )
    assert Alarm(**json.loads(json.dumps(alarm.to_json()))) == alarm


DEAD = {0.1: 0.90, 0.3: 0.88, 0.5: 0.92, 0.75: 0.80, 0.9: 0.89, 0.95: 0.80, 0.98: 0.81}  # learnt .4, fallen below .82
FINE = {0.1: 0.90, 0.3: 0.88, 0.5: 0.92, 0.75: 0.80, 0.98: 0.83}


def test_a_fall_is_what_performance_does_not_come_back_from():
    assert fall(DEAD, 0.5) == 0.95
    assert fall(FINE, 0.5) is None
    assert fall(DEAD, 0.1) is None  # of .8 learnt, .2 lost leaves .74
    assert fall({0.5: 0.9, 0.9: 0.5}, 0.5) == 0.9
    with pytest.raises(InputError, match=r"performance is known at \[0.75\], expected some sparsity up to 0.5"):
        fall({0.75: 0.9}, 0.5)


def test_alarms_are_held_against_performance():
    at = {"early": 0.9, "same": 0.95, "premature": 0.8, "late": 0.98, "false": 0.8}
    dead = dict.fromkeys(("early", "same", "premature", "late", "miss"), DEAD)
    results = verdicts(at, dead | {"false": FINE, "quiet": FINE}, dict.fromkeys([*dead, "false", "quiet"], 0.5))
    assert results == [
        Verdict("early", 0.9, 0.95, "early", pytest.approx(1)),
        Verdict("same", 0.95, 0.95, "early", pytest.approx(0)),
        Verdict("premature", 0.8, 0.95, "premature", pytest.approx(2)),
        Verdict("late", 0.98, 0.95, "late", pytest.approx(math.log2(0.4))),
        Verdict("miss", None, 0.95, "miss", None),
        Verdict("false", 0.8, None, "false", None),
        Verdict("quiet", None, None, "quiet", None),
    ]


# Extraction

PLAN = PrunePlan(remove=0.2, until=0.8, report_at=(0.2, 0.8))  # of 72: 58 (20 %), 46, 37, 30, 24, 19, 15, 14
FIT = Fit(epochs=1, batch_size=16, lr=0.02)


def alarm_on(monkeypatch, given):
    """Extraction sees an alarm, ticket -> (round, good round), as soon as the curve is that long."""

    def some(curve, layer=None):
        moved = (curve.overlap().diagonal(dim1=1, dim2=2).diff(dim=0) < 0).sum(0) + 1
        return [
            Alarm(name, None, "spike", r, float(curve.sparsity[r, k]), good, float(curve.sparsity[good, k]))
            for k, name in enumerate(curve.names)
            if name in given
            for r, good in [given[name]]
            if moved[k] > r
        ]

    monkeypatch.setattr(extract_module, "alarms", some)


def rounds_on_disk(run):
    return {f.name: len(list(f.glob("round-*.json"))) for f in sorted((run.path / "extract").iterdir()) if f.is_dir()}


def test_extraction_without_an_alarm_is_silent_and_carries_its_curve(tmp_path):
    parts = by_label(blobs())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tickets = extract(mlp(), parts, PLAN, FIT, quiet(tmp_path))
    assert len(tickets.curve) == 8
    assert tickets.stopped == {}
    assert diagnose(tickets).alarms == []
    assert torch.equal(tickets.curve.jaccard()[-1], diagnose(tickets)[0.8].matrix)
    assert torch.equal(tickets.curve.jaccard()[0], diagnose(tickets)[0.2].matrix)


@pytest.mark.parametrize("batched", [False, True])
def test_an_alarm_warns_and_changes_nothing_unless_asked(tmp_path, monkeypatch, batched):
    parts = by_label(blobs())
    plain = extract(mlp(), parts, PLAN, FIT, quiet(tmp_path / "plain"), batched=batched)
    alarm_on(monkeypatch, {"b": (4, 2)})
    with pytest.warns(
        CollapseWarning, match=r"1 of 3 tickets collapse: performance past it.*'b'.*last good masks"
    ) as caught:
        warned = extract(mlp(), parts, PLAN, FIT, quiet(tmp_path / "warned"), batched=batched)
    assert torch.equal(flat_masks(plain.at(0.8)), flat_masks(warned.at(0.8)))
    assert warned.stopped == {}
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("batched", [False, True])
def test_stopping_on_collapse_keeps_a_tickets_last_good_masks_and_the_others_go_on(tmp_path, monkeypatch, batched):
    parts = by_label(blobs())
    plain = extract(mlp(), parts, PLAN, FIT, quiet(tmp_path / "plain"), batched=batched)
    alarm_on(monkeypatch, {"b": (4, 2)})
    plan = dataclasses.replace(PLAN, stop_on_collapse=True)
    run = quiet(tmp_path / "stopped")
    with pytest.warns(CollapseWarning, match="1 of 3 tickets collapse: they stop at their last good masks"):
        stopped = extract(mlp(), parts, plan, FIT, run, batched=batched)
    assert rounds_on_disk(run) == {"a": 8, "b": 5, "c": 8}
    assert list(stopped.stopped) == ["b"]
    whole, kept = flat_masks(plain.at(0.8)), flat_masks(stopped.at(0.8))
    assert torch.equal(whole[[0, 2]], kept[[0, 2]])
    assert kept.sum(1).tolist() == [14, 37, 14]
    assert (kept[1] >= whole[1]).all()
    assert torch.equal(flat_masks(plain.at(0.2)), flat_masks(stopped.at(0.2)))
    assert stopped.samples[0.8] < plain.samples[0.8]
    assert stopped.curve.density()[:, 1].mul(72).round().tolist() == [58, 46, 37, 30, 24, 24, 24, 24]


def test_stopping_resumes_to_the_same_masks(tmp_path, monkeypatch):
    parts = by_label(blobs())
    alarm_on(monkeypatch, {"a": (3, 1), "c": (5, 4)})
    plan = dataclasses.replace(PLAN, stop_on_collapse=True)
    with pytest.warns(CollapseWarning):
        whole = extract(mlp(), parts, plan, FIT, quiet(tmp_path / "whole"))
    run, calls = quiet(tmp_path / "killed"), []
    original = extract_module.step

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 40:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(extract_module, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        extract(mlp(), parts, plan, FIT, run)
    with pytest.warns(CollapseWarning):
        resumed = extract(mlp(), parts, plan, FIT, run)
    assert rounds_on_disk(run) == {"a": 4, "b": 8, "c": 6}
    assert torch.equal(flat_masks(whole.at(0.8)), flat_masks(resumed.at(0.8)))


def test_a_run_begun_before_the_setting_existed_goes_on(tmp_path):
    parts = by_label(blobs())
    run = quiet(tmp_path)
    extract(mlp(), parts, PLAN, FIT, run)
    file = run.path / "extract" / "config.json"
    content = json.loads(file.read_text())
    del content["plan"]["stop_on_collapse"]
    file.write_text(json.dumps(content))
    extract(mlp(), parts, PLAN, FIT, run)


# Stages of training


@pytest.mark.parametrize("batched", [False, True])
def test_what_each_epoch_of_a_reported_round_would_give_is_kept(tmp_path, batched):
    parts, plan = by_label(blobs()), PrunePlan(0.3, 0.5, (0.3, 0.5))
    longer = dataclasses.replace(FIT, epochs=3)
    tickets = extract(mlp(), parts, plan, longer, quiet(tmp_path / "three"), batched=batched)
    assert list(tickets.stages) == [0.3, 0.5]
    for level, stages in tickets.stages.items():
        assert len(stages) == 3
        assert torch.equal(stages.jaccard()[-1], diagnose(tickets)[level].matrix)
        assert torch.equal(stages.density(), stages.density()[:1].expand(3, 3))
    # The first round starts at θ0 with all weights: its first epoch is that of a run of one epoch.
    short = extract(mlp(), parts, PrunePlan(0.3, 0.3), FIT, quiet(tmp_path / "one"), batched=batched)
    assert torch.equal(tickets.stages[0.3].jaccard()[0], diagnose(short)[0.3].matrix)


def test_rounds_made_before_stages_were_kept_have_none(tmp_path):
    parts = by_label(blobs())
    run = quiet(tmp_path)
    extract(mlp(), parts, PrunePlan(0.3, 0.3), FIT, run)
    child = run.child("extract")
    for name in parts.names:
        old = child.load(f"{name}/round-000")
        plain = {layer: words for layer, words in old.tensors.items() if "/" not in layer}
        child.save(f"{name}/round-000", rtl.run.Artefact(plain, old.info))
    assert extract(mlp(), parts, PrunePlan(0.3, 0.3), FIT, run).stages == {}
