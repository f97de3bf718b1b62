"""Figures of a run: metric and similarity against sparsity, who shares weights with whom by depth, and examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rtl.alignment import Alignment
from rtl.collapse import Alarm
from rtl.curve import Curve, mean_to_others
from rtl.diagnose import Similarity
from rtl.report import NAMES, Row, row_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe–Ito: told apart with any colour vision; markers too, for print.
STYLES = {
    "rtl": ("#0072B2", "o"),
    "imp_single": ("#D55E00", "s"),
    "imp_multiple": ("#009E73", "^"),
    "dense": ("#555555", "none"),
}
_ON_COLOUR: Any = {"bbox": {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1.5}}
_FURTHER = "Dv<>pP*hX"  # markers of a method's variants and protocols from its third on


def metric_against_sparsity(rows: Iterable[Row], metrics: Mapping[str, str]) -> Figure:
    """One panel a metric (key in a row's metrics -> title): mean over seeds, with the seeds' range shaded."""
    figure, axes = _figure(len(metrics))
    rows = list(rows)
    for axis, (key, title) in zip(axes, metrics.items(), strict=True):
        for method, name, style, own in _lines(rows):
            points: dict[float, list[float]] = {}
            for row in own:
                if key in row["metrics"]:
                    points.setdefault(row["sparsity"], []).append(row["metrics"][key])
            if not points:
                continue
            if method == "dense":
                line = ":" if "linestyle" in style else "--"  # after the first
                axis.axhline(float(np.mean(points[0.0])), color=style["color"], linestyle=line, label=name)
                continue
            x = sorted(points)
            axis.plot(x, [np.mean(points[s]) for s in x], label=name, **style)
            low, high = [min(points[s]) for s in x], [max(points[s]) for s in x]
            axis.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
        axis.set_title(title, fontsize=10)
        _sparsity_axis(axis)
    _legend_below(figure, axes)
    return figure


def metric_by_row(rows: Iterable[Row], metrics: Mapping[str, str]) -> Figure:
    """One panel a metric, of rows of one sparsity: a dot for each method and variant, at its mean over seeds, with the
    seeds' range; dashed, the first's.
    """
    drawn = _lines(list(rows))
    figure, axes = _figure(len(metrics), width=3.2, height=0.9 + 0.24 * len(drawn))
    for axis, (key, title) in zip(axes, metrics.items(), strict=True):
        first = None
        for y, (_, _, style, own) in enumerate(drawn):
            values = [row["metrics"][key] for row in own if key in row["metrics"]]
            if values:
                mean = float(np.mean(values))
                first = mean if first is None else first
                axis.plot([min(values), max(values)], [y, y], color=style["color"], linewidth=1)
                axis.plot([mean], [y], color=style["color"], marker="o", linestyle="none")
        if first is not None:
            axis.axvline(first, color="#555555", linewidth=0.8, linestyle="--", zorder=0)
        axis.set_yticks(range(len(drawn)), [name for _, name, _, _ in drawn], fontsize=8)
        axis.set_ylim(len(drawn) - 0.5, -0.5)
        axis.set_title(title, fontsize=10)
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(alpha=0.25)
    for axis in axes[1:]:
        axis.set_yticklabels([])
    return figure


def similarity_against_sparsity(curve: Curve, alarms: Sequence[Alarm] = ()) -> Figure:
    """Every ticket's mean similarity to the others, between what masks of these sizes have by chance and at most.

    Left over all prunable weights, with a cross where a ticket's collapse alarm was given; right the tickets' mean in
    every layer, from the first (dark) to the last (light).
    """
    figure, (axis, depth) = _figure(2, width=5.2)
    scores = mean_to_others(curve.jaccard())
    for k, name in enumerate(curve.names):
        colour = _colour(k, len(curve.names))
        axis.plot(curve.sparsity[:, k], scores[:, k], color=colour, marker=".", markersize=3, label=name)
        for alarm in alarms:
            if alarm.ticket == name and alarm.layer is None:
                at = float(curve.sparsity[alarm.round, k]), float(scores[alarm.round, k])
                axis.plot(*at, color=colour, marker="x", markersize=9, markeredgewidth=2, linestyle="none")
    sparsity = curve.sparsity.mean(1)
    for label, baseline, line in (("identical", curve.identical(), "--"), ("independent", curve.independent(), ":")):
        axis.plot(sparsity, mean_to_others(baseline).mean(1), color="#555555", linestyle=line, label=f"{label} masks")
    axis.set_title("mean mask similarity to the other tickets (Jaccard)", fontsize=10)
    axis.legend(fontsize=7, ncols=2)
    for number, layer in enumerate(curve.layers):
        colour = _shade(number, len(curve.layers))
        ends = number in (0, len(curve.layers) - 1)
        values = mean_to_others(curve.jaccard(layer)).mean(1)
        depth.plot(sparsity, values, color=colour, linewidth=1, label=layer if ends else None)
    depth.set_title("mean over tickets, layer by layer", fontsize=10)
    depth.legend(fontsize=7)
    for each in (axis, depth):
        each.set_ylim(-0.02, 1.02)
        _sparsity_axis(each)
    return figure


def similarity_by_depth(level: Similarity, sparsity: float, panels: int = 4) -> Figure:
    """Ticket × ticket similarity over all weights and in `panels` layers from the first to the last."""
    layers = list(level.by_layer)
    chosen = [
        layers[i] for i in np.unique(np.linspace(0, len(layers) - 1, min(panels, len(layers))).round().astype(int))
    ]
    matrices = {"all layers": level.matrix} | {layer: level.by_layer[layer] for layer in chosen}
    figure, axes = _figure(len(matrices), width=2.7, height=3.3)
    image: Any = None
    for axis, (title, matrix) in zip(axes, matrices.items(), strict=True):
        image = axis.imshow(matrix.numpy(), vmin=0, vmax=1, cmap="viridis")
        axis.set_title(title, fontsize=8)
        axis.set_xticks(range(len(level.names)), level.names, rotation=90, fontsize=7)
        axis.set_yticks(range(len(level.names)), level.names if axis is axes[0] else [], fontsize=7)
    figure.suptitle(f"mask similarity (Jaccard) at {sparsity:.0%} sparsity, from shallow to deep", fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.7, pad=0.01)
    return figure


def crossed(levels: Mapping[str, Sequence[Sequence[float]]], names: Sequence[str]) -> Figure:
    """What every ticket (a row) makes of every scene's test clips (a column), a panel a sparsity.

    Args:
        levels: by sparsity as text, SI-SNRi in dB, (K, K).
        names: of the K tickets, and of the scenes in the same order.
    """
    values = np.array(list(levels.values()))  # (levels, K, K)
    figure, axes = _figure(len(levels), height=3.4)
    image: Any = None
    for axis, (level, own) in zip(axes, zip(levels, values, strict=True), strict=True):
        # A scene's own difficulty taken out, colours say what a ticket is worth there.
        image = axis.imshow(
            own - own.max(0), cmap="viridis", vmin=float((values - values.max(1)[:, None]).min()), vmax=0
        )
        for ticket, scene in np.ndindex(own.shape):
            axis.text(scene, ticket, f"{own[ticket, scene]:.2f}", ha="center", va="center", fontsize=8, **_ON_COLOUR)
        axis.set_title(f"{float(level):.0%} sparsity", fontsize=9)
        axis.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
        axis.set_yticks(range(len(names)), names if axis is axes[0] else [], fontsize=8)
        axis.set_xlabel("scene of the clips")
    axes[0].set_ylabel("ticket")
    figure.suptitle("SI-SNRi (dB) of every ticket on every scene", fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.7, pad=0.01, label="dB below the scene's best ticket")
    return figure


def semantic_alignment(curve: Curve, found: Alignment) -> Figure:
    """The paper's Fig. 3 from one run's masks: meaning, the masks of the first and last layer, and both over depth.

    Matrices are those of the sparsest stage, which the last two panels' darkest line is too. There, similarity is a
    mean over tickets. Of ρ, a filled marker has p < 0.05, and the legend says ρ and p over all layers together.
    """
    stages = np.unique(np.linspace(0, len(found.sparsity) - 1, min(4, len(found.sparsity))).round().astype(int))
    figure, axes = _figure(5, width=3.1, height=3.4)
    engine: Any = figure.get_layout_engine()
    engine.set(w_pad=0.1)  # inches, beside every panel: a colour bar's numbers ran into the next one's
    shown = {
        "similarity in meaning": found.semantic,
        f"masks of {curve.layers[0]}": curve.jaccard(curve.layers[0])[-1],
        f"masks of {curve.layers[-1]}": curve.jaccard(curve.layers[-1])[-1],
    }
    off = ~np.eye(len(found.names), dtype=bool)
    names = [name if len(name) <= 16 else name[:15] + "…" for name in found.names]  # longer ones leave axes no room
    for axis, (title, matrix) in zip(axes, shown.items(), strict=False):
        values = np.where(off, matrix.numpy(), np.nan)
        image = axis.imshow(values, cmap="viridis", vmin=np.nanmin(values), vmax=max(np.nanmax(values), 1e-3))
        figure.colorbar(image, ax=axis, shrink=0.6, pad=0.02).ax.tick_params(labelsize=7)
        axis.set_title(title, fontsize=9)
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axis.set_yticks(range(len(names)), names if axis is axes[0] else [], fontsize=7)
    depth = np.arange(1, len(found.layers) + 1)
    for shade, stage in enumerate(stages):
        colour, label = _shade(len(stages) - 1 - shade, len(stages)), f"{found.sparsity[stage]:.0%}"
        sharing = [
            float(mean_to_others(curve.jaccard(layer)[_round(curve, found, stage)]).mean()) for layer in found.layers
        ]
        axes[3].plot(depth, sharing, color=colour, marker=".", linewidth=1, label=label)
        overall = f"{label}: {float(found.rho[stage, 0]):+.2f}, p = {float(found.p_value[stage, 0]):.2g}"
        rho, significant = found.rho[stage, 1:].numpy(), found.p_value[stage, 1:].numpy() < 0.05
        axes[4].plot(depth, rho, color=colour, linewidth=1, label=overall)
        axes[4].plot(depth, rho, color=colour, marker="o", markersize=4, linestyle="none", fillstyle="none")
        axes[4].plot(depth[significant], rho[significant], color=colour, marker="o", markersize=4, linestyle="none")
    axes[4].axhline(0, color="#555555", linewidth=0.8)
    axes[3].set_title("mask similarity over depth", fontsize=9)
    axes[4].set_title("Spearman's ρ (filled: p < 0.05)", fontsize=9)
    for axis in axes[3:]:
        axis.set_xlabel("prunable layer, from the first")
        axis.grid(alpha=0.25)
    axes[3].legend(title="sparsity", fontsize=7, title_fontsize=7)
    axes[4].legend(  # below: lines cross all of the panel
        title="ρ over all layers", fontsize=7, title_fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2)
    )
    return figure


def _round(curve: Curve, found: Alignment, stage: int) -> int:
    """The curve's round that a stage of an alignment was taken at."""
    return int((curve.sparsity.mean(1) - found.sparsity[stage]).abs().argmin())


GIVEN = ("target", "noisy", "clean")  # of an example, beside what methods make of it


def _lines(found: Iterable[Row]) -> list[tuple[str, str, dict[str, Any], list[Row]]]:
    """(method, name, how it is drawn, rows) of each method, variant and protocol: after a method's first, hollow and
    dashed.

    The name says the protocol where there are several. Figures of single images had none in older runs.
    """
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for one in found:
        groups.setdefault((one["method"], one["variant"], one.get("protocol", "")), []).append(one)
    several = len({protocol for _, _, protocol in groups}) > 1
    drawn = []
    for method, (colour, marker) in STYLES.items():
        own = [key for key in groups if key[0] == method]
        for number, key in enumerate(own):
            style: dict[str, Any] = {"color": colour, "marker": marker}
            if number:
                style |= {"linestyle": (0, (4, 1 + number)), "markerfacecolor": "none"}
            if number > 1:  # figures of images have markers alone
                style["marker"] = _FURTHER[(number - 2) % len(_FURTHER)]
            drawn.append((method, row_name(method, key[1], key[2] if several else ""), style, groups[key]))
    return drawn


def psnr_by_image(found: Sequence[Mapping[str, Any]]) -> Figure:
    """One panel a sparsity: every image's PSNR by method, mean over seeds; dense is drawn in all of them."""
    levels = sorted({one["sparsity"] for one in found if one["method"] != "dense"}) or [0.0]
    images = list(dict.fromkeys(one["image"] for one in found))
    figure, axes = _figure(len(levels), width=max(2.6, 0.32 * len(images)), height=4.2)
    for axis, level in zip(axes, levels, strict=True):
        for method, name, style, own in _lines(found):
            points: dict[str, list[float]] = {}
            for one in own:
                if one["sparsity"] in (level, 0.0):
                    points.setdefault(one["image"], []).append(one["psnr"])
            if points:
                x, y = [images.index(image) for image in points], [np.mean(values) for values in points.values()]
                style |= {"linestyle": "none"} | ({"marker": "_"} if method == "dense" else {})
                axis.plot(x, y, label=name, **style)
        axis.set_xticks(range(len(images)), images, rotation=90, fontsize=7)
        axis.set_title(f"PSNR (dB) at {level:.0%} sparsity", fontsize=10)
        axis.grid(alpha=0.25)
    _legend_below(figure, axes)
    return figure


def psnr_against_similarity(found: Sequence[Mapping[str, Any]]) -> Figure:
    """One panel a sparsity, one point a region: its PSNR against its ticket's mean similarity to the others.

    Of the first variant in `found`, since all have the same masks, and of the first protocol.
    """
    regions = [one for one in found if "similarity_by_region" in one]
    regions = [one for one in regions if all(one.get(key) == regions[0].get(key) for key in ("variant", "protocol"))]
    levels = sorted({one["sparsity"] for one in regions}) or [0.0]
    images = list(dict.fromkeys(one["image"] for one in regions))
    figure, axes = _figure(len(levels))
    for axis, level in zip(axes, levels, strict=True):
        here = [one for one in regions if one["sparsity"] == level]
        for one in here:
            k = images.index(one["image"])
            x, y = one["similarity_by_region"], one["psnr_by_region"]
            axis.plot(x, y, color=_colour(k, len(images)), marker="o", markersize=4, linestyle="none", alpha=0.8)
        rhos = [one["spearman"]["rho"] for one in here if one["spearman"]["rho"] is not None]
        mean = f", mean ρ {np.mean(rhos):.2f}" if rhos else ""
        axis.set_title(f"{level:.0%} sparsity{mean}", fontsize=10)
        axis.set_xlabel("mean mask similarity to the other regions")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("PSNR of the region (dB)")
    return figure


def example(folder: Path) -> Figure:
    """One example side by side: what was to be had, then a row a sparsity with what each method gives.

    The folder holds pictures `target.png`, or sounds `noisy.wav` and `clean.wav` (shown as spectrograms), with
    `METHOD-SPARSITY.png` or `.wav` beside them.
    """
    shown = {file.stem: file for file in sorted(folder.iterdir()) if file.suffix in (".png", ".wav")}
    given = [name for name in GIVEN if name in shown]
    made = [name.rpartition("-") for name in shown if name not in given]
    methods = [method for method in STYLES if method != "dense" and any(method == own for own, _, _ in made)]
    levels = sorted({level for method, _, level in made if method != "dense"}, key=float) or ["0"]
    dense = [f"{method}-{level}" for method, _, level in made if method == "dense"]
    columns = [*given, *dense, *methods]
    wave = any(file.suffix == ".wav" for file in shown.values())
    figure, grid = _grid(len(levels), len(columns), *((2.9, 2.3) if wave else (2.6, _height(shown, 2.6) + 0.3)))
    reference = max((np.abs(_spectrum(shown[name])[0]).max() for name in given), default=1.0) if wave else 1.0
    for row, level in enumerate(levels):
        for axis, column in zip(grid[row], columns, strict=True):
            method = column.partition("-")[0]
            name = f"{column}-{level}" if column in methods else column
            first = column not in methods
            if name not in shown or (first and row):  # what does not depend on sparsity is shown once
                axis.axis("off")
                continue
            label = NAMES.get(method, method) if first else f"{NAMES[column]}, {float(level):.0%}"
            axis.set_title(label, fontsize=9)
            if wave:
                spectrum, extent = _spectrum(shown[name])
                decibels = 20 * np.log10(np.maximum(np.abs(spectrum) / reference, 1e-4))
                axis.imshow(decibels, origin="lower", aspect="auto", cmap="magma", vmin=-80, vmax=0, extent=extent)
                axis.tick_params(labelsize=7)
            else:
                axis.imshow(_pixels(shown[name]))
                axis.set_xticks([])
                axis.set_yticks([])
    title = f"{folder.name}: spectrograms, kHz against seconds, 80 dB from dark to bright" if wave else folder.name
    figure.suptitle(title, fontsize=10)
    return figure


def _pixels(file: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def _height(shown: Mapping[str, Path], width: float) -> float:
    """Of a picture so wide."""
    rows, columns, _ = _pixels(next(iter(shown.values()))).shape
    return width * rows / columns


def _spectrum(file: Path) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """Complex (frequency, time), windows of 512 samples, and its extent: seconds, kHz."""
    from scipy.io import wavfile
    from scipy.signal import stft

    rate, samples = wavfile.read(file)
    return stft(samples / 32768, nperseg=512)[2], (0, len(samples) / rate, 0, rate / 2000)


def save(figure: Figure, file: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    import io

    import matplotlib.pyplot as plt

    from rtl.run import write_atomically

    buffer = io.BytesIO()
    # Without the version in its metadata, equal figures are equal files.
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    write_atomically(file, buffer.getvalue())


def _figure(panels: int, width: float = 3.6, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    figure, axes = _grid(1, panels, width, height)
    return figure, axes[0]


def _legend_below(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend of all panels' lines, under them: it hides none, and the figure grows by its height."""
    lines = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    columns = max(1, int(figure.get_figwidth() / 2.4))
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(lines) // columns))
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=columns, fontsize=8)


def _grid(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    """Panels of this size in inches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (width * columns, height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    return figure, [list(line) for line in axes]


def _sparsity_axis(axis: Axes) -> None:
    axis.set_xlabel("sparsity of each ticket")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.grid(alpha=0.25)


def _colour(k: int, of: int) -> Any:
    import matplotlib

    return matplotlib.colormaps["tab10" if of <= 10 else "turbo"](k if of <= 10 else k / of)


def _shade(number: int, of: int) -> Any:
    import matplotlib

    return matplotlib.colormaps["viridis"](0.9 * number / max(1, of - 1))
