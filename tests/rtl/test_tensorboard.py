"""rtl.tensorboard: what is written is read back from the event files, in runs of real work."""

import builtins
import sys

import pytest
import torch
from toys import blobs, mlp, quiet

import rtl
import rtl.examples
from rtl.cli import main
from rtl.errors import InputError
from rtl.extract import PrunePlan, extract
from rtl.fit import Fit
from rtl.partition import by_label
from rtl.progress import Progress
from rtl.tensorboard import Board, heat


def events(folder):
    """(tag -> [(step, value)], tags of images -> steps)."""
    pytest.importorskip("tensorboard", reason="needs the extra 'tensorboard'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    read.Reload()
    scalars = {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    images = {tag: [(e.step, e.encoded_image_string) for e in read.Images(tag)] for tag in read.Tags()["images"]}
    return scalars, images


def test_losses_similarity_and_its_matrices_are_written(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra 'tensorboard'")
    run = quiet(tmp_path / "run")
    with Board(tmp_path / "board") as board:
        run.progress.listen(board.event)
        parts = by_label(blobs())
        plan = PrunePlan(20, 0.75)
        tickets = extract(mlp(), parts, plan, Fit(epochs=2, batch_size=16, lr=0.02), run)
        board.tickets("rtl/", tickets)
        board.tickets("one/", extract(mlp(), rtl.partition.whole(blobs()), plan, one_fit(), run.child("single")))
    scalars, images = events(tmp_path / "board")
    assert scalars["extract/a/loss"][-1][0] == 6  # epochs
    assert [value for _, value in scalars["rtl/similarity/mean"]] == pytest.approx(
        [rtl.curve.mean_to_others(m).mean().item() for m in tickets.curve.jaccard()]
    )
    assert [step for step, _ in scalars["rtl/similarity/b"]] == [0, 1, 2]
    assert [value for _, value in scalars["rtl/sparsity"]] == pytest.approx([20 / 72, 40 / 72, 54 / 72])
    assert [step for step, _ in images["rtl/similarity/matrix"]] == [0, 1, 2]
    assert not [tag for tag in scalars if tag.startswith("one/")]


def one_fit():
    return Fit(epochs=1, batch_size=16, lr=0.02, task=rtl.tasks.MultiClass())


def test_a_matrix_is_a_picture_of_its_cells():
    matrix = torch.tensor([[1, 0.2, 0.4], [0.2, 1, 0.3], [0.4, 0.3, 1]], dtype=torch.float64)
    pixels = heat(matrix)
    assert pixels.shape == (48, 48, 3)
    assert (pixels[0:16, 16:32] == [68, 1, 84]).all()  # viridis' darkest
    assert (pixels[0:16, 32:48] == [253, 231, 37]).all()  # and brightest
    assert len({tuple(p) for p in pixels[::16, ::16].reshape(-1, 3).tolist()}) == 3


def test_metrics_and_samples_are_written(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra 'tensorboard'")
    picture = rtl.examples.with_pictures([{"sample": 0}], rtl.data.digits()[1])[0]["picture"]
    row = {"seed": 1, "method": "rtl", "variant": "", "sparsity": 0.965, "metrics": {"accuracy": 0.5}}
    with Board(tmp_path) as board:
        board.results([row], {"examples": {"0.5": [{"ticket": "7", "kind": "missed", "picture": picture}]}})
    scalars, images = events(tmp_path)
    assert scalars == {"results/accuracy/seed-1/rtl": [(965, 0.5)]}
    assert [step for step, _ in images["examples/7/missed"]] == [500]


def test_listeners_hear_every_task_and_values_are_told_once(monkeypatch):
    monkeypatch.setattr("rtl.progress.time.monotonic", lambda: 0.0)
    heard = []
    progress = Progress(quiet=True)
    progress.listen(heard.append)
    with progress.task("cat", 2) as task:
        task.advance(loss=0.5)
        task.advance(loss=0.25)
    assert [event.state for event in heard] == ["started", "finished"]  # faster than a display
    assert [dict(event.values) for event in heard] == [{}, {"loss": 0.25}]


def test_without_tensorboard_the_command_says_what_to_install(tmp_path, monkeypatch, capsys):
    original = builtins.__import__

    def refuse(name, *arguments, **keywords):
        if name.startswith(("tensorboard", "torch.utils.tensorboard")):
            raise ImportError(f"No module named {name!r}")
        return original(name, *arguments, **keywords)

    for name in [n for n in sys.modules if n.startswith(("tensorboard", "torch.utils.tensorboard"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(InputError, match=r"not installed .*: pip install 'rtl-kernels\[tensorboard\]'"):
        Board(tmp_path / "board")
    assert main(["run", "digits", "--tensorboard", "--out", str(tmp_path / "run")]) == 2
    assert "pip install 'rtl-kernels[tensorboard]'" in capsys.readouterr().err
