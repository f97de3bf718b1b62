"""rtl.progress: plain lines, bars on a terminal, events of other processes."""

import io
import time

import pytest

from rtl import progress
from rtl.progress import Event, Progress, duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock the test moves: clock[0] is now, in seconds."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines_are_start_end_and_one_every_few_seconds(clock):
    stream = io.StringIO()
    with Progress(stream=stream, every=5).task("cat", 16) as task:
        for _ in range(16):
            clock[0] += 2
            task.advance(note="loss 0.3")
    assert stream.getvalue().splitlines() == [
        "cat: started, 0/16",
        "cat: 3/16, 6.0 s elapsed, about 26.0 s left, loss 0.3",
        "cat: 6/16, 12.0 s elapsed, about 20.0 s left, loss 0.3",
        "cat: 9/16, 18.0 s elapsed, about 14.0 s left, loss 0.3",
        "cat: 12/16, 24.0 s elapsed, about 8.0 s left, loss 0.3",
        "cat: 15/16, 30.0 s elapsed, about 2.0 s left, loss 0.3",
        "cat: finished 16/16 in 32.0 s, loss 0.3",
    ]


def test_each_plain_line_is_flushed():
    class Recorder(io.StringIO):
        flushes = 0

        def flush(self):
            self.flushes += 1

    stream = Recorder()
    with Progress(stream=stream).task("cat", 1):
        assert stream.flushes == 1
    assert stream.flushes == 2


def test_a_task_that_raises_is_shown_as_stopped_and_the_error_passes():
    stream = io.StringIO()

    def work():
        with Progress(stream=stream).task("cat", 3) as task:
            task.advance()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert stream.getvalue().splitlines()[-1].startswith("cat: stopped at 1/3 after")


def test_many_small_steps_become_few_events_and_none_is_lost(clock):
    events = []
    with Progress(forward=events.append).task("cat", 1000) as task:
        for _ in range(1000):
            clock[0] += 0.001
            task.advance()
    assert 5 <= len(events) <= 15
    assert (events[-1].state, events[-1].done) == ("finished", 1000)


def test_quiet_shows_nothing(capsys):
    with Progress(quiet=True).task("cat", 1) as task:
        task.advance()
    assert capsys.readouterr() == ("", "")


def test_lines_go_to_standard_error_by_default(capsys):
    with Progress().task("cat", 1):
        pass
    out, err = capsys.readouterr()
    assert out == ""
    assert "cat: started" in err


def test_tasks_a_dead_process_left_open_are_shown_as_stopped():
    stream = io.StringIO()
    shown = Progress(stream=stream, every=0)
    shown.show(Event("started", (7, 0), "cat", 0, 4, 0.0))
    shown.show(Event("started", (8, 0), "dog", 0, 4, 0.0))
    shown.show(Event("running", (7, 0), "cat", 2, 4, 1.0))
    shown.abandon(7)
    shown.abandon(7)
    assert stream.getvalue().splitlines()[3:] == ["cat: stopped at 2/4 after 1.0 s"]


def test_a_terminal_gets_bars_and_a_line_for_each_task_that_ended():
    stream = Terminal()
    shown = Progress(stream=stream)
    for _ in range(2):  # bars start again after the last one has ended
        with shown.task("[cat] tickets", 2) as task, shown.task("epoch", 1):
            task.advance()
    text = stream.getvalue()
    assert "━" in text
    assert text.count("epoch: finished 0/1 in") == 2
    assert text.count("[cat] tickets: finished 1/2 in") == 2


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.21, "4.2 s"), (200, "3 min 20 s"), (3725, "1 h 02 min"), (59.99, "60.0 s")]
)
def test_duration_reads_as_a_person_says_it(seconds, text):
    assert duration(seconds) == text


def test_a_task_of_no_steps_is_shown():
    stream = io.StringIO()
    with Progress(stream=stream, every=0).task("cat", 0):
        pass
    assert "finished 0/0" in stream.getvalue()


# The whole


def test_the_whole_adds_up_its_tasks_and_says_what_runs_and_when_it_ends(clock, monkeypatch):
    monkeypatch.setattr(progress.time, "time", lambda: 0.0)
    monkeypatch.setattr(progress.time, "localtime", time.gmtime)
    stream = io.StringIO()
    show = Progress(stream=stream, every=5)
    with show.whole("run", 1000, 200), show.task("cat", 8, unit=50) as cat, show.task("dog", 4, unit=100) as dog:
        for _ in range(2):
            clock[0] += 60
            cat.advance(note="loss 0.3")
            dog.advance()
        clock[0] += 60
        cat.skip(2)
        clock[0] += 60
        cat.advance()
    lines = stream.getvalue().splitlines()
    assert "cat: started, 0/8" in lines
    assert not any(line.startswith("cat: 1/8") for line in lines)  # the whole says it
    # 200 were done before and 100 are skipped: 350 in 240 s leave 250 - 0 of them to do at that pace
    assert "run: 65.0%, 4 min 00 s elapsed, about 4 min 00 s left (until Thu 00:04), cat 5/8, dog 2/4" in lines
    assert lines[-1].startswith("run: finished 65.0% in 4 min 00 s")


def test_the_whole_hears_of_tasks_in_other_processes(clock):
    stream = io.StringIO()
    show = Progress(stream=stream, every=5)
    with show.whole("run", 100):
        clock[0] += 10
        show.show(Event("started", (7, 0), "cat", 0, 10, 0.0, unit=10))
        clock[0] += 10
        show.show(Event("running", (7, 0), "cat", 4, 10, 10.0, unit=10))
        clock[0] += 10
        show.show(Event("finished", (7, 0), "cat", 10, 10, 20.0, unit=10))
    assert stream.getvalue().splitlines()[-1].startswith("run: finished 100.0%")


def test_what_a_resumed_task_skips_does_not_quicken_its_pace(clock):
    stream = io.StringIO()
    with Progress(stream=stream, every=5).task("cat", 10) as task:
        task.skip(6)
        clock[0] += 10
        task.advance()
    assert "cat: 7/10, 10.0 s elapsed, about 30.0 s left" in stream.getvalue()
