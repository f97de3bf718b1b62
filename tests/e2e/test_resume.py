"""`rtl run digits`, stopped at any moment, finishes with the bytes of a run that was not."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")

WORKERS = 2
OPTIONS = "--seeds 0 --sparsities 0.3 0.5 --remove 0.3 --round-epochs 1 --retrain-epochs 1 --batch-size 128 --out run"
COMMAND = [sys.executable, "-m", "rtl.cli", "run", "digits", *OPTIONS.split(), "--workers", str(WORKERS)]
DEADLINE = 1800  # seconds; only what hangs takes as long


class Command:
    """The command in a folder of its own, in a process group of its own."""

    def __init__(self, folder):
        folder.mkdir(exist_ok=True)
        self.run = folder / "run"
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            COMMAND,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # A shell's background job ignores SIGINT, and so would all it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def wait_for(self, pattern, number):
        """Wait until that many files are there."""
        self._wait(lambda: len(list(self.run.glob(pattern))) >= number)

    def _wait(self, reached):
        end = time.monotonic() + DEADLINE
        while not reached():
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < end
            time.sleep(0.002)

    def stop(self, sent):
        """Send SIGINT to the group, as a terminal does, or SIGKILL to the command alone; say how it ended."""
        self._wait(self._halted_at_work)
        found = {"workers": len(self.workers())}
        (os.killpg if sent == signal.SIGINT else os.kill)(self.process.pid, sent)
        os.killpg(self.process.pid, signal.SIGCONT)
        found["code"], found["out"], found["err"] = self.finish()
        end = time.monotonic() + DEADLINE
        while self.group() and time.monotonic() < end:
            time.sleep(0.05)
        return found | {"left": self.group()}

    def _halted_at_work(self):
        """Halt the group; whether it has all its workers then, which come and go. If not, it goes on."""
        os.killpg(self.process.pid, signal.SIGSTOP)
        self._wait(lambda: not {"R", "S"} & {*self.group().values()})
        # One that waits for the disk, or for what it starts, is not halted before that.
        if {*self.group().values()} == {"T"} and len(self.workers()) == WORKERS:
            return True
        os.killpg(self.process.pid, signal.SIGCONT)
        return False

    def group(self):
        """Processes of the command that are alive: id -> state."""
        alive = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, group, *_ = stat.read_text().rpartition(")")[2].split()
                if int(group) == self.process.pid and state not in "ZX":
                    alive[int(stat.parent.name)] = state
        return alive

    def workers(self):
        return [p for p in self.group() if b"multiprocessing.spawn" in Path(f"/proc/{p}/cmdline").read_bytes()]

    def finish(self):
        out, err = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode, out, err


def finish(folder):
    with Command(folder) as command:
        code, out, err = command.finish()
    assert code == 0, err
    return out, err


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    out, _ = finish(folder)
    return folder / "run", out


def without_seconds(value):
    if isinstance(value, dict):
        timed = ("seconds", "wall", "resumed")
        return {key: without_seconds(item) for key, item in value.items() if key not in timed}
    return [without_seconds(item) for item in value] if isinstance(value, list) else value


def contents(run):
    """Every file of a run but its lock and clock: bytes, without what tells time: fields, columns, part of the page."""
    found = {}
    for file in sorted(run.rglob("*")):
        name = str(file.relative_to(run))
        if file.is_dir() or name in (".lock", "wall.json"):
            continue
        found[name] = file.read_bytes()
        if file.suffix == ".json":
            found[name] = json.dumps(without_seconds(json.loads(found[name])))
        elif file.suffix == ".html":
            found[name] = re.sub(r'<section id="cost".*?</section>', "", found[name].decode())
        elif file.suffix == ".md":
            found[name] = [line.split("|")[:-3] for line in found[name].decode().splitlines()]
    return found


def kinds(names):
    return {re.sub(r"[0-9]+", "N", name) for name in names}


STOPS = {  # where in the run -> the signal it gets there
    "workers start": signal.SIGINT,
    "early extraction": signal.SIGKILL,
    "extraction": signal.SIGINT,
    "retraining": signal.SIGKILL,
}


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """One run stopped at four moments and then finished: its folder, and how each stop went."""
    folder, moments, stops = tmp_path_factory.mktemp("interrupted"), random.Random(20260122), {}
    rounds, networks = "seed-0/*/extract/*/round-*.json", "seed-0/**/network.json"
    reached = {
        "workers start": ("seed-0/*/extract/config.json", 2),
        "early extraction": (rounds, moments.randrange(1, 6)),
        "extraction": (rounds, moments.randrange(8, 12)),
        "retraining": (networks, moments.randrange(3, 14)),
    }
    for moment, (pattern, number) in reached.items():
        with Command(folder) as command:
            command.wait_for(pattern, number)
            if moment != "workers start":
                time.sleep(moments.random() * 0.1)
            stops[moment] = command.stop(STOPS[moment])
            stops[moment]["finished"] = (command.run / "table.json").exists()
    finish(folder)
    return folder / "run", stops


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_bytes_of_an_uninterrupted_run(interrupted, uninterrupted):
    expected, found = contents(uninterrupted[0]), contents(interrupted[0])
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == expected[name], name
    assert {
        "table.json",
        "details.json",
        "table.md",
        "config.json",
        "report.html",
        "tickets/N.N/router-confidence.safetensors",
        "figures/metric.png",
        "figures/similarity.png",
        "figures/similarity-by-depth-N.N.png",
        "seed-N/rtl/extract/N/round-N.safetensors",
        "seed-N/imp_single/extract/all/round-N.safetensors",
        "seed-N/rtl/retrain/N.N/network.safetensors",
        "seed-N/imp_multiple/N/retrain/N.N/network.safetensors",
        "seed-N/dense/retrain/N/network.safetensors",
    } <= kinds(found)


@pytest.mark.slow
def test_the_clock_on_the_wall_goes_on_where_the_run_does(interrupted, uninterrupted):
    whole, resumed = (json.loads((run / "table.json").read_text()) for run in (uninterrupted[0], interrupted[0]))
    assert (whole["resumed"], whole["workers"]) == (0, 2)
    assert 1 <= resumed["resumed"] <= len(STOPS)  # a command that is stopped before it works is none
    assert min(whole["wall"], resumed["wall"]) > 0


@pytest.mark.slow
def test_every_stop_came_before_the_end_and_left_no_results(interrupted):
    for moment in STOPS:
        assert interrupted[1][moment]["finished"] is False


@pytest.mark.slow
def test_workers_end_with_the_command_however_it_ends(interrupted):
    for moment in STOPS:
        assert interrupted[1][moment]["workers"] == WORKERS
        assert interrupted[1][moment]["left"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("moment", [m for m, sent in STOPS.items() if sent == signal.SIGINT])
def test_ctrl_c_ends_with_status_130_and_one_line_that_it_resumes(interrupted, moment):
    stop = interrupted[1][moment]
    assert stop["code"] == 130
    assert stop["err"].splitlines()[-1] == "rtl: interrupted; the same command resumes"
    assert "Traceback" not in stop["err"]
    assert stop["out"] == ""


@pytest.mark.slow
def test_the_command_prints_one_table_of_every_method_at_every_sparsity(uninterrupted):
    run, out = uninterrupted
    lines = out.splitlines()
    table = (run / "table.md").read_text().splitlines()
    for method, count in (("RTL", 2), ("IMP single", 2), ("IMP multiple", 2), ("dense", 1)):
        name = re.compile(rf"[|│] {method} \(.*retrain_epochs=1.*\) +[|│]")  # and what else is not the recipe's own
        assert sum(bool(name.match(line)) for line in table) == count
        assert sum(bool(name.match(line)) for line in lines) in (count, 2 * count)  # all, or one part below another
    for heading in ("BA thr.", "BA argmax", "similarity", "#Params"):
        assert heading in out
    rows = json.loads((run / "table.json").read_text())["rows"]
    assert len(rows) == 7
    assert f"{rows[0]['params']:,}" in out
    assert lines[-1].endswith(": run")
