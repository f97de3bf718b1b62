"""A run seen from another terminal: what its folder says while it grows. It reads, and never locks or writes."""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rtl_kernels as rk
from rtl.collapse import Alarm, alarms
from rtl.curve import Curve, mean_to_others
from rtl.errors import InputError
from rtl.progress import duration

if TYPE_CHECKING:
    from rich.console import RenderableType

NARROW = 80  # characters: a narrower terminal has no room for the table's columns


@dataclass(frozen=True)
class Extracting:
    """How far the extraction of one method has come.

    Attributes:
        name: "seed-0/rtl".
        rounds: by ticket's folder, finished rounds; `of`, all there will be (None in runs of older versions).
        sparsity: least of the tickets', where known.
        loss: mean over tickets, of their last round.
        similarity: mean over pairs of tickets, after the last round that all have that were not stopped.
        alarms: collapse alarms up to there.
    """

    name: str
    rounds: dict[str, int]
    of: int | None
    sparsity: float | None
    loss: float | None
    similarity: float | None
    alarms: list[Alarm]


def watch(folder: Path, every: float, once: bool) -> int:
    """Show a run until it is finished, or interrupted, or once. Raises InputError if it is no run."""
    from rich.console import Console
    from rich.live import Live

    if not (folder / "config.json").is_file():
        raise InputError(f"run is {str(folder)!r}, which holds no config.json: give the folder of `rtl run`")
    if not every > 0:
        raise InputError(f"every is {every}, expected a number of seconds above 0")
    console = Console(markup=False, emoji=False, highlight=False)
    if once or not console.is_terminal:
        console.print(status(folder, console.width))
        return 0
    finished = (folder / "table.json").is_file()
    # An interrupt ends the watching, and is no news: the run goes on.
    with suppress(KeyboardInterrupt), Live(status(folder, console.width), console=console, auto_refresh=False) as live:
        while not finished:
            time.sleep(every)
            finished = (folder / "table.json").is_file()  # before the last look, which then shows it
            live.update(status(folder, console.width), refresh=True)
    return 0


def status(folder: Path, width: int) -> RenderableType:
    """A table of every method's rounds, or where `width` is below `NARROW` a list, and a line of every retraining."""
    from rich.console import Group
    from rich.table import Table

    title = f"{folder}: {'finished' if (folder / 'table.json').is_file() else _unfinished(folder)}"
    headings = ("extraction", "rounds", "sparsity", "loss", "similarity", "collapse")
    lines = []
    for one in extractions(folder):
        done = f"{sum(one.rounds.values())}" + (f" of {len(one.rounds) * one.of}" if one.of is not None else "")
        first = min(one.alarms, key=lambda alarm: alarm.round, default=None)
        warned = (
            "" if first is None else f"{len(one.alarms)} tickets, first at {first.sparsity:.1%} ({first.direction})"
        )
        numbers = [one.loss, one.similarity]
        texts = ["–" if number is None else f"{number:.3f}" for number in numbers]
        lines.append([one.name, done, "–" if one.sparsity is None else f"{one.sparsity:.1%}", *texts, warned])
    if not lines:
        return Group(title, "no extraction has begun", *retrainings(folder))
    if width < NARROW:
        listed = [
            "\n  ".join([name, *(f"{what}: {text}" for what, text in zip(headings[1:], texts, strict=True) if text)])
            for name, *texts in lines
        ]
        return Group(title, *listed, *retrainings(folder))
    shown = Table(title=title)
    for heading in headings:
        left = heading in ("extraction", "collapse")
        shown.add_column(heading, justify="left" if left else "right", overflow="fold", no_wrap=not left)
    for line in lines:
        shown.add_row(*line)
    return Group(shown, *retrainings(folder))


def _unfinished(folder: Path) -> str:
    """A killed run leaves no word, but what it wrote last grows old."""
    newest = 0.0
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):  # being replaced
            newest = max(newest, file.stat().st_mtime)
    return f"running or stopped, last wrote {duration(max(0.0, time.time() - newest))} ago"


def extractions(folder: Path) -> list[Extracting]:
    """Of every method and seed whose extraction has begun."""
    found = []
    for place in sorted(file.parent for file in folder.glob("**/extract/config.json")):
        config = _json(place / "config.json")
        names = list(config.get("subsets", {}))
        about = _json(place / "about.json").get("info", {})
        rounds = {name: _rounds(place, name) for name in names}
        last = [_json(files[-1])["info"] for files in rounds.values() if files]
        counts = [len(files) for files in rounds.values()]
        if config.get("plan", {}).get("stop_on_collapse"):  # tickets wait for one another: one far behind has stopped
            counts = [count for count in counts if count >= max(counts) - 1]
        common = min(counts, default=0)
        curve = _curve(place, names, rounds, common)
        kept = [info["kept"] for info in last] if len(last) == len(names) else []
        found.append(
            Extracting(
                str(place.parent.relative_to(folder)),
                {name: len(files) for name, files in rounds.items()},
                len(about["rounds"]) if about else None,
                1 - max(kept) / about["prunable"] if kept and about else None,
                statistics.mean(info["loss"] for info in last) if last else None,
                float(mean_to_others(curve.jaccard()[-1]).mean()) if curve is not None else None,
                alarms(curve) if curve is not None else [],
            )
        )
    return found


def retrainings(folder: Path) -> list[str]:
    """A line for each retraining that has begun, its epochs so far or its end."""
    lines = []
    for place in sorted(file.parent for file in folder.glob("**/retrain/*/config.json")):
        epochs = _json(place / "config.json").get("fit", {}).get("epochs")
        done = (place / "network.json").is_file()
        reached = [int(found[1]) for f in place.glob("*.json") if (found := re.fullmatch(r"checkpoint-(\d+)", f.stem))]
        state = "finished" if done else f"epoch {max(reached, default=0)} of {epochs} saved"
        lines.append(f"{place.relative_to(folder)}: {state}")
    return lines


def _rounds(place: Path, name: str) -> list[Path]:
    from rtl.run import slug

    return sorted((place / slug(name)).glob("round-*.json"))


def _curve(place: Path, names: Sequence[str], rounds: dict[str, list[Path]], common: int) -> Curve | None:
    """Of `common` rounds, a ticket that has fewer keeping its last masks; None for one ticket or no round.

    Padding bits count as weights here.
    """
    if len(names) < 2 or not common:
        return None
    import safetensors.torch
    import torch

    banks = []
    for number in range(common):
        files = [rounds[name][min(number, len(rounds[name]) - 1)] for name in names]
        words = [safetensors.torch.load_file(file.with_suffix(".safetensors")) for file in files]
        layers = {}
        for layer in words[0]:
            if "/" in layer:  # earlier epochs' masks, and weights, that are kept beside
                continue
            together = torch.cat([one[layer] for one in words])
            layers[layer] = rk.MaskBank(together, (together.shape[1], 32 * together.shape[2]))
        banks.append(layers)
    return Curve.of(names, banks)


def _json(file: Path) -> dict[str, Any]:
    """A file that another process may not have written yet: {} then."""
    if not file.is_file():
        return {}
    content: dict[str, Any] = json.loads(file.read_text())
    return content
