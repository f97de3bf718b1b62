"""Choosing tiles by measurement: what is kept, what is read back, and that the backend asks for it. No GPU is timed."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from rtl_kernels.backends.triton_kernels import cases, tune
from rtl_kernels.backends.triton_kernels.configs import Config, Problem, choose

PROBLEM = Problem("correlate", "half", 90, 64, "planes")


def test_every_problem_has_candidates_led_by_the_table_and_a_layer_to_be_timed_on():
    for problem in cases.problems(90):
        listed = tune.candidates(problem)
        assert listed[0] == choose(problem)
        assert len(set(listed)) == len(listed) > 8
        assert all(c.BLOCK_O == listed[0].BLOCK_O and min(c.BLOCK_R, c.BLOCK_K) >= 16 for c in listed)
        layer = tune.layer_for(problem)
        arithmetic = "float16" if problem.arithmetic == "half" else problem.arithmetic
        seen: list[Problem] = []
        cases.record(layer, arithmetic, problem.architecture, lambda p, seen=seen: seen.append(p) or choose(p))
        assert tune.cell(problem) in {tune.cell(p) for p in seen}


def test_the_fastest_candidate_that_runs_is_taken():
    listed = tune.candidates(PROBLEM)
    times = {config: 100.0 for config in listed}
    times[listed[3]] = 50.0
    refused = {listed[2]}
    found = tune.tune(PROBLEM, lambda problem, config: None if config in refused else times[config])
    assert found == (listed[3], 50.0, 100.0)
    assert tune.tune(PROBLEM, lambda problem, config: 7.0) == (listed[0], 7.0, 7.0)  # a tie goes to the table
    with pytest.raises(RuntimeError, match="cannot run on this device"):
        tune.tune(PROBLEM, lambda problem, config: None)


def test_what_is_kept_is_read_back_for_this_device_and_triton_only(tmp_path):
    path = tmp_path / "new" / "triton.json"
    found = {tune.cell(PROBLEM): Config(64, 32, 64, 8, 2, 255)}
    assert tune.load(path, "GPU", "3.7") == {}
    tune.save(path, "GPU", "3.7", found)
    assert tune.load(path, "GPU", "3.7") == found
    assert [p.name for p in path.parent.iterdir()] == ["triton.json"]
    for device, version in (("GPU 2", "3.7"), ("GPU", "3.8")):
        with pytest.warns(UserWarning, match="not used"):
            assert tune.load(path, device, version) == {}


@pytest.mark.parametrize("text", ["", "{}", '{"device": "GPU", "triton": "3.7", "configs": [{"cell": [1]}]}'])
def test_a_file_of_something_else_is_an_error(tmp_path, text):
    path = tmp_path / "triton.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="does not hold configurations"):
        tune.load(path, "GPU", "3.7")


def test_what_was_found_stands_in_front_of_the_table():
    config = Config(64, 32, 64, 8, 2)
    tuned = tune.Tuned({tune.cell(PROBLEM): config})
    assert tuned(PROBLEM) == config
    assert tuned(dataclasses.replace(PROBLEM, outputs=500)) == config  # the table's own classes of width
    for other in ({"outputs": 32}, {"arithmetic": "tf32"}, {"architecture": 80}, {"kind": "rows"}):
        problem = dataclasses.replace(PROBLEM, **other)
        assert tuned(problem) == choose(problem)


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("RTL_KERNELS_CACHE", str(tmp_path))
    assert tune.path_for("NVIDIA H100 80GB HBM3") == tmp_path / "triton-nvidia-h100-80gb-hbm3.json"


def test_the_command_tunes_what_is_missing_and_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    triton = pytest.importorskip("triton")
    monkeypatch.setenv("RTL_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    asked: list[Problem] = []

    def measure(problem: Problem, config: Config) -> float:
        if len(asked) == 200:
            raise KeyboardInterrupt
        asked.append(problem)
        return float(config.BLOCK_R + config.warps + config.stages + config.BLOCK_K)

    with pytest.raises(KeyboardInterrupt):
        tune.main([], measure)
    kept = tune.load(tune.path_for("GPU"), "GPU", triton.__version__)
    assert 0 < len(kept) < len(list(cases.problems(86)))
    before = len(asked)
    monkeypatch.setattr(tune, "candidates", lambda problem: [choose(problem)])
    assert tune.main([], lambda problem, config: asked.append(problem) or 1.0) == 0
    assert len(asked) - before == len(list(cases.problems(86))) - len(kept)
    assert set(tune.load(tune.path_for("GPU"), "GPU", triton.__version__)) == {tune.cell(p) for p in cases.problems(86)}
    assert json.loads(tune.path_for("GPU").read_text())["device"] == "GPU"
    assert "table" in capsys.readouterr().out


def test_without_a_gpu_the_command_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert tune.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_a_layer_recorded_on_a_device_has_a_route_over_all_its_rows():
    steps = cases.record(cases.LAYERS[0], "float32", 80, device="cpu")
    (step,) = [step for step in steps if step.kernel == "correlate"]
    assert step.arguments["offsets"].tolist() == [0, *range(0, 257, 32)]
    assert step.arguments["order"].tolist() == list(range(256))
    assert (step.arguments["words"] == -1).all()
