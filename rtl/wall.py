"""How long a run took by the clock on the wall, over all the commands that it took to finish."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rtl.progress import Event
from rtl.run import write_atomically

SAVE_SECONDS = 10.0  # a killed command loses no more, as long as something reports progress


class Wall:
    """The clock of one command in a run's folder, kept in its wall.json; a context manager around the work.

    It is given the events of the run's progress: a command that does not get to work counts for nothing. A run that was
    begun by a version without this clock has no time.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / "wall.json"
        self._before = self._file.read_bytes() if self._file.is_file() else None
        self._known = self._before is not None or not (folder / "config.json").exists()
        before = {"seconds": 0.0, "commands": 0} if self._before is None else json.loads(self._before)
        self._seconds, self._commands = before["seconds"], before["commands"] + 1
        self._begun, self._saved = time.monotonic(), -float("inf")

    def __enter__(self) -> Wall:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._saved > 0:
            self._save()

    def event(self, event: Event) -> None:
        """What `Progress.listen` is given."""
        if time.monotonic() - self._saved >= SAVE_SECONDS:
            self._save()

    def figures(self, workers: int) -> dict[str, Any]:
        """What table.json says of it: "wall" seconds, how often the run was "resumed", and the "workers" it has."""
        if not self._known:
            return {}
        return {"wall": round(self._passed(), 1), "resumed": self._commands - 1, "workers": workers}

    def forget(self) -> None:
        """This command found everything done: it is not counted."""
        if self._before is not None:
            write_atomically(self._file, self._before)

    def _passed(self) -> float:
        return float(self._seconds) + time.monotonic() - self._begun

    def _save(self) -> None:
        self._saved = time.monotonic()
        if self._known:
            passed = {"seconds": self._passed(), "commands": self._commands}
            write_atomically(self._file, (json.dumps(passed) + "\n").encode())
