"""rtl.report: a summary over seeds, as Markdown, and results that are written whole and read back."""

import json
import shutil
import statistics
from pathlib import Path

import pytest
import torch

from rtl import plots
from rtl.collapse import Alarm
from rtl.curve import Curve
from rtl.diagnose import Similarity
from rtl.errors import InputError
from rtl.recipes.published import REMARKS
from rtl.report import (
    beside_published,
    comparison,
    environment,
    markdown,
    merged,
    read_results,
    summary,
    took,
    write_into,
    write_results,
)

RESULTS = Path(__file__).parents[2] / "results"


def row(method="rtl", sparsity=0.5, seed=0, variant="", **metrics):
    return {
        "method": method,
        "protocol": "quick",
        "variant": variant,
        "sparsity": sparsity,
        "seed": seed,
        "params": 12345 + seed,
        "batch_norm_params": 10,
        "samples": 1000,
        "seconds": 1.5 + seed,
        "metrics": {"accuracy": 0.9, "balanced_accuracy.threshold": 0.8} | metrics,
    }


@pytest.fixture
def table():
    rows = [row(seed=s, sparsity=p, accuracy=0.5 + 0.1 * s) for s in range(3) for p in (0.5, 0.75)]
    rows.append(row("dense", 0.0))
    return {"recipe": "digits", "command": "rtl run digits", "environment": environment(), "rows": rows}


@pytest.fixture
def details():
    levels = {}
    for level, value in (("0.5", 0.6), ("0.75", 0.4)):
        matrix = torch.full((2, 2), value, dtype=torch.float64).fill_diagonal_(1)
        levels[level] = Similarity(("cat", "dög"), matrix, {"conv1": matrix, "conv2": matrix}).to_json()
    both = torch.tensor([[[50, 40], [40, 50]], [[25, 20], [20, 25]]])
    curve = Curve(("cat", "dög"), {"conv1": 100, "conv2": 100}, {"conv1": both, "conv2": both})
    alarm = Alarm("cat", None, "spike", 1, 0.75, 0, 0.5)
    return {
        "class_names": ["cat", "dög"],
        "per_class": [],
        "similarity": levels,
        "curve": curve.to_json(),
        "alarms": [alarm.to_json()],
    }


def test_a_line_is_the_mean_and_standard_deviation_over_seeds_of_one_method_variant_and_sparsity():
    rows = [row(seed=s, accuracy=v) for s, v in enumerate((0.5, 0.6, 0.9))]
    rows += [row(sparsity=0.75), row(variant="schedule=mixed"), row("imp_multiple")]
    head, *lines = summary(rows)
    assert [line[:3] for line in lines] == [
        ["RTL", "quick", "50%"],
        ["RTL", "quick", "75%"],
        ["RTL (schedule=mixed)", "quick", "50%"],
        ["IMP multiple", "quick", "50%"],
    ]
    first = dict(zip(head, lines[0], strict=True))
    assert first["accuracy"] == f"{2 / 3:.3f} ± {statistics.stdev([0.5, 0.6, 0.9]):.3f}" == "0.667 ± 0.208"
    assert first["#Params"] == "12,346"
    assert first["samples"] == "1,000"
    assert first["seconds"] == "2"
    assert first["samples/s"] == "400"
    assert first["BN params"] == "10"


def test_every_metric_has_a_column_under_both_decision_rules():
    head, line = summary([row(**OURS)])
    cells = dict(zip(head, line, strict=True))
    for heading, name in (("BA", "balanced_accuracy"), ("prec.", "precision"), ("recall", "recall")):
        assert cells[f"{heading} thr."] == f"{OURS[f'{name}.threshold']:.3f}"
        assert cells[f"{heading} argmax"] == f"{OURS[f'{name}.argmax']:.3f}"


def test_protocols_are_told_apart():
    rows = [row(), row() | {"protocol": "paper"}, row(seed=1) | {"protocol": "paper"}]
    assert [line[:3] for line in summary(rows)[1:]] == [["RTL", "quick", "50%"], ["RTL", "paper", "50%"]]


# Beside the paper

OURS = {
    "balanced_accuracy.threshold": 0.7,
    "balanced_accuracy.argmax": 0.6,
    "precision.threshold": 0.2,
    "precision.argmax": 0.4,
    "recall.threshold": 0.9,
    "recall.argmax": 0.5,
}


def test_our_figures_stand_beside_the_papers_under_the_papers_rule():
    rows = [row("rtl", **OURS), row("imp_single", **OURS), row("rtl", 0.9, **OURS), row("dense", 0.0, **OURS)]
    head, *lines = beside_published({"recipe": "cifar10", "rows": rows})
    tickets, single = (dict(zip(head, line, strict=True)) for line in lines)
    assert (tickets["method"], tickets["protocol"], tickets["sparsity"]) == ("RTL", "quick", "50%")
    assert tickets["rule"] == "threshold"
    assert [tickets[f"BA, {k}"] for k in ("ours", "paper", "difference")] == ["0.700", "0.778", "-0.078"]
    assert [tickets[f"recall, {k}"] for k in ("ours", "paper", "difference")] == ["0.900", "0.810", "+0.090"]
    assert [tickets[f"#Params, {k}"] for k in ("ours", "paper", "difference")] == ["12,345", "72,000", "-82.9%"]
    assert single["rule"] == "argmax"
    assert [single[f"precision, {k}"] for k in ("ours", "paper", "difference")] == ["0.400", "0.478", "-0.078"]


def test_what_is_beside_the_paper_is_the_mean_over_seeds():
    rows = [row("rtl", seed=s, **OURS | {"recall.threshold": value}) for s, value in enumerate((0.7, 0.8, 0.9))]
    (_, line) = beside_published({"recipe": "cifar10", "rows": rows})
    assert "0.800" in line


def test_a_recipe_the_paper_has_no_table_of_has_none_here():
    assert beside_published({"recipe": "digits", "rows": [row("rtl", **OURS)]}) == []


@pytest.mark.parametrize(
    ("recipe", "key", "heading", "cells"),
    [
        ("inr", "psnr", "PSNR", ["20.000", "17.250", "+2.750"]),
        ("speech", "si_snri", "SI-SNRi", ["20.000", "7.178", "+12.822"]),
    ],
)
def test_pictures_and_speech_are_compared_without_a_decision_rule(recipe, key, heading, cells):
    rows = [row("rtl", **{key: 20.0}), row("imp_single", **{key: 10.0})]
    head, line, _ = beside_published({"recipe": recipe, "rows": rows})
    assert "rule" not in head
    assert line[:6] == ["RTL", "quick", "50%", *cells]
    assert head[3:6] == [f"{heading}, {whose}" for whose in ("ours", "paper", "difference")]


def test_a_metric_we_have_not_is_a_dash_beside_the_papers():
    head, line = beside_published({"recipe": "cifar10", "rows": [row("rtl")]})
    cells = dict(zip(head, line, strict=True))
    assert [cells[f"recall, {whose}"] for whose in ("ours", "paper", "difference")] == ["–", "0.810", "–"]
    assert cells["BA, ours"] == "0.800"


def test_what_cannot_be_read_of_the_papers_figures_is_said_below_them():
    table = {"recipe": "cifar100", "rows": [row("imp_single", **OURS)]}
    assert comparison(table) == f"{markdown(beside_published(table))}\n{REMARKS['cifar100', 'imp_single']}\n"
    table["rows"] = [row("rtl", **OURS)]
    assert comparison(table) == markdown(beside_published(table))
    pictures = {"recipe": "inr", "rows": [row("rtl", psnr=20.0)]}
    assert comparison(pictures).endswith(f"|\n\n{REMARKS['inr', '']}\n")


# Several runs as one


def results(*rows, recipe="digits", command="rtl run digits", **environment):
    table = {"recipe": recipe, "command": command, "environment": {"torch": "2"} | environment, "rows": list(rows)}
    return table, {"class_names": [], "per_class": [{"seed": r["seed"]} for r in rows]}


def test_runs_of_one_recipe_become_one_table(details):
    first, second = results(row(), date="1"), results(row(seed=1), row(seed=2), command="b", date="2")
    table, together = merged([first, (second[0], second[1] | {"similarity": details["similarity"]})])
    assert [r["seed"] for r in table["rows"]] == [0, 1, 2]
    assert table["command"] == "rtl run digits && b"
    assert table["environment"] == {"torch": "2", "date": "1 / 2"}
    assert [r["seed"] for r in together["per_class"]] == [0, 1, 2]
    assert together["similarity"] == details["similarity"]
    assert len(first[0]["rows"]) == 1  # what was given is left as it was


def test_merged_runs_keep_every_images_figures():
    first, second = (
        (t, d | {"per_image": [{"psnr": n}]}) for n, (t, d) in enumerate((results(row()), results(row(seed=1))))
    )
    assert [one["psnr"] for one in merged([first, second])[1]["per_image"]] == [0, 1]


def test_merged_details_say_the_protocol_that_older_ones_left_out():
    first, second = results(row()), results(row(seed=1) | {"protocol": "paper"}, row(seed=2) | {"protocol": "reduced"})
    second[1]["per_class"][0]["protocol"] = "paper"
    found = merged([first, second])[1]["per_class"]
    assert [one.get("protocol") for one in found] == ["quick", "paper", None]  # the last might be of either


def test_one_run_merged_is_itself(table, details):
    table |= {"wall": 60.0, "resumed": 1, "workers": 2}
    assert merged([(table, details)]) == (table, details)


def test_the_time_a_run_took_is_said_below_its_table_and_added_up_of_several(tmp_path, table, details):
    assert took(table) == ""  # of an older run
    table |= {"wall": 6180.0, "resumed": 0, "workers": 2}
    assert took(table) == "In 1 h 43 min with 2 workers."
    write_results(tmp_path, table, details)
    assert (tmp_path / "table.md").read_text() == f"{markdown(summary(table['rows']))}\nIn 1 h 43 min with 2 workers.\n"
    first, second = results(row()), results(row(seed=1))
    first[0].update(wall=60.0, resumed=1, workers=2)
    second[0].update(wall=30.5, resumed=0, workers=1)
    assert took(merged([first, second])[0]) == "In 1 min 30 s, resumed 1 time."
    del second[0]["wall"]
    partly = merged([first, second])  # said of the one that it is known of
    said = f"{first[0]['command']}: In 1 min 00 s with 2 workers, resumed 1 time."
    assert took(partly[0]) == took(merged([partly, results(row(seed=2))])[0]) == said
    assert "wall" not in partly[0]


def test_an_environment_value_two_of_three_runs_share_is_named_once():
    runs = [results(row(seed=s), date=d) for s, d in enumerate(("1", "2", "1"))]
    assert merged(runs)[0]["environment"]["date"] == "1 / 2"


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (results(row(seed=1), recipe="cifar10"), "runs are of 'digits' and of 'cifar10', expected one recipe"),
        (results(row()), r"runs have a row twice, \('rtl', 'quick', '', 0.5, 0\): leave one of them out"),
    ],
)
def test_runs_that_cannot_be_one_are_refused(second, message):
    with pytest.raises(InputError, match=message):
        merged([results(row()), second])


def test_both_tables_are_put_between_their_marks(tmp_path):
    table = results(row("rtl", **OURS), recipe="cifar10")[0]
    document = tmp_path / "README.md"
    marks = "<!-- table: cifar10 -->\nold\n<!-- end -->\nb\n"
    document.write_text(f"a\n{marks}<!-- published: cifar10 -->\n<!-- end -->\nc\n")
    write_into(document, table)
    ours, paper = markdown(summary(table["rows"])), markdown(beside_published(table))
    assert "0.778" in paper
    assert document.read_text() == (
        f"a\n<!-- table: cifar10 -->\n{ours}<!-- end -->\nb\n<!-- published: cifar10 -->\n{paper}<!-- end -->\nc\n"
    )
    document.write_text(marks)  # a document need not have the second
    write_into(document, table)
    assert document.read_text() == f"<!-- table: cifar10 -->\n{ours}<!-- end -->\nb\n"


def test_one_seed_has_no_spread_and_a_missing_metric_is_a_dash():
    head, line, _ = summary([row(), row("imp_multiple", similarity=0.5)])
    cells = dict(zip(head, line, strict=True))
    assert cells["accuracy"] == "0.900"
    assert cells["similarity"] == "–"
    assert "PSNR" not in head  # no row has one


def test_scenes_have_columns_behind_their_mean():
    metrics = {"si_snri.indoor": 5.0, "si_snri.outdoor": 7.0, "si_snri": 6.0}
    head, line = summary([row() | {"metrics": metrics}])
    assert head[3:6] == ["SI-SNRi", "indoor", "outdoor"]
    assert line[3:6] == ["6.000", "5.000", "7.000"]


def test_markdown_is_a_table_with_figures_to_the_right():
    assert markdown([["method", "x"], ["RTL", "1"]]) == "| method | x |\n| --- | ---: |\n| RTL | 1 |\n"


def test_results_are_written_and_read_back_unchanged(tmp_path, table, details):
    write_results(tmp_path / "new" / "folder", table, details)
    again = read_results(tmp_path / "new" / "folder")
    assert again == (table, details)
    assert (tmp_path / "new" / "folder" / "table.md").read_text() == markdown(summary(table["rows"]))
    assert "dög" in (tmp_path / "new" / "folder" / "details.json").read_text()


@pytest.mark.parametrize(
    ("sparsities", "drawn"), [((0.5, 0.1 + 0.2, 0.3), "metric_against_sparsity"), ((0.3, 0.1 + 0.2), "metric_by_row")]
)
def test_a_metric_is_drawn_against_sparsity_where_there_are_several(tmp_path, monkeypatch, sparsities, drawn):
    called = []
    for name in ("metric_against_sparsity", "metric_by_row"):
        draw = getattr(plots, name)
        monkeypatch.setattr(plots, name, lambda *args, name=name, draw=draw: called.append(name) or draw(*args))
    rows = [row(sparsity=s, seed=seed) for seed, s in enumerate(sparsities)] + [row("dense", 0.0)]
    write_results(tmp_path, {"recipe": "r", "command": "c", "environment": environment(), "rows": rows}, {})
    assert called == [drawn]


def test_a_run_made_before_curves_were_kept_gets_that_of_its_tickets(tmp_path):
    committed = RESULTS / "digits"
    shutil.copytree(committed, tmp_path / "old")
    details = json.loads((committed / "details.json").read_text())
    older = {key: value for key, value in details.items() if key not in ("curve", "alarms")}
    (tmp_path / "old" / "details.json").write_text(json.dumps(older))
    (tmp_path / "old" / "tickets" / "notes").mkdir()
    (tmp_path / "old" / "tickets" / "notes" / "tickets.json").write_text("not ours")
    _, details = read_results(tmp_path / "old")
    curve = Curve.from_json(details["curve"])
    for r, (level, similarity) in enumerate(details["similarity"].items()):
        assert curve.jaccard()[r].tolist() == similarity["matrix"]
        assert curve.sparsity[r].tolist() == pytest.approx([float(level)] * 10, abs=1e-4)
    assert details["alarms"] == []


def test_every_figure_is_there_and_is_an_image(tmp_path, table, details):
    from PIL import Image

    write_results(tmp_path, table, details)
    names = {"metric", "similarity", "similarity-by-depth-0.5", "similarity-by-depth-0.75"}
    assert {f.stem for f in (tmp_path / "figures").iterdir()} == names
    for file in (tmp_path / "figures").iterdir():
        with Image.open(file) as image:
            assert len(set(image.convert("L").tobytes())) > 10


def test_results_are_the_same_bytes_twice(tmp_path, table, details):
    for name in ("one", "two"):
        write_results(tmp_path / name, table, details)
    files = sorted(f.relative_to(tmp_path / "one") for f in (tmp_path / "one").rglob("*") if f.is_file())
    assert len(files) == 7
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_table_json_is_written_last(tmp_path, table, details):
    details["similarity"]["0.5"]["matrix"] = "no matrix"
    with pytest.raises(Exception):  # noqa: B017, PT011 (whatever goes wrong on the way)
        write_results(tmp_path, table, details)
    assert not (tmp_path / "table.json").exists()


@pytest.mark.parametrize("content", [None, "{", ""])
def test_an_unfinished_or_damaged_run_is_refused_and_says_what_to_do(tmp_path, table, details, content):
    write_results(tmp_path, table, details)
    file = tmp_path / "table.json"
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    with pytest.raises(InputError, match=r"holds no finished results.*finish `rtl run`") as caught:
        read_results(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["{}", "[]", (RESULTS / "routing" / "table.json").read_text()])
def test_results_that_are_no_runs_are_refused(tmp_path, table, details, content):
    write_results(tmp_path, table, details)
    (tmp_path / "table.json").write_text(content)
    with pytest.raises(InputError, match=r"table\.json and details\.json are not those of an `rtl run`"):
        read_results(tmp_path)


def test_the_environment_is_plain_values():
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert {"machine", "processor", "python", "torch", "cores"} <= found.keys()
