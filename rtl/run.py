"""A run: a directory of idempotent stages.

Running the same command again is resuming: a stage that is done is loaded, any other is computed and saved. An artefact
is two files, `<key>.safetensors` and `<key>.json`. The second is the manifest; it holds the digest of the first and is
renamed into place last, so an artefact whose manifest is there is whole. Equal content gives equal bytes. Nothing on
disk is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor

from rtl.errors import InputError
from rtl.progress import Progress, Task
from rtl.workers import (
    forwarding_progress,
    global_seed,
    map_in_processes,
    one_torch_thread,
    release_freed_memory,
)

try:
    import fcntl
except ImportError:  # not a Unix: all but Run.lock works
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")
R = TypeVar("R")

TEMPORARY = ".rtl-tmp"
COMPONENT = re.compile(r"[A-Za-z0-9_=-][A-Za-z0-9._=-]{0,149}")


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
        self.name = ""  # of a child: where it lies in its first parent, with a slash behind
        self.progress = progress or forwarding_progress() or Progress()
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"path is {str(self.path)!r}, a file: a run needs a folder, give another path")
        if self.workers < 1:
            raise InputError(f"workers is {workers}: give 1 or more, or None for one a core")

    def __reduce__(self) -> tuple[Any, ...]:
        return Run, (self.path.absolute(), self.seed), {"workers": self.workers, "name": self.name}

    def child(self, name: str, seed: int | None = None) -> Run:
        """The run in the subfolder `name` (a key), with the same workers and progress; `seed` None keeps this seed.

        `seed_for` does not depend on the folder: children with equal seeds draw equal numbers.
        """
        seed = self.seed if seed is None else seed
        run = Run(self.path / _checked(name), seed, workers=self.workers, progress=self.progress)
        run.name = f"{self.name}{name}/"
        return run

    # Configuration

    def configure(self, config: Any) -> None:
        """Bind the run to a configuration: a dataclass instance or a mapping of plain values, nested as you like.

        The first call writes it to config.json, with the run's seed as "seed". A dataclass is written with its class
        name as "_type", so that two classes with equal fields differ. A field that the file lacks counts as its
        dataclass's default there, so that runs begun before a setting existed go on.

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
        new, old = _flat(fields), _defaults(config) | _flat(_read_json(file))
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
            with global_seed(self.seed_for("stage", key)):
                artefact = compute()
            self.save(key, artefact)
            release_freed_memory()
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

    def track(self, label: str, total: int, unit: int = 0) -> AbstractContextManager[Task]:
        """`with run.track("cat", epochs) as task: ... task.advance()` shows progress, also from a worker process.

        A child's label has its name before it. A step is `unit` units of `Progress.whole`, where there is one.
        """
        return self.progress.task(self.name + label, total, unit)

    def map(self, function: Callable[[Run, T], R], items: Sequence[T], *, label: str) -> list[R]:
        """`[function(run, item) for item in items]`, in up to `workers` processes of one torch thread each.

        Items are handed out in order, one at a time as workers free up. The result does not depend on the number of
        workers: with one (or one item, or inside a worker) everything runs in this process, also with one torch
        thread; torch's global generators are seeded from (seed, label, position) for each item. `function` must not
        change its item. Workers are spawned, so a script needs `if __name__ == "__main__":` around what it runs; they
        keep freed memory (`rtl.workers.ALLOCATOR`), unless the environment sets a MALLOC_ variable of glibc's.

        Args:
            function: a function of a module (workers import it), or a `functools.partial` of one: what it holds is
                sent to each worker once, and large tensors, such as the data, are one copy that all of them read.
            items: whatever can be pickled; so must the results.
            label: names the work in progress and errors.

        Raises:
            InputError: the function, an item or a result cannot be pickled.
            ChildProcessError: a worker died (killed, out of memory).
            Exception: whatever `function` raised, with the worker's traceback as its cause; the others are stopped.
        """
        items = list(items)
        with self.track(label, len(items)) as task:
            if min(self.workers, len(items)) > 1 and forwarding_progress() is None:
                return map_in_processes(self, function, items, label, task)
            results = []
            with one_torch_thread():
                for position, item in enumerate(items):
                    with global_seed(self.seed_for("map", label, position)):
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
    with replacing(file) as temporary:
        temporary.write_bytes(data)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """The path of a new file beside `file` for the block to write, which takes its place when the block ends well."""
    temporary = file.parent / f".{file.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY}"
    try:
        yield temporary
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
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


def _defaults(value: Any, name: str = "") -> dict[str, Any]:
    """What the settings of the dataclasses in a configuration are by default, flat."""
    found: dict[str, Any] = {}
    if isinstance(value, Mapping):
        for key, item in value.items():
            found |= _defaults(item, f"{name}.{key}" if name else key)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for f in dataclasses.fields(value):
            key, own = f"{name}.{f.name}" if name else f.name, getattr(value, f.name)
            if dataclasses.is_dataclass(own) or isinstance(own, Mapping):
                found |= _defaults(own, key)
            elif f.default is not dataclasses.MISSING:
                found[key] = _plain(f.default, key)
    return found


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    return {k: v for key, item in value.items() for k, v in _flat(item, f"{name}.{key}" if name else key).items()}


def _shown(flat: dict[str, Any], key: str) -> str:
    return json.dumps(flat[key]) if key in flat else "absent"


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
