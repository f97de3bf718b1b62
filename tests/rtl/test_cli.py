"""rtl.cli: four commands; what is wrong is said in one line with status 2, and nothing is written."""

import errno
import json
import os
import re
import signal
from pathlib import Path

import matplotlib.font_manager  # noqa: F401 (makes a list of fonts once, and if that takes long says so among errors)
import pytest
from test_report import row
from toys import tree

import rtl.cli
from rtl.cli import main
from rtl.recipes import recipe
from rtl.report import environment, markdown, summary, write_results
from rtl.run import Run

ROOT = os.environ.get("RTL_DATA")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty working directory, and no data root."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RTL_DATA", raising=False)
    return tmp_path


def call(capsys, *arguments):
    try:
        code = main(arguments)
    except SystemExit as stop:  # --help
        code = stop.code or 0
    out, err = capsys.readouterr()
    return code, out, err


def finished(folder):
    table = {
        "recipe": "digits",
        "command": "rtl run digits",
        "environment": environment(),
        "rows": [row(), row(seed=1)],
    }
    write_results(folder, table, {"class_names": [], "per_class": []})
    return table


# Help and lists


@pytest.mark.parametrize(
    "command", ["", "ls", "show", "run", "run digits", "run cifar10", "watch", "report", "predict"]
)
def test_help_has_an_example(capsys, command):
    code, out, err = call(capsys, *command.split(), "--help")
    assert code == 0
    assert err == ""
    assert f"example: rtl {command.split(maxsplit=1)[0] if command else 'run'}" in out


def test_the_recipes_own_help_lists_every_setting_with_its_default(capsys):
    _, out, _ = call(capsys, "run", "digits", "--help")
    for option in ("--seeds", "--sparsities", "--remove", "--lr", "--schedule", "--out", "--data", "--workers"):
        assert option in out
    assert "0.002" in out


def test_ls_lists_recipes_and_says_how_to_start(capsys):
    code, out, err = call(capsys, "ls")
    assert (code, err) == (0, "")
    assert "  digits " in out
    assert "  cifar10 " in out
    assert "try: rtl run digits" in out


def test_ls_says_which_runs_are_finished(capsys, folder):
    for name in ("done", "half"):
        Run(folder / "runs" / name).configure({"a": 1})
    finished(folder / "runs" / "done")
    _, out, _ = call(capsys, "ls")
    lines = [line.split(maxsplit=1) for line in out.split("runs:\n")[1].splitlines()]
    assert lines == [["runs/done", "finished"], ["runs/half", "unfinished, run again to resume"]]


def test_show_prints_every_setting_of_a_recipe_under_a_protocol(capsys):
    code, out, err = call(capsys, "show", "cifar10", "--protocol", "paper")
    assert (code, err) == (0, "")
    assert "CIFAR-10" in out
    config = recipe("cifar10", "paper")
    for name in ("remove", "round_epochs", "lr", "train_files"):
        assert [name, str(getattr(config, name))] in [line.split() for line in out.splitlines()]


@pytest.mark.parametrize(
    ("arguments", "recorded"),
    [
        ("", ""),
        ("--out a/b --workers 2 --lr 1 --tensorboard --seeds 0 1", "--lr 1 --seeds 0 1"),
        ("--lr 1 --data /there --out=b", "--data DIR --lr 1"),
        ("--data=/there --snrs 0 -5.0 --workers=3", "--data DIR --snrs 0 -5.0"),
        ("--lr 1 --mask /a/m.png --image=b/a.jpg --images c", "--image a.jpg --mask m.png --lr 1 --images c"),
    ],
)
def test_the_recorded_command_says_what_was_run_and_on_what_but_not_where_that_is(arguments, recorded):
    assert rtl.cli._what(arguments.split()) == recorded.split()


# What is wrong


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "required: ls | show | run | watch | report | predict"),
        ("bogus", "'bogus'"),
        ("ls extra", "unrecognized arguments: extra"),
        ("show", "required: recipe (rtl show --help"),
        ("show nope", "recipe is 'nope', expected one of digits, cifar10"),
        ("show digits --protocol paper", "protocol is 'paper', expected one of quick"),
        (
            "run",
            "no recipe is given, expected one of digits, cifar10, cifar100, cifar10-switches, cifar10-tuned, inr, "
            "speech: for example",
        ),
        ("run --lr 1", "no recipe is given"),
        ("run nope", "recipe is 'nope', expected one of digits, cifar10"),
        ("run digits --bogus 1", "--bogus"),
        ("run digits extra", "extra"),
        ("run digits --epochs 3", "--epochs"),
        ("run digits --protocol nope", "protocol is 'nope', expected one of quick"),
        ("run digits --protocol", "--protocol"),
        ("run cifar10 --protocol=fast", "protocol is 'fast', expected one of reduced, quick, paper"),
        ("run digits --seeds x", "--seeds"),
        ("run digits --seeds", "seeds is (), expected one or more different values"),
        ("run digits --seeds 1 1", "seeds is (1, 1), expected one or more different values"),
        ("run digits --sparsities 0.5 1.0", "1.0, expected a sparsity in [0, 1)"),
        ("run digits --sparsities 0.99999", "leaves none of 32400 weights"),
        ("run digits --remove 0", "remove is 0"),
        ("run digits --lr 0", "lr is 0.0"),
        ("run digits --lr nan", "lr is nan"),
        ("run digits --batch-size 0", "batch_size is 0"),
        ("run digits --round-epochs 0", "epochs is 0"),
        ("run digits --schedule mixd", "'mixd'"),
        ("run digits --methods magic", "'magic'"),
        ("run digits --workers 0", "workers is 0"),
        ("run digits --train-files 2", "train_files is 2, but the digits are not in files"),
        ("run digits --recipe mine", "recipe is 'mine', but rtl run digits runs 'digits'"),
        ("run digits --out file", "path is 'file', a file"),
        ("run digits --out file/below", "Not a directory: file"),
        ("run speech --mix-seed -1", "mix_seed is -1, expected 0 or more"),
        ("run speech --clip-seconds nan", "clip_seconds is nan, expected a finite number"),
        ("run cifar10", "no data root: give one (--data DIR), or set the environment variable RTL_DATA"),
        ("run cifar10 --data nowhere", "the data root is 'nowhere', which does not exist"),
        ("run cifar10 --data file", "the data root is 'file', which is not a folder"),
        ("run cifar10 --data empty", "no CIFAR-10 in 'empty'"),
        ("report", "required: RUN (rtl report --help"),
        ("report nowhere", "run is 'nowhere', which holds no finished results"),
        ("report empty", "run is 'empty', which holds no finished results"),
        ("report file", "run is 'file', which holds no finished results"),
        ("report done --to file", "give another path"),
        ("report done done --merge", "merge makes one run of 2, which needs a folder: give --to DIR"),
        ("report done done --merge --to both", "runs have a row twice"),
        ("report empty --bogus", "--bogus"),
        ("report done --into nowhere.md", "document is 'nowhere.md', which cannot be read"),
        ("report done --into empty", "document is 'empty', which cannot be read"),
        (
            "report done --into file",
            "has no line '<!-- table: digits -->' with a line '<!-- end -->' after it: add both",
        ),
        ("report done done --to new --into file", "has no line '<!-- table: digits -->'"),
        ("report done --semantics file", "semantics is given, but the run has no three tickets"),
        ("watch nowhere", "run is 'nowhere', which holds no config.json"),
        ("watch half --every 0", "every is 0.0, expected a number of seconds above 0"),
        ("predict", "required: RUN, FILE (rtl predict --help"),
        ("predict done", "required: FILE"),
        ("predict nowhere x.png", "run is 'nowhere', which holds no tickets: finish its `rtl run`"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_with_status_2_and_nothing_is_written(capsys, folder, command, message):
    (folder / "file").write_text("x")
    (folder / "empty").mkdir()
    finished(folder / "done")
    Run(folder / "half").configure({"a": 1})
    before = tree(folder), sorted(folder.rglob("*"))
    code, out, err = call(capsys, *command.split())
    assert code == 2
    assert out == ""
    assert err.startswith("rtl: ")
    assert err.count("\n") == 1
    assert message in err
    assert (tree(folder), sorted(folder.rglob("*"))) == before


def test_more_training_files_than_there_are_is_refused(capsys, monkeypatch, folder):
    if not ROOT or not (Path(ROOT) / "cifar10").is_dir():
        pytest.skip("needs CIFAR-10: set RTL_DATA to a data root that holds cifar10")
    code, _, err = call(capsys, "run", "cifar10", "--data", ROOT, "--train-files", "9")
    assert code == 2
    assert err.count("\n") == 1
    assert "parts is 9, but" in err
    assert tree(folder) == {}


def test_a_changed_recipe_in_an_existing_run_is_refused_and_the_run_unharmed(capsys, folder):
    Run(folder / "runs/digits").configure(recipe("digits"))
    finished(folder / "runs/digits")
    before = tree(folder)
    code, out, err = call(capsys, "run", "digits", "--lr", "0.5", "--seeds", "7")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "lr was 0.002, now 0.5; seeds was [0, 1, 2], now [7]: use another --out or delete the folder" in err
    assert {name: data for name, data in tree(folder).items() if not name.endswith(".lock")} == before


@pytest.mark.parametrize("command", ["run digits --out held", "report held", "report held free --to page"])
def test_a_run_that_another_process_holds_is_refused(capsys, folder, command):
    for name in ("held", "free"):
        finished(folder / name)
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with Run(folder / "held").lock():
                os.write(theirs, b"x")
                signal.pause()
        finally:
            os._exit(1)
    os.close(theirs)
    try:
        assert os.read(ours, 1) == b"x"
        before = tree(folder)
        code, _, err = call(capsys, *command.split())
        assert tree(folder) == before
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert code == 2
    assert f"which process {child} is using: wait for it or use another --out" in err


def test_a_run_is_kept_elsewhere_while_it_is_held_and_may_be_named_twice(capsys, folder):
    finished(folder / "done")
    with Run(folder / "done").lock():
        assert call(capsys, "report", "done", "--to", "kept")[0] == 0  # it is only read
    assert not (folder / "kept/.lock").exists()
    assert call(capsys, "report", "done", "./done")[0] == 0


# Report


def test_report_prints_the_command_the_environment_and_the_table(capsys, folder):
    table = finished(folder / "done")
    before = tree(folder)
    code, out, err = call(capsys, "report", "done")
    assert (code, err) == (0, "")
    assert "rtl run digits" in out
    assert "0.900 ± 0.000" in out
    assert all(name in out for name in ("RTL", "BA thr.", "#Params"))
    after = tree(folder)
    assert "rtl run digits" in after.pop("done/report.html").decode()
    assert after == before
    assert (folder / "done/table.md").read_text() == markdown(summary(table["rows"]))


def test_a_narrow_terminal_gets_the_table_in_parts_and_every_figure_whole(capsys, folder, monkeypatch):
    finished(folder / "done")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes the output for a terminal's
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = call(capsys, "report", "done")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out)
    table = [line for line in plain.splitlines() if line[:1] in "┏┃┡│└"]
    assert max(map(len, table)) <= 80
    assert "…" not in plain
    head, line = summary([row(), row(seed=1)])
    assert all(text in plain for text in (*head, *line))
    assert sum(line.startswith("│ RTL ") for line in table) > 1  # every part says what its lines are of


@pytest.mark.parametrize(("changed", "counted"), [({"variant": "lr=0.1"}, False), ({"samples": 1}, True)])
def test_a_run_found_done_keeps_its_time_and_machine_whatever_its_rows_are_called_now(
    capsys, folder, monkeypatch, changed, counted
):
    table = finished(folder / "done") | {"wall": 60.0, "resumed": 0, "workers": 7}
    table["environment"]["processor"] = "another"
    write_results(folder / "done", table, {})
    rows = [one | changed for one in table["rows"]]
    monkeypatch.setattr("rtl.recipes.run_recipe", lambda *_: (rows, {"class_names": [], "per_class": []}))
    assert call(capsys, "run", "digits", "--out", "done", "--workers", "1")[0] == 0
    after = json.loads((folder / "done/table.json").read_text())
    assert after["rows"] == rows
    assert (after["environment"]["processor"] == "another") is not counted
    assert ((after["wall"], after["workers"]) == (60.0, 7)) is not counted


def test_report_draws_the_figures_again(capsys, folder):
    finished(folder / "done")
    before = tree(folder)
    (folder / "done/figures/metric.png").unlink()
    call(capsys, "report", "done")
    after = tree(folder)
    assert after.pop("done/report.html")
    assert after == before


def test_several_runs_are_one_page_and_each_ones_table(capsys, folder):
    for name in ("one", "two"):
        finished(folder / name)
    readme = folder / "R.md"
    readme.write_text("<!-- table: digits -->\n<!-- end -->\n")
    before = tree(folder)
    code, out, _ = call(capsys, "report", "one", "two", "--to", "both", "--into", "R.md")
    assert code == 0
    assert out.count("0.900 ± 0.000") == 2
    after = tree(folder)
    page = after.pop("both/report.html").decode()
    assert page.count("<article><h3>one</h3>") == page.count("<article><h3>two</h3>") > 1
    assert "RTL" in after.pop("R.md").decode()
    del before["R.md"]
    assert after == before


def test_of_several_tables_one_without_its_mark_stops_all(capsys, folder):
    finished(folder / "one")
    table = {"recipe": "cifar10", "command": "c", "environment": environment(), "rows": [row()]}
    write_results(folder / "two", table, {"class_names": [], "per_class": []})
    (folder / "R.md").write_text("<!-- table: digits -->\n<!-- end -->\n")
    before = tree(folder)
    code, out, err = call(capsys, "report", "one", "two", "--into", "R.md")
    assert (code, out) == (2, "")
    assert "no line '<!-- table: cifar10 -->'" in err
    assert tree(folder) == before


def test_a_missing_place_for_the_papers_figures_is_said_and_no_error(capsys, folder):
    metrics = {f"{name}.{rule}": 0.5 for name in ("precision", "recall") for rule in ("threshold", "argmax")}
    rows = [row(**metrics)]
    table = {"recipe": "cifar10", "command": "c", "environment": environment(), "rows": rows}
    write_results(folder / "done", table, {"class_names": [], "per_class": []})
    (folder / "R.md").write_text("<!-- table: cifar10 -->\n<!-- end -->\n")
    code, _, err = call(capsys, "report", "done", "--into", "R.md")
    assert code == 0
    assert err.count("\n") == 1
    assert "R.md has no line '<!-- published: cifar10 -->'" in err
    (folder / "R.md").write_text("<!-- table: cifar10 -->\n<!-- end -->\n<!-- published: cifar10 -->\n<!-- end -->\n")
    assert call(capsys, "report", "done", "--into", "R.md")[2] == ""
    assert "0.778" in (folder / "R.md").read_text()


def test_meaning_of_ones_own_is_set_against_sharing(capsys, folder):
    finished(folder / "done")
    details = json.loads((folder / "done/details.json").read_text())
    curve = json.loads((Path(__file__).parent / "fixtures/curves/inr.json").read_text())
    (folder / "done/details.json").write_text(json.dumps({**details, "curve": curve, "alarms": []}))
    vectors = {"names": curve["names"], "embedding": [[k, 1] for k in range(5)]}
    (folder / "meaning.json").write_text(json.dumps(vectors))
    code, _, err = call(capsys, "report", "done", "--semantics", "meaning.json")
    assert (code, err) == (0, "")
    written = json.loads((folder / "done/details.json").read_text())["alignment"]
    assert written["names"] == curve["names"]
    assert (folder / "done/figures/alignment.png").is_file()
    code, _, err = call(capsys, "report", "done", "--semantics", "nowhere")
    assert code == 2
    assert "semantics is 'nowhere', which cannot be used" in err


def test_report_writes_results_and_the_configuration_elsewhere(capsys, folder):
    table = finished(folder / "done")
    Run(folder / "done").configure({"lr": 1})
    (folder / "done/media/scene").mkdir(parents=True)
    (folder / "done/media/scene/one.png").write_bytes(b"x")
    code, *_ = call(capsys, "report", "done", "--to", "results/digits")
    assert code == 0
    assert json.loads((folder / "results/digits/table.json").read_text()) == table
    written = {
        str(f.relative_to(folder / "results/digits")) for f in (folder / "results/digits").rglob("*") if f.is_file()
    }
    assert written == {
        "table.json",
        "details.json",
        "table.md",
        "figures/metric.png",
        "config.json",
        "media/scene/one.png",
        "report.html",
    }
    assert "data:image/png;base64,eA==" in (folder / "results/digits/report.html").read_text()


def test_merged_runs_are_one_table_of_all(capsys, folder):
    for seed in (0, 1):
        table = {"recipe": "digits", "command": f"c{seed}", "environment": environment(), "rows": [row(seed=seed)]}
        write_results(folder / f"run{seed}", table, {"class_names": [], "per_class": []})
        Run(folder / f"run{seed}").configure({"a": seed})
        (folder / f"run{seed}/tickets/0.5").mkdir(parents=True)
        (folder / f"run{seed}/tickets/0.5/inputs.json").write_text(str(seed))
    code, out, err = call(capsys, "report", "run0", "run1", "--merge", "--to", "both")
    assert (code, err) == (0, "")
    assert "c0 && c1" in out
    assert [r["seed"] for r in json.loads((folder / "both/table.json").read_text())["rows"]] == [0, 1]
    assert {f.name for f in (folder / "both").glob("config*")} == {"config-run0.json", "config-run1.json"}
    assert (folder / "both/tickets/0.5/inputs.json").read_text() == "0"  # the first run's
    assert (folder / "both/report.html").is_file()


def test_a_single_network_as_large_as_the_tickets_union_is_a_run_that_merges_into_their_table(capsys, folder):
    settings = "--seeds 0 --remove 0.5 --round-epochs 1 --retrain-epochs 1 --batch-size 256 --workers 1"
    command = f"run digits --methods rtl imp_single --sparsities 0.5 {settings} --out tickets"
    assert call(capsys, *command.split())[0] == 0
    union = json.loads((folder / "tickets/table.json").read_text())["rows"][0]["params"]
    sparsity = 1 - union / 32_400
    command = f"run digits --methods imp_single --sparsities {sparsity} {settings} --out single"
    assert call(capsys, *command.split())[0] == 0
    code, out, _ = call(capsys, "report", "tickets", "single", "--merge", "--to", "both")
    assert code == 0
    rows = json.loads((folder / "both/table.json").read_text())["rows"]
    kept = [("rtl", union), ("imp_single", 16_200), ("imp_single", union)]
    assert [(r["method"], r["params"]) for r in rows] == kept
    assert rows[2]["samples"] == rows[1]["samples"]
    assert rows[2]["variant"] == f"{rows[1]['variant']},sparsities={sparsity:g}"
    assert f"{union:,}" in out


def test_report_of_an_unfinished_run_says_to_finish_it(capsys, folder):
    Run(folder / "half").configure(recipe("digits"))
    code, out, err = call(capsys, "report", "half")
    assert (code, out) == (2, "")
    assert "finish `rtl run`" in err


# How it ends


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "rtl: interrupted; the same command resumes\n"),
        (ChildProcessError("worker 7 died: run again to resume"), 1, "rtl: worker 7 died: run again to resume\n"),
        (PermissionError(13, "Permission denied", "/there"), 2, "rtl: Permission denied: /there: give another path\n"),
        (OSError(errno.ENOSPC, "No space left"), 1, "rtl: No space left: make room, and give the same command again\n"),
    ],
)
def test_what_stops_a_command_is_said_in_one_line(capsys, monkeypatch, error, code, message):
    def stopped(_):
        raise error

    monkeypatch.setattr(rtl.cli, "_dispatch", stopped)
    assert call(capsys, "ls") == (code, "", message)


@pytest.mark.parametrize("error", [ZeroDivisionError(), OSError(errno.EIO, "Input/output error")])
def test_a_bug_keeps_its_traceback(monkeypatch, error):
    def bug(_):
        raise error

    monkeypatch.setattr(rtl.cli, "_dispatch", bug)
    with pytest.raises(type(error)):
        main(["ls"])
