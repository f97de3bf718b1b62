"""rtl.run: stages that resume, artefacts that are whole or absent, workers that change nothing but the time."""

import dataclasses
import functools
import io
import json
import os
import pickle
import platform
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import rtl.run
import rtl.workers
from rtl.errors import InputError
from rtl.progress import Progress
from rtl.run import Artefact, Run, slug, write_atomically


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run", seed=3, workers=2, progress=Progress(quiet=True))


def artefact(value=1):
    return Artefact({"mask": torch.full((64, 256), value), "theta": torch.full((8,), float(value))}, {"value": value})


def never():
    raise AssertionError("computed again")


def forked(action):
    """Process id of a fork of this process that does `action` and exits with status 0."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # a fork has none of its parent's threads, and waits for them for ever
            action()
            os._exit(0)
        finally:
            os._exit(1)
    return child


DEADLINE = 300  # seconds; only what hangs takes as long


def wait_to_be_ended():
    signal.alarm(2 * DEADLINE)  # by this if by nobody else
    signal.pause()


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())


# Stages


def test_a_stage_is_computed_once(run):
    calls = []

    def compute():
        calls.append(1)
        return artefact()

    first = run.stage("extract/cat/round-07", compute)
    again = Run(run.path, progress=Progress(quiet=True)).stage("extract/cat/round-07", compute)
    assert calls == [1]
    for name in ("mask", "theta"):
        assert torch.equal(first.tensors[name], again.tensors[name])
    assert first.info == again.info == {"value": 1}


def test_an_interrupted_stage_is_computed_again(run):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.stage("a", interrupted)
    assert not run.done("a")
    assert run.stage("a", artefact).info == {"value": 1}


def test_a_fresh_stage_gives_exactly_what_a_resumed_one_gives(run):
    def compute():
        return Artefact({"b": torch.ones(2), "a": torch.ones(1).requires_grad_()}, {"pair": (1, 2), "at": Path("x")})

    fresh, resumed = run.stage("a", compute), run.stage("a", never)
    assert fresh.info == resumed.info == {"pair": [1, 2], "at": "x"}
    assert list(fresh.tensors) == list(resumed.tensors) == ["a", "b"]
    assert not fresh.tensors["a"].requires_grad


def test_what_a_stage_draws_depends_on_seed_and_key_only(run, tmp_path):
    def draw():
        return Artefact({"x": torch.rand(4)})

    other = Run(tmp_path / "other", seed=3, progress=Progress(quiet=True))
    state = torch.get_rng_state()
    run.stage("first", draw)
    x = run.stage("second", draw).tensors["x"]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(other.stage("second", draw).tensors["x"], x)
    assert not torch.equal(run.load("first").tensors["x"], x)


def test_a_stage_that_returns_no_artefact_is_refused(run):
    with pytest.raises(InputError, match="artefact of 'a' is a dict"):
        run.stage("a", lambda: {})


def test_every_kind_of_tensor_comes_back_equal(run):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {
        "shared": base,
        "shared.view": base[1:3],
        "transposed": base.T,
        "expanded": torch.ones(1).expand(5),
        "channels_last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "bool": base > 3,
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "half": base.bfloat16(),
        "int64": torch.tensor([2**62]),
        "日本": torch.nn.Parameter(torch.ones(2)),
    }
    loaded = run.stage("a", lambda: Artefact(tensors)).tensors
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name
        assert loaded[name].is_contiguous()
        loaded[name].add_(1) if name != "bool" else loaded[name].logical_not_()  # memory of its own, writable


def test_equal_content_gives_equal_bytes(tmp_path):
    contents = []
    for order in (1, -1):
        run = Run(tmp_path / str(order), progress=Progress(quiet=True))
        names = [f"layer.{i}" for i in range(9)][::order]
        tensors = {n: torch.arange(12.0).reshape(3, 4) for n in names}
        if order == -1:
            tensors = {n: t.T.contiguous().T for n, t in tensors.items()}
        run.save("a", Artefact(tensors, {n: 1 for n in names}))
        contents.append([(run.path / f).read_bytes() for f in ("a.json", "a.safetensors")])
    assert contents[0] == contents[1]


def test_an_artefact_without_tensors_is_its_manifest_alone(run):
    run.save("a", artefact())
    run.save("a", Artefact(info={"x": 1}))
    assert files(run.path) == ["a.json"]
    assert json.loads((run.path / "a.json").read_text()) == {"info": {"x": 1}, "tensors": None}
    assert run.load("a").info == {"x": 1}


def test_a_discarded_artefact_is_gone_and_discarding_nothing_is_fine(run):
    run.save("a/b", artefact())
    run.discard("a/b")
    run.discard("a/b")
    assert not run.done("a/b")
    assert files(run.path) == []


@pytest.mark.parametrize("info", [{"x": {1, 2}}, {"x": {1: 2}}, {"x": torch.ones(1)}])
def test_info_that_has_no_json_form_is_refused_by_its_place(run, info):
    with pytest.raises(InputError, match=r"info\.x is "):
        run.save("a", Artefact(info=info))


# Crashes


def test_a_process_killed_between_tensors_and_manifest_leaves_the_stage_to_be_computed(run):
    def save():
        real = os.replace
        rtl.run.os.replace = lambda a, b: os._exit(9) if str(b).endswith(".json") else real(a, b)
        run.save("a", artefact())

    os.waitpid(forked(save), 0)
    assert "a.safetensors" in files(run.path)
    assert not run.done("a")
    assert run.stage("a", lambda: artefact(2)).info == {"value": 2}


def test_a_crash_before_any_system_call_leaves_the_artefact_whole_or_absent(run):
    """The process dies at the n-th call of fsync, replace or unlink while it saves 2 over 1, for every n."""
    outcomes = []
    for n in range(100):
        run.save("a", artefact(1))

        def save(n=n):
            calls = iter(range(100))
            for name in ("fsync", "replace", "unlink"):
                real = getattr(os, name)
                setattr(os, name, lambda *a, real=real, **k: os._exit(9) if next(calls) == n else real(*a, **k))
            run.save("a", artefact(2))

        _, status = os.waitpid(forked(save), 0)
        outcomes.append(run.load("a").info["value"] if run.done("a") else None)
        if status == 0:
            break
    assert outcomes[0] == 1
    assert outcomes[-1] == 2
    assert None in outcomes
    assert len(outcomes) > 8


def test_a_process_killed_at_random_never_leaves_a_wrong_artefact(run):
    def save_for_ever():
        for value in range(10**9):
            run.save("a", artefact(value))

    draw = random.Random(0)
    for _ in range(12):
        child = forked(save_for_ever)
        time.sleep(0.02 + 0.05 * draw.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if run.done("a"):
            loaded = run.load("a")
            assert (loaded.tensors["mask"] == loaded.info["value"]).all()
    with run.lock():
        assert set(files(run.path)) <= {".lock", "a.json", "a.safetensors"}


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch):
    write_atomically(tmp_path / "a", b"old")
    monkeypatch.setattr(rtl.run.os, "fsync", lambda descriptor: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_atomically(tmp_path / "a", b"new")
    assert files(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


# Damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "a.safetensors").unlink(), r"a\.safetensors is missing.*delete .*a\.json and run again"),
        (lambda p: flip(p / "a.safetensors"), r"a\.safetensors is damaged.*delete .*a\.json and run again"),
        (lambda p: (p / "a.safetensors").write_bytes(b""), r"a\.safetensors is damaged"),
        (lambda p: (p / "a.json").write_text("{"), r"a\.json is damaged.*delete it"),
        (lambda p: (p / "a.json").write_text('{"info": 1}'), r"a\.json is damaged, it is not a manifest"),
    ],
)
def test_a_damaged_artefact_is_reported_with_what_to_do(run, damage, message):
    run.save("a", artefact())
    damage(run.path)
    with pytest.raises(InputError, match=message):
        run.stage("a", never)


def flip(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_loading_what_was_never_saved_says_so(run):
    with pytest.raises(InputError, match="holds no such artefact"):
        run.load("a")


# Names


ELSEWHERE = ["", "/a", "a/", "a//b", "..", "../a", "a/../b", ".a", "a b", "日本", "a\n", "a\\b", "x" * 151]
RESERVED = ["config", "a/config", "a.json", "a.safetensors/b"]


@pytest.mark.parametrize("key", ELSEWHERE + RESERVED)
def test_a_key_that_could_leave_the_folder_or_meet_another_file_is_refused(run, key):
    for action in (run.done, run.load, run.discard, lambda k: run.save(k, artefact()), run.child):
        with pytest.raises(InputError, match="key is"):
            action(key)


def test_slugs_are_valid_keys_and_never_collide(run):
    names = ["", "maple tree", "maple  tree", "x" * 64, "x" * 65, "x" * 66, "\udc80", "a\n", "\u00e9", "e\u0301"]
    names += ["maple-tree", "maple_tree", "../x", "x", ".x", "..", "日本", "日木", "a/b", "cat", "Cat", "=", "a=b"]
    names += ["config", "a.json"]
    names += [slug(name) for name in names if slug(name) != name]  # a name that is another's slug
    slugs = [slug(name) for name in names]
    assert len(set(slugs)) == len(set(names)) == len(names)
    for value in slugs:
        assert not run.done(f"extract/{value}")


def test_an_ordinary_name_is_its_own_slug_and_others_stay_readable():
    assert slug("cat") == "cat"
    assert slug("maple tree").startswith("maple-tree=")


# Configuration


@dataclasses.dataclass(frozen=True)
class Head:
    classes: int = 10


@dataclasses.dataclass(frozen=True)
class OtherHead:
    classes: int = 10


@dataclasses.dataclass(frozen=True)
class Config:
    lr: float = 1e-4
    report_at: tuple = (0.25, 0.5)
    head: object = Head()


def test_an_equal_configuration_is_accepted_and_its_file_unchanged(run):
    run.configure(Config())
    first = (run.path / "config.json").read_bytes()
    Run(run.path, seed=3).configure(Config())
    assert (run.path / "config.json").read_bytes() == first
    assert json.loads(first) == {
        "_type": "Config",
        "head": {"_type": "Head", "classes": 10},
        "lr": 1e-4,
        "report_at": [0.25, 0.5],
        "seed": 3,
    }


def test_a_setting_that_a_runs_file_does_not_know_yet_counts_as_its_default(run):
    run.configure({"inner": Config()})
    file = run.path / "config.json"
    content = json.loads(file.read_text())
    del content["inner"]["lr"], content["inner"]["head"]["classes"]
    file.write_text(json.dumps(content))
    before = file.read_bytes()
    run.configure({"inner": Config()})
    assert file.read_bytes() == before
    with pytest.raises(InputError, match=r"inner\.head\.classes was 10, now 5; inner\.lr was 0\.0001, now 0\.5"):
        run.configure({"inner": Config(lr=0.5, head=Head(5))})
    with pytest.raises(InputError, match=r"inner\.head\.classes was absent"):
        run.configure({"inner": {"lr": 1e-4, "report_at": [0.25, 0.5], "head": {"classes": 5}}})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config(lr=0.5), r"lr was 0\.0001, now 0\.5: use another --out or delete the folder"),
        (Config(head=OtherHead()), r'head\._type was "Head", now "OtherHead"'),
        (Config(lr=1.0, head=Head(5)), r"head\.classes was 10, now 5; lr was 0\.0001, now 1\.0"),
        ({"lr": 1e-4}, r"head\.classes was 10, now absent"),
    ],
)
def test_another_configuration_is_refused_by_its_fields(run, config, message):
    run.configure(Config())
    with pytest.raises(InputError, match=message):
        run.configure(config)


def test_another_seed_is_another_configuration(run):
    run.configure(Config())
    with pytest.raises(InputError, match="seed was 3, now 4"):
        Run(run.path, seed=4).configure(Config())
    with pytest.raises(InputError, match=r"config\.seed is 7, but the run's seed is 3"):
        run.configure({"seed": 7})


def test_a_configuration_without_json_form_is_refused(run):
    with pytest.raises(InputError, match=r"config\.head is <function"):
        run.configure(Config(head=never))
    with pytest.raises(InputError, match="config is a int"):
        run.configure(3)


@pytest.mark.parametrize("workers", [0, -1])
def test_workers_must_be_positive(tmp_path, workers):
    with pytest.raises(InputError, match=f"workers is {workers}"):
        Run(tmp_path, workers=workers)


def test_a_file_is_no_run(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(InputError, match="a file"):
        Run(tmp_path / "f")


# Randomness


def test_seeds_are_the_same_on_every_machine_and_differ_by_name(run):
    assert run.seed_for("extract", "cat", 7) == 3524399329950538086
    names = [(), ("a",), ("a", "b"), ("ab",), ("a", 1), ("a", "1"), ("b", "a"), ("日本",)]
    seeds = {run.seed_for(*n) for n in names} | {run.child("x", seed=4).seed_for(*n) for n in names}
    assert len(seeds) == 2 * len(names)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_generator_follows_its_name_and_a_child_keeps_the_seed(run):
    def draw(generator):
        return torch.rand(5, generator=generator)

    assert torch.equal(draw(run.generator("a")), draw(run.child("x").generator("a")))
    assert not torch.equal(draw(run.generator("a")), draw(run.generator("b")))


def test_a_child_is_a_subfolder_with_the_same_workers_and_progress(run):
    child = run.child("seed-1", seed=1)
    child.save("a", artefact())
    assert (run.path / "seed-1" / "a.json").is_file()
    assert (child.seed, child.workers, child.progress) == (1, run.workers, run.progress)


# Lock


def hold_lock(run, ready):
    with run.lock():
        os.write(ready, b"x")
        wait_to_be_ended()


def test_a_second_process_is_refused_by_the_holders_id_and_a_killed_holder_lets_go(run):
    read, write = os.pipe()
    child = forked(lambda: hold_lock(run, write))
    try:
        os.read(read, 1)
        with pytest.raises(InputError, match=f"process {child} is using"), run.lock():
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with run.lock():
        assert (run.path / ".lock").read_text() == str(os.getpid())
    with run.lock():
        pass


def test_taking_the_lock_sweeps_what_killed_processes_left(run):
    def die_while_writing():
        rtl.run.os.replace = lambda a, b: os._exit(9)
        run.save("deep/er/a", artefact())

    os.waitpid(forked(die_while_writing), 0)
    assert len(files(run.path)) == 1
    run.save("b", artefact())
    with run.lock():
        assert files(run.path) == [".lock", "b.json", "b.safetensors"]


# Workers. Their functions are of this module, so that a worker can import them.


def work(run, item):
    with run.track(f"item {item}", 2) as task:
        task.advance()
        drawn = run.stage(f"map/{item}", lambda: Artefact({"x": torch.rand(2)})).tensors["x"].tolist()
        nested = run.map(double, [item, item + 1], label="nested")
        task.advance()
    return item, drawn, torch.rand(2).tolist(), nested, torch.get_num_threads()


def double(run, item):
    return 2 * item, os.getpid()


def test_results_are_equal_and_in_order_for_any_number_of_workers(tmp_path):
    shown = io.StringIO()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        one = Run(tmp_path / "1", workers=1, progress=Progress(quiet=True)).map(work, range(4), label="w")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    two = Run(tmp_path / "2", workers=2, progress=Progress(stream=shown, every=0)).map(work, range(4), label="w")

    def without_ids(results):
        return [(item, stage, drawn, [n for n, _ in nested], t) for item, stage, drawn, nested, t in results]

    assert without_ids(one) == without_ids(two)
    assert [result[0] for result in two] == [0, 1, 2, 3]
    assert all(result[4] == 1 for result in one + two)
    ids = [{process for _, process in nested} for _, _, _, nested, _ in two]
    assert all(len(i) == 1 and os.getpid() not in i for i in ids)  # nested work stays in its worker
    for name in ("w", "item 0", "item 1", "item 2", "item 3"):  # workers' tasks show in the parent
        assert f"{name}: started" in shown.getvalue()
        assert f"{name}: finished" in shown.getvalue()
    for name in files(tmp_path / "1"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


class OurError(KeyError):
    pass


def fail_at_one(run, item):
    working = run.path / "working"
    if item == 1:
        wait_for(working)
        raise OurError("the reason")
    write_atomically(working, str(os.getpid()).encode())
    wait_to_be_ended()


def test_an_error_in_a_worker_stops_the_others_and_keeps_its_type_and_traceback(run):
    shown = io.StringIO()
    run.progress = Progress(stream=shown)
    run.path.mkdir()
    with pytest.raises(OurError, match="the reason") as caught:
        run.map(fail_at_one, [0, 1], label="w")
    with pytest.raises(ProcessLookupError):
        os.kill(int((run.path / "working").read_text()), 0)
    assert "in w-worker-" in str(caught.value.__cause__)
    assert "in fail_at_one" in str(caught.value.__cause__)
    assert "w: stopped at 0/2" in shown.getvalue()


def die(run, item):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_named_with_its_exit_code_and_what_to_do(run):
    message = r"^w-worker-\d \(pid \d+\) died with exit code -9 \(SIGKILL, .*run again to resume$"
    with pytest.raises(ChildProcessError, match=message):
        run.map(die, [0, 1], label="w")


class UnpicklableError(Exception):
    def __init__(self, a, b):
        super().__init__(a)


def test_an_error_that_cannot_be_pickled_is_told_in_words():
    error = rtl.workers._portable(UnpicklableError("one", "two"))
    assert type(error) is RuntimeError
    assert str(error) == "UnpicklableError: one"


def memory(tensors, run, item):
    """A sum over all of `tensors`, and the MiB this process then has to itself."""
    total = sum(float(t.sum()) for t in tensors)
    return total, int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory in /proc")
def test_workers_hold_no_copies_of_large_tensors(run):
    found = {}
    for megabytes in (1, 96):
        large = torch.full((megabytes << 18,), 0.5)
        small = torch.arange(10)
        found[megabytes] = run.map(functools.partial(memory, [large, large, small]), [0, 1], label="w")
        assert [total for total, _ in found[megabytes]] == [(megabytes << 18) + 45.0] * 2
    assert max(found[96])[1] - min(found[1])[1] < 32


def scribble(tensors, run, item):
    """What arrived: in the second process, after the first has written to all of it."""
    reading, written = run.path / "reading", run.path / "written"
    if item == 0:
        before = [t.clone() for t in tensors]
        wait_for(reading)
        for t in tensors:
            t.zero_()
        written.touch()
        return before
    reading.touch()
    wait_for(written)
    return tensors


def wait_for(file):
    end = time.monotonic() + DEADLINE
    while not file.exists():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_large_tensors_of_any_kind_arrive_whole_and_are_each_process_own_to_change(run):
    base = torch.randn(3, 1 << 19)
    kinds = [base, base[1:], base.T, base.bfloat16(), base > 0, base[0, :1000], (base * 100).to(torch.int64)]
    assert sum(t.nbytes >= rtl.workers.MAPPED_BYTES for t in kinds) == 6
    kept = [t.clone() for t in kinds]
    run.path.mkdir()
    first, second = run.map(functools.partial(scribble, kinds), [0, 1], label="w")
    for *found, expected in zip(first, second, kinds, kept, strict=True):
        for tensor in found:
            assert tensor.dtype == expected.dtype
            assert torch.equal(tensor, expected)


def allocator(run, item):
    return {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}


@pytest.mark.parametrize("own", [{}, {"MALLOC_ARENA_MAX": "2"}])
def test_workers_keep_freed_memory_unless_the_user_says_how(run, monkeypatch, own):
    for name in allocator(run, 0):
        monkeypatch.delenv(name)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    assert run.map(allocator, [0, 1], label="w") == [own or rtl.workers.ALLOCATOR] * 2
    assert allocator(run, 0) == own  # this process's are as they were


FAULTS = """
import resource, torch
from rtl.workers import keep_freed_memory

keep_freed_memory()
for _ in range(64):  # glibc finds the room for aligned memory again only when what was freed has grown together
    torch.ones(16 << 20)
found = []
for _ in range(8):  # the least: what the system does to a process besides costs it faults now and then
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(found))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
@pytest.mark.parametrize("own", [{}, {"MALLOC_ARENA_MAX": "2"}])
def test_a_process_can_keep_freed_memory_too(own):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | own
    done = subprocess.run([sys.executable, "-c", FAULTS], env=environment, check=True, capture_output=True, text=True)
    assert (int(done.stdout) < 16) == (not own)  # pages of the last tensor, 64 MiB, that had to be asked for


RELEASED = """
import sys, torch
import rtl.workers
from rtl.run import Artefact, Run

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) >> 10

rtl.workers.keep_freed_memory()
rtl.workers.RELEASE_SECONDS = float(sys.argv[1])
before = resident()
large = [torch.ones(1 << 20) for _ in range(64)]
del large
Run(sys.argv[2]).stage("work", lambda: Artefact({"kept": torch.ones(8)}))
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps, and releases")
@pytest.mark.parametrize(("seconds", "held"), [(0, False), (3600, True)])
def test_a_finished_stage_gives_freed_memory_back_now_and_then(tmp_path, seconds, held):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", RELEASED, str(seconds), str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert (int(done.stdout) > 128) == held  # MiB; 256 were freed


def give_a_function(run, item):
    return lambda: item


def test_a_result_that_cannot_be_pickled_is_refused(run):
    with pytest.raises(InputError, match=r"the result for items\[4\] is a function.*pass workers=1"):
        rtl.workers._answer(run, give_a_function, "w", 4, "cat")


def test_what_cannot_be_sent_to_a_worker_is_refused_before_any_starts(run):
    with pytest.raises(InputError, match=r"function is <function .*<lambda>.*pass workers=1"):
        run.map(lambda run, item: item, [1, 2], label="w")
    with pytest.raises(InputError, match=r"items\[1\] is a function.*pass workers=1"):
        run.map(double, [1, lambda: 2], label="w")
    assert Run(run.path, workers=1, progress=run.progress).map(lambda run, item: item, [1, 2], label="w") == [1, 2]


def test_no_items_give_no_results(run):
    assert run.map(double, [], label="w") == []


def test_a_run_survives_pickling(run):
    copy = pickle.loads(pickle.dumps(run))
    assert (copy.path, copy.seed, copy.workers) == (run.path.absolute(), run.seed, run.workers)


SCRIPT = """
import functools, os, signal, sys
from rtl.run import Run

def sleep(run, item, data):
    os.write(1, b"ready\\n")
    signal.alarm(600)  # ends it if nobody else does
    signal.pause()

def main(data=b""):
    Run(sys.argv[1], workers=2).map(functools.partial(sleep, data=data), [1, 2], label="w")
"""


@contextmanager
def script(tmp_path, ending):
    (tmp_path / "script.py").write_text(SCRIPT + ending)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(Path(rtl.run.__file__).parents[1])}
    pipe = subprocess.PIPE
    # A shell's background job ignores SIGINT, and so would all it starts.
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, preexec_fn=heed) as parent:
        try:
            yield parent
        finally:
            parent.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(tmp_path, number):
    with script(tmp_path, 'if __name__ == "__main__":\n    main()\n') as parent:
        assert [parent.stdout.readline() for _ in range(2)] == ["ready\n", "ready\n"]
        parent.send_signal(number)
        _, errors = parent.communicate(timeout=DEADLINE)  # ends when no process holds the pipes any more
    assert parent.returncode == -number
    if number == signal.SIGINT:
        assert "KeyboardInterrupt" in errors
        assert "w: stopped at 0/2" in errors


def test_a_script_that_guards_nothing_is_told_to(tmp_path):
    with script(tmp_path, "main(bytes(1 << 20))\n") as parent:  # more than a pipe to a dying worker holds
        _, errors = parent.communicate(timeout=DEADLINE)
    assert parent.returncode == 1
    assert 'a script needs `if __name__ == "__main__":`' in errors.splitlines()[-1]
