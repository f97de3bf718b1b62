"""rtl.watch: what is said of a run while it grows."""

import json
import os
import time

import pytest
from test_collapse import alarm_on
from toys import blobs, mlp, quiet

import rtl.watch
from rtl import extract, retrain
from rtl.cli import main
from rtl.collapse import CollapseWarning
from rtl.curve import mean_to_others
from rtl.diagnose import diagnose
from rtl.extract import PrunePlan
from rtl.fit import Fit
from rtl.partition import by_label
from rtl.watch import extractions, retrainings

PLAN, FIT = PrunePlan(20, 0.75, (0.25, 0.75)), Fit(epochs=1, batch_size=16, lr=0.02)


def one_line(text):
    """A title is broken wherever the folder's name, which is long, leaves no room."""
    return " ".join(text.split())


@pytest.fixture
def run(tmp_path):
    one = quiet(tmp_path / "run")
    one.configure({"a": 1})
    return one


def test_a_finished_extraction_says_what_the_tickets_say(run):
    parts = by_label(blobs())
    tickets = extract(mlp(), parts, PLAN, FIT, run.child("seed-0/rtl"))
    (found,) = extractions(run.path)
    assert found.name == "seed-0/rtl"
    assert found.rounds == {"a": 3, "b": 3, "c": 3}
    assert found.of == 3
    assert found.sparsity == pytest.approx(0.75)
    assert found.similarity == pytest.approx(diagnose(tickets)[0.75].mean)
    assert found.loss > 0
    assert found.alarms == []


def test_half_an_extraction_is_followed_as_far_as_all_tickets_are(run):
    parts = by_label(blobs())
    tickets = extract(mlp(), parts, PLAN, FIT, run)
    for file in [*(run.path / "extract/b").glob("round-00[12].*"), *(run.path / "extract/c").glob("round-002.*")]:
        file.unlink()
    (found,) = extractions(run.path)
    assert found.rounds == {"a": 3, "b": 1, "c": 2}
    assert found.sparsity == pytest.approx(0.25)
    assert found.similarity == pytest.approx(diagnose(tickets)[0.25].mean)


def test_a_ticket_that_stopped_does_not_end_what_is_said_of_the_others(run, monkeypatch):
    alarm_on(monkeypatch, {"b": (1, 0)})
    plan = PrunePlan(0.2, 0.8, stop_on_collapse=True)
    with pytest.warns(CollapseWarning):
        tickets = extract(mlp(), by_label(blobs()), plan, FIT, run)
    (found,) = extractions(run.path)
    assert found.rounds["b"] < found.rounds["a"]
    assert found.similarity == pytest.approx(float(mean_to_others(tickets.curve.jaccard()[-1]).mean()))


def test_a_run_that_has_just_begun_and_one_of_an_older_version_are_shown(run, capsys):
    parts = by_label(blobs())
    assert main(["watch", str(run.path), "--once"]) == 0
    assert "no extraction has begun" in capsys.readouterr().out
    extract(mlp(), parts, PLAN, FIT, run)
    (run.path / "extract/about.json").unlink()
    for file in (run.path / "extract/a").glob("*"):
        file.unlink()
    (found,) = extractions(run.path)
    assert (found.of, found.sparsity, found.similarity) == (None, None, None)
    assert main(["watch", str(run.path)]) == 0  # not a terminal: once
    assert "running or stopped" in one_line(capsys.readouterr().out)


def test_retraining_is_followed_by_its_checkpoints(run, capsys):
    parts = by_label(blobs())
    tickets = extract(mlp(), parts, PLAN, FIT, run)
    retrain(mlp(), tickets.at(0.75), parts, Fit(epochs=3, batch_size=16, lr=0.02), run)
    assert retrainings(run.path) == ["retrain/0.75: finished"]
    place = run.path / "retrain/0.75"
    (place / "network.json").rename(place / "checkpoint-0002.json")
    assert retrainings(run.path) == ["retrain/0.75: epoch 2 of 3 saved"]
    main(["watch", str(run.path), "--once"])
    assert "epoch 2 of 3 saved" in capsys.readouterr().out


@pytest.mark.parametrize("width", [40, 80])
def test_a_narrow_terminal_shows_every_figure_whole(run, capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    extract(mlp(), by_label(blobs()), PLAN, FIT, run.child("seed-0/imp_multiple"))
    assert main(["watch", str(run.path), "--once"]) == 0
    out = capsys.readouterr().out
    (found,) = extractions(run.path)
    figures = ["9 of 9", "75.0%", f"{found.loss:.3f}", f"{found.similarity:.3f}"]
    assert all(text in out for text in ("seed-0/imp_multiple", *figures))
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= width


def test_an_unfinished_run_says_when_it_wrote_last(run, capsys, monkeypatch):
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    for file in run.path.rglob("*"):
        os.utime(file, (now - 3723,) * 2)
    assert main(["watch", str(run.path), "--once"]) == 0
    assert "running or stopped, last wrote 1 h 02 min ago" in one_line(capsys.readouterr().out)
    (run.path / "table.json").write_text("{}")
    assert main(["watch", str(run.path), "--once"]) == 0
    assert "finished" in capsys.readouterr().out


def test_an_interrupt_ends_the_watching_and_is_not_said_to_end_the_run(run, capsys, monkeypatch):
    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    monkeypatch.setattr(time, "sleep", interrupted)
    assert main(["watch", str(run.path)]) == 0
    assert "interrupted" not in capsys.readouterr().err


def test_the_last_look_is_at_the_finished_run_however_soon_after_a_look_it_ends(run, monkeypatch):
    looks, status = [], rtl.watch.status

    def look(folder, width):
        found = status(folder, width)
        looks.append("finished" in found.renderables[0])
        if len(looks) == 2:
            (folder / "table.json").write_text("{}")
        return found

    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(rtl.watch, "status", look)
    assert main(["watch", str(run.path)]) == 0
    assert looks == [False, False, True]


def test_watching_writes_nothing(run):
    extract(mlp(), by_label(blobs()), PLAN, FIT, run)
    before = {f: f.stat().st_mtime_ns for f in run.path.rglob("*")}
    main(["watch", str(run.path), "--once"])
    assert {f: f.stat().st_mtime_ns for f in run.path.rglob("*")} == before
    assert json.loads((run.path / "extract/about.json").read_text())["info"]["prunable"] == 72
