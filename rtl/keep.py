"""Results kept in another folder than their run's: the settings, tickets and media that belong to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rtl.errors import InputError
from rtl.report import FIGURE
from rtl.run import Run, write_atomically


def check_target(folders: Sequence[Path], to: Path) -> None:
    """Raise InputError if `to` is the folder of a run, whose own settings and tickets would be replaced.

    A single run may be kept where it is.
    """
    if (to / ".lock").exists() and [folder.resolve() for folder in folders] != [to.resolve()]:
        raise InputError(f"to is {str(to)!r}, a run's own folder, whose results would be replaced: give another folder")


@contextmanager
def locked(folders: Sequence[Path]) -> Iterator[None]:
    """Keep `rtl run` off those of the folders that are runs' own; kept results have no lock.

    Raises InputError if one is in use.
    """
    with ExitStack() as held:
        for folder in {folder.resolve(): folder for folder in folders}.values():
            if (folder / ".lock").exists():
                held.enter_context(Run(folder).lock())
        yield


def settings(folder: Path) -> list[Path]:
    """The configuration a folder holds: config.json, of a run, or config-NAME.json of each merged one."""
    return [file for file in (folder / "config.json", *sorted(folder.glob("config-*.json"))) if file.is_file()]


def keep(folders: Sequence[Path], main: Path, to: Path) -> None:
    """Copy runs' settings, and one run's tickets and media, to a folder that results of theirs are written to next.

    Others that it holds, beside older results, are removed when all is copied.

    Args:
        folders: of the runs. Of several, config.json becomes config-NAME.json, by the folder's name.
        main: the one of them whose tickets and media are copied.
        to: the folder.
    """
    named = _named_settings(folders)
    for name, file in named.items():
        _copy(file, to / f"{name}.json")
    new = {to / f"{name}.json" for name in named}
    places = [] if main.resolve() == to.resolve() else ["tickets", "media"]
    for place in places:
        for folder in (main / place, *_folders(main / place)):
            new |= _copy_folder(folder, to / folder.relative_to(main))
    if (to / "table.json").is_file():  # the folder is ours, and not one with tickets or media of somebody else's
        old = {*settings(to), *(file for place in places for file in (to / place).rglob("*") if file.is_file())}
        for file in sorted(old - new, key=lambda file: file.name != "tickets.json"):
            file.unlink()
        for folder in sorted((folder for place in places for folder in _folders(to / place)), reverse=True):
            if not any(folder.iterdir()):
                folder.rmdir()


def keep_figures(to: Path, drawn: set[str]) -> None:
    """Remove the figures that earlier results had, and these have not: `drawn` is what `write_results` returns."""
    for file in (to / "figures").glob("*.png"):
        if file.stem not in drawn and FIGURE.fullmatch(file.stem):
            file.unlink()


def _named_settings(folders: Sequence[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for folder in folders:
        for file in settings(folder):
            name = f"config-{folder.resolve().name}" if len(folders) > 1 and file.stem == "config" else file.stem
            while name in found:  # two folders of one name
                name += "-2"
            found[name] = file
    return found


def _copy_folder(folder: Path, to: Path) -> set[Path]:
    """Copy the files in it, but what a killed process left half written, and return the copies.

    A description never stands beside the tensors of another, as in `TicketNetwork.save_pretrained`: tickets.json goes
    before anything changes, and comes last.
    """
    files = [file for file in folder.glob("*") if file.is_file() and not file.name.startswith(".")]
    (to / "tickets.json").unlink(missing_ok=True)
    for file in sorted(files, key=lambda file: (file.name == "tickets.json", file.suffix == ".json", file.name)):
        _copy(file, to / file.name)
    return {to / file.name for file in files}


def _copy(file: Path, to: Path) -> None:
    if file.resolve() != to.resolve():
        write_atomically(to, file.read_bytes())


def _folders(folder: Path) -> list[Path]:
    return [below for below in sorted(folder.rglob("*")) if below.is_dir()]
