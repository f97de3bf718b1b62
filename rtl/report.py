"""Results as tables: rows of table.json (DESIGN's schema) to a summary over seeds, printed and as Markdown."""

from __future__ import annotations

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
    ("PSNR", "psnr"),
    ("PSNR pooled", "psnr.pooled"),
    ("SI-SNRi", "si_snri"),
    ("similarity", "similarity"),
)
# What is drawn against sparsity, and its title.
CURVES = {
    "balanced_accuracy.threshold": "balanced accuracy, score ≥ ½",
    "accuracy": "accuracy, argmax",
    "psnr": "PSNR (dB), mean over images",
    "si_snri": "SI-SNR improvement (dB), mean over clips",
}


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
    """One line for each method, variant and sparsity, mean ± standard deviation over seeds, below a heading.

    Columns are the metrics that some row has.
    """
    rows = list(rows)
    columns = _columns(rows)
    groups: dict[tuple[str, str, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["variant"], row["sparsity"]), []).append(row)
    lines = [["method", "sparsity", *(heading for heading, _ in columns), "#Params", "samples", "seconds"]]
    for (method, variant, sparsity), group in groups.items():
        name = NAMES[method] + (f" ({variant})" if variant else "")
        cells = [_spread([row["metrics"][key] for row in group if key in row["metrics"]]) for _, key in columns]
        counts = [f"{statistics.mean(row[key] for row in group):,.0f}" for key in ("params", "samples", "seconds")]
        lines.append([name, f"{sparsity:.0%}", *cells, *counts])
    return lines


def _columns(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Heading and metric; a scene's figure ("si_snri.indoor") stands behind the mean over scenes."""
    had = dict.fromkeys(key for row in rows for key in row["metrics"])
    found = []
    for heading, key in COLUMNS:
        if key in had:
            found.append((heading, key))
        if key == "si_snri":
            found += [(scene.removeprefix("si_snri."), scene) for scene in had if scene.startswith("si_snri.")]
    return found


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

    A folder that holds a table.json holds all of them. What lies in its `examples` is drawn too.
    """
    from rtl import plots
    from rtl.diagnose import Similarity

    folder = Path(folder)
    figures = folder / "figures"
    had = {key for row in table["rows"] for key in row["metrics"]}
    shown = {key: title for key, title in CURVES.items() if key in had}
    plots.save(plots.metric_against_sparsity(table["rows"], shown), figures / "metric.png")
    levels = {float(level): Similarity.from_json(s) for level, s in details.get("similarity", {}).items()}
    if levels:
        plots.save(plots.similarity_against_sparsity(levels), figures / "similarity.png")
        for level, similarity in levels.items():
            plots.save(plots.similarity_by_depth(similarity, level), figures / f"similarity-by-depth-{level:g}.png")
    if "per_image" in details:
        plots.save(plots.psnr_by_image(details["per_image"]), figures / "psnr-by-image.png")
        plots.save(plots.psnr_against_similarity(details["per_image"]), figures / "psnr-against-similarity.png")
    for example in sorted(path for path in (folder / "examples").glob("*") if path.is_dir()):
        plots.save(plots.example(example), figures / f"example-{example.name}.png")
    write_atomically(folder / "table.md", markdown(summary(table["rows"])).encode())
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
