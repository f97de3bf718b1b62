"""The command line: rtl ls | show RECIPE | run RECIPE | watch RUN | report RUN... | predict RUN FILE... | enhance."""

import argparse
import contextlib
import dataclasses
import errno
import io
import json
import re
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

from rtl.errors import InputError
from rtl.workers import keep_freed_memory

_DESCRIPTION = """Tickets for the subsets of your data, over one set of shared weights.

  rtl ls                list the recipes and the runs in ./runs
  rtl show RECIPE       print what a recipe does and its settings
  rtl run RECIPE        run it, or resume it; every setting is an option (rtl run RECIPE --help)
  rtl watch RUN         follow a run from another terminal
  rtl report RUN [RUN]  print finished runs' tables, write report.html: a page to look at, runs side by side
  rtl predict RUN FILE  route files to tickets and let them answer
  rtl enhance RUN FILE  take the noise from a recording, with the tickets of a run of the speech recipe

example: rtl run digits --seeds 0 1 --out runs/two-seeds
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0; 1 if a worker died or a disk is full; 2 for bad input; 130 if
    interrupted; 141 if nobody reads what it prints."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None:  # the process is the command's own
        keep_freed_memory()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
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
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"rtl: {error.strerror}: make room, and give the same command again", file=sys.stderr)
        return 1


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    """Our own warnings in one line, without the code that gave them; others as Python shows them."""
    ours = category.__module__.startswith("rtl.")
    text = f"rtl: warning: {message}\n" if ours else warnings.formatwarning(message, category, filename, lineno, line)
    (file or sys.stderr).write(text)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} ({self.prog} --help shows how)")


def _dispatch(arguments: list[str]) -> int:
    parser = _Parser(prog="rtl", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="ls | show | run | watch | report | predict | enhance"
    )
    commands.add_parser("ls", help="list recipes and runs", epilog="example: rtl ls")
    show = commands.add_parser("show", help="print a recipe", epilog="example: rtl show cifar10 --protocol paper")
    show.add_argument("recipe")
    show.add_argument("--protocol", help="which of the recipe's protocols (default: its first)")
    run = commands.add_parser("run", help="run or resume a recipe", add_help=False)
    run.add_argument("recipe", nargs="?")
    report = commands.add_parser(
        "report",
        help="print runs' tables and write report.html",
        description="Print each run's table, draw its figures again, and write one page about all, report.html.",
        epilog="example: rtl report runs/digits runs/mine --to runs/both",
    )
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a finished run")
    report.add_argument(
        "--merge",
        action="store_true",
        help="make one run's results of several runs of a recipe, in --to, with the tickets of the first that has any: "
        "rtl report runs/quick runs/paper --merge --to results/cifar10",
    )
    report.add_argument(
        "--to",
        type=Path,
        metavar="DIR",
        help="write there: of one run, or merged, everything to keep (table, figures, page, tickets), in place of what "
        "was kept there before; of several the page (default: the first RUN)",
    )
    report.add_argument(
        "--into",
        type=Path,
        metavar="FILE",
        help="put the tables in a Markdown file, between its lines <!-- table: RECIPE --> and <!-- end -->, and the "
        "comparisons with the paper below <!-- published: RECIPE -->",
    )
    report.add_argument(
        "--semantics",
        type=Path,
        metavar="PATH",
        help="meaning of the tickets' names, to set sharing against: a WordNet folder, or JSON with names and a matrix "
        "or an embedding (default: WordNet for CIFAR-10's classes)",
    )
    watch = commands.add_parser("watch", help="follow a run", epilog="example: rtl watch runs/digits")
    watch.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    watch.add_argument("--every", type=float, default=5.0, metavar="SECONDS", help="between two looks (default: 5)")
    watch.add_argument("--once", action="store_true", help="look once")
    predict = commands.add_parser(
        "predict",
        help="route files to tickets and let them answer",
        epilog="example: rtl predict runs/digits seven.png more.npy --by centroid",
    )
    predict.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    predict.add_argument("files", type=Path, nargs="+", metavar="FILE", help="picture, or .npy of a sample or several")
    predict.add_argument("--sparsity", type=float, help="which of the run's tickets (default: the least sparse)")
    predict.add_argument(
        "--by",
        default="confidence",
        metavar="ROUTER",
        help="confidence (default), centroid, or a ticket's name: the context of all files",
    )
    predict.add_argument("--resize", action="store_true", help="bring pictures to the size of the run's samples")
    predict.add_argument("--json", action="store_true", help="print JSON instead of a table")
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
        return _report(options.runs, options.merge, options.to, options.into, options.semantics)
    if options.command == "watch":
        from rtl.watch import watch as follow

        return follow(options.run, options.every, options.once)
    if options.command == "predict":
        return _predict(options)
    if options.command == "enhance":
        return _enhance(options.run, options.file, options.scene, options.output, options.sparsity)
    return _run(options.recipe, rest)


def _ls() -> int:
    from rtl.recipes import RECIPES

    print("recipes:")
    width = max(map(len, RECIPES)) + 2
    for name, recipe in RECIPES.items():
        print(f"  {name:<{width}}{' '.join((recipe.__doc__ or '').split())}")
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

    from rtl.page import write_page
    from rtl.report import environment, read_results, write_results
    from rtl.run import Run
    from rtl.wall import Wall

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
        """Data root (default: the folder that RTL_DATA names; inr: none, but scikit-learn's photographs)."""
        workers: int | None = None
        """Worker processes (default: one a core)."""
        tensorboard: bool = False
        """Also write curves and pictures for TensorBoard to OUT/tensorboard (needs 'rtl-kernels[tensorboard]')."""

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
    with run.lock(), _board(out / "tensorboard" if options.tensorboard else None) as board:
        with Wall(out) as wall:
            run.progress.listen(wall.event)
            rows, details = run_recipe(config, run, data, board)
        table: dict[str, Any] = {
            "recipe": name,
            "command": shlex.join(["rtl", "run", name, *_what(arguments)]),
            "environment": environment(),
            **wall.figures(run.workers),
            "rows": rows,
        }
        if (out / "table.json").exists() and _numbers(before := read_results(out)[0]) == _numbers(table):
            wall.forget()  # nothing was computed now
            table |= {key: before[key] for key in ("environment", "wall", "resumed", "workers") if key in before}
        write_results(out, table, details)
        write_page([out], out / "report.html")
    _print_table(table)
    print(f"to look at: {out / 'report.html'}\ntable, figures and every stage: {out}")
    return 0


def _numbers(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows without what they are called: that may change with what a recipe's own settings are."""
    return [{key: value for key, value in row.items() if key != "variant"} for row in table["rows"]]


def _board(folder: Path | None) -> contextlib.AbstractContextManager[Any]:
    from rtl.tensorboard import Board

    return contextlib.nullcontext() if folder is None else Board(folder)


def _one_line(message: str) -> str:
    """What tyro said, without the box it draws around it, its headings and its advice."""
    words = " ".join(re.sub(r"[\u2500-\u257f]", " ", message).split())
    words = re.sub(r"( Argument helptext:.*)? For full helptext.*", "", words)
    return re.sub(r"^(Unrecognized options (?=Unr)|Invalid choice |Value error |Error parsing config: )+", "", words)


def _what(arguments: Sequence[str]) -> list[str]:
    """The arguments without those that say where and how fast, which nobody else's machine shares.

    Of what is read from files, that it is: the data root as DIR (without it, a recipe may take other data), a picture
    and its mask by their names.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--out", "--data", "--workers", "--image", "--mask"):
        parser.add_argument(option)
    for option in ("--tensorboard", "--no-tensorboard"):
        parser.add_argument(option, action="store_true")
    own, rest = parser.parse_known_args(list(arguments))
    files = {"--data": own.data and "DIR", "--image": own.image, "--mask": own.mask}
    return [*(word for option, file in files.items() if file for word in (option, Path(file).name)), *rest]


def _value_of(option: str, arguments: Sequence[str]) -> str | None:
    """The value `option` is given among arguments that another parser reads."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument(option, dest="value", nargs="?")
    value: str | None = peek.parse_known_args(list(arguments))[0].value
    return value


def _report(folders: Sequence[Path], merge: bool, to: Path | None, into: Path | None, semantics: Path | None) -> int:
    from rtl.keep import check_target, keep, keep_figures, locked
    from rtl.page import write_page
    from rtl.report import (
        check_document,
        main_run,
        merged,
        read_results,
        with_semantics,
        write_into,
        write_results,
    )

    if merge and to is None:
        raise InputError(f"merge makes one run of {len(folders)}, which needs a folder: give --to DIR")
    whole = to if merge or len(folders) == 1 else None
    if whole is not None:
        check_target(folders, whole)
    with locked(folders if whole is None else [whole]):
        found = [read_results(folder) for folder in folders]
        shown = folders[main_run(found)]
        if merge:
            found = [merged(found)]
        if semantics is not None:
            found = [(table, with_semantics(details, semantics)) for table, details in found]
        if into is not None:
            for mark in check_document(into, [table for table, _ in found]):
                said = f"{into} has no line {mark!r}, with '<!-- end -->' below it, for the comparison with the paper"
                print(f"rtl: {said}", file=sys.stderr)
        if whole is not None:
            keep(folders, shown, whole)
        for folder, (table, details) in zip(folders, found, strict=False):  # merged, there is one
            drawn = write_results(whole or folder, table, details)
            if whole is not None and whole.resolve() != shown.resolve():
                keep_figures(whole, drawn)
            if into is not None:
                write_into(into, table)
            print(table["command"])
            print(json.dumps(table["environment"]))
            _print_table(table)
        page = (to or folders[0]) / "report.html"
        write_page([whole] if whole is not None else folders, page)
    print(f"written: {page}{', with table and figures beside it' if len(found) == 1 else ''}")
    return 0


def _enhance(run: Path, file: Path, scene: str, output: Path, sparsity: float | None) -> int:
    from rtl.enhance import enhance, load_network
    from rtl.progress import Progress

    net = load_network(run, sparsity)
    gain = enhance(net, scene, file, output, Progress())
    turned = "" if gain == 1 else f", turned down to {gain:.2f} of its volume so that nothing is clipped"
    print(f"{output}: {file} by the ticket {scene!r} at {net.sparsity:.0%} sparsity{turned}")
    return 0


def _predict(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from rtl.predict import predict

    rows = predict(options.run, options.files, options.sparsity, options.by, options.resize)
    if options.json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return 0
    table = Table()
    for heading in ("sample", "ticket", "probability", "answer", "score"):
        table.add_column(heading, justify="right" if heading in ("probability", "score") else "left")
    for row in rows:
        table.add_row(row["sample"], row["ticket"], f"{row['probability']:.3f}", row["answer"], f"{row['score']:.3f}")
    Console(markup=False, emoji=False).print(table)  # files are named as they please
    return 0


def _print_table(results: dict[str, Any]) -> None:
    from rtl.report import beside_published, remarks, summary, took

    _print_lines("mean ± standard deviation over seeds", summary(results["rows"]))
    if took(results):
        print(took(results))
    compared = beside_published(results)
    if compared:
        _print_lines("beside the paper" + (", under its decision rule" if "rule" in compared[0] else ""), compared)
        for said in remarks(results):
            print(said)


def _print_lines(title: str, lines: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    width = console.width if console.is_terminal else 200  # a pipe or a file has room for all columns
    for number, columns in enumerate(_blocks(lines, width)):
        table = Table(title=None if number else title)
        for column in columns:
            table.add_column(lines[0][column], justify="right" if column else "left", no_wrap=True)
        for line in lines[1:]:
            table.add_row(*(line[column] for column in columns))
        Console(width=width, markup=False, emoji=False).print(table)


def _blocks(lines: Sequence[Sequence[str]], width: int) -> list[list[int]]:
    """Columns of the tables, each at most `width` wide where that can be, that show all of `lines` one below another.

    Each begins with the first three columns, which say what a line is of.
    """
    takes = [max(len(line[column]) for line in lines) + 3 for column in range(len(lines[0]))]
    blocks: list[list[int]] = []
    for column in range(3, len(takes)):
        if not blocks or sum(takes[c] for c in [*blocks[-1], column]) + 1 > width:
            blocks.append([0, 1, 2])
        blocks[-1].append(column)
    return blocks


if __name__ == "__main__":
    sys.exit(main())
