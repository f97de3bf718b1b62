"""benchmarks.bench_price: the plain contender is the same algorithm, and every contender is presented with as much."""

import dataclasses
import json

import pytest
import torch
from toys import TinyConv, images, quiet, seeded

import rtl
from benchmarks import bench_price
from benchmarks.bench_price import CONTENDERS, PARTS, Plain, measure, plain_run, profile, table
from rtl.data import digits
from rtl.evaluate import evaluate, ticket_scores
from rtl.extract import PrunePlan, extract
from rtl.fit import Fit
from rtl.partition import by_label, whole
from rtl.recipes import recipe
from rtl.retrain import retrain
from rtl.tasks import MultiClass

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
    expected = ours.export("all")(data.inputs).softmax(1) if single else ticket_scores(ours, data)
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


@pytest.fixture(scope="module")
def measured():
    train, test = (d.select(torch.arange(n)) for d, n in zip(digits(), (300, 100), strict=True))
    return {name: measure(name, SMALL, train, test, 1, quiet=True) for name in CONTENDERS}


def test_every_contender_is_presented_with_the_same_samples(measured):
    counts = {name: row["samples"] for name, row in measured.items()}
    assert counts["dense_loop"] == counts["dense_workers"] == counts["rtl"]
    assert counts["imp_single"] == counts["dense_imp_single"] == pytest.approx(counts["rtl"], rel=0.1)
    for row in measured.values():
        assert row["samples_per_second"] == row["samples"] / row["seconds"] > 0


def test_the_samples_of_our_contenders_are_those_the_package_counted(measured, tmp_path):
    train, test = (d.select(torch.arange(n)) for d, n in zip(digits(), (300, 100), strict=True))
    config = dataclasses.replace(SMALL, methods=("rtl", "imp_single"))
    rows, _ = rtl.recipes.classification.run_classification(config, quiet(tmp_path), train, test)
    for row in rows:
        assert row["samples"] == measured[row["method"]]["samples"]  # one level: extraction and its retraining
        assert row["metrics"]["accuracy"] == measured[row["method"]]["accuracy"]["0.5"]


def test_the_plain_contenders_learn_as_ours_do(measured):
    """Rounding differs, so figures do a little; an algorithm that does something else would show here."""
    ours, loop, workers = (
        measured[n]["balanced_accuracy.threshold"]["0.5"] for n in ("rtl", "dense_loop", "dense_workers")
    )
    assert loop == workers
    assert loop == pytest.approx(ours, abs=0.05)


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


def test_the_results_become_a_table_and_a_file(tmp_path, monkeypatch, capsys, measured):
    results = {"runs": list(measured.values()), "profile": {}}
    text = table(results)
    assert text.count("\n") == 2 + len(CONTENDERS)
    assert "| rtl | 1 × 1 |" in text
    monkeypatch.setattr(bench_price, "_measured", lambda options: results)
    bench_price.main(["--out", str(tmp_path / "price.json")])
    assert json.loads((tmp_path / "price.json").read_text()) == results
    assert (tmp_path / "price.md").read_text() == text
    assert text in capsys.readouterr().out
