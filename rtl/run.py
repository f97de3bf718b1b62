"""A run: a directory of idempotent stages, and the worker processes that compute them.

Running the same command again is resuming: a stage that is done is loaded, any other is computed and saved. An artefact
is two files, `<key>.safetensors` and `<key>.json`. The second is the manifest; it holds the digest of the first and is
renamed into place last, so an artefact whose manifest is there is whole. Equal content gives equal bytes. Nothing on
disk is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import pickle
import re
import secrets
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor

from rtl.errors import InputError
from rtl.progress import Event, Progress, Task

try:
    import fcntl
except ImportError:  # not a Unix: all but Run.lock works
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")
R = TypeVar("R")

TEMPORARY = ".rtl-tmp"
COMPONENT = re.compile(r"[A-Za-z0-9_=-][A-Za-z0-9._=-]{0,149}")

_worker_progress: Progress | None = None  # set in a worker process: reports to the parent


@dataclasses.dataclass(frozen=True, eq=False)
class Artefact:
    """What a stage gives: tensors (any device, dtype and layout; saved contiguous, on the CPU) and JSON values."""

    tensors: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Run:
    """A directory of idempotent stages: running again is resuming.

    Args:
        path: the directory; made when something is first written.
        seed: every random number of the run follows from it.
        workers: processes `map` may use; None is the number of CPU cores this process may use.
        progress: where progress shows; None shows it on standard error, `Progress(quiet=True)` not at all.

    Raises:
        InputError: `path` is a file, or `workers` is not positive.
    """

    def __init__(
        self, path: str | Path, seed: int = 0, *, workers: int | None = None, progress: Progress | None = None
    ) -> None:
        self.path = Path(path)
        self.seed = seed
        self.workers = _usable_cores() if workers is None else workers
        self.progress = progress or _worker_progress or Progress()
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"path is {str(self.path)!r}, a file: a run needs a folder, give another path")
        if self.workers < 1:
            raise InputError(f"workers is {workers}: give 1 or more, or None for one a core")

    def __reduce__(self) -> tuple[Any, ...]:
        return Run, (self.path.absolute(), self.seed), {"workers": self.workers}

    def child(self, name: str, seed: int | None = None) -> Run:
        """The run in the subfolder `name` (a key), with the same workers and progress; `seed` None keeps this seed.

        `seed_for` does not depend on the folder: children with equal seeds draw equal numbers.
        """
        seed = self.seed if seed is None else seed
        return Run(self.path / _checked(name), seed, workers=self.workers, progress=self.progress)

    # Configuration

    def configure(self, config: Any) -> None:
        """Bind the run to a configuration: a dataclass instance or a mapping of plain values, nested as you like.

        The first call writes it to config.json, with the run's seed as "seed". A dataclass is written with its class
        name as "_type", so that two classes with equal fields differ.

        Raises:
            InputError: the folder holds another configuration, `config` has another seed than the run, or a value has
                no JSON form.
        """
        fields = _plain(config, "config")
        if not isinstance(fields, dict):
            raise InputError(f"config is a {type(config).__name__}: give a dataclass instance or a mapping")
        if fields.setdefault("seed", self.seed) != self.seed:
            raise InputError(f"config.seed is {fields['seed']}, but the run's seed is {self.seed}: make them equal")
        file = self.path / "config.json"
        if not file.exists():
            write_atomically(file, _json(fields))
            return
        new, old = _flat(fields), _flat(_read_json(file))
        differing = [key for key in sorted(new.keys() | old.keys()) if new.get(key, ...) != old.get(key, ...)]
        if differing:
            values = "; ".join(f"{key} was {_shown(old, key)}, now {_shown(new, key)}" for key in differing)
            raise InputError(f"config differs from {file}: {values}: use another --out or delete the folder")

    # Artefacts

    def stage(self, key: str, compute: Callable[[], Artefact]) -> Artefact:
        """The artefact `key`: loaded if done, else computed, saved and loaded, so that both are the same.

        torch's global generators are seeded from (seed, key) around `compute` and put back: what a stage draws (its
        dropout, say) does not depend on which stages before it were resumed.
        """
        if not self.done(key):
            with _global_seed(self.seed_for("stage", key)):
                artefact = compute()
            self.save(key, artefact)
        return self.load(key)

    def done(self, key: str) -> bool:
        """Whether the artefact `key` was saved to its end."""
        return self._files(key)[0].is_file()

    def load(self, key: str) -> Artefact:
        """The saved artefact `key`, tensors on the CPU in sorted order.

        Raises:
            InputError: there is none, or its files are damaged (tensors are checked against the manifest's digest).
        """
        manifest_file, tensors_file = self._files(key)
        if not manifest_file.is_file():
            raise InputError(f"key is {key!r}, but {self.path} holds no such artefact: run the stage that makes it")
        again = f"delete {manifest_file} and run again"
        manifest = _read_json(manifest_file)
        if not isinstance(manifest.get("info"), dict) or "tensors" not in manifest:
            raise InputError(f"{manifest_file} is damaged, it is not a manifest: {again}")
        info, expected = manifest["info"], manifest["tensors"]
        if expected is None:
            return Artefact({}, info)
        try:
            data = tensors_file.read_bytes()
        except FileNotFoundError:
            raise InputError(f"{tensors_file} is missing, but its manifest is there: {again}") from None
        if (found := _digest(data)) != expected:
            raise InputError(f"{tensors_file} is damaged, it is {found}, its manifest says {expected}: {again}")
        # Cloned into torch's own aligned memory: some kernels' rounding depends on alignment.
        return Artefact({name: t.clone() for name, t in sorted(safetensors.torch.load(data).items())}, info)

    def save(self, key: str, artefact: Artefact) -> None:
        """Write an artefact so that a process killed at any moment leaves it done and whole, or not done.

        Saving over an artefact forgets the old one first; successive checkpoints that must never be lost take
        successive keys, the older discarded after the newer is saved.

        Raises:
            InputError: `key` is not a valid key, or `artefact` is none or has no JSON form.
        """
        manifest_file, tensors_file = self._files(key)
        if not isinstance(artefact, Artefact):
            raise InputError(f"artefact of {key!r} is a {type(artefact).__name__}: a stage returns an rtl.run.Artefact")
        # A clone each: safetensors refuses tensors that share storage.
        tensors = {
            name: t.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, t in sorted(artefact.tensors.items())
        }
        data = safetensors.torch.save(tensors) if tensors else None
        info = _plain(artefact.info, "info")
        manifest = _json({"info": info, "tensors": None if data is None else _digest(data)})
        self.discard(key)
        if data is not None:
            write_atomically(tensors_file, data)
        write_atomically(manifest_file, manifest)

    def discard(self, key: str) -> None:
        """Delete the artefact `key`, if there is one (a checkpoint that a later one replaces)."""
        for file in self._files(key):  # the manifest first: from then on it is not done
            with suppress(FileNotFoundError):
                file.unlink()
                _sync_folder(file.parent)

    def _files(self, key: str) -> tuple[Path, Path]:
        folder, name = (self.path / _checked(key)).parent, key.rpartition("/")[2]
        return folder / f"{name}.json", folder / f"{name}.safetensors"

    # Randomness

    def seed_for(self, *names: str | int) -> int:
        """A seed of 63 bits that follows from the run's seed and `names` alone, on any machine."""
        return int.from_bytes(hashlib.sha256(json.dumps([self.seed, *names]).encode()).digest()[:8], "big") >> 1

    def generator(self, *names: str | int) -> torch.Generator:
        """A CPU generator seeded by `seed_for(*names)`."""
        return torch.Generator().manual_seed(self.seed_for(*names))

    # Work

    def track(self, label: str, total: int) -> AbstractContextManager[Task]:
        """`with run.track("cat", epochs) as task: ... task.advance()` shows progress, also from a worker process."""
        return self.progress.task(label, total)

    def map(self, function: Callable[[Run, T], R], items: Sequence[T], *, label: str) -> list[R]:
        """`[function(run, item) for item in items]`, in up to `workers` processes of one torch thread each.

        Items are handed out in order, one at a time as workers free up. The result does not depend on the number of
        workers: with one (or one item, or inside a worker) everything runs in this process, also with one torch
        thread; torch's global generators are seeded from (seed, label, position) for each item. `function` must not
        change its item. Workers are spawned, so a script needs `if __name__ == "__main__":` around what it runs.

        Args:
            function: a function of a module (workers import it).
            items: whatever can be pickled; so must the results.
            label: names the work in progress and errors.

        Raises:
            InputError: the function, an item or a result cannot be pickled.
            ChildProcessError: a worker died (killed, out of memory).
            Exception: whatever `function` raised, with the worker's traceback as its cause; the others are stopped.
        """
        items = list(items)
        with self.track(label, len(items)) as task:
            if min(self.workers, len(items)) > 1 and _worker_progress is None:
                return _map_in_processes(self, function, items, label, task)
            results = []
            with _one_torch_thread():
                for position, item in enumerate(items):
                    with _global_seed(self.seed_for("map", label, position)):
                        results.append(function(self, item))
                    task.advance()
            return results

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes off this folder and its children for the length of the block.

        The lock ends with the process that holds it, however it ends. What killed processes left half written is
        swept.

        Raises:
            InputError: another process holds the lock, or the platform has none.
        """
        if fcntl is None:
            raise InputError(f"lock of {self.path}: this platform has no fcntl, use Linux or macOS")
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / ".lock", "a+", encoding="ascii") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise InputError(
                    f"path is {str(self.path)!r}, which process {holder} is using: wait for it or use another --out"
                ) from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            for leftover in self.path.rglob(f".*{TEMPORARY}"):
                leftover.unlink(missing_ok=True)
            yield


def slug(name: str) -> str:
    """A key component for any name: itself where that is safe, else its safe characters, "=" and a hash of it.

    Different names give different slugs: only a hashed one holds "=".
    """
    if re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", name) and not _reserved(name):
        return name
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[:40]
    return f"{readable}={hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


def write_atomically(file: Path, data: bytes) -> None:
    """Replace `file` by `data`, or leave it as it was: no reader and no crash ever sees a part of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.parent / f".{file.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY}"
    try:
        with open(temporary, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(file.parent)


def _sync_folder(folder: Path) -> None:
    if fcntl is None:  # a folder can be synced on Unix only
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reserved(component: str) -> bool:
    """Whether files of a key with this component could be taken for config.json or for another key's files."""
    return component == "config" or component.endswith((".json", ".safetensors"))


def _checked(key: str) -> str:
    if not all(COMPONENT.fullmatch(part) and not _reserved(part) for part in key.split("/")):
        raise InputError(
            f"key is {key!r}: parts between slashes have 1 to 150 characters of A-Z a-z 0-9 . _ = -, start with no dot "
            "and are not reserved (config, *.json, *.safetensors): make a part with rtl.run.slug(name)"
        )
    return key


def _digest(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode("ascii")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise InputError(f"{file} is damaged, it is not a JSON object: delete it and run again")
    return value


def _plain(value: Any, name: str) -> Any:
    """`value` in JSON's types; `name` says where it stands."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _plain(getattr(value, f.name), f"{name}.{f.name}") for f in dataclasses.fields(value)}
        return {"_type": type(value).__name__, **fields}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{name}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    raise InputError(
        f"{name} is {value!r}, a {type(value).__name__}: expected None, bool, int, float, str, a path, a dataclass, "
        "a list or a mapping with str keys: convert it"
    )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    return {k: v for key, item in value.items() for k, v in _flat(item, f"{name}.{key}" if name else key).items()}


def _shown(flat: dict[str, Any], key: str) -> str:
    return json.dumps(flat[key]) if key in flat else "absent"


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _global_seed(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        torch.manual_seed(seed)
        yield


# Worker processes. A worker has one pipe to its parent. Messages are pickled here, by value: torch's own reduction for
# processes passes file descriptors, which die with the worker. concurrent.futures neither stops running work nor says
# how a worker died.


class _WorkerTraceback(Exception):  # noqa: N818 (it is shown as a cause, never raised by itself)
    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _map_in_processes(run: Run, function: Callable[[Run, T], R], items: Sequence[T], label: str, task: Task) -> list[R]:
    head = _pickled((run, function, label), f"function is {function!r}")
    queue = [_pickled((i, item), f"items[{i}] is a {type(item).__name__}") for i, item in enumerate(items)][::-1]
    results: dict[int, R] = {}
    context = multiprocessing.get_context("spawn")
    team: dict[Connection, BaseProcess] = {}
    started: set[Connection] = set()
    finished = False
    try:
        with _environment(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1"):
            for number in range(min(run.workers, len(items))):
                ours, theirs = context.Pipe()
                name = f"{label}-worker-{number}"
                process: BaseProcess = context.Process(
                    target=_work, args=(theirs, head, os.getcwd()), name=name, daemon=True
                )
                process.start()
                theirs.close()  # so that ours ends when the worker does
                team[ours] = process
        while len(results) < len(items):
            for pipe in wait(list(team)):
                assert isinstance(pipe, Connection)
                try:
                    message = pipe.recv_bytes()
                except (EOFError, OSError):
                    raise _died(team[pipe], pipe in started) from None
                kind, *content = pickle.loads(message)
                if kind in ("ready", "result") and queue:
                    with suppress(ConnectionError):  # it died: the next recv says so
                        pipe.send_bytes(queue.pop())
                if kind == "ready":
                    started.add(pipe)
                elif kind == "event":
                    run.progress.show(content[0])
                elif kind == "result":
                    results[content[0]] = content[1]
                    task.advance()
                else:
                    error, text = content
                    raise error from _WorkerTraceback(f"in {team[pipe].name}:\n{text}")
        finished = True
    finally:
        for pipe, worker in team.items():
            if finished:
                pipe.close()  # the worker ends by itself, flushing what it printed
                worker.join(10)
            worker.terminate()
        for pipe, worker in team.items():
            worker.join(5)
            worker.kill()
            worker.join()
            pipe.close()
            run.progress.abandon(worker.pid or 0)
    return [results[position] for position in range(len(items))]


def _work(pipe: Connection, head: bytes, folder: str) -> None:
    """What a worker process does: one item after another until the parent closes the pipe."""
    global _worker_progress
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent stops its workers
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    os.chdir(folder)
    sending = threading.Lock()

    def send(data: bytes) -> None:
        with sending:
            pipe.send_bytes(data)

    def forward(event: Event) -> None:
        send(pickle.dumps(("event", event)))

    _worker_progress = Progress(forward=forward)
    with suppress(EOFError, ConnectionError):  # the parent closed the pipe, or died
        send(pickle.dumps(("ready",)))
        while True:
            item = pipe.recv_bytes()
            try:
                answer = _answer(head, item)
            except BaseException as error:
                answer = pickle.dumps(("error", _portable(error), traceback.format_exc()))
            send(answer)


def _answer(head: bytes, data: bytes) -> bytes:
    try:
        run, function, label = pickle.loads(head)
        position, item = pickle.loads(data)
    except (AttributeError, ImportError) as error:
        raise InputError(f"function and items cannot be rebuilt in a worker ({error}): pass workers=1") from error
    with _global_seed(run.seed_for("map", label, position)):
        result = function(run, item)
    return _pickled(("result", position, result), f"the result for items[{position}] is a {type(result).__name__}")


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _pickled(value: Any, what: str) -> bytes:
    try:
        return pickle.dumps(value)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise InputError(f"{what}, which worker processes cannot be sent ({error}): pass workers=1") from error


def _portable(error: BaseException) -> BaseException:
    """`error` if it survives pickling, else a RuntimeError that says the same."""
    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    except Exception:
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")


def _died(process: BaseProcess, started: bool) -> ChildProcessError:
    process.join(5)
    code = process.exitcode
    how = f"exit code {code}"
    if code is not None and code < 0:
        how += f" ({signal.Signals(-code).name}{', out of memory perhaps' if -code == signal.SIGKILL else ''})"
    advice = "what was saved is kept, run again to resume"
    if not started:
        advice += '; it had not started: a script needs `if __name__ == "__main__":` around what it runs'
    return ChildProcessError(f"{process.name} (pid {process.pid}) died with {how}: {advice}")


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
