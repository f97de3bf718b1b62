"""The machinery of the benchmarks: every contender is right, a wrong one is found, and figures come from results."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import contenders, harness, networks, plot, summary
from benchmarks.cases import CASES, NETWORKS, SPARSITIES, Case, Network
from benchmarks.timing import RoundRobin, SkippedError
from rtl.errors import InputError

ROOT = Path(__file__).parents[2]

TINY = (
    Case("linear", (24, 40), (40,), 30, 3),
    Case("strided", (8, 6, 3, 3), (6, 9, 8), 20, 3, {"padding": 1, "stride": (1, 2)}),
    Case("depthwise", (8, 1, 3, 3), (8, 6, 6), 20, 3, {"padding": 1, "groups": 8}),
)
TINY_NETWORK = Network("tiny", "per_ticket", batch=24, tickets=2, size=16)
TINY_INR = Network("tiny", batch=40, tickets=2, model="inr")
COMPILED = "compiled loop"


def names(of):
    """Compiling takes tens of seconds."""
    return [pytest.param(name, marks=pytest.mark.slow if name == COMPILED else ()) for name in of]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", names(contenders.CONTENDERS))
@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_contender_is_right_or_says_why_not(case, name, training):
    if name == COMPILED and case.name != "strided":
        pytest.skip("compiled for one case: compiling takes long")
    if name == COMPILED and shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    problem = contenders.Problem(case, 0.5, training)
    runs, skipped = contenders.build(problem, [name])
    if name == "loop, cached" and training:
        assert not runs
        assert "nothing to cache" in skipped[name]
    else:
        assert not skipped
        runs[name]()


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_code_of_torch_compile_that_fails_is_no_contender_and_is_said(monkeypatch):
    def made(*args):
        raise AssertionError("expected size 3==3, stride 9==1\nmore")

    monkeypatch.setattr(torch, "compile", lambda function, **options: made)
    runs, skipped = contenders.build(contenders.Problem(TINY[1], 0.5, True), ["dense", COMPILED])
    assert list(runs) == ["dense"]
    assert skipped == {COMPILED: "torch.compile's code fails: expected size 3==3, stride 9==1"}


@pytest.mark.parametrize("computes", ["masked", "untied", "dense"])
@pytest.mark.parametrize("training", [False, True])
def test_wrong_contender_is_found(computes, training):
    problem = contenders.Problem(TINY[1], 0.5, training)
    wrong = problem.weight.detach() * (problem.masks[0] if computes != "dense" else 0.999)
    call = contenders.Call(lambda: problem.dense(problem.x, wrong), problem.weight, computes)
    with pytest.raises(AssertionError, match=r"wrong: y: .* elements are wrong"):
        contenders.Expected(problem).check("wrong", call)


def test_wrong_gradient_is_found():
    problem = contenders.Problem(TINY[0], 0.5, True)

    def leaky():  # right values, but every weight gets a gradient
        y = contenders.ours(problem).forward()
        through = problem.dense(problem.x, problem.weight)
        return y + through - through.detach()

    with pytest.raises(AssertionError, match=r"wrong: d[xW]: .* elements are wrong"):
        contenders.Expected(problem).check("wrong", contenders.Call(leaky, problem.weight))


def test_contender_that_needs_too_much_memory_is_skipped(monkeypatch):
    monkeypatch.setattr(contenders, "MEMORY_LIMIT", 1 << 10)
    _, skipped = contenders.build(contenders.Problem(TINY[0], 0.5, False), ["gathered bmm", "vmap"])
    assert "a weight for every sample would take" in skipped["gathered bmm"]
    assert "GiB" in skipped["vmap"]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("batch_norm", ["shared", "per_ticket"])
def test_network_contender_is_right_or_says_why_not(batch_norm, training):
    problem = networks.Problem(dataclasses.replace(TINY_NETWORK, batch_norm=batch_norm), 0.5, training)
    runs, skipped = networks.build(problem)
    assert set(skipped) == ({"loop, cached", "ours, fused"} if training else set()) | (
        {"loop"} if training and batch_norm == "shared" else set()
    )
    for run in runs.values():
        run()


@pytest.mark.parametrize("training", [False, True])
def test_every_contender_computes_the_network_of_pixels(training):
    runs, skipped = networks.build(networks.Problem(TINY_INR, 0.5, training))
    assert set(skipped) == {"ours, fused"} | ({"loop, cached"} if training else set())
    for run in runs.values():
        run()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("network", [TINY_NETWORK, TINY_INR])
def test_wrong_network_is_found(network, training):
    problem = networks.Problem(network, 0.5, training)
    name, bank = next(iter(problem.net.banks.items()))
    expected = networks.Expected(problem)
    right = networks.ours(problem)
    expected.check("right", right)
    problem.net.banks = {**problem.net.banks, name: bank.select([1, 0])}
    with pytest.raises(AssertionError, match="wrong: results"):
        expected.check("wrong", networks.ours(problem))


def test_wrong_network_gradient_is_found():
    problem = networks.Problem(TINY_NETWORK, 0.5, True)
    call = networks.ours(problem)
    call.parameters[0].register_hook(lambda gradient: gradient * 1.2)
    with pytest.raises(AssertionError, match="wrong: gradient 0"):
        networks.Expected(problem).check("wrong", call)


def test_network_training_step_moves_weights():
    problem = networks.Problem(TINY_NETWORK, 0.5, True)
    call = networks.ours(problem)
    before = [p.detach().clone() for p in call.parameters]
    networks._step(problem, call)()
    assert any(not torch.equal(old, new) for old, new in zip(before, call.parameters, strict=True))


@pytest.fixture
def work(monkeypatch):
    """work(seconds) takes so long by the clock that is read."""
    now = 0.0

    def clock():
        return now

    def work(seconds):
        nonlocal now
        now += seconds

    monkeypatch.setattr("benchmarks.timing.time", SimpleNamespace(thread_time=clock, perf_counter=clock))
    return work


def test_round_robin_times_everybody_in_turn_and_the_slow_less_often(work):
    seconds, calls = {"quick": 0.002, "slow": 1.0}, {"quick": 0, "slow": 0}

    def run(name):
        calls[name] += 1
        work(seconds[name])

    robin = RoundRobin({"quick": lambda: run("quick"), "slow": lambda: run("slow")})
    rounds = robin.rounds(0.01)
    for _ in range(rounds):
        robin.round()
    timings = robin.timings()
    assert timings["quick"].median == pytest.approx(0.002)
    assert timings["slow"].median == pytest.approx(1)
    assert timings["quick"].blocks == rounds
    assert 3 <= timings["slow"].blocks < rounds
    assert calls["slow"] == 2 + timings["slow"].blocks
    for timing in timings.values():
        assert 0 < timing.low <= timing.median <= timing.high


def test_round_robin_skips_who_is_over_the_limit(work):
    robin = RoundRobin({"first": lambda: work(0.5), "slow": lambda: work(2)}, limit=1)
    robin.round()
    assert list(robin.timings()) == ["first"]
    assert robin.skipped == {"slow": "one call takes 2.0 s, over the limit of 1 s"}


# ---- results


def report(ratios, threads=1, mode="inference", cases=CASES, skipped=None):
    """pytest-benchmark's JSON, with `ratios` {contender: ratio} for every case and sparsity, dense at 2 ms."""
    timings = {
        name: {"median": 0.002 * r, "low": 0.0018 * r, "high": 0.0026 * r} for name, r in {"dense": 1, **ratios}.items()
    }
    where = [(case, sparsity) for case in cases for sparsity in SPARSITIES]
    return {
        "machine_info": {
            "processor": "P",
            "instructions": "I",
            "cores": 2,
            "torch": "T",
            "python": "3",
            "threads": threads,
        },
        "commit_info": {"id": "abc"},
        "datetime": "2026-01-02T03:04:05",
        "benchmarks": [
            {
                "extra_info": {
                    "case": case,
                    "sparsity": sparsity,
                    "mode": mode,
                    "threads": threads,
                    "contenders": timings,
                    "skipped": skipped or {},
                }
            }
            for case, sparsity in where
        ],
    }


PEAKS = {"flops": 1e11, "bandwidth": {"L1": 2e11, "DRAM": 2e10}, "buffer": {"L1": 16384, "DRAM": 1 << 27}}


def test_summary_has_the_documented_rows():
    result = summary.summarise([report({"ours": 0.5}, skipped={"vmap": "too much"})], "make bench", PEAKS)
    row = next(row for row in result["rows"] if row["contender"] == "ours")
    assert row["ratio_to_dense"] == 0.5
    assert (row["low"], row["high"], row["seconds"]) == (0.45, 0.65, 0.001)
    assert {"case", "sparsity", "threads", "contender", "ratio_to_dense", "mode"} <= row.keys()
    assert len(result["rows"]) == 2 * 9 * 4
    assert result["skipped"][0]["reason"] == "too much"
    assert "threads" not in result["environment"]


def test_table_shows_spread_means_and_who_is_faster():
    reports = [report({"ours": 0.5, "loop": 2, "untied": 0.4}), report({"ours": 1.25}, threads=2)]
    head, *lines = summary.table(summary.summarise(reports, "make bench", PEAKS))
    first = dict(zip(head, lines[0], strict=True))
    assert first["dense"] == "2 ms"
    assert first["ours 50%"] == "0.50 ± 0.10"
    assert first["loop"] == "2"
    assert first["faster than ours"] == "untied at 25%, 50%, 75%, 90%"
    means = [dict(zip(head, line, strict=True)) for line in lines if "mean" in line[0]]
    assert [m["pass"] for m in means] == ["inference, 1 thread", "inference, 2 threads"]
    assert means[0]["ours 90%"] == "0.50"
    assert means[0]["untied"] == "0.4"
    assert means[1]["loop"] == "–"
    assert means[1]["faster than ours"].startswith("dense at 25%")


def test_no_geometric_mean_without_all_nine_cases():
    lines = summary.table(summary.summarise([report({"ours": 0.5}, cases=list(CASES)[:8])], "make bench", PEAKS))
    assert len(lines) == 1 + 8


def test_table_is_written_between_its_marks_and_nowhere_else(tmp_path):
    result = summary.summarise([report({"ours": 0.5}, skipped={"vmap": "too much"})], "make bench", PEAKS)
    summary.write_results(tmp_path, {}, result)
    document = tmp_path / "README.md"
    document.write_text("before\n<!-- benchmarks -->\nnot measured yet\n<!-- end -->\nafter\n<!-- end -->\n")
    assert summary.main(["--results", str(tmp_path), "--into", str(document)]) == 0
    text = document.read_text()
    assert text == f"before\n<!-- benchmarks -->\n{summary.section(result)}<!-- end -->\nafter\n<!-- end -->\n"
    assert "* vmap: too much\n" in text
    document.write_text("<!-- benchmarks -->\nthese stay\n<!-- end -->\n<!-- others -->\n<!-- end -->\n")
    assert summary.main(["--results", str(tmp_path), "--into", str(document), "--mark", "others"]) == 0
    ours = summary.section(result)
    assert (
        document.read_text() == f"<!-- benchmarks -->\nthese stay\n<!-- end -->\n<!-- others -->\n{ours}<!-- end -->\n"
    )


def test_document_without_marks_is_left_alone(tmp_path, capsys):
    summary.write_results(tmp_path, {}, summary.summarise([report({"ours": 0.5})], "make bench", PEAKS))
    document = tmp_path / "README.md"
    document.write_text("nothing\n")
    assert summary.main(["--results", str(tmp_path), "--into", str(document)]) == 2
    assert "<!-- benchmarks -->" in capsys.readouterr().err
    assert document.read_text() == "nothing\n"


def test_missing_results_are_an_error_in_words(tmp_path, capsys):
    assert summary.main(["--results", str(tmp_path)]) == 2
    assert plot.main(["--results", str(tmp_path)]) == 2
    assert "run python -m benchmarks" in capsys.readouterr().err


@pytest.mark.parametrize(("mark", "results"), [(summary.MARK, "."), ("benchmarks avx2", "avx2")])
def test_readme_shows_the_committed_results(mark, results):
    block = (ROOT / "README.md").read_text().split(f"<!-- {mark} -->\n")[1].split("<!-- end -->")[0]
    assert block == summary.section(summary.read_summary(summary.RESULTS / results))


def test_figures_are_drawn_from_a_summary(tmp_path):
    reports = [report({"ours": 0.5, "loop": 2}), report({"ours": 0.7}, threads=2, mode="training")]
    result = summary.summarise(reports, "make bench", PEAKS)
    files = plot.draw(result, tmp_path)
    assert [file.name for file in files] == ["ratio-inference-1.png", "ratio-training-2.png", "roofline.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    without = plot.draw({**result, "peaks": "no C++ compiler"}, tmp_path)
    assert [file.name for file in without] == ["ratio-inference-1.png", "ratio-training-2.png"]


def test_every_contender_has_a_style():
    assert plot.STYLES.keys() == contenders.CONTENDERS.keys() - {"dense"}


# ---- the command


def options(*arguments):
    return command.parse(arguments)


def test_everything_is_measured_unless_reduced():
    full = list(command.stages(options("--threads", "1", "2")))
    assert len(full) == 2 * 2 * len(command.SUITES)
    reduced = list(command.stages(options("--reduced")))
    assert {stage.case for stage in reduced} == set(command.SUITES)
    assert {stage.case for stage in reduced if stage.mode == "training"} == set(command.REDUCED_TRAINING)


def test_cases_without_a_chosen_sparsity_are_left_out():
    assert {stage.case for stage in command.stages(options("--sparsity", "0.25"))} == set(CASES)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--case", "nothing like it"], "case is ['nothing like it'], but the cases are"),
        (["--sparsity", "0.3"], "sparsity is [0.3], which none"),
        (["--threads", "0"], "threads is 0"),
        (["--reduced", "--case", "depthwise", "--mode", "training"], "of which --reduced measures none in mode train"),
        (["--seconds", "-1"], "seconds is -1"),
    ],
)
def test_bad_input_is_refused_in_words(arguments, said, capsys):
    assert command.main(arguments) == 2
    assert said in capsys.readouterr().err


def test_a_place_for_results_that_is_none_is_refused_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "run", lambda stage, finished: pytest.fail("measured"))
    (tmp_path / "file").touch()
    assert command.main(["--reduced", "--out", str(tmp_path / "file")]) == 2
    assert "file', expected a folder" in capsys.readouterr().err


def test_the_benchmarks_refuse_another_environment():
    environment = {key: value for key, value in os.environ.items() if key not in harness.ALLOCATOR}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks/bench_operators.py", "-q"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "MALLOC_MMAP_MAX_" in done.stderr


@pytest.mark.slow
def test_a_run_from_command_to_table_and_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "UNFINISHED", tmp_path / "unfinished")
    case = "linear 8, 128→128, K4"
    arguments = ["--case", case, "--contender", "ours", "--mode", "inference", "--seconds", "0.01"]
    assert command.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert f"| {case} | inference, 1 thread |" in capsys.readouterr().out
    result = summary.read_summary(tmp_path / "out")
    assert [row["contender"] for row in result["rows"]] == ["dense", "ours"]
    raw = json.loads((tmp_path / "out" / "operators-1.json").read_text())
    assert raw["machine_info"]["torch"] == torch.__version__
    assert not {"node", "branch"} & {*raw["machine_info"], *raw["commit_info"]}
    assert not list((tmp_path / "unfinished").iterdir())


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    """A stage whose report is there is not measured again; one measured by other code is."""
    monkeypatch.setattr(command, "UNFINISHED", tmp_path)
    stage = next(command.stages(options("--reduced")))
    finished = command.place(stage, "this code")
    finished.write_text('{"benchmarks": []}')
    assert command.run(stage, finished) == {"benchmarks": []}
    assert command.place(stage, "other code") != finished
    other = dataclasses.replace(stage, mode="training")
    assert command.place(other, "this code") != finished


def test_results_are_there_after_each_case_and_unfinished_until_the_last(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "UNFINISHED", tmp_path / "unfinished")
    monkeypatch.setattr(command.roofline, "measure", lambda: PEAKS)
    failing = ["linear 1024, 128→128, K8"]

    def run(stage, finished):
        if stage.case in failing:
            raise RuntimeError("it is wrong")
        return report({"ours": 0.5}, cases=[stage.case])

    monkeypatch.setattr(command, "run", run)
    arguments = ["--case", "linear 256", "--case", "linear 1024", "--mode", "inference", "--out", str(tmp_path / "out")]
    assert command.main(arguments) == 1
    result = summary.read_summary(tmp_path / "out")
    assert result["unfinished"] == "1 of 2 cases are measured"
    assert {row["case"] for row in result["rows"]} == {"linear 256, 512→512, K8"}
    assert summary.section(result).startswith("**Unfinished: 1 of 2 cases are measured.** `python -m benchmarks ")
    failing.clear()
    capsys.readouterr()
    assert command.main(arguments) == 0
    result = summary.read_summary(tmp_path / "out")
    assert "unfinished" not in result
    assert result["peaks"] == PEAKS
    assert len({row["case"] for row in result["rows"]}) == 2
    assert capsys.readouterr().out == summary.section(result)


def test_a_failed_measurement_fails_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "UNFINISHED", tmp_path)
    monkeypatch.setattr(command.Stage, "command", lambda self, output: [sys.executable, "-c", "exit('it is wrong')"])
    assert command.main(["--reduced", "--case", "1024"]) == 1
    assert "it is wrong" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_cases_of_all_suites_have_different_names():
    assert len(command.SUITES) == len(CASES) + len(NETWORKS) + 3


def test_skipping_is_for_reasons_only():
    problem = contenders.Problem(TINY[0], 0.5, True)
    with pytest.raises(SkippedError):
        contenders.loop_cached(problem)
    with pytest.raises(InputError):
        command.parse(["--limit", "0"])
