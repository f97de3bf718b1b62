"""rtl.keep: what `rtl report --to` keeps, of which run, in which order, and what goes."""

import pytest
import torch
from test_cli import call, finished
from test_report import row
from toys import tree

import rtl.keep
from rtl.curve import Curve
from rtl.diagnose import Similarity
from rtl.report import environment, insights, write_results
from rtl.run import Run


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ticket_files(folder, level, text):
    """A level of tickets by its names alone, as `TicketNetwork.save_pretrained` and the routers give them."""
    place = folder / "tickets" / level
    place.mkdir(parents=True)
    for name in ("tickets.safetensors", "tickets.json", "inputs.json", "router-x.safetensors", "router-x.json"):
        (place / name).write_text(text)


def test_of_merged_runs_the_tickets_are_those_that_the_details_are_of(capsys, folder, monkeypatch):
    from rtl.page import RunView

    monkeypatch.setattr(RunView, "banks", {})  # the tickets here are none
    matrix = torch.eye(2, dtype=torch.float64)
    levels = {"0.5": Similarity(("a", "b"), matrix, {"w": matrix}).to_json()}
    curve = Curve(("a", "b"), {"w": 9}, {"w": torch.full((1, 2, 2), 3)})
    for name, seed, details in (
        ("single", 0, {}),
        ("first", 1, {"similarity": levels, **insights(curve)}),
        ("other", 2, {"similarity": {}, **insights(curve)}),
    ):
        table = {"recipe": "digits", "command": name, "environment": environment(), "rows": [row(seed=seed)]}
        write_results(folder / name, table, {"class_names": [], "per_class": [], **details})
        Run(folder / name).configure({"lr": seed})
        (folder / name / "media/scene").mkdir(parents=True)
        (folder / name / f"media/scene/{name}.png").write_bytes(b"x")
    ticket_files(folder / "first", "0.5", "first")
    for level in ("0.5", "0.9"):
        ticket_files(folder / "other", level, "other")
    code, _, err = call(capsys, "report", "single", "first", "other", "--merge", "--to", "both")
    assert (code, err) == (0, "")
    found = tree(folder / "both")
    tickets = {name: data for name, data in found.items() if name.startswith("tickets/")}
    assert len(tickets) == 5
    assert set(tickets.values()) == {b"first"}
    assert [name for name in found if name.startswith("media/")] == ["media/scene/first.png"]
    page = found["report.html"].decode()
    assert all(f"<summary>settings of {name}</summary>" in page for name in ("single", "first", "other"))


def test_nothing_of_earlier_results_stays_beside_new_ones(capsys, folder, monkeypatch):
    from rtl.page import RunView

    monkeypatch.setattr(RunView, "banks", {})  # the tickets here are none
    finished(folder / "done")
    Run(folder / "done").configure({"lr": 1})
    ticket_files(folder / "done", "0.5", "new")
    monkeypatch.setattr("rtl.report._curve_of_tickets", lambda _: None)
    assert call(capsys, "report", "done", "--to", "fresh")[0] == 0
    finished(folder / "kept")
    Run(folder / "kept").configure({"lr": 2})
    (folder / "kept/config-old.json").write_text("{}")
    for level in ("0.5", "0.75"):
        ticket_files(folder / "kept", level, "old")
    (folder / "kept/tickets/0.5/router-old.json").write_text("old")
    for name in ("media/scene/old.png", "figures/similarity-by-depth-0.75.png", "figures/mine.png", "notes.txt"):
        (folder / "kept" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "kept" / name).write_bytes(b"old")
    assert call(capsys, "report", "done", "--to", "kept")[0] == 0
    found = tree(folder / "kept")
    assert found.pop("notes.txt") == found.pop("figures/mine.png") == b"old"  # not ours
    title = b"rtl report: kept", b"rtl report: fresh"
    expected = tree(folder / "fresh")
    assert found.keys() == expected.keys()
    for name in expected.keys() - {"report.html"}:
        assert found[name] == expected[name], name
    assert title[0] in found["report.html"]
    assert title[1] in expected["report.html"]
    assert sorted(f.name for f in (folder / "kept/tickets").iterdir()) == ["0.5"]


def test_figures_of_examples_outlive_their_media_where_a_run_is_kept(capsys, folder):
    finished(folder / "done")  # as results are committed, without their media
    (folder / "done/figures/example-street.png").write_bytes(b"x")
    for arguments in (["done"], ["done", "--to", "done"]):
        assert call(capsys, "report", *arguments)[0] == 0
        assert (folder / "done/figures/example-street.png").read_bytes() == b"x"


def test_a_folder_of_ones_own_loses_nothing(capsys, folder):
    finished(folder / "done")
    (folder / "mine/media").mkdir(parents=True)
    (folder / "mine/media/holiday.png").write_bytes(b"x")
    assert call(capsys, "report", "done", "--to", "mine")[0] == 0
    assert (folder / "mine/media/holiday.png").read_bytes() == b"x"


@pytest.mark.parametrize("arguments", ["one --to two", "one two --merge --to two", "one two --merge --to one"])
def test_a_runs_own_folder_takes_no_other_results(capsys, folder, arguments):
    for seed, name in enumerate(("one", "two")):
        table = {"recipe": "digits", "command": name, "environment": environment(), "rows": [row(seed=seed)]}
        write_results(folder / name, table, {"class_names": [], "per_class": []})
        with Run(folder / name).lock():
            Run(folder / name).configure({"lr": seed})
    before = tree(folder)
    code, _, err = call(capsys, "report", *arguments.split())
    assert code == 2
    assert "a run's own folder, whose results would be replaced: give another folder" in err
    assert tree(folder) == before


@pytest.mark.parametrize("stop", range(5))
def test_a_copy_that_is_stopped_leaves_no_names_beside_other_weights(folder, monkeypatch, stop):
    ticket_files(folder / "new", "0.5", "new")
    ticket_files(folder / "kept", "0.5", "old")
    written, write = [], rtl.keep.write_atomically

    def stopped(file, data):
        if len(written) == stop:
            raise KeyboardInterrupt
        written.append(file.name)
        write(file, data)

    monkeypatch.setattr(rtl.keep, "write_atomically", stopped)
    with pytest.raises(KeyboardInterrupt):
        rtl.keep.keep([folder / "new"], folder / "new", folder / "kept")
    assert not (folder / "kept/tickets/0.5/tickets.json").exists()
    monkeypatch.setattr(rtl.keep, "write_atomically", write)
    rtl.keep.keep([folder / "new"], folder / "new", folder / "kept")
    assert tree(folder / "kept") == tree(folder / "new")


def test_a_run_reported_where_it_is_keeps_its_tickets(folder):
    ticket_files(folder / "run", "0.5", "own")
    (folder / "run/table.json").write_text("{}")
    (folder / "run/tickets/notes.txt").write_text("mine")
    before = tree(folder)
    rtl.keep.keep([folder / "run"], folder / "run", folder / "run")
    assert tree(folder) == before
