"""Progress of long work: bars on a terminal, plain lines anywhere else.

A task reports itself as a stream of `Event` snapshots. A display needs nothing but the latest one, so the events of a
worker process can be sent to its parent and shown there beside everyone else's, and added up to the whole of the work.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Literal

COALESCE_SECONDS = 0.1  # a task that advances faster than this reports only now and then


@dataclasses.dataclass(frozen=True)
class Event:
    """Where one task stands. `task` is (process id, number of the task in that process); `values` are for curves.

    Of the `done` steps `skipped` took no time, because an earlier run did them. A step is `unit` units of the whole
    work; `whole` says that this is that whole, counted in units.
    """

    state: Literal["started", "running", "finished", "stopped"]
    task: tuple[int, int]
    label: str
    done: int
    total: int
    seconds: float
    note: str = ""
    values: Mapping[str, float] = dataclasses.field(default_factory=dict)
    skipped: int = 0
    unit: int = 0
    whole: bool = False

    @property
    def left(self) -> float | None:
        """Seconds until it ends, at the pace so far; None while there is none."""
        if self.done <= self.skipped or self.done > self.total:
            return None
        return self.seconds / (self.done - self.skipped) * (self.total - self.done)

    def __str__(self) -> str:
        count, elapsed = f"{self.done}/{self.total}", duration(self.seconds)
        if self.whole:
            count = f"{self.done / max(1, self.total):.1%}"
        if self.state == "started":
            text = f"{self.label}: started, {count}"
        elif self.state == "finished":
            text = f"{self.label}: finished {count} in {elapsed}"
        elif self.state == "stopped":
            text = f"{self.label}: stopped at {count} after {elapsed}"
        else:
            text = f"{self.label}: {count}, {elapsed} elapsed"
            if self.left is not None:
                text += f", about {duration(self.left)} left"
                if self.whole:
                    text += time.strftime(" (until %a %H:%M)", time.localtime(time.time() + self.left))
        return f"{text}, {self.note}" if self.note else text


class Task:
    """One piece of work of `total` steps, made by `Progress.task`."""

    def __init__(
        self,
        show: Callable[[Event], None],
        task: tuple[int, int],
        label: str,
        total: int,
        unit: int = 0,
        whole: bool = False,
    ) -> None:
        self._show, self._task, self._label, self._total, self._unit, self._whole = (
            show,
            task,
            label,
            total,
            unit,
            whole,
        )
        self._done, self._skipped, self._note = 0, 0, ""
        self._values: dict[str, float] = {}
        self._begun = self._shown = time.monotonic()
        self._report("started")

    def advance(self, n: int = 1, note: str = "", **values: float) -> None:
        """`n` more steps are done. `note` (a loss, say) stays beside the count until another replaces it.

        `values` are for those who draw curves (`Progress.listen`); of steps faster than `COALESCE_SECONDS`, the last.
        """
        self._done += n
        self._note = note or self._note
        self._values |= values
        if time.monotonic() - self._shown >= COALESCE_SECONDS:
            self._report("running")

    def skip(self, n: int) -> None:
        """`n` more steps were done before, by a run that this one resumes: the pace is that of the others."""
        self._skipped += n
        self.advance(n)

    def _report(self, state: Literal["started", "running", "finished", "stopped"]) -> None:
        self._shown = time.monotonic()
        seconds = self._shown - self._begun
        values, self._values = self._values, {}
        counts = self._skipped, self._unit, self._whole
        self._show(Event(state, self._task, self._label, self._done, self._total, seconds, self._note, values, *counts))


class Progress:
    """Shows tasks: bars when `stream` is a terminal, else plain lines.

    Args:
        quiet: show nothing.
        stream: where to write; None is standard error.
        every: seconds between two plain lines of one task, beside its first and last.
        forward: receives every event instead of a display (how a worker process reports to its parent).
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        stream: IO[str] | None = None,
        every: float = 5.0,
        forward: Callable[[Event], None] | None = None,
    ) -> None:
        self._numbers = itertools.count()
        self._open: dict[tuple[int, int], Event] = {}
        self._listeners: list[Callable[[Event], None]] = []
        self._whole: Task | None = None
        self._display: Callable[[Event], None]
        self._lines = False
        if forward is not None:
            self._display = forward
        elif quiet:
            self._display = lambda event: None
        elif (stream or sys.stderr).isatty():
            self._display = _Bars(stream).show
        else:
            self._lines = True
            self._display = _Lines(stream, every).show

    @contextmanager
    def whole(self, label: str, total: int, done: int = 0) -> Iterator[None]:
        """All the work of the block as one task of `total` units, which its tasks (here and in workers) add to.

        `done` units were done before, by tasks that do not come again. It says what is running and when everything
        ends. As plain lines the tasks then show only their first and last.
        """
        with self.task(label, total, whole=True) as self._whole:
            self._whole.skip(done)
            try:
                yield
            finally:
                self._whole = None

    @contextmanager
    def task(self, label: str, total: int, unit: int = 0, whole: bool = False) -> Iterator[Task]:
        """A task of `total` steps, shown until the block ends: as finished, or as stopped if it raises.

        A step is `unit` units of the `whole`, where there is one.
        """
        task = Task(self.show, (os.getpid(), next(self._numbers)), label, total, unit, whole)
        try:
            yield task
        except BaseException:
            task._report("stopped")
            raise
        task._report("finished")

    def show(self, event: Event) -> None:
        """Show an event, of this process or of another."""
        before = self._open.get(event.task)
        if event.state in ("finished", "stopped"):
            self._open.pop(event.task, None)
        else:
            self._open[event.task] = event
        if self._whole is None or event.whole or event.state != "running" or not self._lines:
            self._display(event)
        for listener in self._listeners:
            listener(event)
        if self._whole is not None and event.unit:
            done, skipped = (before.done, before.skipped) if before else (0, 0)
            running = [f"{e.label} {e.done}/{e.total}" for e in self._open.values() if e.unit]
            self._whole._skipped += (event.skipped - skipped) * event.unit
            self._whole.advance((event.done - done) * event.unit, ", ".join(running))

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Give every event to `listener` too, in this process, also those of worker processes."""
        self._listeners.append(listener)

    def abandon(self, process: int) -> None:
        """Show as stopped every task that the process with this id left open."""
        for event in [event for event in self._open.values() if event.task[0] == process]:
            self.show(dataclasses.replace(event, state="stopped"))


class _Lines:
    def __init__(self, stream: IO[str] | None, every: float) -> None:
        self._stream, self._every = stream, every
        self._printed: dict[tuple[int, int], float] = {}

    def show(self, event: Event) -> None:
        now = time.monotonic()
        if event.state == "running" and now - self._printed[event.task] < self._every:
            return
        print(event, file=self._stream or sys.stderr, flush=True)
        self._printed[event.task] = now
        if event.state in ("finished", "stopped"):
            del self._printed[event.task]


class _Bars:
    """One bar a running task; a task that ends leaves a line."""

    def __init__(self, stream: IO[str] | None) -> None:
        from rich import progress
        from rich.console import Console

        self._bars = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[note]}", markup=False),
            console=Console(file=stream or sys.stderr),
        )
        self._bar: dict[tuple[int, int], progress.TaskID] = {}

    def show(self, event: Event) -> None:
        if event.state == "started":
            if not self._bar:
                self._bars.start()
            self._bar[event.task] = self._bars.add_task(event.label, total=event.total, note=event.note)
        elif event.state == "running":
            self._bars.update(self._bar[event.task], completed=event.done, note=event.note)
        else:
            self._bars.remove_task(self._bar.pop(event.task))
            self._bars.console.print(str(event), markup=False, highlight=False)
            if not self._bar:
                self._bars.stop()


def duration(seconds: float) -> str:
    """Seconds as a person says them: "4.2 s", "3 min 20 s", "1 h 02 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
