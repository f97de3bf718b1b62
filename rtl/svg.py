"""Charts for the report page: SVG that takes its colours from the page's style sheet, described for screen readers.

Colours are the classes c0..c9 of `assets/report.css`; lines differ by marker too. Nothing here runs in the browser.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

_WIDTH, _HEIGHT = 460, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 36
_MARKERS = 4


_SPARSITIES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.999)


def percent(value: float) -> str:
    """0.965 as "96.5%", 0.5 as "50%"."""
    return f"{100 * value:.1f}".removesuffix(".0") + "%"


@dataclass(frozen=True)
class Series:
    """One line. `kind`: "line" with markers, "thin" without, "dashed" or "dotted" (baselines)."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    kind: str = "line"


@dataclass(frozen=True)
class Mark:
    """A cross at a point, with what it says."""

    x: float
    y: float
    text: str
    colour: int = 0


class Html(str):
    """Text of a table's cell that is HTML already."""


def halves(sparsities: Sequence[float]) -> bool:
    """Whether a chart against these shows equal factors of density as equal steps."""
    return 0.9 < max(sparsities) < 1


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    marks: Sequence[Mark] = (),
    x_format: Callable[[float], str] = percent,
    y_from: float | None = None,
    y_to: float | None = None,
) -> str:
    """A figure: the chart, its legend, and the numbers in a table that opens. Points that are NaN break a line.

    Where x is a sparsity (`x_format` is `percent`) and goes beyond 0.9, equal steps are equal factors of density.
    """
    finite = [(x, y) for one in series for x, y in one.points if math.isfinite(y)]
    if not finite:
        return ""
    xs, ys = [x for x, _ in finite], [y for _, y in finite]
    low = min(ys) if y_from is None else y_from
    high = max(ys) if y_to is None else y_to
    y_ticks = _ticks(low, high)
    low, high = min(low, y_ticks[0]), max(high, y_ticks[-1])
    halving = x_format is percent and halves(xs)
    x_ticks = list(_SPARSITIES) if halving else _ticks(min(xs), max(xs))
    left, right = min(xs), max(xs)

    def scaled(x: float) -> float:
        return -math.log2(1 - x) if halving else x

    def at(x: float, y: float) -> tuple[float, float]:
        across = (scaled(x) - scaled(left)) / (scaled(right) - scaled(left)) if right > left else 0.5
        up = (y - low) / (high - low) if high > low else 0.5
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in y_ticks:
        y = at(left, tick)[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{_number(tick)}</text>')
    for tick in x_ticks:
        if left <= tick <= right:
            x = at(tick, low)[0]
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">'
                f"{x_format(tick)}</text>"
            )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="tick" x="{middle}" y="{_HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>')
    for one in series:
        for piece in _pieces(one.points):
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*p) for p in piece))
            parts.append(f'<polyline class="{one.kind} c{one.colour % 10}" points="{path}"/>')
            if one.kind == "line":  # of many points, some: markers tell lines apart, and should not hide them
                marked = piece[one.colour % 3 :: len(piece) // 8] if len(piece) > 16 else piece
                parts += [_marker(*at(*p), one.colour, f"{one.name}: {x_format(p[0])}, {p[1]:.4g}") for p in marked]
    for mark in marks:
        x, y = at(mark.x, mark.y)
        parts.append(
            f'<path class="alarm c{mark.colour % 10}" d="M{x - 5:.1f} {y - 5:.1f}l10 10m0 -10l-10 10">'
            f"<title>{escape(mark.text)}</title></path>"
        )
    svg = (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title)}; the numbers are in the table below">' + "".join(parts) + "</svg>"
    )
    return figure(title, svg, legend(series, bool(marks)), _numbers(title, series, x_label, x_format))


def dot_chart(title: str, rows: Sequence[Series]) -> str:
    """A figure with a name and a dot for each of `rows`, of one point each, and a dashed line at the first's."""
    known = [one for one in rows if math.isfinite(one.points[0][1])]
    if not known:
        return ""
    values = [one.points[0][1] for one in known]
    ticks = _ticks(min(values), max(values))
    left = 10 + 6.2 * max(len(one.name) for one in known)
    width, line = left + 250, 19
    bottom = _TOP + line * len(known)

    def across(value: float) -> float:
        return left + 8 + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (width - left - 26)

    parts = []
    for tick in ticks:
        x = across(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{_number(tick)}</text>')
    x = across(values[0])
    parts.append(f'<polyline class="dashed c9" points="{x:.1f},{_TOP} {x:.1f},{bottom}"/>')
    for number, (one, value) in enumerate(zip(known, values, strict=True)):
        y = _TOP + line * (number + 0.5)
        name = escape(one.name)
        parts.append(f'<text class="tick" x="{left - 4:.1f}" y="{y + 4:.1f}" text-anchor="end">{name}</text>')
        parts.append(_marker(across(value), y, one.colour, f"{one.name}: {value:.4g}"))
    numbers = table(["", title], [[one.name, f"{y:.4g}"] for one, y in zip(known, values, strict=True)], label=title)
    svg = (
        f'<svg style="max-width:{width:.0f}px" viewBox="0 0 {width:.0f} {bottom + 22}" role="img" '
        f'aria-label="{escape(title)}; the numbers are in the table below">' + "".join(parts) + "</svg>"
    )
    return figure(title, svg, _folded(numbers))


def figure(title: str, picture: str, *below: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{picture}{''.join(below)}</figure>"


def legend(series: Sequence[Series], alarms: bool) -> str:
    items = []
    for one in series:
        swatch = f'<polyline class="{one.kind} c{one.colour % 10}" points="0,6 22,6"/>'
        if one.kind == "line":
            swatch += _marker(11, 6, one.colour, "")
        items.append(f'<li><svg viewBox="0 0 22 12" aria-hidden="true">{swatch}</svg>{escape(one.name)}</li>')
    if alarms:
        cross = '<path class="alarm c0" d="M6 1l10 10m0 -10l-10 10"/>'
        items.append(f'<li><svg viewBox="0 0 22 12" aria-hidden="true">{cross}</svg>collapse alarm</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[Any]],
    sortable: bool = False,
    caption: str = "",
    label: str = "",
) -> str:
    """An HTML table; the first column heads its row.

    A cell is text, `Html`, or a number as (text, what it is sorted by, None where it is not known). `label`: what
    screen readers call the table where it has no caption.
    """
    cells, numbers = [], set()
    for row in rows:
        line = ""
        for column, cell in enumerate(row):
            text, key = cell if isinstance(cell, tuple) else (cell, None)
            sort = "" if key is None else f' data-sort="{key}"'
            tag = 'th scope="row"' if column == 0 else "td"
            numeric = ""
            if isinstance(cell, tuple):
                numeric = ' class="n"'
                numbers.add(column)
            shown = text if isinstance(text, Html) else escape(str(text))
            line += f"<{tag}{sort}{numeric}>{shown}</{tag.split()[0]}>"
        cells.append(f"<tr>{line}</tr>")
    headings = ""
    for column, heading in enumerate(head):
        numeric = ' class="n"' if column in numbers else ""
        said = f'<button type="button">{escape(heading)}</button>' if sortable else escape(heading)
        headings += f'<th scope="col"{numeric}{" aria-sort=none" if sortable else ""}>{said}</th>'
    said = f"<caption><span>{escape(caption)}</span></caption>" if caption else ""
    kind = ' class="sortable"' if sortable else ""
    name = escape(caption or label or "table")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{name}"><table{kind}>{said}'
        f"<thead><tr>{headings}</tr></thead><tbody>{''.join(cells)}</tbody></table></div>"
    )


def tree(names: Sequence[str], links: Sequence[Sequence[float]], title: str) -> str:
    """A dendrogram, leaves on the left: `links` as scipy's `linkage` gives them."""
    from scipy.cluster.hierarchy import dendrogram

    drawn = dendrogram(links, no_plot=True, labels=list(names))
    row, span = 18, 260
    height = row * len(names) + 30
    furthest = max(max(heights) for heights in drawn["dcoord"]) or 1.0
    name_width = 8 + 7 * max(map(len, names))

    def x(distance: float) -> float:
        return name_width + distance / furthest * span

    parts = [
        f'<text class="tick" x="{name_width - 6}" y="{row * k + row / 2 + 4:.1f}" text-anchor="end">{escape(n)}</text>'
        for k, n in enumerate(drawn["ivl"])
    ]
    for places, heights in zip(drawn["icoord"], drawn["dcoord"], strict=True):
        points = " ".join(f"{x(h):.1f},{p / 10 * row:.1f}" for p, h in zip(places, heights, strict=True))
        parts.append(f'<polyline class="thin c0" points="{points}"/>')
    for tick in (0.0, furthest):
        anchor = "start" if tick == 0 else "end"
        parts.append(
            f'<text class="tick" x="{x(tick):.1f}" y="{height - 6}" text-anchor="{anchor}">{1 - tick:.3f}</text>'
        )
    return (
        f'<svg style="max-width:{name_width + span + 10}px" viewBox="0 0 {name_width + span + 10} {height}" role="img" '
        f'aria-label="{escape(title)}">' + "".join(parts) + "</svg>"
    )


def stacked(counts: Sequence[int], colours: Callable[[int], str], text: str) -> Html:
    """One bar, a part for each of `counts`, as wide as its share."""
    total, parts = sum(counts) or 1, []
    for n, count in enumerate(counts):
        if count:
            parts.append(f'<i style="width:{100 * count / total:.3f}%;background:{colours(n)}"></i>')
    said = escape(text)
    return Html(f'<span class="bar" role="img" aria-label="{said}" title="{said}">{"".join(parts)}</span>')


def _numbers(title: str, series: Sequence[Series], x_label: str, x_format: Callable[[float], str]) -> str:
    values = [
        {round(x, 9): y for x, y in one.points} for one in series
    ]  # a mean of equal sparsities is off by rounding
    xs = sorted({x for own in values for x in own})
    rows = [[x_format(x), *(f"{v[x]:.4g}" if x in v and math.isfinite(v[x]) else "–" for v in values)] for x in xs]
    numbers = table([x_label, *(one.name for one in series)], rows, label=f"numbers of: {title}")
    return _folded(numbers)


def _folded(numbers: str) -> str:
    return f'<details class="numbers"><summary>numbers</summary>{numbers}</details>'


def _pieces(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    pieces: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            pieces[-1].append(point)
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _marker(x: float, y: float, colour: int, text: str) -> str:
    said = f"<title>{escape(text)}</title>" if text else ""
    kind = colour % _MARKERS
    if kind == 0:
        return f'<circle class="dot c{colour % 10}" cx="{x:.1f}" cy="{y:.1f}" r="3.2">{said}</circle>'
    shape = {1: "M-3-3h6v6h-6z", 2: "M0-4l4 7h-8z", 3: "M0-4l4 4l-4 4l-4-4z"}[kind]
    return f'<path class="dot c{colour % 10}" transform="translate({x:.1f} {y:.1f})" d="{shape}">{said}</path>'


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values that span low to high."""
    if high - low < 1e-9:
        low, high = low - 0.05, high + 0.05
    step = 10 ** math.floor(math.log10((high - low) / about))
    step *= min((m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= about), default=10)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 10) for n in range(first, last + 1)]


def _number(value: float) -> str:
    return f"{value:.10g}"
