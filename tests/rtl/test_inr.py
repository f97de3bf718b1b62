"""The picture experiment: equal θ0 and equal costs, PSNR of what is seen, from files of every kind, resumable."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toys import quiet, seeded, tree

import rtl
import rtl.cli
from rtl.data import picture, sample_pictures
from rtl.errors import InputError
from rtl.evaluate import evaluate, predict
from rtl.models import inr
from rtl.models.inr import fourier_features
from rtl.partition import by_region
from rtl.recipes import load_data, recipe, run_recipe
from rtl.recipes.inr import spearman, with_region
from rtl.report import read_results
from rtl.tickets import TicketNetwork

SMALL = dataclasses.replace(
    recipe("inr"),
    images=("china",),
    longest_side=16,
    regions=3,
    methods=("rtl", "imp_single", "imp_multiple", "dense"),
    sparsities=(0.5, 0.75),
    remove=20_000,
    round_steps=4,
    retrain_steps=4,
    batch_size=60,
)
BOTH = dataclasses.replace(SMALL, images=())  # photographs
ROOT = Path(__file__).parents[2]


# The networks


def prunable(model):
    return {name: m.weight for name, m in model.named_modules() if model.prunable(name, m)}


def test_both_networks_prune_the_papers_53_888_weights():
    for model in (inr(), inr(7)):
        shapes = {name: tuple(weight.shape) for name, weight in prunable(model).items()}
        hidden = {f"hidden.{i}": (128, 128) for i in range(3)}
        assert shapes == {"first": (128, 34)} | hidden | {"last": (3, 128)}
        assert sum(w.numel() for w in prunable(model).values()) == 53_888
    assert tuple(inr(7).of_class.weight.shape) == (128, 16)  # with `first`, the paper's [128×50]
    assert tuple(inr(7).embedding.weight.shape) == (7, 16)


def test_the_tickets_weights_are_the_baselines_without_the_columns_of_the_embedding():
    alone, told = seeded(inr, 0), seeded(inr, 5)
    for name, weight in prunable(told).items():
        assert torch.equal(prunable(alone)[name], weight)
    assert not torch.equal(prunable(seeded(inr, 0, seed=1))["first"], prunable(alone)["first"])
    assert abs(float(alone.first.weight.detach().std()) / math.sqrt(2 / 50) - 1) < 0.05


def test_both_networks_start_equal_as_torch_draws_them_too():
    alone, told = (seeded(lambda classes: inr(classes, "torch"), classes) for classes in (0, 5))
    for name, parameter in alone.named_parameters():
        assert torch.equal(told.get_parameter(name), parameter)
        fan_in = 50 if name.startswith("first") else 128
        assert float(parameter.detach().abs().max()) * math.sqrt(fan_in) <= 1
        assert float(parameter.detach().std()) == pytest.approx(
            1 / math.sqrt(3 * fan_in), rel=0.05 if parameter.dim() == 2 else 0.6
        )
    assert float(told.of_class.weight.detach().std()) == pytest.approx(1 / math.sqrt(3 * 50), rel=0.05)


def test_features_are_the_coordinates_and_their_octaves():
    x = torch.tensor([[0.25, -0.5]])
    found = fourier_features(x)[0]
    assert found.shape == (34,)
    expected = [0.25, -0.5]
    for f in (math.sin, math.cos):
        expected += [f(2**j * math.pi * c) for c in (0.25, -0.5) for j in range(8)]
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


def test_the_baselines_first_layer_reads_features_and_embedding_side_by_side():
    model = seeded(inr, 3)
    x = torch.tensor([[0.1, 0.2, 2.0], [0.1, 0.2, 0.0]])
    weight = torch.cat([model.first.weight, model.of_class.weight], 1)
    h = torch.cat([fourier_features(x[:, :2]), model.embedding.weight[[2, 0]]], 1) @ weight.T + model.first.bias
    for layer in (*model.hidden, model.last):
        h = layer(h.relu())
    torch.testing.assert_close(model(x), h, rtol=1e-4, atol=1e-5)
    assert not torch.equal(model(x)[0], model(x)[1])


def test_inputs_of_the_other_network_are_refused():
    for model, columns in ((inr(), 3), (inr(2), 2)):
        with pytest.raises(InputError, match=f"x has shape \\(4, {columns}\\), expected"):
            model(torch.zeros(4, columns))
    with pytest.raises(InputError, match="num_classes is -1"):
        inr(-1)


# The recipe


def test_all_methods_take_as_many_steps_on_as_many_pixels():
    config = recipe("inr")
    for regions in (1, 3, 7):
        share = math.ceil(config.batch_size / regions)
        for phase, steps in enumerate((config.round_steps, config.retrain_steps)):
            single = config.fits("imp_single", regions)[phase]
            assert single.batch_size == share * regions
            assert single.epochs * single.task.samples == steps * share * regions
            for schedule in ("sequential", "mixed", "pooled"):
                tickets = config.fits("rtl", regions, schedule)[phase]
                pooled = bool(phase) and schedule == "pooled"
                assert tickets.epochs * tickets.task.samples == steps * share * (regions if pooled else 1)
                assert tickets.task.by_area is pooled
                together = bool(phase) and schedule != "sequential"  # a step of retraining holds all regions
                assert tickets.batch_size == (share * regions if together else share)
                assert tickets.schedule == (schedule if phase else "sequential")


def test_the_papers_protocol_is_the_papers():
    config = recipe("inr", "paper")
    assert (config.lr, config.round_steps, config.remove, config.longest_side) == (0.01, 10_000, 4096, None)
    assert {40_416, 26_944, 13_472} <= set(config.plan.rounds(53_888))


@pytest.mark.parametrize("protocol", ["reduced", "paper"])
def test_a_protocol_as_it_is_has_rows_told_apart_by_the_schedule_alone(protocol):
    config = recipe("inr", protocol)
    for schedule, name in (("pooled", "schedule=pooled"), ("mixed", "schedule=mixed"), ("sequential", "")):
        assert config.variant("rtl", schedule) == name
        assert {config.variant(method, schedule) for method in ("imp_single", "imp_multiple", "dense")} == {""}
    assert config.milestones == config.sparsities


@pytest.mark.parametrize(
    ("changed", "method", "variant"),
    [
        ({"lr": 0.5, "round_steps": 3}, "rtl", "schedule=mixed,round_steps=3,lr=0.5"),
        ({"lr": 0.5, "round_steps": 3}, "dense", "lr=0.5"),
        ({"images": ("china",), "regions": 2}, "imp_single", "images=china,regions=2"),
        ({"image": Path("a.png"), "mask": Path("m.png")}, "imp_single", "image=a.png,mask=m.png"),
        ({"sparsities": (0.5,), "seeds": (7,), "methods": ("rtl",)}, "rtl", "schedule=mixed"),  # they choose rows
        ({"sparsities": (0.5, 0.6)}, "imp_single", "sparsities=0.6"),
        ({"sparsities": (0.6,)}, "dense", ""),
    ],
)
def test_whatever_differs_from_the_protocol_is_named_for_the_methods_it_matters_to(changed, method, variant):
    assert dataclasses.replace(recipe("inr"), **changed).variant(method, "mixed") == variant


def test_masks_do_not_depend_on_which_sparsities_are_asked_for():
    config = recipe("inr", "paper")
    some = dataclasses.replace(config, sparsities=(0.75,)).plan.rounds(53_888)
    assert some == config.plan.rounds(53_888)[: len(some)]
    assert some[-1] == 13_472


def test_the_committed_run_is_the_recipes_and_goes_on(tmp_path):
    config = recipe("inr")
    rows = read_results(ROOT / "results/inr")[0]["rows"]
    named = {(m, config.variant(m, s)) for m in config.methods for s in config.schedules}
    assert {(r["method"], r["variant"]) for r in rows} == named
    shutil.copy(ROOT / "results/inr/config.json", tmp_path)
    quiet(tmp_path).configure(config)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"round_steps": 0}, "round_steps is 0, expected 1 to 100, or a multiple of 100"),
        ({"retrain_steps": 150}, "retrain_steps is 150"),
        ({"regions": 0}, "regions is 0"),
        ({"mask": "m.png"}, "mask is 'm.png', but no image is given"),
        ({"image": "a.png", "images": ("b",)}, "give one of the two"),
        ({"methods": ("magic",)}, "methods holds 'magic'"),
        ({"batch_size": 1}, "batch_size is 1"),
        ({"sparsities": ()}, "sparsities is"),
        ({"init": "zero"}, "init is 'zero', expected 'kaiming' or 'torch'"),
    ],
)
def test_a_bad_setting_is_refused_when_the_configuration_is_made(changed, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(recipe("inr"), **changed)


def test_a_recipe_that_cannot_be_run_on_its_images_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match="batch_size is 5, expected 2 or more for each of 3 regions"):
        load_data(dataclasses.replace(SMALL, batch_size=5), None)
    with pytest.raises(InputError, match="images holds 'lena', but without --data there are china, flower"):
        load_data(dataclasses.replace(SMALL, images=("lena",)), None)
    with pytest.raises(InputError, match="leaves none of 53888"):
        load_data(dataclasses.replace(SMALL, sparsities=(0.999999,)), None)
    with pytest.raises(InputError, match="give one of the two"):
        load_data(dataclasses.replace(SMALL, images=(), image=tmp_path / "a.png"), tmp_path)


def test_without_data_given_the_photographs_are_scikit_learns_whatever_rtl_data_names(tmp_path, monkeypatch):
    monkeypatch.setenv("RTL_DATA", str(tmp_path))
    assert [one.name for one in load_data(BOTH, None)] == ["china", "flower"]
    with pytest.raises(InputError, match="which has no image with a mask"):
        load_data(BOTH, tmp_path)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """Two images by all methods: folder, pictures, rows, details."""
    data = load_data(BOTH, None)
    run = quiet(tmp_path_factory.mktemp("inr"))
    return run, BOTH, data, *run_recipe(BOTH, run, data)


def matching(found, method, sparsity, schedule="pooled"):
    which = method, BOTH.variant(method, schedule), sparsity
    return [one for one in found if (one["method"], one["variant"], one["sparsity"]) == which]


def one(experiment, *which):
    (found,) = matching(experiment[3], *which)
    return found


def per_image(experiment, *which):
    return matching(experiment[4]["per_image"], *which)


def test_a_row_is_the_mean_over_images_with_all_pixels_pooled_beside_it(experiment):
    found = [(r["method"], r["sparsity"]) for r in experiment[3]]
    assert found == [(m, s) for m in ("rtl", *SMALL.methods[:3]) for s in (0.5, 0.75)] + [("dense", 0.0)]
    for method, sparsity in found:
        row, images = one(experiment, method, sparsity), per_image(experiment, method, sparsity)
        assert [d["image"] for d in images] == ["china", "flower"]
        assert row["metrics"]["psnr"] == pytest.approx(np.mean([d["psnr"] for d in images]))
        assert {(d["protocol"], d["variant"]) for d in images} == {(row["protocol"], row["variant"])}
        errors = [10 ** (-d["psnr"] / 10) for d in images]  # both images have equally many pixels
        assert row["metrics"]["psnr.pooled"] == pytest.approx(-10 * math.log10(np.mean(errors)))


def test_every_schedule_retrains_the_same_masks(experiment):
    variants = [BOTH.variant("rtl", schedule) for schedule in ("pooled", "mixed")]
    assert [r["variant"] for r in experiment[3] if r["method"] == "rtl"] == [v for v in variants for _ in range(2)]
    pooled, mixed = (one(experiment, "rtl", 0.5, schedule) for schedule in ("pooled", "mixed"))
    same = "params", "samples"
    assert [pooled[key] for key in same] == [mixed[key] for key in same]
    assert pooled["metrics"]["similarity"] == mixed["metrics"]["similarity"]
    assert pooled["metrics"]["psnr"] != mixed["metrics"]["psnr"]
    extractions = {f.parent for f in experiment[0].path.rglob("extract/config.json")}
    assert len(extractions) == 2 * 3  # images · (tickets, single, dense)


def test_a_schedule_stands_for_itself_and_once():
    for schedules in ((), ("mixed", "mixed")):
        with pytest.raises(InputError, match=r"schedules is \(.*\), expected one or more different values"):
            dataclasses.replace(SMALL, schedules=schedules)


def test_a_picture_is_made_of_its_regions(experiment):
    for d in experiment[4]["per_image"]:
        errors = [10 ** (-p / 10) for p in d["psnr_by_region"]]
        assert sum(d["pixels"]) == 11 * 16
        assert d["psnr"] == pytest.approx(-10 * math.log10(np.average(errors, weights=d["pixels"])))


def test_the_figure_is_the_psnr_of_what_the_saved_tickets_show(experiment):
    run, config, data, *_ = experiment
    net = TicketNetwork.from_pretrained(run.path / "tickets/0.5")
    parts = by_region(data[0].data, config.regions)
    shown = predict([net], parts).clamp(0, 1)
    psnr = -10 * math.log10(float((shown - data[0].data.targets).square().mean()))
    assert per_image(experiment, "rtl", 0.5)[0]["psnr"] == pytest.approx(psnr)
    assert evaluate(net, parts).metrics == {"psnr": pytest.approx(psnr)}
    written = np.asarray(Image.open(run.path / "media/china/rtl-0.5.png")).reshape(-1, 3)
    assert np.abs(written - shown.numpy() * 255).max() <= 0.51
    target = np.asarray(Image.open(run.path / "media/china/target.png")).reshape(-1, 3)
    assert np.abs(target - data[0].data.targets.numpy() * 255).max() <= 0.51


def test_params_are_the_union_the_one_mask_the_sum_and_everything(experiment):
    for sparsity, keep in ((0.5, 26_944), (0.75, 13_472)):
        assert keep < one(experiment, "rtl", sparsity)["params"] < 3 * keep
        assert one(experiment, "imp_single", sparsity)["params"] == keep
        assert one(experiment, "imp_multiple", sparsity)["params"] == 3 * keep
    assert one(experiment, "dense", 0.0)["params"] == 53_888


def test_all_methods_are_presented_with_equally_many_pixels(experiment):
    for sparsity in (0.5, 0.75):
        counts = {one(experiment, m, sparsity)["samples"] for m in SMALL.methods[:3]}
        assert counts == {2 * 4 * 60 * ({0.5: 2, 0.75: 3}[sparsity] + 1)}  # images · steps · pixels · (rounds + 1)


def test_all_start_at_one_theta0_but_for_the_embedding(experiment):
    found = {}
    for file in experiment[0].path.rglob("config.json"):
        theta0 = json.loads(file.read_text()).get("theta0")
        if theta0:
            method = file.relative_to(experiment[0].path).parts[2]
            found.setdefault("told" if method in ("imp_single", "dense") else "tickets", set()).add(theta0)
    assert {len(v) for v in found.values()} == {1}
    assert found["told"] != found["tickets"]


def test_similarity_of_regions_is_set_beside_their_psnr(experiment):
    for d in per_image(experiment, "rtl", 0.5):
        assert len(d["similarity_by_region"]) == len(d["psnr_by_region"]) == 3
        assert d["spearman"]["rho"] in (-1, -0.5, 0.5, 1)
    assert "spearman" not in per_image(experiment, "imp_single", 0.5)[0]


def test_spearman_is_scipys_and_none_where_it_is_not_defined():
    assert spearman([1, 2, 3, 4], [1, 3, 2, 4])["rho"] == pytest.approx(0.8)
    assert spearman([1, 2], [1, 2]) == spearman([1, 1, 1], [1, 2, 3]) == {"rho": None, "p": None}


def test_run_again_it_gives_the_same_from_what_is_kept(experiment):
    run, config, data, rows, details = experiment
    assert run_recipe(config, run, data) == (rows, details)
    with pytest.raises(InputError, match=r"lr was 0.01, now 0.1"):
        run_recipe(dataclasses.replace(config, lr=0.1), run, data)
    with pytest.raises(InputError, match="config differs"):
        run_recipe(config, run, data[:1])


def test_an_image_of_one_region_has_one_ticket(tmp_path):
    config = dataclasses.replace(
        SMALL, regions=1, methods=("rtl", "imp_single"), sparsities=(0.5,), schedules=("mixed",)
    )
    rows, details = run_recipe(config, quiet(tmp_path), load_data(config, None))
    assert [r["params"] for r in rows] == [26_944, 26_944]
    assert "similarity" not in details
    assert "similarity" not in rows[0]["metrics"]
    assert json.loads(json.dumps(details, allow_nan=False)) == json.loads(json.dumps(details))


def test_the_baseline_is_told_the_region():
    data = sample_pictures(16)[0].data
    parts = by_region(data, 3)
    told = with_region(parts)
    assert told.names == ("all",)
    assert torch.equal(told.data.inputs, torch.cat([data.inputs, parts.index[:, None]], 1))
    assert torch.equal(told.data.targets, data.targets)


# The command


def test_the_command_runs_on_an_image_with_a_mask_and_its_report_is_complete(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photo = sample_pictures(24)[1]
    pixels = (photo.data.targets.view(photo.height, photo.width, 3) * 255).round().to(torch.uint8).numpy()
    Image.fromarray(pixels).save("flower.png")
    mask = np.zeros(pixels.shape[:2], np.uint8)
    mask[:, :7], mask[:8, 9:], mask[9:, 9:] = 1, 2, 3
    Image.fromarray(mask).save("flower_mask.png")
    settings = "--round-steps 3 --retrain-steps 3 --batch-size 30 --sparsities 0.5 0.75 --remove 0.5 --workers 1"
    command = f"run inr --image flower.png --mask flower_mask.png {settings} --out run"
    assert rtl.cli.main(command.split()) == 0
    out = capsys.readouterr().out
    named = "RTL (schedule=pooled,image=flower.png,mask=flower_mask.png,remove=0.5,round_steps=3,"
    assert all(text in out for text in (named, "IMP single", "dense", "PSNR pooled", "#Params"))
    assert "BA thr." not in out
    assert rtl.cli.main(["report", "run", "--to", "kept"]) == 0
    table = json.loads((tmp_path / "kept/table.json").read_text())
    assert table["command"] == f"rtl run inr --image flower.png --mask flower_mask.png {settings[:-12]}"
    names = {str(f.relative_to(tmp_path / "kept")) for f in (tmp_path / "kept").rglob("*") if f.is_file()}
    assert {
        f"figures/{n}.png" for n in ("metric", "psnr-by-image", "psnr-against-similarity", "example-flower")
    } <= names
    assert {"media/flower/target.png", "media/flower/rtl-0.75.png", "tickets/0.5/tickets.json"} <= names
    kept, run = tree(tmp_path / "kept"), tree(tmp_path / "run")
    assert "report.html" in kept  # which has the folder's name on it
    assert [name for name, data in kept.items() if run[name] != data] == ["report.html"]
    details = json.loads((tmp_path / "kept/details.json").read_text())
    assert details["images"] == ["flower"]
    assert [len(d["regions"]) for d in details["per_image"]] == [3] * 7
    assert len(picture("flower.png", "flower_mask.png").data) == sum(details["per_image"][0]["pixels"])


def test_a_run_keeps_the_names_of_its_files_and_goes_on_where_they_have_moved(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "home"
    home.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(home / "a.png")
    Image.fromarray(np.repeat(np.uint8([[1], [2]]), 4, 0).repeat(8, 1)).save(home / "regions.png")
    settings = "--methods rtl --schedules mixed --sparsities 0.5 --remove 0.5 --batch-size 8 --workers 1 --out run"
    settings += " --round-steps 1 --retrain-steps 1"

    def command():
        return f"run inr --image {home}/a.png --mask {home}/regions.png {settings}".split()

    assert rtl.cli.main(command()) == 0
    before = tree(tmp_path / "run")
    for name, data in before.items():
        assert str(home).encode() not in data, name
    assert json.loads(before["config.json"])["image"] == "a.png"
    assert json.loads(before["table.json"])["command"].startswith("rtl run inr --image a.png --mask regions.png --meth")
    home = home.rename(tmp_path / "moved")
    assert rtl.cli.main(command()) == 0
    assert tree(tmp_path / "run") == before
    Image.fromarray(np.full((8, 8), 200, np.uint8)).save(home / "a.png")  # another picture of that name
    assert rtl.cli.main(command()) == 2
    assert "config differs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--image none.png", "image is 'none.png', which cannot be read"),
        ("--mask m.png", "mask is 'm.png', but no image is given"),
        ("--data nowhere", "data is 'nowhere', which is no folder"),
        ("--round-steps 101", "round_steps is 101"),
    ],
)
def test_a_command_that_cannot_run_says_why_in_one_line(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert rtl.cli.main(["run", "inr", *options.split()]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())
