"""Figures of a run: metric and similarity against sparsity, and who shares weights with whom by depth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rtl.alignment import Alignment
from rtl.collapse import Alarm
from rtl.curve import Curve, mean_to_others
from rtl.diagnose import Similarity
from rtl.report import NAMES, Row

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


def metric_against_sparsity(rows: Iterable[Row], metrics: Mapping[str, str]) -> Figure:
    """One panel a metric (key in a row's metrics -> title): mean over seeds, with the seeds' range shaded."""
    figure, axes = _figure(len(metrics))
    rows = list(rows)
    for axis, (key, title) in zip(axes, metrics.items(), strict=True):
        for method, (colour, marker) in STYLES.items():
            points: dict[float, list[float]] = {}
            for row in rows:
                if row["method"] == method and key in row["metrics"]:
                    points.setdefault(row["sparsity"], []).append(row["metrics"][key])
            if not points:
                continue
            if method == "dense":
                axis.axhline(float(np.mean(points[0.0])), color=colour, linestyle="--", label=NAMES[method])
                continue
            x = sorted(points)
            axis.plot(x, [np.mean(points[s]) for s in x], color=colour, marker=marker, label=NAMES[method])
            low, high = [min(points[s]) for s in x], [max(points[s]) for s in x]
            axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set_title(title, fontsize=10)
        _sparsity_axis(axis)
    axes[0].legend(fontsize=8)
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


def semantic_alignment(curve: Curve, found: Alignment) -> Figure:
    """The paper's Fig. 3 from one run's masks: meaning, the masks of the first and last layer, and both over depth.

    Matrices are those of the sparsest stage, which the last two panels' darkest line is too. There, similarity is a
    mean over tickets; a filled marker is a correlation with p < 0.05.
    """
    stages = np.unique(np.linspace(0, len(found.sparsity) - 1, min(4, len(found.sparsity))).round().astype(int))
    figure, axes = _figure(5, width=3.1, height=3.4)
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
        figure.colorbar(image, ax=axis, shrink=0.6, pad=0.02)
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
        rho, significant = found.rho[stage, 1:].numpy(), found.p_value[stage, 1:].numpy() < 0.05
        axes[4].plot(depth, rho, color=colour, linewidth=1, label=label)
        axes[4].plot(depth, rho, color=colour, marker="o", markersize=4, linestyle="none", fillstyle="none")
        axes[4].plot(depth[significant], rho[significant], color=colour, marker="o", markersize=4, linestyle="none")
    axes[4].axhline(0, color="#555555", linewidth=0.8)
    axes[3].set_title("mask similarity over depth", fontsize=9)
    axes[4].set_title("Spearman's ρ with meaning", fontsize=9)
    for axis in axes[3:]:
        axis.set_xlabel("prunable layer, from the first")
        axis.grid(alpha=0.25)
    axes[3].legend(title="sparsity", fontsize=7, title_fontsize=7)
    return figure


def _round(curve: Curve, found: Alignment, stage: int) -> int:
    """The curve's round that a stage of an alignment was taken at."""
    return int((curve.sparsity.mean(1) - found.sparsity[stage]).abs().argmin())


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
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, panels, figsize=(width * panels, height), squeeze=False, layout="constrained")
    return figure, list(axes[0])


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
