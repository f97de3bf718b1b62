"""The report page: one HTML file for one run or several side by side, with nothing to fetch.

It shows what a run's folder holds: table.json and details.json; its settings (`rtl.keep.settings`); the tickets' masks
in tickets/; and the pictures and sounds below media/ (`media/GROUP/NAME.png`, shown under their names), which recipes
for images and speech leave there.
"""

from __future__ import annotations

import base64
import itertools
import json
import math
import mimetypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch

import rtl_kernels as rk
from rtl.alignment import Alignment
from rtl.collapse import LOST, WARM_UP, Alarm, Verdict, verdicts
from rtl.curve import Curve, mean_to_others
from rtl.keep import settings
from rtl.report import NAMES, columns, group_rows, of_one_sparsity, read_results, remarks, row_name, took, words
from rtl.run import write_atomically
from rtl.svg import Mark, Series, dot_chart, figure, halves, line_chart, percent, stacked, table, tree

_ASSETS = Path(__file__).parent / "assets"
_SOUNDS = (".wav", ".flac", ".ogg", ".mp3")
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
_BALANCED = "balanced_accuracy.threshold"
_LIKE = {"rtl": 0, "imp_single": 1, "imp_multiple": 2, "dense": 9}


@dataclass(frozen=True, eq=False)
class RunView:
    """One run as its folder shows it.

    Attributes:
        name: the folder's, or what tells it from others.
        folder: where it is.
        table, details: as `rtl.report.read_results` gives them.
    """

    name: str
    folder: Path
    table: Mapping[str, Any]
    details: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path, name: str = "") -> RunView:
        """Raises InputError if the run is not finished."""
        table, details = read_results(folder)
        return cls(name or folder.resolve().name, folder, table, details)

    @cached_property
    def curve(self) -> Curve | None:
        return Curve.from_json(self.details["curve"]) if "curve" in self.details else None

    @cached_property
    def alarms(self) -> list[Alarm]:
        return [Alarm(**alarm) for alarm in self.details.get("alarms", [])]

    @cached_property
    def configs(self) -> dict[str, dict[str, Any]]:
        """The settings, by the name of each merged run ("" for a run)."""
        names = {file: file.stem.removeprefix("config").removeprefix("-") for file in settings(self.folder)}
        return {name: json.loads(file.read_bytes()) for file, name in names.items()}

    @cached_property
    def banks(self) -> dict[float, Mapping[str, rk.MaskBank]]:
        """The masks in tickets/, by sparsity."""
        from rtl.tickets import TicketNetwork, saved_levels

        levels = saved_levels(self.folder)
        return {sparsity: TicketNetwork.from_pretrained(level).net.banks for sparsity, level in levels.items()}


def write_page(folders: Sequence[Path], file: Path) -> None:
    """Write the page of these runs. Raises InputError if one is not finished."""
    views = [RunView.read(folder, name) for folder, name in zip(folders, names_of(folders), strict=True)]
    write_atomically(file, page(views).encode())


def names_of(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of those above them as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts))):
        names = [str(Path(*own[-depth:])) for own in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(Path(*own)) for own in parts]


def page(runs: Sequence[RunView]) -> str:
    """The page, HTML."""
    sections = [
        ("results", "Results", _results(runs)),
        ("curves", "Against sparsity", _beside(runs, _curves)),
        ("similarity", "What tickets share", _beside(runs, _similarity)),
        ("layers", "How many tickets keep a weight", _beside(runs, _layers)),
        ("meaning", "Sharing and meaning", _beside(runs, _meaning)),
        ("routing", "Which ticket serves an input", _beside(runs, _routing)),
        ("classes", "Each ticket", _beside(runs, _classes)),
        ("examples", "Samples right and wrong", _beside(runs, _examples)),
        ("media", "Pictures and sounds", _beside(runs, _media)),
        ("cost", "Cost", _beside(runs, _cost)),
        ("run", "What was run", _beside(runs, _what)),
    ]
    shown = [(key, title, body) for key, title, body in sections if body]
    names = ", ".join(run.name for run in runs)
    links = "".join(f'<li><a href="#{key}">{title}</a></li>' for key, title, _ in shown)
    body = "".join(
        f'<section id="{key}" aria-labelledby="{key}-h"><h2 id="{key}-h">{title}</h2>{html}</section>'
        for key, title, html in shown
    )
    style, script = (_ASSETS / f"report.{kind}" for kind in ("css", "js"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>rtl report: {escape(names)}</title><style>{style.read_text(encoding='utf-8')}</style></head><body>"
        '<a class="skip" href="#results">skip to results</a>'
        f"<header><h1>{escape(names)}</h1>{_lead(runs)}</header>"
        f'<nav aria-label="sections"><ul>{links}</ul></nav><main>{body}</main>'
        f"<script>{script.read_text(encoding='utf-8')}</script></body></html>\n"
    )


def _beside(runs: Sequence[RunView], part: Any) -> str:
    """What `part` makes of every run, in columns; "" if it makes nothing of any."""
    parts = [part(run) for run in runs]
    if not any(parts):
        return ""
    if len(runs) == 1:
        return str(parts[0])
    articles = "".join(
        f"<article><h3>{escape(run.name)}</h3>{html or '<p class=soft>nothing of this kind in this run</p>'}</article>"
        for run, html in zip(runs, parts, strict=True)
    )
    return f'<div class="runs">{articles}</div>'


def _lead(runs: Sequence[RunView]) -> str:
    said = []
    for run in runs:
        rows = run.table["rows"]
        tickets = len(run.curve.names) if run.curve else 0
        seeds = len({row["seed"] for row in rows})
        protocols = "/".join(sorted({row["protocol"] for row in rows}))
        text = f"{run.name}: recipe {run.table['recipe']}, {protocols} protocol, {seeds} seed{'s' * (seeds != 1)}"
        said.append(f"<p>{escape(text)}{f', {tickets} tickets' if tickets else ''}.</p>")
        if run.alarms:
            first = min(run.alarms, key=lambda alarm: alarm.round)
            said.append(
                f'<p class="warn"><strong>Collapse alarm</strong> for {len(run.alarms)} of {tickets} tickets; '
                f"the first: {escape(str(first))}.</p>"
            )
    return "".join(said)


# Results


def _results(runs: Sequence[RunView]) -> str:
    from rtl.recipes.published import published

    rows = [row for run in runs for row in run.table["rows"]]
    shown = columns(rows)
    head = [*(["run"] if len(runs) > 1 else []), "method", "protocol", "sparsity", *(h for h, _ in shown)]
    head += ["#Params", "samples"]
    body: list[list[Any]] = []
    for run in runs:
        for (method, variant, protocol, sparsity), group in group_rows(run.table["rows"]).items():
            line: list[Any] = [run.name] if len(runs) > 1 else []
            line += [row_name(method, variant), protocol, (percent(sparsity), sparsity)]
            line += [_spread([row["metrics"][key] for row in group if key in row["metrics"]]) for _, key in shown]
            line += [_count([row[key] for row in group]) for key in ("params", "samples")]
            body.append(line)
    for recipe in dict.fromkeys(run.table["recipe"] for run in runs):
        for paper in published(recipe):
            metrics = paper["metrics"]
            line = ["paper"] if len(runs) > 1 else []
            line += [f"paper: {NAMES[paper['method']]}", "–", (percent(paper["sparsity"]), paper["sparsity"])]
            line += [(f"{metrics[key]:.3f}", metrics[key]) if key in metrics else ("–", None) for _, key in shown]
            line += [(f"{paper['params']:,}", paper["params"]), ("–", None)]
            body.append(line)
    caption = "mean ± standard deviation over seeds; a heading sorts"
    meant = {heading: words(key) for heading, key in shown if heading != words(key)}
    meant |= {"#Params": "weights to be stored (RTL: the union of the masks)", "samples": "presented in training"}
    key = "; ".join(f"{heading}: {said}" for heading, said in meant.items())
    known = dict.fromkeys([f"{key}.", *(said for run in runs for said in remarks(run.table))])
    return table(head, body, sortable=True, caption=caption) + "".join(f"<p>{escape(said)}</p>" for said in known)


def _spread(values: Sequence[float]) -> tuple[str, float | None]:
    if not values:
        return "–", None
    mean = float(np.mean(values))
    return f"{mean:.3f}" + (f" ±\N{NO-BREAK SPACE}{np.std(values, ddof=1):.3f}" if len(values) > 1 else ""), mean


def _count(values: Sequence[float]) -> tuple[str, float]:
    mean = float(np.mean(values))
    return f"{mean:,.0f}", mean


# Curves


def _curves(run: RunView) -> str:
    charts = []
    rows = run.table["rows"]
    at = sorted({alarm.sparsity for alarm in run.alarms})
    for _, key in columns(rows):
        if key == "similarity":
            continue
        found = _by_method(rows, key)
        if of_one_sparsity(rows):
            dots = [Series(name, points, _LIKE[method]) for (method, name), points in found.items()]
            charts.append(dot_chart(words(key), dots))
            continue
        series = []
        first = dict(_LIKE)
        further = itertools.cycle(range(3, 9))  # colours of a method's variants and protocols after its first
        for (method, name), points in found.items():
            if method == "dense":
                level = points[0][1]
                pruned = [r["sparsity"] for r in rows if r["method"] != "dense"]
                ends = min(pruned, default=0.0), max(pruned, default=1.0)
                series.append(Series(name, [(s, level) for s in ends], 9, "dashed" if method in first else "dotted"))
            else:
                series.append(Series(name, points, first[method] if method in first else next(further)))
            first.pop(method, None)
        charts.append(line_chart(words(key), series, "sparsity"))
    curve = run.curve
    if curve is not None and len(curve.names) > 1:
        charts.append(_by_ticket(run))
        scores, sparsity = mean_to_others(curve.jaccard()), curve.sparsity.mean(1).tolist()
        series = [
            Series(name, list(zip(curve.sparsity[:, k].tolist(), scores[:, k].tolist(), strict=True)), k)
            for k, name in enumerate(curve.names)
        ]
        for name, baseline, kind in (
            ("identical masks", curve.identical(), "dashed"),
            ("independent masks", curve.independent(), "dotted"),
        ):
            means = mean_to_others(baseline).mean(1).tolist()
            series.append(Series(name, list(zip(sparsity, means, strict=True)), 9, kind))
        marks = [
            Mark(a.sparsity, float(scores[a.round, k]), str(a), k)
            for a in run.alarms
            for k in [curve.names.index(a.ticket)]
        ]
        charts.append(line_chart("mask similarity to the other tickets (Jaccard)", series, "sparsity", marks))
    elif at:
        charts.append(f"<p>Alarms at {', '.join(map(percent, at))}.</p>")
    return f'<div class="charts">{"".join(charts)}</div>{_alarm_table(run)}'


def _by_method(rows: Sequence[Mapping[str, Any]], key: str) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Points of each method and variant under its name, and of each protocol where there are several."""
    several = len({row["protocol"] for row in rows}) > 1
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for (method, variant, protocol, sparsity), group in group_rows(rows).items():
        values = [row["metrics"][key] for row in group if key in row["metrics"]]
        if values:
            name = row_name(method, variant, protocol if several else "")
            found.setdefault((method, name), []).append((sparsity, float(np.mean(values))))
    return {name: sorted(points) for name, points in found.items()}


def _alarm_table(run: RunView) -> str:
    if run.curve is None or len(run.curve.names) < 2:
        return ""
    if len(run.curve) < WARM_UP + 2:
        return (
            f"<p>{len(run.curve)} rounds are known, too few for a collapse alarm: it learns from {WARM_UP} slopes.</p>"
        )
    if not run.alarms:
        return "<p>No collapse alarm: similarity neither turned upwards nor fell faster than before.</p>"
    performance = _performance(run)
    found: dict[str, Verdict] = {}
    if performance is not None and performance.floor and any(min(v) <= 0.5 for v in performance.values.values()):
        at = {alarm.ticket: alarm.sparsity for alarm in run.alarms}
        found = {v.ticket: v for v in verdicts(at, performance.values, performance.floor)}
    body = []
    for alarm in run.alarms:
        verdict = found.get(alarm.ticket)
        fall = ("–", None) if verdict is None or verdict.fall is None else (percent(verdict.fall), verdict.fall)
        lead = ("–", None) if verdict is None or verdict.lead is None else (f"{verdict.lead:+.1f}", verdict.lead)
        body.append(
            [
                alarm.ticket,
                alarm.direction,
                (percent(alarm.sparsity), alarm.sparsity),
                (percent(alarm.good_sparsity), alarm.good_sparsity),
                fall,
                lead,
            ]
        )
    head = ["ticket", "similarity", "alarm at", "last good masks", "performance fell at", "lead, halvings of density"]
    caption = "collapse alarms of the first seed"
    if performance is not None and found:
        caption += (
            f"; a ticket has fallen where, from there on, it has lost {LOST:.0%} of the {performance.unit} above "
            "chance that it has up to 50% sparsity"
        )
    return table(head, body, sortable=True, caption=caption)


@dataclass(frozen=True, eq=False)
class _Performance:
    """How tickets do: values by ticket, by sparsity; what they are; of which tickets; chance's, where it is known."""

    values: dict[str, dict[float, float]]
    unit: str
    of: str
    floor: dict[str, float]


# Where the details say how each ticket does: list, key of its rows, and what it is.
_PERFORMANCES = (
    ("per_image", "psnr_by_region", "PSNR (dB)"),
    ("per_class", _BALANCED, "balanced accuracy"),
    ("per_class", "si_snri", "SI-SNRi (dB)"),
)


def _performance(run: RunView) -> _Performance | None:
    """Of the first seed's tickets, as they were retrained first: thresholded balanced accuracy of each class, PSNR of
    each region of the first image, or SI-SNR improvement of each scene. None if there is none.
    """
    if run.curve is None:
        return None
    for place, key, unit in _PERFORMANCES:
        rows = [row for row in run.details.get(place, []) if row["method"] == "rtl" and key in row]
        if not rows:
            continue
        which = ("protocol", "variant", "image", "seed")  # older runs' details have not all of them
        own = [row for row in rows if all(row.get(what) == rows[0].get(what) for what in which)]
        values: dict[str, dict[float, float]] = {}
        for row in own:
            named = row[key] if isinstance(row[key], Mapping) else zip(run.curve.names, row[key], strict=True)
            for ticket, value in dict(named).items():
                values.setdefault(ticket, {})[row["sparsity"]] = value
        several = len({row.get("protocol") for row in rows}) > 1
        said = [rows[0].get(what) for what in ("image", "variant", *(["protocol"] if several else []))]
        of = ", ".join(["each ticket", *filter(None, said), "first seed"])
        return _Performance(values, unit, of, dict.fromkeys(values, 0.5) if key == _BALANCED else {})
    return None


def _by_ticket(run: RunView) -> str:
    """Each ticket's performance, crossed where its alarm was given."""
    found = _performance(run)
    if found is None:
        return ""
    tickets = list(found.values)
    series = [Series(ticket, sorted(values.items()), k) for k, (ticket, values) in enumerate(found.values.items())]
    title = f"{found.unit} of {found.of}"
    every = [s for values in found.values.values() for s in values]
    if len(set(every)) == 1:
        return dot_chart(title, series)
    marks = []
    for alarm in run.alarms:
        values = sorted(found.values.get(alarm.ticket, {}).items())
        if values and values[0][0] <= alarm.sparsity <= values[-1][0]:
            xs, ys = zip(*values, strict=True)
            at = [alarm.sparsity, *xs]
            at = [-math.log2(1 - s) for s in at] if every and halves(every) else at  # on the line that is drawn
            y = float(np.interp(at[0], at[1:], ys))
            marks.append(Mark(alarm.sparsity, y, str(alarm), tickets.index(alarm.ticket)))
    return line_chart(title, series, "sparsity", marks)


# Similarity


def _similarity(run: RunView) -> str:
    curve = run.curve
    if curve is None or len(curve.names) < 2:
        return ""
    layers = curve.layers
    depth = [layers[i] for i in np.unique(np.linspace(0, len(layers) - 1, min(4, len(layers))).round().astype(int))]
    sparsity = curve.sparsity.mean(1).tolist()
    data = curve.to_json() | {"sparsity": sparsity}
    empty = '<svg role="img" viewBox="0 0 230 232"></svg>'
    panels = [f"<figure><figcaption>all layers<br><small></small></figcaption>{empty}</figure>"]
    panels += [
        f'<figure data-layer="{escape(n)}"><figcaption>{escape(n)}<br><small></small></figcaption>{empty}</figure>'
        for n in depth
    ]
    options = "".join(f'<option value="{escape(layer)}">{escape(layer)}</option>' for layer in layers)
    options = f"<option>all layers</option>{options.replace('<option', '<option selected', 1)}"
    panels.append(
        f"<figure data-chosen><figcaption>the layer chosen above<br><small></small></figcaption>{empty}</figure>"
    )
    last = len(curve) - 1
    trees = "".join(
        f'<div data-round="{r}"{"" if r == last else " hidden"}>{_tree(curve, r)}</div>' for r in range(len(curve))
    )
    encoded = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # no name can end or hide the script
    return (
        '<div class="similarity"><noscript><p>The matrices need JavaScript; figures/similarity-by-depth-*.png has '
        "those of the reported sparsities.</p></noscript>"
        f'<div class="controls"><label>sparsity <input type="range" min="0" max="{last}" value="{last}" step="1">'
        f"</label><output>{percent(sparsity[-1])}</output>"
        '<label><input type="checkbox"> colours from 0 to 1</label>'
        f"<label>layer <select>{options}</select></label></div>"
        f'<div class="matrices">{"".join(panels)}</div>'
        '<details class="numbers"><summary>numbers of the layer chosen above</summary><div class="scroll" tabindex="0" '
        'role="region" aria-label="mask similarity of the layer chosen above"><table></table></div></details>'
        "<p class=soft>Jaccard similarity between the tickets' masks, from shallow to deep; brighter is more alike. "
        "The slider goes through the rounds of extraction.</p>"
        + figure("ticket tree: mean-linkage clustering by similarity over all layers (1: equal masks)", trees)
        + f'<script type="application/json">{encoded}</script></div>'
    )


def _tree(curve: Curve, number: int) -> str:
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import squareform

    distance = 1 - curve.jaccard()[number].numpy()
    np.fill_diagonal(distance, 0)
    links = linkage(squareform(distance, checks=False), method="average")
    return tree(curve.names, links, f"ticket tree at {percent(float(curve.sparsity[number].mean()))} sparsity")


def _layers(run: RunView) -> str:
    blocks: list[str] = []
    head = ["layer", "share of its weights", "weights", "kept by none", "kept by all"]
    for sparsity, banks in sorted(run.banks.items(), reverse=True):
        tickets = next(iter(banks.values())).num_masks
        if tickets < 2:
            return ""

        def shade(n: int, of: int = tickets) -> str:
            return "var(--rule)" if n == 0 else f"hsl({260 - 200 * (n - 1) / max(1, of - 1):.0f} 60% 50%)"

        total = torch.zeros(tickets + 1, dtype=torch.int64)
        lines: list[list[Any]] = []
        bars: list[tuple[str, list[int]]] = []
        for layer, bank in banks.items():
            shared = torch.bincount(bank.to_dense().sum(0).flatten(), minlength=tickets + 1)
            total += shared
            bars.append((layer, shared.tolist()))
        for layer, counts in [("all layers", total.tolist()), *bars]:
            weights = sum(counts)
            said = f"{layer}: of {weights:,} weights " + ", ".join(
                f"{c:,} kept by {n}" for n, c in enumerate(counts) if c
            )
            shares = [counts[n] / weights for n in (0, tickets)]
            shown = [(f"{weights:,}", weights), *((percent(share), share) for share in shares)]
            mean = sum(n * c for n, c in enumerate(counts)) / weights
            lines.append([layer, (stacked(counts, shade, said), mean), *shown])
        key = "".join(
            f'<span class="key" style="background:{shade(n)}" aria-hidden="true"></span>{n}'
            for n in sorted({0, 1, tickets // 2, tickets})
        )
        blocks.append(
            f"<details{' open' if not blocks else ''}><summary>{percent(sparsity)} sparsity</summary>"
            f"<p class=soft>tickets that keep a weight:{key}</p>"
            f"{table(head, lines, sortable=True, label='shared weights')}</details>"
        )
    return "".join(blocks)


# Meaning, routing, tickets


def _meaning(run: RunView) -> str:
    if "alignment" not in run.details:
        return ""
    found = Alignment.from_json(run.details["alignment"])
    stages = np.unique(np.linspace(0, len(found.sparsity) - 1, min(4, len(found.sparsity))).round().astype(int))
    series = [
        Series(
            f"{percent(found.sparsity[stage])} sparsity",
            [(float(n + 1), float(v)) for n, v in enumerate(found.rho[stage, 1:])],
            int(k),
        )
        for k, stage in enumerate(stages)
    ]
    chart = line_chart(
        "Spearman's ρ of mask similarity with meaning, by layer",
        series,
        "layer, from the first",
        x_format="{:g}".format,
    )
    body = [
        [(percent(s), s), _plain(found.rho[r, 0]), _plain(found.p_value[r, 0]), _significant(found, r)]
        for r, s in enumerate(found.sparsity)
    ]
    head = ["sparsity", "ρ, all layers", "p", "layers with p < 0.05"]
    meaning = [
        [name, *((f"{v:.3f}", float(v)) for v in row)]
        for name, row in zip(found.names, found.semantic.tolist(), strict=True)
    ]
    stages_table = ""
    if run.details.get("stage_alignment"):
        lines = []
        for level, values in run.details["stage_alignment"].items():
            one = Alignment.from_json(values)
            for epoch in range(len(one.sparsity)):
                cells = _plain(one.rho[epoch, 0]), _plain(one.p_value[epoch, 0]), _significant(one, epoch)
                lines.append([(percent(float(level)), float(level)), (str(epoch + 1), epoch + 1), *cells])
        caption = "by stage of training: had the tickets been pruned after each epoch of the round"
        stages_table = table(["sparsity", "epoch", *head[1:]], lines, sortable=True, caption=caption)
    ways = f"{found.permutations:,} permutations of the tickets' names, two-sided, not corrected for many layers"
    tables = table(head, body, sortable=True, caption=f"p-values of {ways}") + stages_table
    return (
        f'<div class="charts">{chart}<div class="tall">{tables}</div></div>'
        "<details><summary>similarity in meaning</summary>"
        f"{table(['ticket', *found.names], meaning, sortable=True, label='similarity in meaning')}</details>"
    )


def _significant(found: Alignment, stage: int) -> tuple[str, int]:
    p = found.p_value[stage, 1:]
    count = int((p < 0.05).sum())
    return f"{count} of {int((~p.isnan()).sum())}", count


def _plain(value: torch.Tensor) -> tuple[str, float | None]:
    number = float(value)
    return ("–", None) if math.isnan(number) else (f"{number:.3f}", number)


def _routing(run: RunView) -> str:
    rows = run.details.get("routing", [])
    if not rows:
        return ""
    metric = next(key for key in rows[0] if key in ("accuracy", "mse"))
    groups: dict[tuple[str, str, float, str], list[Mapping[str, Any]]] = {}
    several = len({row.get("protocol", "") for row in rows}) > 1  # older runs' details do not say it
    for row in rows:
        protocol, variant = row.get("protocol", ""), row.get("variant", "")
        name = row["router"] + (f" ({variant})" if variant else "") + (f", {protocol}" if several and protocol else "")
        groups.setdefault((protocol, variant, row["sparsity"], name), []).append(row)
    body = [
        [
            router,
            (percent(sparsity), sparsity),
            *(_spread([row[key] for row in group]) for key in ("routing", metric, "calibration")),
        ]
        for (_, _, sparsity, router), group in sorted(groups.items())
    ]
    head = ["router", "sparsity", "own ticket", f"end task: {metric}", "calibration error"]
    caption = "two-fold on held-out samples: calibrated on one half, measured on the other; the oracle: by context"
    return table(head, body, sortable=True, caption=caption)


def _classes(run: RunView) -> str:
    found = _performance(run)
    if found is None:
        return ""
    levels = sorted(next(iter(found.values.values())))
    body = [
        [ticket, *((f"{values[s]:.3f}", values[s]) if s in values else ("–", None) for s in levels)]
        for ticket, values in found.values.items()
    ]
    rule = ", score ≥ ½," if found.unit == "balanced accuracy" else ""
    caption = f"{found.unit}{rule} of {found.of}, by sparsity"
    own = table(["ticket", *map(percent, levels)], body, sortable=True, caption=caption)
    return own + "".join(_crossed(run, level) for level in run.details.get("crossed", {}))


def _crossed(run: RunView, level: str) -> str:
    names = run.details["class_names"]
    body = [
        [ticket, *((f"{value:.3f}", value) for value in values)]
        for ticket, values in zip(names, run.details["crossed"][level], strict=True)
    ]
    caption = f"SI-SNRi (dB) of every ticket on every scene, {percent(float(level))} sparsity"
    return table(["ticket", *(f"on {name}" for name in names)], body, sortable=True, caption=caption)


def _examples(run: RunView) -> str:
    from rtl.examples import KINDS

    blocks: list[str] = []
    for level, found in sorted(run.details.get("examples", {}).items(), key=lambda item: -float(item[0])):
        lines = []
        for ticket in dict.fromkeys(one["ticket"] for one in found):
            cells = "".join(
                f"<td>{''.join(_example(o) for o in found if o['ticket'] == ticket and o['kind'] == kind) or '–'}</td>"
                for kind in KINDS
            )
            lines.append(f'<tr><th scope="row">{escape(ticket)}</th>{cells}</tr>')
        head = "".join(
            f'<th scope="col">{h}</th>'
            for h in ("ticket", "right: surest", "missed: its own, not taken", "false alarm: another's, taken")
        )
        blocks.append(
            f"<details{' open' if not blocks else ''}><summary>{percent(float(level))} sparsity</summary>"
            '<div class="scroll" tabindex="0" role="region" aria-label="examples"><table class="examples"><thead>'
            f"<tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></details>"
        )
    return "".join(blocks)


def _example(one: Mapping[str, Any]) -> str:
    own = one["own"] or "none of them"
    said = f"sample {one['sample']}, {own}: score {one['score']:.2f}"
    picture = f'<img src="{escape(one["picture"])}" alt="{escape(said)}">' if "picture" in one else ""
    number = "" if picture else f"#{one['sample']} "
    return f"<figure>{picture}{number}{escape(own)} {one['score']:.2f}</figure>"


def _media(run: RunView) -> str:
    groups: dict[str, list[str]] = {}
    root = run.folder / "media"
    for file in sorted(root.rglob("*")) if root.is_dir() else []:
        kind = file.suffix.lower()
        if kind not in (*_SOUNDS, *_PICTURES):
            continue
        name = escape(file.stem)
        mime = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
        source = f"data:{mime};base64,{base64.b64encode(file.read_bytes()).decode()}"
        shown = (
            f'<audio controls preload="metadata" src="{source}" aria-label="{name}"></audio>'
            if kind in _SOUNDS
            else f'<img src="{source}" alt="{name}">'
        )
        group = str(file.parent.relative_to(root))
        groups.setdefault("" if group == "." else group, []).append(figure(file.stem, shown))
    return "".join(
        (f"<h3>{escape(group)}</h3>" if group else "") + f'<div class="media">{"".join(figures)}</div>'
        for group, figures in groups.items()
    )


# Cost and circumstances


def _cost(run: RunView) -> str:
    weights = sum(run.curve.sizes.values()) if run.curve else None
    tickets = len(run.curve.names) if run.curve else 1
    body: list[list[Any]] = []
    for (method, variant, protocol, sparsity), group in group_rows(run.table["rows"]).items():
        params = float(np.mean([row["params"] for row in group]))
        masks = {"rtl": tickets, "imp_multiple": tickets, "imp_single": 1, "dense": 0}[method]
        stored = None if weights is None else 4 * params + masks * weights / 8
        body.append(
            [
                row_name(method, variant),
                protocol,
                (percent(sparsity), sparsity),
                _count([row["seconds"] for row in group]),
                _count([row["samples"] for row in group]),
                ("–", None) if stored is None else (f"{stored:,.0f}", stored),
            ]
        )
    head = ["method", "protocol", "sparsity", "seconds of training", "samples presented", "bytes of weights and masks"]
    caption = (
        "means over seeds; seconds of all worker processes; float32 for each stored weight, one bit for each prunable "
        "weight and mask; batch norm apart"
    )
    time = f"<p>{escape(took(run.table))}</p>" if took(run.table) else ""
    return time + table(head, body, sortable=True, caption=caption)


def _what(run: RunView) -> str:
    lists = []
    for name, config in run.configs.items():
        lines = [[key, json.dumps(value)] for key, value in config.items() if not key.startswith("_")]
        title = f"settings of {name}" if name else "settings"
        shown = table(["setting", "value"], lines, label=title)
        lists.append(f"<details><summary>{escape(title)}</summary>{shown}</details>")
    circumstances = [[key, str(value)] for key, value in run.table["environment"].items()]
    return (
        f"<pre><code>{escape(run.table['command'])}</code></pre>"
        + "".join(lists)
        + table(["environment", "value"], circumstances, label="environment")
    )
