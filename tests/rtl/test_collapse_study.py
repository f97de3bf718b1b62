"""benchmarks.collapse: the study of the alarm, from its plan to the committed table, which follows from its records."""

import json
import math
from pathlib import Path

import pytest
import torch
from toys import quiet

from benchmarks import collapse as study
from rtl.collapse import LIMIT
from rtl.curve import Curve
from rtl.errors import InputError
from rtl.extract import PrunePlan

RESULTS = Path(__file__).parents[2] / "results" / "collapse"


def committed(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


@pytest.mark.parametrize("prunable", [125_832, 53_888, 32_400])
def test_tickets_are_retrained_between_10_and_98_percent_after_whole_rounds(prunable):
    levels = study.sparsities_of(prunable, 0.98)
    kept = PrunePlan(study.REMOVE, levels[-1], levels).rounds(prunable)
    assert 0.1 < levels[0] < 0.15
    assert 0.97 < levels[-1] <= 0.985
    assert sum(level <= 0.5 for level in levels) == 3  # what a plateau is the median of
    *whole, last = [after / before for before, after in zip([prunable, *kept], kept, strict=False)]
    assert whole == pytest.approx([1 - study.REMOVE] * len(whole), abs=1e-3)
    assert 1 - study.REMOVE - 1e-3 < last < 1 - study.REMOVE / 2  # the alarm passes over what is less


def test_an_experiment_leaves_what_was_shared_and_how_tickets_did(tmp_path, monkeypatch):
    monkeypatch.setitem(study.UNTIL, "digits", 0.45)
    small = study.config_of("digits", (0.5,))
    monkeypatch.setattr(study, "config_of", lambda *_: small)
    study.run(["digits"], [5], None, quiet(tmp_path))
    one = json.loads((tmp_path / "digits" / "seed-5" / "record.json").read_text())
    curve = Curve.from_json(one["curve"])
    assert len(curve) == 5
    assert (one["task"], one["seed"], one["floor"]["3"]) == ("digits", 5, 0.5)
    for values in study.performance(one).values():
        assert list(values) == pytest.approx(curve.sparsity[[0, 2, 4], 0].tolist())
        assert min(values.values()) > 0.75
    own = curve.overlap().diagonal(dim1=1, dim2=2)
    either = own[:, :, None] + own[:, None, :] - curve.overlap()
    assert torch.equal(curve.jaccard(), curve.overlap().double() / either)
    assert max(one["baselines"]["independent"]) < float(curve.jaccard().min()) < min(one["baselines"]["identical"])


def record(task="digits", seed=0, fallen=(0.9, 0.95)):
    levels = {"0.3": 0.9, "0.9": 0.9, "0.95": 0.9, "0.98": 0.9}
    performance = {
        str(k): {s: 0.6 if float(s) >= fell else value for s, value in levels.items()} for k, fell in enumerate(fallen)
    }
    return {
        "task": task,
        "seed": seed,
        "performance": performance,
        "floor": dict.fromkeys(performance, 0.5),
        "samples": 1,
    }


def test_a_parameter_is_chosen_on_the_choosing_seeds_alone():
    mine, others = [record(seed=s) for s in study.CHOOSING], [record(seed=9, fallen=(0.98, 0.98))] * 9
    chosen = study.choose([*mine, *others, record("cifar10", fallen=(0.98, 0.98))], "fixed sparsity")
    assert 0.88 < chosen <= 0.9  # 0.9: fallen there, and not yet PREMATURE for what falls at 0.95
    assert study.choose(others + mine, "fixed sparsity") == chosen
    found = study.at_fixed_sparsity(mine[0], chosen)
    assert [(v.kind, v.fall) for v in found] == [("early", 0.9), ("early", 0.95)]
    assert found[1].lead == pytest.approx(math.log2((1 - chosen) / 0.05))


def test_nothing_is_chosen_without_all_choosing_seeds():
    with pytest.raises(InputError, match=r"records lack the digits' seeds \[1, 2\], on which parameters are chosen"):
        study.choose([record(), record("cifar10", 1)], "fixed sparsity")


def test_seeds_run_by_themselves_are_added_to_the_results_and_take_the_place_of_their_own(tmp_path, monkeypatch):
    def committed_one(task, seed):
        return next(r for r in committed("details")["records"] if (r["task"], r["seed"]) == (task, seed))

    def run(tasks, seeds, root, out):  # leaves what was measured of seed 0, as other seeds
        for task, seed in ((task, seed) for task in tasks for seed in seeds):
            file = out.path / task / f"seed-{seed}" / "record.json"
            file.parent.mkdir(parents=True)
            file.write_text(json.dumps(committed_one(task, 0) | {"seed": seed, "samples": 7}))

    for name in ("details", "table"):
        (tmp_path / f"{name}.json").write_bytes((RESULTS / f"{name}.json").read_bytes())
    monkeypatch.setattr(study, "run", run)
    monkeypatch.setattr(study, "draw", lambda *_: None)
    monkeypatch.setattr(study, "aligned", lambda *_: [])
    monkeypatch.setattr(study, "sensitivity", lambda _: {})
    options = ["--data", str(tmp_path), "--results", str(tmp_path), "--runs", str(tmp_path / "runs")]
    assert study.main(["cifar10", "--seeds", "2", "1", *options]) == 0
    new, old = json.loads((tmp_path / "details.json").read_text())["records"], committed("details")["records"]
    assert [one for one in new if one["task"] != "cifar10"] == [one for one in old if one["task"] != "cifar10"]
    assert [one["seed"] for one in new if one["task"] == "cifar10"] == [0, 1, 2]
    assert study.main(["cifar10", "--seeds", "0", *options]) == 0
    newer = json.loads((tmp_path / "details.json").read_text())["records"]
    assert [one["samples"] for one in newer if one["task"] == "cifar10"] == [7, 7, 7]
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert {r["parameter"] for r in rows if r["rule"] == "similarity"} == {LIMIT}


def test_the_alarms_limit_is_the_one_that_the_study_chose():
    assert study.choose(committed("details")["records"], "similarity") == LIMIT


def test_the_committed_table_follows_from_the_records():
    details = committed("details")
    assert committed("table")["rows"] == study.analyse(details["records"])
    assert details["right"] == study.sensitivity(details["records"])
    found = [(r["task"], r["seed"]) for r in details["records"]]  # of some tasks fewer seeds than can be run
    assert found == sorted(set(found), key=lambda key: (list(study.SEEDS).index(key[0]), key[1]))
    assert set(found) <= {(task, seed) for task, of in study.SEEDS.items() for seed in of}
    assert {task for task, _ in found} == set(study.SEEDS)
