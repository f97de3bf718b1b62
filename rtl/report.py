"""Results as tables: rows of table.json (DESIGN's schema) to a summary over seeds, printed and as Markdown."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtl.errors import InputError
from rtl.run import write_atomically

if TYPE_CHECKING:
    from torch import Tensor

    from rtl.curve import Curve

NAMES = {"rtl": "RTL", "imp_single": "IMP single", "imp_multiple": "IMP multiple", "dense": "dense"}

Row = Mapping[str, Any]
# Heading, and what it reads from a row.
COLUMNS: tuple[tuple[str, str], ...] = (
    ("BA thr.", "balanced_accuracy.threshold"),
    ("prec. thr.", "precision.threshold"),
    ("recall thr.", "recall.threshold"),
    ("BA argmax", "balanced_accuracy.argmax"),
    ("accuracy", "accuracy"),
    ("similarity", "similarity"),
)


def environment() -> dict[str, Any]:
    """The machine and the versions a result was made with."""
    import torch

    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": torch.multiprocessing.cpu_count(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def summary(rows: Iterable[Row]) -> list[list[str]]:
    """One line for each method, variant and sparsity, mean ± standard deviation over seeds, below a heading."""
    groups: dict[tuple[str, str, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["variant"], row["sparsity"]), []).append(row)
    lines = [["method", "sparsity", *(heading for heading, _ in COLUMNS), "#Params", "samples", "seconds"]]
    for (method, variant, sparsity), group in groups.items():
        name = NAMES[method] + (f" ({variant})" if variant else "")
        cells = [_spread([row["metrics"][key] for row in group if key in row["metrics"]]) for _, key in COLUMNS]
        counts = [f"{statistics.mean(row[key] for row in group):,.0f}" for key in ("params", "samples", "seconds")]
        lines.append([name, f"{sparsity:.0%}", *cells, *counts])
    return lines


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all but the first column are figures, set to the right."""
    head, *body = lines
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, rule, *body])


def write_results(folder: str | Path, table: Mapping[str, Any], details: Mapping[str, Any]) -> None:
    """Write figures/*.png, table.md, details.json and, last, table.json of a run to a folder, each whole or not at all.

    A folder that holds a table.json holds all of them.
    """
    from rtl import plots
    from rtl.alignment import Alignment
    from rtl.collapse import Alarm
    from rtl.curve import Curve
    from rtl.diagnose import Similarity

    folder = Path(folder)
    figures = folder / "figures"
    shown = {"balanced_accuracy.threshold": "balanced accuracy, score ≥ ½", "accuracy": "accuracy, argmax"}
    plots.save(plots.metric_against_sparsity(table["rows"], shown), figures / "metric.png")
    if "curve" in details:
        curve, found = Curve.from_json(details["curve"]), [Alarm(**alarm) for alarm in details["alarms"]]
        plots.save(plots.similarity_against_sparsity(curve, found), figures / "similarity.png")
        if "alignment" in details:
            aligned = Alignment.from_json(details["alignment"])
            plots.save(plots.semantic_alignment(curve, aligned), figures / "alignment.png")
    for level, values in details.get("similarity", {}).items():
        plots.save(
            plots.similarity_by_depth(Similarity.from_json(values), float(level)),
            figures / f"similarity-by-depth-{level}.png",
        )
    write_atomically(folder / "table.md", markdown(summary(table["rows"])).encode())
    for name, content in (("details.json", details), ("table.json", table)):
        write_atomically(folder / name, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def read_results(folder: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """table.json and details.json of a finished run. Raises InputError if they are not there.

    Where the details hold no curve, it is that of the masks in `tickets/`, if there are any.
    """
    try:
        table, details = (json.loads((Path(folder) / f"{name}.json").read_text()) for name in ("table", "details"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"run is {str(folder)!r}, which holds no finished results ({error}): finish `rtl run`"
        ) from error
    if "curve" not in details:
        curve = _curve_of_tickets(Path(folder) / "tickets")
        if curve is not None:
            details |= insights(curve)
    return table, details


def insights(curve: Curve, semantic: Tensor | None = None) -> dict[str, Any]:
    """What details.json says of the masks' similarity: the "curve", its "alarms", and its "alignment" with meaning.

    Args:
        curve: of one seed's tickets.
        semantic: (K, K); None: the package's table, where it knows the tickets' names, else there is no alignment.
    """
    from rtl import semantics
    from rtl.alignment import alignment
    from rtl.collapse import alarms

    found: dict[str, Any] = {"curve": curve.to_json(), "alarms": [alarm.to_json() for alarm in alarms(curve)]}
    if semantic is None:
        semantic = semantics.known(curve.names)
    if semantic is not None and len(curve.names) > 2:
        found["alignment"] = alignment(curve, semantic).to_json()
    return found


def _curve_of_tickets(folder: Path) -> Curve | None:
    from rtl.curve import Curve
    from rtl.tickets import TicketNetwork

    levels = sorted((path.parent for path in folder.glob("*/tickets.json")), key=lambda path: float(path.name))
    nets = [TicketNetwork.from_pretrained(level) for level in levels]
    return Curve.of(nets[0].names, [net.net.banks for net in nets]) if nets else None


def write_into(document: Path, table: Mapping[str, Any]) -> None:
    """Replace the table between `<!-- table: RECIPE -->` and `<!-- end -->` in a document by a run's.

    Raises InputError if the document has no such place.
    """
    begin, end = f"<!-- table: {table['recipe']} -->\n", "<!-- end -->"
    before, mark, after = document.read_text().partition(begin)
    if not mark or end not in after:
        raise InputError(f"document is {str(document)!r}, which has no line {begin.strip()!r} with an {end!r} after it")
    after = after[after.index(end) :]
    write_atomically(document, (before + begin + markdown(summary(table["rows"])) + after).encode())
