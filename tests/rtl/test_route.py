"""rtl.route and `rtl predict`: routers against their definitions, calibration, the oracle, and files on the disk."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toys import blobs, identity_network, quiet, seeded

import rtl
from rtl import route
from rtl.cli import main
from rtl.data import Data
from rtl.errors import InputError
from rtl.evaluate import evaluate, ticket_logits
from rtl.extract import PrunePlan, extract
from rtl.fit import Fit, masked_copy
from rtl.partition import by_cluster, by_label, by_metadata
from rtl.predict import Inputs, predict
from rtl.retrain import retrain

RESULTS = Path(__file__).parents[2] / "results"


def points(rows, labels=None):
    inputs = torch.tensor(rows, dtype=torch.float32)
    return Data(inputs, torch.tensor(labels if labels is not None else [0] * len(rows)), tuple("abc"))


@pytest.fixture
def net():
    """Three one-vs-rest tickets, whose logits are the three inputs."""
    return identity_network()


# By context


def test_context_is_a_name_a_number_or_a_partitions_rule(net):
    assert route.by_context(net, ["c", 0, "b"]).ticket.tolist() == [2, 0, 1]
    data = Data(torch.zeros(3, 2), torch.zeros(3), metadata={"scene": ["y", "x", "z"]})
    parts = by_metadata(data, "scene")
    only = identity_network("xz", outputs=[0, 2], classes=3)
    with pytest.raises(InputError, match="context has 1 samples that are in no ticket's subset"):
        route.by_context(only, parts.apply(data))
    assert route.by_context(only, parts.apply(data.select(torch.tensor([2, 1])))).ticket.tolist() == [1, 0]
    with pytest.raises(InputError, match="'dog'"):
        route.by_context(net, ["dog"])


# By centroid


def test_the_nearest_centroid_is_that_of_the_subsets_means(net):
    train = points([[0, 0, 0], [2, 0, 0], [9, 9, 9], [0, 0, 20], [0, 0, 22]], [0, 0, 1, 2, 2])
    router = route.by_centroid(net, by_label(train))
    assert router.centroids.tolist() == [[1, 0, 0], [9, 9, 9], [0, 0, 21]]
    routing = router(net, points([[3, 1, 1], [8, 9, 9], [1, 1, 19]]))
    assert routing.ticket.tolist() == [0, 1, 2]
    assert router.scores(net, points([[3, 1, 1]]))[0].tolist() == pytest.approx([-6, -164, -410])


def test_clusters_route_new_data_as_their_own_rule_does_without_labels():
    data = blobs(features=3)
    parts = by_cluster(data, 3, features=lambda d: d.inputs[:, :2])
    tickets = identity_network(parts.names)
    router = route.by_centroid(tickets, parts)
    new = blobs(sizes=(30, 30, 30), features=3, seed=0)
    assert torch.equal(router(tickets, new).ticket, parts.apply(new).index)
    fixed = by_cluster(data, 3, features=data.inputs)
    with pytest.raises(InputError, match=r"parts was clustered by an array.*pass features="):
        route.by_centroid(tickets, fixed)


def test_a_network_with_tickets_of_some_subsets_only_has_their_centroids():
    train = points([[0, 0, 0], [9, 9, 9], [0, 0, 20]], [0, 1, 2])
    some = identity_network("ca", outputs=[2, 0], classes=3)
    router = route.by_centroid(some, by_label(train))
    assert router.centroids.tolist() == [[0, 0, 20], [0, 0, 0]]
    assert router(some, points([[0, 0, 19.0]])).ticket.tolist() == [0]


# By confidence


def test_the_surest_ticket_is_that_of_the_largest_logit(net):
    data = points([[1, 2, 0], [-3, -5, -9], [0, 0, 4]])
    router = route.by_confidence(net)
    torch.testing.assert_close(router.scores(net, data), data.inputs.double(), atol=1e-5, rtol=0)
    assert router(net, data).ticket.tolist() == [1, 0, 2]


def test_a_tickets_confidence_is_its_logit_however_large(net):
    data = points([[30, -45, 16], [17, 18, 19]])
    assert torch.equal(route.confidence(net, data), data.inputs.double())


def test_tickets_that_tell_classes_apart_are_sure_by_their_softmax():
    masks = torch.eye(3, dtype=torch.bool).expand(2, 3, 3).clone()
    masks[1, 0] = False  # the second ticket does not see the first class
    net = identity_network("xy", outputs=[0, 1], task="multi_class", classes=3, masks=masks)
    data = points([[4, 0, 0], [0, 4, 0]])
    scores = route.confidence(net, data)
    assert float(scores[0, 0]) == pytest.approx(4 - math.log(math.exp(4) + 2), abs=1e-6)
    assert float(scores[0, 1]) == pytest.approx(-math.log(3), abs=1e-6)
    assert route.by_confidence(net)(net, data).ticket[0] == 0
    with pytest.raises(InputError, match=r"net's task is 'regression'.*route by centroid"):
        route.by_confidence(identity_network(task="regression"))


def test_a_router_of_other_tickets_is_refused(net):
    with pytest.raises(InputError, match="net has the tickets a, b, c, but the router x, y, z"):
        route.by_confidence(identity_network("xyz"))(net, points([[0, 0, 0]]))


def test_inputs_without_their_normalisation_are_refused(net):
    with pytest.raises(InputError, match=r"data is a Tensor, expected an rtl.data.Data, normalised as"):
        route.by_confidence(net)(net, torch.zeros(2, 3))


# Calibration


def loud(offset, n=600, seed=0, gain=1.0):
    """Samples whose own logit is high, through tickets of which the first says `offset` more of everything."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    logits = torch.randn((n, 3), generator=generator) + 2.0 * torch.nn.functional.one_hot(labels, 3)
    logits[:, 0] += offset
    return Data(gain * logits, labels, tuple("abc"))


def test_calibration_hears_a_loud_ticket_no_more_than_the_others(net):
    router, test = route.by_confidence(net), loud(5.0, seed=1)
    before = float((router(net, test).ticket == test.targets).double().mean())
    fitted = router.calibrated(net, by_label(loud(5.0)))
    after = float((fitted(net, test).ticket == test.targets).double().mean())
    fair = float((router(net, loud(0.0, seed=1)).ticket == test.targets).double().mean())
    assert before < 0.4
    assert after == pytest.approx(fair, abs=0.02)
    assert fair > 0.8


@pytest.mark.parametrize("gain", [0.01, 1.0, 40.0])
def test_calibrated_probabilities_mean_what_they_say_whatever_the_scores_unit(net, gain):
    fitted = route.by_confidence(net).calibrated(net, by_label(loud(0.0, 3000, gain=gain)))
    test = loud(0.0, 3000, seed=1, gain=gain)
    routing = fitted(net, test)
    right = (routing.ticket == test.targets).double()
    assert route._calibration_error(routing.probability, right) < 0.03
    if gain == 1.0:
        assert fitted.scale == pytest.approx(2.0, rel=0.1)  # Gaussians of distance 2 and unit variance


def test_every_ticket_needs_a_held_out_sample(net):
    data = loud(0.0)
    parts = by_label(data)
    some = parts.apply(data.select(torch.nonzero(data.targets != 1).flatten()))
    with pytest.raises(InputError, match="held_out has no sample of b"):
        route.by_confidence(net).calibrated(net, some)


# Beside the oracle


def test_routing_and_the_end_task_are_measured_beside_the_oracle(net):
    data = loud(4.0, 900)
    found = route.compare(net, [route.by_confidence(net)], by_label(data))
    assert found["oracle"]["routing"] == 1
    own = data.inputs[torch.arange(900), data.targets] >= 0
    assert found["oracle"]["accuracy"] == pytest.approx(float(own.double().mean()))
    assert 0.75 < found["confidence"]["routing"] < 0.95
    assert found["confidence"]["accuracy"] <= found["confidence"]["routing"]
    assert found["confidence"]["calibration"] < 0.06


@pytest.mark.parametrize(("task", "metric"), [("regression", "mse"), ("pixels", "psnr"), ("enhancement", "si_snri")])
def test_a_task_without_classes_is_judged_by_its_own_measure(task, metric):
    generator = torch.Generator().manual_seed(0)
    target = torch.rand((40, 8), generator=generator)
    inputs = target + 0.5 * torch.randn((40, 8), generator=generator)  # colours beyond 0 and 1 too
    data = Data(inputs, target, metadata={"scene": ["x", "y"] * 20})
    masks = torch.eye(8, dtype=torch.bool).expand(2, 8, 8).clone()
    masks[1, 0, 0] = False
    net, parts = identity_network("xy", task=task, classes=8, masks=masks), by_metadata(data, "scene")
    found = route.compare(net, [route.by_centroid(net, parts)], parts)
    assert found["oracle"][metric] == pytest.approx(evaluate(net, parts).metrics[metric])
    assert set(found["centroid"]) == {"routing", "calibration", metric}
    with pytest.raises(InputError, match="net is of task 'magic', expected one of one_vs_rest"):
        route.compare(identity_network("xy", task="magic", classes=8), [], parts)


def test_the_test_half_is_not_calibrated_on(net):
    """On few samples with labels that say nothing, a router that had seen the labels would do better than chance."""
    found, router = [], route.by_confidence(net)
    for seed in range(25):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(18)[torch.randperm(18, generator=generator)] % 3
        data = Data(torch.randn((18, 3), generator=generator), labels, tuple("abc"))
        try:
            found.append(route.compare(net, [router], by_label(data), seed)["confidence"]["routing"])
        except InputError:  # a half without some ticket
            continue
    assert len(found) > 15
    assert sum(found) / len(found) < 0.38


def test_a_partition_without_labels_works_at_inference_on_unlabelled_data(tmp_path):
    """Clusters, regression tickets in them, and new samples routed by their inputs alone."""
    train = blobs(sizes=(60, 60, 60))
    target = train.inputs[:, :3].abs()
    data = Data(train.inputs, target)
    parts = by_cluster(data, 3)
    model = seeded(rtl.models.mlp, 6, [16], 3)
    fit = Fit(epochs=6, batch_size=16, lr=0.02, task=rtl.tasks.Regression())
    run = quiet(tmp_path)
    net = retrain(model, extract(model, parts, PrunePlan(0.5, 0.5), fit, run).at(0.5), parts, fit, run)
    new = blobs(sizes=(40, 40, 40), seed=0)
    held_out = parts.apply(Data(new.inputs, new.inputs[:, :3].abs()))
    found = route.compare(net, [route.by_centroid(net, parts)], held_out)
    assert found["centroid"]["routing"] > 0.9
    assert found["centroid"]["mse"] == pytest.approx(found["oracle"]["mse"], rel=0.2)
    wrong = torch.tensor([1, 2, 0])[held_out.index]
    worse = (net(new.inputs, wrong) - held_out.data.targets).square().mean()
    assert float(worse.detach()) > found["centroid"]["mse"]


# Kept, and used on files


def test_a_saved_router_is_the_same(tmp_path, net):
    data = loud(3.0)
    for router in (route.by_confidence(net), route.by_centroid(net, by_label(data))):
        fitted = router.calibrated(net, by_label(data))
        fitted.save(tmp_path)
        again = route.Router.load(tmp_path, router.method)
        assert torch.equal(again(net, data).ticket, fitted(net, data).ticket)
        assert torch.equal(again(net, data).probability, fitted(net, data).probability)
    with pytest.raises(InputError, match="features is a function, which cannot be saved"):
        route.by_centroid(net, by_label(data), features=lambda d: d.inputs).save(tmp_path)
    (tmp_path / "router-centroid.json").write_text("{")
    with pytest.raises(InputError, match="holds no router by centroid"):
        route.Router.load(tmp_path, "centroid")


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """The committed tickets of the digits, with routers and a way to read files."""
    folder = tmp_path_factory.mktemp("run")
    place = folder / "tickets" / "0.5"
    net = rtl.TicketNetwork.from_pretrained(RESULTS / "digits" / "tickets" / "0.5")
    net.save_pretrained(place)
    train, test = rtl.data.digits()
    Inputs.of(train).save(place)
    parts = by_label(train)
    for router in (route.by_confidence(net), route.by_centroid(net, parts)):
        router.calibrated(net, parts.apply(test)).save(place)
    return folder


def test_real_tickets_are_routed_almost_as_well_as_the_oracle():
    net = rtl.TicketNetwork.from_pretrained(RESULTS / "digits" / "tickets" / "0.5")
    train, test = rtl.data.digits()
    parts = by_label(train)
    found = route.compare(net, [route.by_confidence(net), route.by_centroid(net, parts)], parts.apply(test))
    assert found["confidence"]["routing"] > 0.95
    assert 0.8 < found["centroid"]["routing"] < 0.95
    assert found["centroid"]["accuracy"] < found["confidence"]["accuracy"] < found["oracle"]["accuracy"] + 1e-9


@pytest.mark.parametrize("by", ["confidence", "centroid"])
def test_files_are_routed_and_answered(digits_run, tmp_path, capsys, by):
    _, test = rtl.data.digits()
    Image.fromarray((test.inputs[0, 0] * 255).round().to(torch.uint8).numpy()).save(tmp_path / "one.png")
    np.save(tmp_path / "many.npy", test.inputs[1:40].numpy())
    (tmp_path / "many.npy").rename(tmp_path / "many.NPY")
    files = [str(tmp_path / "one.png"), str(tmp_path / "many.NPY")]
    assert main(["predict", str(digits_run), *files, "--by", by, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["sample"] for row in rows] == [files[0], *(f"{files[1]}[{i}]" for i in range(39))]
    right = [row["ticket"] == str(int(label)) for row, label in zip(rows, test.targets[:40], strict=True)]
    assert sum(right) >= 34
    net = rtl.TicketNetwork.from_pretrained(digits_run / "tickets" / "0.5")
    scores = ticket_logits(net, test.select(torch.arange(40))).sigmoid()
    for i, row in enumerate(rows[1:], 1):
        assert row["score"] == pytest.approx(float(scores[i, int(row["ticket"])]), abs=1e-5)
        assert row["answer"] == row["ticket"] if row["score"] >= 0.5 else f"not {row['ticket']}"
        assert 0 < row["probability"] <= 1


def test_a_context_is_named_and_the_table_is_printed(digits_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    odd = "[red]<:x:>.npy"  # no mark-up
    np.save(odd, rtl.data.digits()[1].inputs[0].numpy())
    assert main(["predict", str(digits_run), odd, "--by", "7"]) == 0
    out = capsys.readouterr().out
    assert "probability" in out
    assert "7" in out
    assert odd in out
    assert predict(digits_run, [Path(odd)], by="7")[0]["probability"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["big.png"], "of 9 × 8 pixels, but samples have 8 × 8: crop it, or add --resize"),
        (["text.png"], "cannot be read as a picture"),
        (["absent.png"], "cannot be read as a picture"),
        (["bad.npy"], "int64 of shape (8, 8), but samples are floats (or uint8 pixels) of shape (1, 8, 8)"),
        (["text.npy"], "cannot be read as an array"),
        (["deep.npy"], "uint16 of shape (1, 1, 8, 8), but samples are floats (or uint8 pixels)"),
        (["deep.png"], "file is 'deep.png', of mode I;16: give one of 8 bits a channel"),
        (["empty.npy"], "file is 'empty.npy', which cannot be read as an array"),
        (["archive.npy"], "file is 'archive.npy', an archive of arrays: give each as a .npy file"),
        (["nan.npy"], "file is 'nan.npy', which holds NaN, infinity or what float32 cannot hold"),
        (["huge.npy"], "file is 'huge.npy', which holds NaN, infinity or what float32 cannot hold"),
        (["folder"], "file is 'folder', which cannot be read as a picture"),
        (["big.png", "--resize", "--by", "dog"], "ticket is 'dog', expected one of 0, 1"),
        (["big.png", "--sparsity", "0.9"], "sparsity is 0.9, but the run has tickets at 0.5"),
    ],
)
def test_what_cannot_be_predicted_is_said_in_one_line(digits_run, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (9, 8)).save("big.png")
    np.save("bad.npy", np.zeros((8, 8), dtype=np.int64))
    np.save("deep.npy", np.zeros((1, 8, 8), dtype=np.uint16))
    Image.fromarray(np.full((8, 8), 300, dtype=np.uint16)).save("deep.png")
    np.save("nan.npy", np.full((1, 8, 8), np.nan))
    np.save("huge.npy", np.full((1, 8, 8), 1e300))
    np.savez("archive.npz", np.zeros((1, 8, 8)))
    Path("archive.npz").rename("archive.npy")
    Path("empty.npy").touch()
    Path("folder").mkdir()
    for name in ("text.png", "text.npy"):
        Path(name).write_text("no sample")
    assert main(["predict", str(digits_run), *arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err


def test_a_resized_picture_is_read(digits_run, tmp_path):
    Image.new("RGB", (30, 20), "white").save(tmp_path / "x.png")
    assert len(predict(digits_run, [tmp_path / "x.png"], resize=True)) == 1


def test_bytes_are_pixels_and_floats_are_values(tmp_path):
    inputs = Inputs((1, 8, 8), (), (), ("a",))
    np.save(tmp_path / "bytes.npy", np.full((1, 8, 8), 51, dtype=np.uint8))
    np.save(tmp_path / "floats.npy", np.full((1, 8, 8), 51, dtype=np.float64))
    data, _ = inputs.read([tmp_path / "bytes.npy", tmp_path / "floats.npy"])
    assert data.inputs.flatten(1).unique(dim=1).tolist() == [[pytest.approx(0.2)], [51]]


@pytest.mark.parametrize(
    ("task", "instead"),
    [
        ("enhancement", "give `rtl enhance` the recording and its scene"),
        ("pixels", "its pictures are in the run's media and report.html"),
        ("regression", "call the network itself"),
    ],
)
def test_tickets_that_name_no_class_say_what_to_do_instead(capsys, tmp_path, task, instead):
    small = masked_copy(rtl.models.mlp(2, [3], 1), 1, "shared")
    rtl.TicketNetwork(small, ("a",), (0,), task, 0.5).save_pretrained(tmp_path / "tickets" / "0.5")
    assert main(["predict", str(tmp_path), "x.npy"]) == 2
    assert f"run's task is '{task}', whose tickets name no class: {instead}" in capsys.readouterr().err


def test_a_folder_of_another_name_beside_the_tickets_is_passed_over(digits_run, tmp_path):
    shutil.copytree(digits_run, tmp_path / "run")
    shutil.copytree(tmp_path / "run" / "tickets" / "0.5", tmp_path / "run" / "tickets" / "mine")
    np.save(tmp_path / "x.npy", np.zeros((1, 8, 8), dtype=np.float32))
    assert len(predict(tmp_path / "run", [tmp_path / "x.npy"])) == 1


def test_tickets_of_an_older_run_say_what_they_lack(capsys, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "x.png")
    (tmp_path / "run" / "tickets").mkdir(parents=True)
    net = rtl.TicketNetwork.from_pretrained(RESULTS / "digits" / "tickets" / "0.5")
    net.save_pretrained(tmp_path / "run" / "tickets" / "0.5")
    assert main(["predict", str(tmp_path / "run"), str(tmp_path / "x.png")]) == 2
    assert "do not say how samples are read" in capsys.readouterr().err
