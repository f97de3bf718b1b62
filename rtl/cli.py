"""The command line: rtl ls | show RECIPE | run RECIPE | report RUN | enhance RUN FILE."""

import argparse
import contextlib
import dataclasses
import io
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

from rtl.errors import InputError

_DESCRIPTION = """Tickets for the subsets of your data, over one set of shared weights.

  rtl ls                list the recipes and the runs in ./runs
  rtl show RECIPE       print what a recipe does and its settings
  rtl run RECIPE        run it, or resume it; every setting is an option (rtl run RECIPE --help)
  rtl report RUN        print a finished run's table and draw its figures again
  rtl enhance RUN FILE  take the noise from a recording, with the tickets of a run of the speech recipe

example: rtl run digits --seeds 0 1 --out runs/two-seeds
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0; 1 if a worker died; 2 for bad input; 130 if interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except InputError as error:
        print(f"rtl: {error}", file=sys.stderr)
        return 2
    except (NotADirectoryError, FileExistsError, IsADirectoryError, PermissionError) as error:
        print(f"rtl: {error.strerror}: {error.filename}: give another path", file=sys.stderr)
        return 2
    except ChildProcessError as error:
        print(f"rtl: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("rtl: interrupted; the same command resumes", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone
        sys.stderr.close()
        return 141


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} ({self.prog} --help shows how)")


def _dispatch(arguments: list[str]) -> int:
    parser = _Parser(prog="rtl", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="ls | show | run | report | enhance")
    commands.add_parser("ls", help="list recipes and runs", epilog="example: rtl ls")
    show = commands.add_parser("show", help="print a recipe", epilog="example: rtl show cifar10 --protocol paper")
    show.add_argument("recipe")
    show.add_argument("--protocol", help="which of the recipe's protocols (default: its first)")
    run = commands.add_parser("run", help="run or resume a recipe", add_help=False)
    run.add_argument("recipe", nargs="?")
    report = commands.add_parser("report", help="print a run's table", epilog="example: rtl report runs/digits")
    report.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    report.add_argument("--to", type=Path, metavar="DIR", help="write all results there (default: RUN)")
    report.add_argument("--into", type=Path, metavar="FILE", help="put the table between its marks in a Markdown file")
    clean = commands.add_parser(
        "enhance",
        help="take the noise from a recording",
        epilog="example: rtl enhance runs/speech in.wav --scene outdoor -o out.wav",
    )
    clean.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run of the speech recipe")
    clean.add_argument("file", type=Path, metavar="FILE", help="a recording of any length, rate and number of channels")
    clean.add_argument("--scene", required=True, help="whose ticket to use, such as outdoor")
    clean.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="what to write: .wav or .flac")
    clean.add_argument("--sparsity", type=float, help="of the tickets (default: the lowest that the run kept)")
    # The options of `run` are the recipe's own settings, which only the recipe knows.
    own, rest = (arguments[:2], arguments[2:]) if arguments[:1] == ["run"] else (arguments, [])
    if own[:1] == ["run"] and (len(own) == 1 or own[1].startswith("-")):
        own, rest = ["run"], arguments[1:]
    options = parser.parse_args(own)
    if options.command == "ls":
        return _ls()
    if options.command == "show":
        return _show(options.recipe, options.protocol)
    if options.command == "report":
        return _report(options.run, options.to, options.into)
    if options.command == "enhance":
        return _enhance(options.run, options.file, options.scene, options.output, options.sparsity)
    return _run(options.recipe, rest)


def _ls() -> int:
    from rtl.recipes import RECIPES

    print("recipes:")
    for name, recipe in RECIPES.items():
        print(f"  {name:<10}{' '.join((recipe.__doc__ or '').split())}")
    runs = sorted(path.parent for path in Path("runs").glob("*/config.json"))
    print("runs:" if runs else "runs: none in ./runs yet; try: rtl run digits")
    for folder in runs:
        print(
            f"  {folder!s:<30}{'finished' if (folder / 'table.json').exists() else 'unfinished, run again to resume'}"
        )
    return 0


def _show(name: str, protocol: str | None) -> int:
    from rtl.recipes import RECIPES, recipe

    config = recipe(name, protocol)
    print((RECIPES[name].__doc__ or "").strip())
    for field in dataclasses.fields(config):
        print(f"  {field.name:<16}{getattr(config, field.name)}")
    return 0


def _run(name: str | None, arguments: list[str]) -> int:
    from rtl.recipes import RECIPES, load_data, recipe, run_recipe

    if name is None:
        if "-h" in arguments or "--help" in arguments:
            print("usage: rtl run RECIPE [options]\n\nRun a recipe, or resume it: finished stages are loaded.\n")
            _ls()
            print(
                "\nrtl run RECIPE --help lists its settings\nexample: rtl run digits --seeds 0 1 --out runs/two-seeds"
            )
            return 0
        raise InputError(f"no recipe is given, expected one of {', '.join(RECIPES)}: for example rtl run digits")
    import tyro

    from rtl.report import environment, write_results
    from rtl.run import Run

    # The protocol chooses the settings that the other options then change.
    base = recipe(name, _value_of("--protocol", arguments))

    Settings = TypeVar("Settings")

    @dataclasses.dataclass(frozen=True)
    class Options(Generic[Settings]):
        """Run a recipe, or resume it: finished stages are loaded."""

        config: tyro.conf.OmitArgPrefixes[Settings]
        out: Path | None = None
        """Folder of the run (default: runs/RECIPE, with the protocol if it is not the first)."""
        data: Path | None = None
        """Data root (default: the environment variable RTL_DATA; inr: scikit-learn's photographs)."""
        workers: int | None = None
        """Worker processes (default: one a core)."""

    about = f"{(RECIPES[name].__doc__ or '').strip()}\n\nexample: rtl run {name} --seeds 0 1 --out runs/mine"
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            kind: Any = Options
            options = tyro.cli(
                kind[type(base)], prog=f"rtl run {name}", description=about, args=arguments, default=Options(base)
            )
    except SystemExit as stop:
        if stop.code in (0, None):  # --help
            return 0
        raise InputError(f"{_one_line(said.getvalue())} (rtl run {name} --help lists the options)") from None
    config = options.config
    if config.recipe != name:
        raise InputError(f"recipe is {config.recipe!r}, but rtl run {name} runs {name!r}: leave --recipe out")
    first = RECIPES[name]().protocol
    out = options.out or Path("runs") / (name if config.protocol == first else f"{name}-{config.protocol}")
    run = Run(out, workers=options.workers)
    data = load_data(config, options.data)
    with run.lock():
        rows, details = run_recipe(config, run, data)
        table: dict[str, Any] = {
            "recipe": name,
            "command": shlex.join(["rtl", "run", name, *_what(arguments)]),
            "environment": environment(),
            "rows": rows,
        }
        write_results(out, table, details)
    _print_table(rows)
    print(f"table, figures and every stage: {out}")
    return 0


def _one_line(message: str) -> str:
    """What tyro said, without the box it draws around it, its headings and its advice."""
    words = " ".join(re.sub(r"[\u2500-\u257f]", " ", message).split())
    words = re.sub(r"( Argument helptext:.*)? For full helptext.*", "", words)
    return re.sub(r"^(Unrecognized options (?=Unr)|Invalid choice |Value error |Error parsing config: )+", "", words)


def _what(arguments: Sequence[str]) -> list[str]:
    """The arguments without those that say where and how fast, which nobody else's machine shares."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--out", "--data", "--workers"):
        parser.add_argument(option)
    return parser.parse_known_args(list(arguments))[1]


def _value_of(option: str, arguments: Sequence[str]) -> str | None:
    """The value `option` is given among arguments that another parser reads."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument(option, dest="value", nargs="?")
    value: str | None = peek.parse_known_args(list(arguments))[0].value
    return value


def _report(folder: Path, to: Path | None, into: Path | None) -> int:
    from rtl.report import read_results, write_into, write_results
    from rtl.run import write_atomically

    table, details = read_results(folder)
    if to is not None:
        for file in sorted(f for name in ("config.json", "tickets/*/*", "examples/*/*") for f in folder.glob(name)):
            write_atomically(to / file.relative_to(folder), file.read_bytes())
    write_results(to or folder, table, details)
    if into is not None:
        write_into(into, table)
    print(table["command"])
    print(json.dumps(table["environment"]))
    _print_table(table["rows"])
    print(f"written to {to or folder}")
    return 0


def _enhance(run: Path, file: Path, scene: str, output: Path, sparsity: float | None) -> int:
    from rtl.enhance import enhance, load_network
    from rtl.progress import Progress

    net = load_network(run, sparsity)
    gain = enhance(net, scene, file, output, Progress())
    turned = "" if gain == 1 else f", turned down to {gain:.2f} of its volume so that nothing is clipped"
    print(f"{output}: {file} by the ticket {scene!r} at {net.sparsity:.0%} sparsity{turned}")
    return 0


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from rtl.report import summary

    lines, console = summary(rows), Console()
    width = console.width if console.is_terminal else 200  # a pipe or a file has room for all columns
    for number, columns in enumerate(_blocks(lines, width)):
        table = Table(title=None if number else "mean ± standard deviation over seeds")
        for column in columns:
            table.add_column(lines[0][column], justify="right" if column else "left", no_wrap=True)
        for line in lines[1:]:
            table.add_row(*(line[column] for column in columns))
        Console(width=width).print(table)


def _blocks(lines: Sequence[Sequence[str]], width: int) -> list[list[int]]:
    """Columns of the tables, each at most `width` wide where that can be, that show all of `lines` one below another.

    Each begins with the first two columns, which say what a line is of.
    """
    takes = [max(len(line[column]) for line in lines) + 3 for column in range(len(lines[0]))]
    blocks: list[list[int]] = []
    for column in range(2, len(takes)):
        if not blocks or sum(takes[c] for c in [*blocks[-1], column]) + 1 > width:
            blocks.append([0, 1])
        blocks[-1].append(column)
    return blocks


if __name__ == "__main__":
    sys.exit(main())
