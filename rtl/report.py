"""Results as tables: rows of table.json to a summary over seeds, printed and as Markdown."""

from __future__ import annotations

import datetime
import json
import platform
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtl.errors import InputError
from rtl.progress import duration
from rtl.run import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure
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
    ("prec. argmax", "precision.argmax"),
    ("recall argmax", "recall.argmax"),
    ("accuracy", "accuracy"),
    ("PSNR", "psnr"),
    ("PSNR pooled", "psnr.pooled"),
    ("SI-SNRi", "si_snri"),
    ("similarity", "similarity"),
)


# The same in words.
WORDS = {
    "balanced_accuracy.threshold": "balanced accuracy, score ≥ ½",
    "precision.threshold": "precision, score ≥ ½",
    "recall.threshold": "recall, score ≥ ½",
    "balanced_accuracy.argmax": "balanced accuracy, argmax",
    "precision.argmax": "precision, argmax",
    "recall.argmax": "recall, argmax",
    "accuracy": "accuracy, argmax",
    "psnr": "PSNR (dB), mean over images",
    "psnr.pooled": "PSNR (dB), of all images' pixels together",
    "si_snri": "SI-SNR improvement (dB), mean over clips",
    "similarity": "mean Jaccard similarity of the tickets' masks",
}


def words(key: str) -> str:
    """What a metric is; a scene's own ("si_snri.indoor") is named."""
    return WORDS.get(key) or f"SI-SNR improvement (dB), {key.removeprefix('si_snri.')}"


def columns(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The columns, heading and key of a metric, that some row has.

    A scene's figure ("si_snri.indoor") stands behind the mean over scenes.
    """
    had = dict.fromkeys(key for row in rows for key in row["metrics"])
    found = []
    for heading, key in COLUMNS:
        if key in had:
            found.append((heading, key))
        if key == "si_snri":
            found += [(scene.removeprefix("si_snri."), scene) for scene in had if scene.startswith("si_snri.")]
    return found


def group_rows(rows: Iterable[Row]) -> dict[tuple[str, str, str, float], list[Row]]:
    """The seeds' rows of each method, variant, protocol and sparsity."""
    groups: dict[tuple[str, str, str, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["variant"], row["protocol"], row["sparsity"]), []).append(row)
    return groups


# What is drawn against sparsity.
CURVES = ("balanced_accuracy.threshold", "accuracy", "psnr", "si_snri")


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

    Columns are the metrics that some row has.

    "seconds" are those of every worker process (one thread each), added up; "samples/s" are samples presented in one of
    those seconds.
    """
    rows = list(rows)
    shown = columns(rows)
    headings = ("#Params", "BN params", "samples", "samples/s", "seconds")
    lines = [["method", "protocol", "sparsity", *(heading for heading, _ in shown), *headings]]
    for (method, variant, protocol, sparsity), group in group_rows(rows).items():
        cells = [_spread([row["metrics"][key] for row in group if key in row["metrics"]]) for _, key in shown]
        params, norms, samples, seconds = (
            statistics.mean(row[key] for row in group) for key in ("params", "batch_norm_params", "samples", "seconds")
        )
        counts = [f"{n:,.0f}" for n in (params, norms, samples, samples / seconds if seconds else 0, seconds)]
        lines.append([row_name(method, variant), protocol, f"{sparsity:.0%}", *cells, *counts])
    return lines


# What is set beside the paper, under whichever decision rule is its own, and its heading.
_COMPARED = {
    "balanced_accuracy": "BA",
    "precision": "precision",
    "recall": "recall",
    "psnr": "PSNR",
    "si_snri": "SI-SNRi",
}


def beside_published(table: Mapping[str, Any]) -> list[list[str]]:
    """A run's rows beside the paper's of the same method and sparsity, under its decision rule, below a heading.

    Each figure is ours (mean over seeds), the paper's and the difference; #Params differ by a fraction of the paper's.
    Empty if the paper has none of the rows.
    """
    from rtl.recipes.published import published

    theirs = {(row["method"], row["sparsity"]): row for row in published(table["recipe"])}
    keys = [key.partition(".") for row in theirs.values() for key in row["metrics"]]
    shown = [name for name in _COMPARED if name in {name for name, _, _ in keys}]
    ruled = any(rule for _, _, rule in keys)
    lines = []
    for (method, variant, protocol, sparsity), group in group_rows(table["rows"]).items():
        paper = theirs.get((method, sparsity))
        if paper is None:
            continue
        line = [row_name(method, variant), protocol, f"{sparsity:.0%}"]
        if ruled:
            line.append(next(iter(paper["metrics"])).partition(".")[2])  # the same for all
        for name in shown:
            key, value = next((key, value) for key, value in paper["metrics"].items() if key.partition(".")[0] == name)
            own = [row["metrics"][key] for row in group if key in row["metrics"]]
            line += [f"{statistics.mean(own):.3f}" if own else "–", f"{value:.3f}"]
            line.append(f"{statistics.mean(own) - value:+.3f}" if own else "–")
        params = statistics.mean(row["params"] for row in group)
        lines.append([*line, f"{params:,.0f}", f"{paper['params']:,}", f"{params / paper['params'] - 1:+.1%}"])
    names = [*(_COMPARED[name] for name in shown), "#Params"]
    head = [f"{name}, {whose}" for name in names for whose in ("ours", "paper", "difference")]
    return [["method", "protocol", "sparsity", *(["rule"] if ruled else []), *head], *lines] if lines else []


def took(table: Mapping[str, Any]) -> str:
    """How long a run took by the clock on the wall, in words; "" where that is not known."""
    if "wall" not in table:
        return " ".join(f"{one['command']}: {took(one)}" for one in table.get("runs", ()))
    said, workers, resumed = f"In {duration(table['wall'])}", table.get("workers", 0), table.get("resumed", 0)
    if workers:
        said += f" with {workers} worker{'s' * (workers != 1)}"
    if resumed:
        said += f", resumed {resumed} time{'s' * (resumed != 1)}"
    return f"{said}."


def remarks(table: Mapping[str, Any]) -> list[str]:
    """What is to be known of the paper's figures for this run's methods."""
    from rtl.recipes.published import REMARKS

    methods = {"", *(row["method"] for row in table["rows"])}
    return [said for (recipe, method), said in REMARKS.items() if recipe == table["recipe"] and method in methods]


def comparison(table: Mapping[str, Any]) -> str:
    """`beside_published` in Markdown, with what is to be known of it; "" if the paper has none of the rows."""
    lines = beside_published(table)
    return markdown(lines) + "".join(f"\n{said}\n" for said in remarks(table)) if lines else ""


def row_name(method: str, variant: str, protocol: str = "") -> str:
    """What tables and figures call a row's method; `protocol` where there are several, and no column says it."""
    return NAMES[method] + (f" ({variant})" if variant else "") + (f", {protocol}" if protocol else "")


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


FIGURE = re.compile(r"metric|similarity|alignment|(similarity-by-depth|psnr|example)-.*")  # names of those below


def of_one_sparsity(rows: Iterable[Mapping[str, Any]]) -> bool:
    """Whether all rows but those of dense networks are: there is nothing to draw against sparsity."""
    return len({round(row["sparsity"], 9) for row in rows if row["method"] != "dense"}) == 1


def write_results(folder: str | Path, table: Mapping[str, Any], details: Mapping[str, Any]) -> set[str]:
    """Write figures/*.png, table.md, details.json and, last, table.json of a run to a folder, each whole or not at all.

    A folder that holds a table.json holds all of them. Examples in its `media` (`plots.example`) are drawn too.

    Returns the figures' names, without their ending.
    """
    from rtl import plots
    from rtl.alignment import Alignment
    from rtl.collapse import Alarm
    from rtl.curve import Curve
    from rtl.diagnose import Similarity

    folder = Path(folder)
    drawn: set[str] = set()

    def draw(name: str, figure: Figure) -> None:
        plots.save(figure, folder / "figures" / f"{name}.png")
        drawn.add(name)

    had = {key for row in table["rows"] for key in row["metrics"]}
    shown = {key: WORDS[key] for key in CURVES if key in had}
    metric = plots.metric_by_row if of_one_sparsity(table["rows"]) else plots.metric_against_sparsity
    draw("metric", metric(table["rows"], shown))
    if "curve" in details:
        curve, found = Curve.from_json(details["curve"]), [Alarm(**alarm) for alarm in details["alarms"]]
        draw("similarity", plots.similarity_against_sparsity(curve, found))
        if "alignment" in details:
            draw("alignment", plots.semantic_alignment(curve, Alignment.from_json(details["alignment"])))
    for level, values in details.get("similarity", {}).items():
        depth = plots.similarity_by_depth(Similarity.from_json(values), float(level))
        draw(f"similarity-by-depth-{level}", depth)
    if "crossed" in details:
        draw("crossed", plots.crossed(details["crossed"], details["class_names"]))
    if "per_image" in details:
        draw("psnr-by-image", plots.psnr_by_image(details["per_image"]))
        draw("psnr-against-similarity", plots.psnr_against_similarity(details["per_image"]))
    for group in sorted({file.parent for name in plots.GIVEN for file in (folder / "media").glob(f"*/{name}.*")}):
        draw(f"example-{group.name}", plots.example(group))
    time = f"{took(table)}\n" if took(table) else ""
    tables = (markdown(summary(table["rows"])), time, comparison(table))
    write_atomically(folder / "table.md", "\n".join(filter(None, tables)).encode())
    for name, content in (("details.json", details), ("table.json", table)):
        write_atomically(folder / name, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    return drawn


def read_results(folder: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """table.json and details.json of a finished run. Raises InputError if they are not there.

    Where the details hold no curve, it is that of the masks in `tickets/`, if there are any.
    """
    try:
        table, details = (json.loads((Path(folder) / f"{name}.json").read_bytes()) for name in ("table", "details"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"run is {str(folder)!r}, which holds no finished results ({error}): finish `rtl run`"
        ) from error
    if not _of_a_run(table) or not isinstance(details, dict):
        raise InputError(f"run is {str(folder)!r}, whose table.json and details.json are not those of an `rtl run`")
    table.pop("published", None)  # older runs held a copy of the paper's figures
    if "curve" not in details:
        curve = _curve_of_tickets(Path(folder))
        if curve is not None:
            details |= insights(curve)
    return table, details


def _of_a_run(table: Any) -> bool:
    """Whether a table.json is a run's: benchmarks keep results of other kinds in files of these names."""
    if not isinstance(table, dict) or not {"recipe", "command", "environment", "rows"} <= table.keys():
        return False
    needed = {"method", "protocol", "variant", "sparsity", "seed", "params", "samples", "seconds", "metrics"}
    return all(needed <= row.keys() for row in table["rows"])


def main_run(results: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> int:
    """Which of several runs' tickets are those of the merged run: the first's whose details say what tickets share."""
    return next((number for number, (_, details) in enumerate(results) if "similarity" in details), 0)


def merged(results: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tables and details of several runs of one recipe as those of one, in that order.

    Commands are joined by " && "; of an environment that differs, all values are kept; times by the clock on the wall
    are added up, if all are known, else "runs" has those that are; what the details say of tickets (their similarity,
    examples) is of the `main_run`.
    In details that an older version wrote, which say no protocol, it is that of the run's rows.
    Raises InputError for other recipes, or a row that two runs have.
    """
    (table, _), *others = results
    table = dict(table)
    for other, _ in others:
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
    clocks = ("wall", "resumed", "workers")
    timed = [run for one, _ in results for run in one.get("runs", [one]) if "wall" in run]
    for key in clocks:
        values = [one.get(key) for one, _ in results]
        table.pop(key, None)
        if None not in values and (key != "workers" or len(set(values)) == 1):
            table[key] = values[0] if key == "workers" else sum(values)
    table.pop("runs", None)
    if timed and "wall" not in table:
        table["runs"] = [{key: run[key] for key in ("command", *clocks) if key in run} for run in timed]
    details = dict(results[main_run(results)][1])
    for key in ("per_class", "per_image", "routing"):
        if any(key in one for _, one in results):
            details[key] = [
                values if "protocol" in values else values | _protocol(run)
                for run, one in results
                for values in one.get(key, [])
            ]
    seen = set()
    for row in table["rows"]:
        which = tuple(row[key] for key in ("method", "protocol", "variant", "sparsity", "seed"))
        if which in seen:
            raise InputError(f"runs have a row twice, {which}: leave one of them out")
        seen.add(which)
    return table, details


def _protocol(table: Mapping[str, Any]) -> dict[str, str]:
    """{"protocol": that of a run's rows}, or {} where they have several."""
    protocols = {row["protocol"] for row in table["rows"]}
    return {"protocol": protocols.pop()} if len(protocols) == 1 else {}


def insights(curve: Curve, semantic: Tensor | None = None, stages: Mapping[str, Curve] | None = None) -> dict[str, Any]:
    """What details.json says of the masks' similarity: the "curve", its "alarms", and its "alignment" with meaning.

    With `stages`, these too, and their "stage_alignment", both by sparsity.

    Args:
        curve: of one seed's tickets.
        stages: `Tickets.stages`, by sparsity as text.
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
        if stages:
            found["stage_alignment"] = {level: alignment(one, semantic).to_json() for level, one in stages.items()}
    if stages:
        found["stages"] = {level: one.to_json() for level, one in stages.items()}
    return found


def with_semantics(details: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """The details with the alignment of their curve to another meaning of the tickets' names (`rtl.semantics.read`).

    Raises InputError if the source does not fit, or the run has no tickets to compare.
    """
    from rtl import semantics
    from rtl.curve import Curve

    if "curve" not in details or len(details["curve"]["names"]) < 3:
        raise InputError("semantics is given, but the run has no three tickets to compare: leave it out")
    curve = Curve.from_json(details["curve"])
    stages = {level: Curve.from_json(one) for level, one in details.get("stages", {}).items()}
    return {**details, **insights(curve, semantics.read(source, curve.names), stages)}


def _curve_of_tickets(folder: Path) -> Curve | None:
    from rtl.curve import Curve
    from rtl.tickets import TicketNetwork, saved_levels

    nets = [TicketNetwork.from_pretrained(level) for level in saved_levels(folder).values()]
    return Curve.of(nets[0].names, [net.net.banks for net in nets]) if nets and len(nets[0].names) > 1 else None


def check_document(document: Path, tables: Sequence[Mapping[str, Any]]) -> list[str]:
    """Raise InputError unless a document has a place for each of these runs' tables (`write_into`).

    Returns what it has no place for: the marks of comparisons with the paper.
    """
    text, missing = _text(document), []
    for table in tables:
        _replaced(document, text, f"table: {table['recipe']}", "")
        mark = f"published: {table['recipe']}"
        if f"<!-- {mark} -->\n" in text:
            _replaced(document, text, mark, "")
        elif beside_published(table):
            missing.append(f"<!-- {mark} -->")
    return missing


def write_into(document: Path, table: Mapping[str, Any]) -> None:
    """Replace the table between `<!-- table: RECIPE -->` and `<!-- end -->` in a document by a run's.

    So is one between `<!-- published: RECIPE -->` and `<!-- end -->`, if there is such a place, by the comparison with
    the paper. Raises InputError if the document has no place for the table, or one that does not end.
    """
    text = _replaced(document, _text(document), f"table: {table['recipe']}", markdown(summary(table["rows"])))
    mark = f"published: {table['recipe']}"
    if f"<!-- {mark} -->\n" in text:
        text = _replaced(document, text, mark, comparison(table))
    write_atomically(document, text.encode())


def replace_between(document: Path, mark: str, text: str) -> None:
    """Replace what stands between `<!-- MARK -->` and `<!-- end -->` in a document by whole lines of text.

    Raises InputError if the document has no such place.
    """
    write_atomically(document, _replaced(document, _text(document), mark, text).encode())


def _text(document: Path) -> str:
    try:
        return document.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"document is {str(document)!r}, which cannot be read ({error}): give a text file") from error


def _replaced(document: Path, content: str, mark: str, text: str) -> str:
    begin, end = f"<!-- {mark} -->\n", "<!-- end -->"
    before, found, after = content.partition(begin)
    if not found or end not in after:
        raise InputError(
            f"document is {str(document)!r}, which has no line {begin.strip()!r} with a line {end!r} after it: add "
            "both where the text belongs"
        )
    return before + begin + text + after[after.index(end) :]
