"""rtl.plots: what the figures show, read from the figures themselves."""

import dataclasses

import matplotlib
import numpy as np
import pytest
import torch
from test_report import row

from rtl import plots
from rtl.alignment import alignment
from rtl.collapse import Alarm
from rtl.curve import Curve
from rtl.diagnose import Similarity

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def closed():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


def level(value, k=3, layers=6):
    matrix = torch.full((k, k), value, dtype=torch.float64).fill_diagonal_(1)
    return Similarity(tuple("abc"[:k]), matrix, {f"layer{i}": matrix * (i + 1) / layers for i in range(layers)})


def lines(axis):
    return {line.get_label(): line for line in axis.get_lines()}


def test_a_metric_is_its_mean_over_seeds_against_sparsity_with_dense_as_a_level():
    rows = [
        row(m, s, seed, accuracy=0.1 * seed + s / 10)
        for m in ("rtl", "imp_single")
        for seed in (1, 3)
        for s in (0.5, 0.9)
    ]
    rows.append(row("dense", 0.0, accuracy=0.7))
    figure = plots.metric_against_sparsity(rows, {"accuracy": "accuracy", "balanced_accuracy.threshold": "BA"})
    assert [axis.get_title() for axis in figure.axes] == ["accuracy", "BA"]
    drawn = lines(figure.axes[0])
    assert drawn.keys() == {"RTL", "IMP single", "dense"}
    assert list(drawn["RTL"].get_xdata()) == [0.5, 0.9]
    assert list(drawn["RTL"].get_ydata()) == pytest.approx([0.25, 0.29])
    assert list(drawn["dense"].get_ydata()) == [0.7, 0.7]
    assert len(figure.axes[0].collections) == 2  # the range over seeds


def test_a_methods_variants_are_lines_of_their_own():
    rows = [row("rtl", s, accuracy=s) for s in (0.5, 0.9)] + [row("dense", 0.0, accuracy=0.7)]
    rows += [row("rtl", s, accuracy=2 * s) | {"variant": "schedule=mixed"} for s in (0.5, 0.9)]
    drawn = lines(plots.metric_against_sparsity(rows, {"accuracy": "accuracy"}).axes[0])
    assert drawn.keys() == {"RTL", "RTL (schedule=mixed)", "dense"}
    assert list(drawn["RTL"].get_ydata()) == [0.5, 0.9]
    assert list(drawn["RTL (schedule=mixed)"].get_ydata()) == [1, 1.8]
    assert drawn["RTL"].get_color() == drawn["RTL (schedule=mixed)"].get_color()
    assert drawn["RTL"].get_linestyle() != drawn["RTL (schedule=mixed)"].get_linestyle()


def test_variants_at_one_sparsity_are_rows_with_a_dot_at_the_mean_and_the_range_of_seeds():
    rows = [
        row("rtl", 0.5, seed, accuracy=number + seed / 10) | {"variant": variant}
        for number, variant in enumerate("ab")
        for seed in (1, 3)
    ]
    rows += [row("dense", 0.0, accuracy=0.7), row("imp_single", 0.5) | {"metrics": {}}]
    (axis,) = plots.metric_by_row(rows, {"accuracy": "accuracy"}).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["RTL (a)", "RTL (b)", "IMP single", "dense"]
    dots = [(*one.get_xdata(), *one.get_ydata()) for one in axis.get_lines() if one.get_marker() == "o"]
    assert dots == [pytest.approx(dot) for dot in ((0.2, 0), (1.2, 1), (0.7, 3))]
    assert list(axis.get_lines()[0].get_xdata()) == pytest.approx([0.1, 0.3])
    dashed = [one for one in axis.get_lines() if one.get_linestyle() == "--"]
    assert [list(one.get_xdata()) for one in dashed] == [pytest.approx([0.2, 0.2])]
    assert axis.yaxis_inverted()


def test_protocols_of_merged_runs_are_lines_of_their_own():
    rows = [row("rtl", s, accuracy=s) for s in (0.5, 0.9)] + [row("dense", 0.0, accuracy=0.7)]
    rows += [one | {"protocol": "paper", "metrics": {"accuracy": 0.1}} for one in rows]
    figure = plots.metric_against_sparsity(rows, {"accuracy": "accuracy"})
    drawn = lines(figure.axes[0])
    assert drawn.keys() == {"RTL, quick", "RTL, paper", "dense, quick", "dense, paper"}
    assert list(drawn["RTL, quick"].get_ydata()) == [0.5, 0.9]
    assert list(drawn["RTL, paper"].get_ydata()) == [0.1, 0.1]
    assert list(drawn["dense, quick"].get_ydata()) == [0.7, 0.7]
    for method in ("RTL", "dense"):
        assert drawn[f"{method}, quick"].get_linestyle() != drawn[f"{method}, paper"].get_linestyle()
    (legend,) = figure.legends  # under the panels, and not in one of them
    assert {text.get_text() for text in legend.get_texts()} == drawn.keys()
    assert figure.axes[0].get_legend() is None


def test_one_seed_at_one_sparsity_is_drawn():
    figure = plots.metric_against_sparsity([row()], {"accuracy": "accuracy"})
    assert list(lines(figure.axes[0])["RTL"].get_ydata()) == [0.9]


def curve(k=3, layers=2):
    """Two rounds of masks over layers of 100 weights: 50, then 25 kept, 40 and 20 of them shared."""
    both = torch.stack([torch.full((k, k), shared).fill_diagonal_(kept) for kept, shared in ((50, 40), (25, 20))])
    names = [f"layer{n}" for n in range(layers)]
    return Curve(tuple("abcdefghijklmno"[:k]), dict.fromkeys(names, 100), {name: both.clone() for name in names})


def test_similarity_is_a_line_for_each_ticket_between_both_baselines_with_its_alarm():
    alarm = Alarm("b", None, "spike", 1, 0.75, 0, 0.5)
    figure = plots.similarity_against_sparsity(curve(), [alarm, dataclasses.replace(alarm, ticket="c", layer="layer0")])
    drawn = lines(figure.axes[0])
    assert {"a", "b", "c", "independent masks", "identical masks"} <= drawn.keys()
    assert list(drawn["b"].get_xdata()) == [0.5, 0.75]
    assert list(drawn["b"].get_ydata()) == pytest.approx([40 / 60, 20 / 30])
    assert list(drawn["independent masks"].get_ydata()) == pytest.approx([0.5 / 1.5, 0.25 / 1.75])
    assert list(drawn["identical masks"].get_ydata()) == [1, 1]
    crosses = [line for line in figure.axes[0].get_lines() if line.get_marker() == "x"]
    assert [(list(c.get_xdata()), list(c.get_ydata())) for c in crosses] == [([0.75], [pytest.approx(20 / 30)])]
    assert crosses[0].get_color() == drawn["b"].get_color()
    assert lines(figure.axes[1]).keys() >= {"layer0", "layer1"}


def test_similarity_by_depth_shows_all_layers_together_and_some_from_the_first_to_the_last():
    figure = plots.similarity_by_depth(level(0.5), 0.75)
    panels = [axis for axis in figure.axes if axis.get_images()]
    titles = [axis.get_title() for axis in panels]
    assert titles[0] == "all layers"
    assert titles[1] == "layer0"
    assert titles[-1] == "layer5"
    assert len(titles) == 5
    assert float(panels[-1].get_images()[0].get_array()[0, 1]) == 0.5
    assert all(axis.get_images()[0].get_clim() == (0, 1) for axis in panels)


def test_crossed_writes_each_figure_and_colours_it_by_its_distance_from_the_scenes_best():
    figure = plots.crossed({"0.5": [[5.0, 1.0], [4.5, 3.0]], "0.75": [[4.0, 1.0], [4.0, 1.5]]}, ("in", "out"))
    first, second = (axis for axis in figure.axes if axis.get_images())
    assert [text.get_text() for text in first.texts] == ["5.00", "1.00", "4.50", "3.00"]
    assert first.get_images()[0].get_array().tolist() == [[0, -2], [-0.5, 0]]
    assert first.get_images()[0].get_clim() == second.get_images()[0].get_clim() == (-2, 0)
    assert first.get_title() == "50% sparsity"
    assert [label.get_text() for label in first.get_yticklabels()] == ["in", "out"]


@pytest.mark.parametrize(("k", "layers"), [(1, 1), (2, 2), (3, 1)])
def test_few_tickets_and_few_layers_are_drawn(k, layers, tmp_path):
    plots.save(plots.similarity_by_depth(level(0.5, k, layers), 0.5), tmp_path / "depth.png")
    plots.save(plots.similarity_against_sparsity(curve(k, layers)), tmp_path / "similarity.png")
    assert (tmp_path / "depth.png").stat().st_size > 5000


def test_more_tickets_than_named_colours_are_told_apart():
    drawn = plots.similarity_against_sparsity(curve(12)).axes[0].get_lines()
    assert len({str(line.get_color()) for line in drawn}) == 13


def test_equal_figures_are_equal_files_and_are_closed(tmp_path):
    import matplotlib.pyplot as plt

    for name in ("one", "two"):
        plots.save(plots.metric_against_sparsity([row()], {"accuracy": "accuracy"}), tmp_path / f"{name}.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert plt.get_fignums() == []


def test_alignment_shows_meaning_the_first_and_last_layers_masks_and_both_over_depth(tmp_path):
    masks = curve(4, layers=3)
    masks.overlaps["layer2"][1, 0, 1] = masks.overlaps["layer2"][1, 1, 0] = 5
    meaning = torch.eye(4, dtype=torch.float64)
    meaning[0, 2] = meaning[2, 0] = 0.5
    found = alignment(masks, meaning)
    figure = plots.semantic_alignment(masks, found)
    titles = ["similarity in meaning", "masks of layer0", "masks of layer2", "mask similarity over depth"]
    assert [axis.get_title() for axis in figure.axes[:5]] == [*titles, "Spearman's ρ (filled: p < 0.05)"]
    overall = [text.get_text() for text in figure.axes[4].get_legend().get_texts()]
    assert len(overall) == len(figure.axes[3].get_legend().get_texts())
    assert overall[-1].endswith(f": {float(found.rho[-1, 0]):+.2f}, p = {float(found.p_value[-1, 0]):.2g}")
    assert float(figure.axes[0].get_images()[0].get_array()[0, 2]) == 0.5
    assert float(figure.axes[2].get_images()[0].get_array()[0, 1]) == pytest.approx(5 / 45)
    sharing, rho = lines(figure.axes[3])["75%"], lines(figure.axes[4])[overall[-1]]
    assert list(sharing.get_xdata()) == [1, 2, 3]
    assert sharing.get_ydata()[0] == pytest.approx(20 / 30)
    assert sharing.get_ydata()[2] == pytest.approx((5 * 20 / 30 + 5 / 45) / 6)
    assert list(rho.get_ydata()) == pytest.approx(found.rho[1, 1:].tolist(), nan_ok=True)
    plots.save(figure, tmp_path / "alignment.png")
    assert (tmp_path / "alignment.png").stat().st_size > 5000


def per_image(image, method, sparsity, psnr, similarity=None):
    one = {"image": image, "method": method, "variant": "", "sparsity": sparsity, "seed": 0, "psnr": psnr}
    if similarity:
        one |= {
            "similarity_by_region": similarity,
            "psnr_by_region": [10.0, 20.0],
            "spearman": {"rho": None, "p": None},
        }
    return one


def test_every_image_has_its_psnr_by_method_at_each_sparsity():
    found = [per_image(i, m, s, 20 + s) for i in ("a", "b") for m in ("rtl", "imp_single") for s in (0.5, 0.75)]
    found += [one | {"variant": "schedule=mixed", "psnr": 19} for one in found if one["method"] == "rtl"]
    figure = plots.psnr_by_image([*found, per_image("a", "dense", 0.0, 30)])
    assert [axis.get_title() for axis in figure.axes] == ["PSNR (dB) at 50% sparsity", "PSNR (dB) at 75% sparsity"]
    drawn = lines(figure.axes[1])
    assert list(drawn["RTL"].get_ydata()) == [20.75, 20.75]
    assert list(drawn["RTL (schedule=mixed)"].get_ydata()) == [19, 19]
    assert list(drawn["dense"].get_ydata()) == [30]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["a", "b"]


def test_images_of_several_protocols_are_told_apart():
    found = [per_image("a", "rtl", 0.5, 20, similarity=[0.3, 0.6]) | {"protocol": p} for p in ("reduced", "paper")]
    found[1] |= {"psnr": 30, "psnr_by_region": [0.0, 0.0]}
    drawn = lines(plots.psnr_by_image(found).axes[0])
    assert {name: list(line.get_ydata()) for name, line in drawn.items()} == {"RTL, reduced": [20], "RTL, paper": [30]}
    (axis,) = plots.psnr_against_similarity(found).axes
    assert [list(line.get_ydata()) for line in axis.get_lines()] == [[10, 20]]


def test_regions_are_points_of_similarity_and_psnr():
    found = [per_image(i, "rtl", 0.5, 20, similarity=[0.3, 0.6]) for i in ("a", "b")]
    found[0]["spearman"]["rho"] = 0.5
    found.append(found[0] | {"variant": "schedule=mixed", "psnr_by_region": [0.0, 0.0]})
    figure = plots.psnr_against_similarity([*found, per_image("a", "imp_single", 0.5, 20)])
    (axis,) = figure.axes
    assert axis.get_title() == "50% sparsity, mean ρ 0.50"
    assert [list(line.get_xdata()) for line in axis.get_lines()] == [[0.3, 0.6]] * 2
    assert [list(line.get_ydata()) for line in axis.get_lines()] == [[10, 20]] * 2


def shown(figure):
    return [[axis.get_title() for axis in figure.axes[i : i + 4] if axis.axison] for i in range(0, len(figure.axes), 4)]


def test_a_picture_stands_beside_what_each_method_makes_of_it(tmp_path):
    from PIL import Image

    for k, name in enumerate(("target", "dense-0", "rtl-0.5", "rtl-0.75", "imp_single-0.5", "imp_single-0.75")):
        Image.new("RGB", (8, 4), (40 * k, 0, 0)).save(tmp_path / f"{name}.png")
    figure = plots.example(tmp_path)
    assert shown(figure) == [["target", "dense", "RTL, 50%", "IMP single, 50%"], ["RTL, 75%", "IMP single, 75%"]]
    assert int(figure.axes[-1].get_images()[0].get_array()[0, 0, 0]) == 200


def test_a_sound_is_shown_as_spectrograms_of_seconds_and_khz_on_one_scale(tmp_path):
    from scipy.io import wavfile

    time = np.arange(16_000) / 16_000
    for name, level in (("noisy", 20_000), ("clean", 20_000), ("rtl-0.5", 20)):
        wavfile.write(tmp_path / f"{name}.wav", 16_000, (level * np.sin(2 * np.pi * 2000 * time)).astype(np.int16))
    (titles,) = shown(figure := plots.example(tmp_path))
    assert titles == ["noisy", "clean", "RTL, 50%"]
    clean, faint = (axis.get_images()[0] for axis in figure.axes[1:])
    assert clean.get_extent() == [0, 1, 0, 8]
    loudest = clean.get_array().max(axis=1).argmax() / (len(clean.get_array()) - 1) * 8
    assert loudest == pytest.approx(2, abs=0.05)  # kHz
    assert clean.get_array().max() == 0
    assert faint.get_array().max() == pytest.approx(-60, abs=1)  # a thousandth of the level
