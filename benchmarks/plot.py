"""Figures of a finished benchmark: `python -m benchmarks.plot`.

ratio-MODE-THREADS.png: time over dense's against sparsity, a panel for each of the nine cases. roofline.png: what the
cases reach on one thread, under what one core can do at most (benchmarks/roofline.py, measured in the same run).
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.cases import CASES
from benchmarks.contenders import CONTENDERS
from benchmarks.roofline import work
from benchmarks.summary import RESULTS, read_summary
from rtl.errors import InputError
from rtl.plots import save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_EXAMPLE = """example:
  $ python -m benchmarks.plot
  draws benchmarks/results/summary.json, beside it"""

# Ours stands out; the rest are told apart by colour (Okabe–Ito) and marker.
STYLES = {
    "ours": ("#0072B2", "o"),
    "ours + route": ("#56B4E9", "o"),
    "loop": ("#D55E00", "s"),
    "loop, cached": ("#D55E00", "D"),
    "compiled loop": ("#E69F00", "P"),
    "untied": ("#009E73", "^"),
    "grouped conv": ("#CC79A7", "v"),
    "CSR": ("#000000", "x"),
    "gathered bmm": ("#999999", "<"),
    "vmap": ("#999999", ">"),
}
ROOFLINE_SPARSITIES = (0.5, 0.9)


def ratio_against_sparsity(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """A panel a case; a line a contender, ours with the distance between its quartiles shaded. Logarithmic."""
    import matplotlib.pyplot as plt

    columns = 3
    figure, axes = plt.subplots(
        -(-len(CASES) // columns), columns, figsize=(11, 9.5), sharex=True, sharey=True, layout="constrained"
    )
    shown: dict[str, Any] = {}
    for axis, case in zip(axes.flat, CASES, strict=True):
        axis.axhline(1, color="#555555", linestyle="--", linewidth=1)
        for name in CONTENDERS:
            points = sorted(
                (row for row in rows if row["case"] == case and row["contender"] == name), key=lambda r: r["sparsity"]
            )
            if name == "dense" or not points:
                continue
            colour, marker = STYLES[name]
            x = [row["sparsity"] for row in points]
            (shown[name],) = axis.plot(
                x,
                [row["ratio_to_dense"] for row in points],
                color=colour,
                marker=marker,
                markersize=5,
                linewidth=2.2 if name == "ours" else 1,
                linestyle="-" if name in ("ours", "CSR") else ":",
                zorder=3 if name == "ours" else 2,
            )
            if name == "ours":
                low, high = [row["low"] for row in points], [row["high"] for row in points]
                axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        axis.set_title(case, fontsize=9)
        _ratio_axis(axis)
    for axis in axes[-1]:
        axis.set_xlabel("sparsity of each mask")
    for axis in axes[:, 0]:
        axis.set_ylabel("time / dense")
    figure.suptitle(title, fontsize=11)
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=min(len(shown), 6), fontsize=9)
    return figure


def _ratio_axis(axis: Axes) -> None:
    axis.set_yscale("log")
    axis.set_yticks([0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100])
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.minorticks_off()
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.set_xticks([0.25, 0.5, 0.75, 0.9])
    axis.grid(alpha=0.25)


def roofline(rows: Sequence[Mapping[str, Any]], peaks: Mapping[str, Any]) -> Figure:
    """Operations a second against operations a byte, of inference on one thread.

    Operations are those of weights that are kept, bytes input, weight and output once each: ours moves to the left and,
    where it skips what dense multiplies by zero, stays as high.
    """
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8.5, 6), layout="constrained")
    intensity = np.logspace(-1, 3, 200)
    for (level, bandwidth), style in zip(peaks["bandwidth"].items(), itertools.cycle(["-", "--", "-.", ":"])):
        roof = np.minimum(peaks["flops"], bandwidth * intensity) / 1e9
        axis.plot(intensity, roof, style, color="#777777", linewidth=1, label=f"{level}, {bandwidth / 1e9:.0f} GB/s")
    axis.text(1000, peaks["flops"] / 1e9 * 1.06, f"peak {peaks['flops'] / 1e9:.0f} GFLOP/s", fontsize=8, ha="right")
    colours = plt.get_cmap("tab10")
    for number, (name, case) in enumerate(CASES.items()):
        operations, moved = work(case)
        for contender, sparsity, marker in (
            ("dense", ROOFLINE_SPARSITIES[0], "s"),
            *(("ours", s, m) for s, m in zip(ROOFLINE_SPARSITIES, "ov", strict=True)),
        ):
            found = [
                row["seconds"]
                for row in rows
                if (row["case"], row["contender"], row["sparsity"]) == (name, contender, sparsity)
            ]
            kept = operations * (1 if contender == "dense" else 1 - sparsity)
            for seconds in found:
                axis.plot(kept / moved, kept / seconds / 1e9, marker, color=colours(number), markersize=6)
        axis.plot([], [], "o", color=colours(number), label=name)
    for label, marker in (
        ("dense", "s"),
        *((f"ours, {s:.0%}", m) for s, m in zip(ROOFLINE_SPARSITIES, "ov", strict=True)),
    ):
        axis.plot([], [], marker, color="#333333", label=label)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(0.1, 1000)
    axis.set_xlabel("operations of kept weights / bytes of input, weight and output")
    axis.set_ylabel("GFLOP/s of kept weights, one thread")
    axis.legend(fontsize=7, loc="lower right")
    axis.grid(alpha=0.25)
    return figure


def draw(summary: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the figures there are rows for, each whole or not at all, and say where."""
    import matplotlib

    matplotlib.use("Agg")
    rows = [row for row in summary["rows"] if row["case"] in CASES]
    files = []
    for mode, threads in dict.fromkeys((row["mode"], row["threads"]) for row in rows):
        chosen = [row for row in rows if (row["mode"], row["threads"]) == (mode, threads)]
        plural = "s" * (threads > 1)
        title = f"{mode}, {threads} thread{plural}, {summary['environment']['processor']}, {summary['date']}"
        files.append(folder / f"ratio-{mode}-{threads}.png")
        save(ratio_against_sparsity(chosen, title), files[-1])
    single = [row for row in rows if (row["mode"], row["threads"]) == ("inference", 1)]
    if single and isinstance(summary["peaks"], Mapping):
        files.append(folder / "roofline.png")
        save(roofline(single, summary["peaks"]), files[-1])
    return files


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plot",
        description=__doc__.split("\n\n")[1],
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="DIR", help="default: results beside this file"
    )
    options = parser.parse_args(arguments)
    try:
        for file in draw(read_summary(options.results), options.results):
            print(file)
    except (InputError, OSError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
