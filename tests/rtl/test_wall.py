"""rtl.wall: a run's time by the clock on the wall, over commands that were interrupted."""

import json
import time

import pytest

import rtl.wall
from rtl.progress import Event
from rtl.run import Run
from rtl.wall import Wall

EVENT = Event("running", (1, 1), "cat", 1, 2, 0.5)


@pytest.fixture
def clock(monkeypatch):
    """A clock to be set, `clock[0]`."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_command_that_is_interrupted_counts_and_the_next_goes_on(tmp_path, clock):
    with pytest.raises(KeyboardInterrupt), Wall(tmp_path) as first:
        work(first, clock, 60)
    Run(tmp_path).configure({"lr": 1})
    with Wall(tmp_path) as second:
        work(second, clock, 40, stopped=False)
    assert second.figures(2) == {"wall": 100.0, "resumed": 1, "workers": 2}
    assert json.loads((tmp_path / "wall.json").read_text()) == {"seconds": 100.0, "commands": 2}


def work(wall, clock, seconds, stopped=True):
    wall.event(EVENT)
    clock[0] += seconds
    if stopped:
        raise KeyboardInterrupt


def test_a_command_that_is_killed_has_counted_to_its_last_saving(tmp_path, clock):
    killed = Wall(tmp_path)
    for _ in range(25):
        killed.event(EVENT)
        clock[0] += 1
    lost = clock[0] - 1000 - json.loads((tmp_path / "wall.json").read_text())["seconds"]
    assert 0 <= lost <= rtl.wall.SAVE_SECONDS
    assert Wall(tmp_path).figures(1)["resumed"] == 1


def test_a_command_that_does_not_get_to_work_or_finds_all_done_leaves_it_as_it_was(tmp_path, clock):
    with Wall(tmp_path):
        clock[0] += 5
    assert list(tmp_path.iterdir()) == []
    with Wall(tmp_path) as wall:
        work(wall, clock, 5, stopped=False)
    before = (tmp_path / "wall.json").read_bytes()
    with Wall(tmp_path) as again:
        work(again, clock, 3, stopped=False)
    assert (tmp_path / "wall.json").read_bytes() != before
    again.forget()
    assert (tmp_path / "wall.json").read_bytes() == before


def test_a_run_begun_without_the_clock_has_no_time(tmp_path, clock):
    Run(tmp_path).configure({"lr": 1})
    with Wall(tmp_path) as wall:
        work(wall, clock, 5, stopped=False)
    assert wall.figures(2) == {}
    assert not (tmp_path / "wall.json").exists()
