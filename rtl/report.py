"""Results as tables: rows of table.json (DESIGN's schema) to a summary over seeds, printed and as Markdown."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rtl.errors import InputError
from rtl.run import write_atomically

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
    """The day, the machine and the versions a result was made with."""
    import torch

    return {
        "date": datetime.date.today().isoformat(),
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
    """One line for each method, variant, protocol and sparsity, mean ± standard deviation over seeds, below a heading.

    "seconds" are those of every worker process (one thread each), added up; "samples/s" are samples presented in one of
    those seconds.
    """
    headings = ("#Params", "BN params", "samples", "samples/s", "seconds")
    lines = [["method", "protocol", "sparsity", *(heading for heading, _ in COLUMNS), *headings]]
    for (method, variant, protocol, sparsity), group in _over_seeds(rows).items():
        cells = [_spread([row["metrics"][key] for row in group if key in row["metrics"]]) for _, key in COLUMNS]
        params, norms, samples, seconds = (
            statistics.mean(row[key] for row in group) for key in ("params", "batch_norm_params", "samples", "seconds")
        )
        counts = [f"{n:,.0f}" for n in (params, norms, samples, samples / seconds if seconds else 0, seconds)]
        lines.append([_name(method, variant), protocol, f"{sparsity:.0%}", *cells, *counts])
    return lines


def beside_published(rows: Iterable[Row], published: Iterable[Row]) -> list[list[str]]:
    """Our rows beside the paper's of the same method and sparsity, under its decision rule, below a heading.

    Each figure is ours (mean over seeds), the paper's and the difference; #Params differ by a fraction of the paper's.
    Empty if the paper has none of the rows.
    """
    theirs = {(row["method"], row["sparsity"]): row for row in published}
    columns = {"BA": "balanced_accuracy", "precision": "precision", "recall": "recall"}
    lines = []
    for (method, variant, protocol, sparsity), group in _over_seeds(rows).items():
        paper = theirs.get((method, sparsity))
        if paper is None:
            continue
        cells = []
        for key in columns.values():
            own = statistics.mean(row["metrics"][f"{key}.{paper['rule']}"] for row in group)
            cells += [f"{own:.3f}", f"{paper[key]:.3f}", f"{own - paper[key]:+.3f}"]
        params = statistics.mean(row["params"] for row in group)
        cells += [f"{params:,.0f}", f"{paper['params']:,}", f"{params / paper['params'] - 1:+.1%}"]
        lines.append([_name(method, variant), protocol, f"{sparsity:.0%}", paper["rule"], *cells])
    head = [f"{name}{column}" for name in (*columns, "#Params") for column in (", ours", ", paper", ", difference")]
    return [["method", "protocol", "sparsity", "rule", *head], *lines] if lines else []


def _over_seeds(rows: Iterable[Row]) -> dict[tuple[str, str, str, float], list[Row]]:
    groups: dict[tuple[str, str, str, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["variant"], row["protocol"], row["sparsity"]), []).append(row)
    return groups


def _name(method: str, variant: str) -> str:
    return NAMES[method] + (f" ({variant})" if variant else "")


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
    from rtl.diagnose import Similarity

    folder = Path(folder)
    figures = folder / "figures"
    shown = {"balanced_accuracy.threshold": "balanced accuracy, score ≥ ½", "accuracy": "accuracy, argmax"}
    plots.save(plots.metric_against_sparsity(table["rows"], shown), figures / "metric.png")
    levels = {float(level): Similarity.from_json(s) for level, s in details.get("similarity", {}).items()}
    if levels:
        plots.save(plots.similarity_against_sparsity(levels), figures / "similarity.png")
        for level, similarity in levels.items():
            plots.save(plots.similarity_by_depth(similarity, level), figures / f"similarity-by-depth-{level:g}.png")
    compared = beside_published(table["rows"], table.get("published", ()))
    tables = [markdown(lines) for lines in (summary(table["rows"]), compared) if lines]
    write_atomically(folder / "table.md", "\n".join(tables).encode())
    for name, content in (("details.json", details), ("table.json", table)):
        write_atomically(folder / name, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def read_results(folder: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """table.json and details.json of a finished run. Raises InputError if they are not there."""
    try:
        table, details = (json.loads((Path(folder) / f"{name}.json").read_text()) for name in ("table", "details"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"run is {str(folder)!r}, which holds no finished results ({error}): finish `rtl run`"
        ) from error
    return table, details


def merged(results: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tables and details of several runs of one recipe as those of one, in that order.

    Commands are joined by " && "; of an environment that differs, all values are kept; the similarity matrices are
    those of the first run that has any. Raises InputError for other recipes, or a row that two runs have.
    """
    (table, details), *others = results
    table, details = dict(table), dict(details)
    for other, more in others:
        if other["recipe"] != table["recipe"]:
            raise InputError(f"runs are of {table['recipe']!r} and of {other['recipe']!r}, expected one recipe")
        table["rows"] = [*table["rows"], *other["rows"]]
        table["command"] += f" && {other['command']}"
        table["environment"] = {
            key: table["environment"].get(key, "?") for key in {**table["environment"], **other["environment"]}
        } | {
            key: f"{table['environment'].get(key, '?')} / {value}"
            for key, value in other["environment"].items()
            if str(value) not in str(table["environment"].get(key, "?")).split(" / ")
        }
        details["per_class"] = [*details["per_class"], *more["per_class"]]
        if "similarity" not in details and "similarity" in more:
            details["similarity"] = more["similarity"]
    seen = set()
    for row in table["rows"]:
        which = tuple(row[key] for key in ("method", "protocol", "variant", "sparsity", "seed"))
        if which in seen:
            raise InputError(f"runs have a row twice, {which}: leave one of them out")
        seen.add(which)
    return table, details


def write_into(document: Path, table: Mapping[str, Any]) -> None:
    """Replace the table between `<!-- table: RECIPE -->` and `<!-- end -->` in a document by a run's.

    So is one between `<!-- published: RECIPE -->` and `<!-- end -->`, if there is such a place, by the comparison with
    the paper. Raises InputError if the document has no place for the table, or one that does not end.
    """
    text = _replaced(document, document.read_text(), f"<!-- table: {table['recipe']} -->\n", summary(table["rows"]))
    begin = f"<!-- published: {table['recipe']} -->\n"
    if begin in text:
        text = _replaced(document, text, begin, beside_published(table["rows"], table.get("published", ())))
    write_atomically(document, text.encode())


def _replaced(document: Path, text: str, begin: str, lines: Sequence[Sequence[str]]) -> str:
    end = "<!-- end -->"
    before, mark, after = text.partition(begin)
    if not mark or end not in after:
        raise InputError(f"document is {str(document)!r}, which has no line {begin.strip()!r} with an {end!r} after it")
    return before + begin + (markdown(lines) if lines else "") + after[after.index(end) :]
