"""rtl.report: a summary over seeds, as Markdown, and results that are written whole and read back."""

import json
import statistics

import pytest
import torch

from rtl.diagnose import Similarity
from rtl.errors import InputError
from rtl.report import environment, markdown, read_results, summary, write_results


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
    return {"class_names": ["cat", "dög"], "per_class": [], "similarity": levels}


def test_a_line_is_the_mean_and_standard_deviation_over_seeds_of_one_method_variant_and_sparsity():
    rows = [row(seed=s, accuracy=v) for s, v in enumerate((0.5, 0.6, 0.9))]
    rows += [row(sparsity=0.75), row(variant="schedule=mixed"), row("imp_multiple")]
    head, *lines = summary(rows)
    assert [line[:2] for line in lines] == [
        ["RTL", "50%"],
        ["RTL", "75%"],
        ["RTL (schedule=mixed)", "50%"],
        ["IMP multiple", "50%"],
    ]
    first = dict(zip(head, lines[0], strict=True))
    assert first["accuracy"] == f"{2 / 3:.3f} ± {statistics.stdev([0.5, 0.6, 0.9]):.3f}" == "0.667 ± 0.208"
    assert first["#Params"] == "12,346"
    assert first["samples"] == "1,000"
    assert first["seconds"] == "2"


def test_one_seed_has_no_spread_and_a_missing_metric_is_a_dash():
    head, line, _ = summary([row(), row("imp_multiple", similarity=0.5)])
    cells = dict(zip(head, line, strict=True))
    assert cells["accuracy"] == "0.900"
    assert cells["similarity"] == "–"
    assert "PSNR" not in head  # no row has one


def test_scenes_have_columns_behind_their_mean():
    metrics = {"si_snri.indoor": 5.0, "si_snri.outdoor": 7.0, "si_snri": 6.0}
    head, line = summary([row() | {"metrics": metrics}])
    assert head[2:5] == ["SI-SNRi", "indoor", "outdoor"]
    assert line[2:5] == ["6.000", "5.000", "7.000"]


def test_markdown_is_a_table_with_figures_to_the_right():
    assert markdown([["method", "x"], ["RTL", "1"]]) == "| method | x |\n| --- | ---: |\n| RTL | 1 |\n"


def test_results_are_written_and_read_back_unchanged(tmp_path, table, details):
    write_results(tmp_path / "new" / "folder", table, details)
    again = read_results(tmp_path / "new" / "folder")
    assert again == (table, details)
    assert (tmp_path / "new" / "folder" / "table.md").read_text() == markdown(summary(table["rows"]))
    assert "dög" in (tmp_path / "new" / "folder" / "details.json").read_text()


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


def test_the_environment_is_plain_values():
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert {"machine", "processor", "python", "torch", "cores"} <= found.keys()
