"""benchmarks.bench_price: the plain contender is the same algorithm, and every contender is presented with as much."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from toys import TinyConv, images, quiet, seeded

import rtl
from benchmarks import bench_price
from benchmarks.bench_price import (
    CONTENDERS,
    PARTS,
    Plain,
    expected_seconds,
    measure,
    plain_run,
    presented_samples,
    profile,
    table,
)
from rtl.data import Data, digits
from rtl.errors import InputError
from rtl.evaluate import evaluate, ticket_logits
from rtl.extract import PrunePlan, extract
from rtl.fit import Fit
from rtl.partition import by_label, whole
from rtl.recipes import recipe
from rtl.retrain import retrain
from rtl.tasks import MultiClass
from rtl.workers import ALLOCATOR

PLAN = PrunePlan(40, 0.5, (0.25, 0.5))
SMALL = dataclasses.replace(
    recipe("digits"), seeds=(0,), sparsities=(0.5,), milestones=(), remove=0.5, round_epochs=1, retrain_epochs=1
)


class Double(TinyConv):
    """Convolutions and batch norms in float64, so that only another algorithm gives another result."""

    def __init__(self):
        super().__init__()
        self.double()

    def forward(self, x):
        return super().forward(x.double())


@pytest.mark.parametrize("single", [False, True])
def test_the_plain_contender_gives_the_masks_and_weights_of_rtl(tmp_path, single):
    data = images((20, 32, 24))
    parts = whole(data) if single else by_label(data)
    fit = Fit(epochs=2, batch_size=16, lr=0.02, batch_norm="shared" if single else "per_ticket")
    fit = dataclasses.replace(fit, task=MultiClass()) if single else fit
    model, run = seeded(Double), quiet(tmp_path)
    tickets = extract(model, parts, PLAN, fit, run)
    levels = {0.25: 135, 0.5: 90}
    plain = Plain(model, parts, PLAN.rounds(180), levels, fit, 2, 2, run)
    masks = [plain.extract(k) for k in range(len(parts))]
    for level in levels:
        for layer, bank in tickets.at(level).banks.items():
            for k, own in enumerate(masks):
                assert torch.equal(bank.dense(k), own[level][f"{layer}.weight"].bool())
    ours, theirs = retrain(model, tickets.at(0.5), parts, fit, run), plain.retrain(0.5, masks)
    theta = dict(ours.net.model.named_parameters())
    for name, value in theirs.model.named_parameters():
        if name != "features.3.bias":  # before a batch norm: its gradient is rounding, which Adam amplifies
            torch.testing.assert_close(theta[name], value, rtol=0, atol=1e-7)
            assert (value - model.get_parameter(name)).abs().max() > 1e-3
    scores = theirs.scores(data, single)
    expected = ours.export("all")(data.inputs).softmax(1) if single else ticket_logits(ours, data).sigmoid()
    torch.testing.assert_close(scores, expected.detach(), rtol=0, atol=1e-5)


def test_a_plain_run_reports_the_metrics_of_its_networks(tmp_path):
    data, run, fit = images(), quiet(tmp_path), Fit(epochs=1, batch_size=16, lr=0.02)
    parts, model = by_label(data), seeded(Double)
    found = plain_run(
        Plain(model, parts, PLAN.rounds(180), {0.25: 135, 0.5: 90}, fit, 1, 1, run), data, run, workers=False
    )
    net = retrain(model, extract(model, parts, PLAN, fit, run).at(0.5), parts, fit, run)
    assert found[0.5] == pytest.approx(evaluate(net, data).metrics)
    assert list(found) == [0.25, 0.5]


def small():
    """(train, test) of the digits, of each class equally many to train on: batched extraction asks for it."""
    train, test = digits()
    own = [(train.targets == k).nonzero().flatten()[:30] for k in range(10)]
    return train.select(torch.cat(own)), test.select(torch.arange(100))


@pytest.fixture(scope="module")
def measured():
    return {name: measure(name, SMALL, *small(), 1, quiet=True) for name in CONTENDERS}


def test_every_contender_is_presented_with_the_same_samples(measured):
    counts = {name: row["samples"] for name, row in measured.items()}
    assert counts["dense_loop"] == counts["dense_workers"] == counts["rtl_batched"] == counts["rtl"]
    assert counts["imp_single"] == counts["dense_imp_single"] == pytest.approx(counts["rtl"], rel=0.1)
    for row in measured.values():
        assert row["samples_per_second"] == row["samples"] / row["seconds"] > 0
        assert 0 < row["processor_seconds"] < 1.5 * torch.get_num_threads() * row["seconds"]


def test_the_samples_of_our_contenders_are_those_the_package_counted(measured, tmp_path):
    config = dataclasses.replace(SMALL, methods=("rtl", "imp_single"))
    rows, _ = rtl.recipes.classification.run_classification(config, quiet(tmp_path), *small())
    for row in rows:
        assert row["samples"] == measured[row["method"]]["samples"]  # one level: extraction and its retraining
        assert row["metrics"]["accuracy"] == measured[row["method"]]["accuracy"]["0.5"]


def test_processor_seconds_are_those_of_all_threads_and_of_processes_that_ended():
    began = bench_price._processor_seconds()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.5: pass"], check=True)
    assert 0.45 < bench_price._processor_seconds() - began < 5


def test_the_plain_contenders_learn_as_ours_do(measured):
    """Rounding differs, so figures do a little; an algorithm that does something else would show here."""
    ours, loop, workers = (
        measured[n]["balanced_accuracy.threshold"]["0.5"] for n in ("rtl", "dense_loop", "dense_workers")
    )
    assert loop == workers
    assert loop == pytest.approx(ours, abs=0.05)
    assert measured["rtl_batched"]["balanced_accuracy.threshold"]["0.5"] == pytest.approx(ours, abs=0.05)


def test_the_profile_accounts_for_the_time_of_a_step():
    train, test = (d.select(torch.arange(n)) for d, n in zip(digits(), (300, 100), strict=True))
    found = profile(dataclasses.replace(SMALL, batch_size=32), train, test, steps=3)
    assert list(found) == ["extraction", "retraining", "evaluation"]
    for what, measurement in found.items():
        spent = measurement["milliseconds"]
        assert tuple(spent) == PARTS
        training = what != "evaluation"
        for part in PARTS:
            needed = training or part in ("data", "forward", "batch norm forward")
            assert (spent[part] > 0) == needed or part == "other", (what, part)
        assert sum(measurement["share"].values()) == pytest.approx(1, abs=0.1)


def row(name, seconds, processor):
    return {
        "contender": name,
        "workers": 1,
        "threads": 2,
        "samples": 1000,
        "samples_per_second": 1000 / seconds,
        "seconds": seconds,
        "processor_seconds": processor,
    }


def test_the_table_has_wall_and_processor_time_in_units_of_either_imp_single():
    runs = [row("rtl", 50, 90), row("imp_single", 100, 100), row("dense_imp_single", 200, 360)]
    head, _, ours, *_, skipped = table({"runs": [*runs, {"contender": "rtl_batched", "skipped": "why"}]}).splitlines()
    cells = dict(zip(*([c.strip() for c in line.strip("|").split("|")] for line in (head, ours)), strict=True))
    assert (cells["seconds"], cells["processor seconds"], cells["workers × threads"]) == ("50", "90", "1 × 2")
    assert (cells["seconds / imp_single's"], cells["processor seconds / imp_single's"]) == ("0.50", "0.90")
    assert (cells["seconds / dense_imp_single's"], cells["processor seconds / dense_imp_single's"]) == ("0.25", "0.25")
    assert skipped == "rtl_batched: why"


def test_an_interrupted_measurement_goes_on_and_a_finished_one_is_made_anew(tmp_path, monkeypatch, capsys):
    calls, stop = [], ["dense_loop"]

    def apart(name, *_):
        if name in stop:
            raise KeyboardInterrupt
        if name == "rtl_batched":
            raise InputError("subsets differ")
        calls.append(name)
        return row(name, 10, 20)

    monkeypatch.setattr(bench_price, "measure_apart", apart)
    monkeypatch.setattr(bench_price, "load", lambda *_: small())
    monkeypatch.setattr(bench_price, "recipe", lambda *_: SMALL)
    arguments = ["--data", "/some/where", "--only", *CONTENDERS, "--out", str(tmp_path / "price.json")]
    assert bench_price.main(arguments) == 130
    results = json.loads((tmp_path / "price.json").read_text())
    assert [one["contender"] for one in results["runs"]] == ["rtl", "rtl_batched", "imp_single"]
    assert results["complete"] is False
    stop.clear()
    assert bench_price.main(arguments) == 0
    assert calls == ["rtl", "imp_single", "dense_loop", "dense_workers", "dense_imp_single"]
    results = json.loads((tmp_path / "price.json").read_text())
    assert results["complete"] is True
    assert "--data DIR --only rtl " in results["command"]
    assert "/some/where" not in json.dumps(results)
    assert (tmp_path / "price.md").read_text() == table(results)
    shown = capsys.readouterr()
    assert table(results) in shown.out
    for name in CONTENDERS:
        assert re.search(rf"^{name}: [\d,]+ \+ [\d,]+ samples, about ", shown.err, re.MULTILINE)
    assert bench_price.main(arguments) == 0
    assert len(calls) == 10


def test_other_code_or_settings_begin_anew(tmp_path):
    same = {"config": {"lr": 1}, "workers": 2, "code": "a"}
    unfinished = {**same, "complete": False, "runs": [1], "profile": {}}
    (tmp_path / "price.json").write_text(json.dumps(unfinished))
    assert bench_price._begun(tmp_path / "price.json", same) == unfinished
    for other in ({"code": "b"}, {"config": {"lr": 2}}, {"workers": 1}):
        assert bench_price._begun(tmp_path / "price.json", same | other)["runs"] == []


def test_the_default_run_takes_less_than_25_minutes_on_two_cores(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    config = dataclasses.replace(recipe("cifar10", "reduced"), methods=("rtl",))
    labels = torch.arange(10_000) % 10
    data = Data(torch.zeros(10_000, 3, 1, 1), labels, tuple("abcdefghij"))
    assert presented_samples(config, data, False) == (180_000, 160_000)
    assert presented_samples(config, data, True) == (180_000, 160_000)
    seconds = {name: expected_seconds(name, config, data, data, 2) for name in CONTENDERS}
    assert seconds["rtl"] == (90_000 + 80_000 + 25_000) / 2600
    assert sum(seconds.values()) < 20 * 60  # beside the profile, and loading and starting each


@pytest.mark.slow
def test_all_contenders_and_their_workers_keep_freed_memory(monkeypatch):
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(bench_price, "_measure_loaded", settings)
    for name in ("rtl", "dense_workers"):
        assert bench_price.measure_apart(name, SMALL, None, 2, True) == [ALLOCATOR, ALLOCATOR]


def settings(*_):
    found = quiet("nowhere", workers=2).map(of_this_process, [0, 1], label="w")
    return [of_this_process(None, 0), found[0]]


def of_this_process(_, item):
    return {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
