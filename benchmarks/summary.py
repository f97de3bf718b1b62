"""From pytest-benchmark's JSON to summary.json and a table: printed, or written into the README.

python -m benchmarks.summary [--results DIR] [--into FILE [--mark NAME]]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES
from rtl.errors import InputError
from rtl.report import markdown, replace_between
from rtl.run import write_atomically

RESULTS = Path(__file__).parent / "results"
MARK = "benchmarks"

Report = Mapping[str, Any]
Row = Mapping[str, Any]

_EXAMPLE = """example:
  $ python -m benchmarks.summary --into README.md
  writes the table of benchmarks/results/summary.json between its marks in README.md"""


def summarise(
    reports: Iterable[Report], command: str, peaks: Mapping[str, Any] | str, unfinished: str | None = None
) -> dict[str, Any]:
    """One row a measurement: its median over dense's median of the same interleaved rounds.

    Args:
        reports: pytest-benchmark's JSON, with extra_info as harness.measure leaves it.
        command: what made them.
        peaks: what roofline.measure gave, or why there is nothing.
        unfinished: what is missing, while the measurement goes on.

    Returns:
        {"rows": [{"case", "sparsity", "threads", "contender", "mode", "ratio_to_dense", "low", "high", "seconds"}],
        "skipped": [{"case", "sparsity", "threads", "contender", "mode", "reason"}], "command", "date", "environment",
        "commit", "peaks"}, and "unfinished" where it is; low and high are quartiles of the contender's times over
        dense's median.
    """
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    reports = list(reports)
    for report in reports:
        for info in (entry["extra_info"] for entry in report["benchmarks"]):
            where = {key: info[key] for key in ("case", "sparsity", "threads", "mode")}
            dense = info["contenders"]["dense"]["median"]
            for name, timing in info["contenders"].items():
                ratios = {
                    "ratio_to_dense": round(timing["median"] / dense, 4),
                    "low": round(timing["low"] / dense, 4),
                    "high": round(timing["high"] / dense, 4),
                }
                rows.append({**where, "contender": name, **ratios, "seconds": float(f"{timing['median']:.4g}")})
            skipped += [{**where, "contender": name, "reason": reason} for name, reason in info["skipped"].items()]
    return ({} if unfinished is None else {"unfinished": unfinished}) | {
        "command": command,
        "date": reports[0]["datetime"][:10],
        "environment": {key: value for key, value in reports[0]["machine_info"].items() if key != "threads"},
        "commit": reports[0]["commit_info"],
        "peaks": peaks,
        "rows": rows,
        "skipped": skipped,
    }


def table(summary: Mapping[str, Any]) -> list[list[str]]:
    """Heading and lines: dense in time, everybody else in units of it, one line a case, mode and number of threads.

    Ours at every sparsity, ± half the distance of the quartiles; the others' range over the sparsities. The last column
    names every contender that was faster than ours, and where. Where all nine cases are there, so is their geometric
    mean.
    """
    rows = summary["rows"]
    sparsities = sorted({row["sparsity"] for row in rows})
    others = [name for name in dict.fromkeys(row["contender"] for row in rows) if name not in ("dense", "ours")]
    head = ["case", "pass", "dense", *(f"ours {s:.0%}" for s in sparsities), *others, "faster than ours"]
    lines = [head]
    for (mode, threads), section in _grouped(rows, "mode", "threads").items():
        label = f"{mode}, {threads} thread{'s' * (threads > 1)}"
        cases = _grouped(section, "case")
        for (case,), group in cases.items():
            lines.append([case, label, *_line(group, sparsities, others)])
        if all((name,) in cases for name in CASES):
            nine = [row for row in section if row["case"] in CASES]
            lines.append(["**geometric mean of the nine**", label, *_line(_means(nine), sparsities, others)])
    return lines


def _grouped(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def _means(rows: Sequence[Row]) -> list[Row]:
    """Geometric means over cases, of those contenders and sparsities that have every case."""
    count = len({row["case"] for row in rows})
    return [
        {
            "contender": contender,
            "sparsity": sparsity,
            "ratio_to_dense": math.exp(statistics.fmean(math.log(row["ratio_to_dense"]) for row in group)),
        }
        for (contender, sparsity), group in _grouped(rows, "contender", "sparsity").items()
        if len(group) == count
    ]


def _line(rows: Sequence[Row], sparsities: Sequence[float], others: Sequence[str]) -> list[str]:
    by = {(row["contender"], row["sparsity"]): row for row in rows}
    seconds = [row["seconds"] for row in rows if row["contender"] == "dense" and "seconds" in row]
    cells = [_time(statistics.median(seconds)) if seconds else ""]
    for sparsity in sparsities:
        row = by.get(("ours", sparsity))
        spread = f" ± {(row['high'] - row['low']) / 2:.2f}" if row and "high" in row else ""
        cells.append(f"{row['ratio_to_dense']:.2f}{spread}" if row else "–")
    for name in others:
        cells.append(_range([row["ratio_to_dense"] for row in rows if row["contender"] == name]))
    faster = []
    for name in ("dense", *(name for name in others if not name.startswith("ours"))):
        where = [
            f"{s:.0%}"
            for s in sparsities
            if (name, s) in by and ("ours", s) in by and by[name, s]["ratio_to_dense"] < by["ours", s]["ratio_to_dense"]
        ]
        if where:
            faster.append(f"{name} at {', '.join(where)}")
    return [*cells, "; ".join(faster) or "none"]


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def _range(ratios: Sequence[float]) -> str:
    if not ratios:
        return "–"
    low, high = (f"{r:.0f}" if r >= 10 else f"{r:.2g}" for r in (min(ratios), max(ratios)))
    return low if low == high else f"{low}–{high}"


def section(summary: Mapping[str, Any]) -> str:
    """The table as Markdown, with what it was measured on above and why something is missing below."""
    environment = summary["environment"]
    text = (
        f"`{summary['command']}`, {summary['date']}, {environment['processor']} ({environment['instructions']}, "
        f"{environment['cores']} cores), torch {environment['torch']}, Python {environment['python']}:\n\n"
        f"{markdown(table(summary))}"
    )
    if "unfinished" in summary:
        text = f"**Unfinished: {summary['unfinished']}.** {text}"
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in summary["skipped"]:
        cases = reasons.setdefault((row["contender"], row["reason"]), [])
        if row["case"] not in cases:
            cases.append(row["case"])
    if reasons:
        text += "\nNot measured (–):\n\n"
        for (contender, reason), cases in reasons.items():
            named = f" ({'; '.join(cases)})" if len(cases) < 3 else ""
            text += f"* {contender}: {reason}{named}\n"
    return text


def show(summary: Mapping[str, Any]) -> None:
    """Print the table: with lines and colours on a terminal, as Markdown elsewhere."""
    if not sys.stdout.isatty():
        print(section(summary), end="")
        return
    from rich.console import Console
    from rich.table import Table

    head, *lines = table(summary)
    unfinished = f"; unfinished: {summary['unfinished']}" if "unfinished" in summary else ""
    shown = Table(caption=f"{summary['command']}: times over dense's; {summary['date']}{unfinished}")
    for number, name in enumerate(head):
        shown.add_column(name, justify="left" if number in (0, 1, len(head) - 1) else "right")
    for line in lines:
        shown.add_row(*(cell.replace("**", "") for cell in line), style="bold" if line[0].startswith("**") else None)
    Console().print(shown)


def write_results(folder: Path, reports: Mapping[str, Report], summary: Mapping[str, Any]) -> None:
    """Write NAME.json for every report and, last, summary.json, each whole or not at all."""
    for name, report in reports.items():
        write_atomically(folder / f"{name}.json", _json(report))
    write_atomically(folder / "summary.json", _json(summary))


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def read_summary(folder: Path) -> dict[str, Any]:
    """summary.json of a folder. Raises InputError if it is not there."""
    try:
        summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"results is {str(folder)!r}, which holds no summary ({error}): run python -m benchmarks"
        ) from error
    return summary


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.summary",
        description="Print the table of a finished benchmark, or write it into a document.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="DIR", help="default: results beside this file"
    )
    parser.add_argument("--into", type=Path, metavar="FILE", help="write it between <!-- NAME --> and <!-- end -->")
    parser.add_argument("--mark", default=MARK, metavar="NAME", help=f"default: {MARK}")
    options = parser.parse_args(arguments)
    try:
        summary = read_summary(options.results)
        if options.into is None:
            show(summary)
        else:
            replace_between(options.into, options.mark, section(summary))
    except (InputError, OSError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
