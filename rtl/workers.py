"""Worker processes of `Run.map`: one pipe each to the parent, gone when either side is.

Messages are pickled here, by value: torch's own reduction for processes passes file descriptors, which die with the
worker. What all items have in common is sent once, its large tensors in a file without a name that every worker maps.
concurrent.futures neither stops running work nor says how a worker died.
"""

from __future__ import annotations

import ctypes
import io
import mmap
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import reduction, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import IO, TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from rtl.errors import InputError
from rtl.progress import Event, Progress, Task

if TYPE_CHECKING:
    from rtl.run import Run

T = TypeVar("T")
R = TypeVar("R")

# What workers start with unless a MALLOC_ variable is set: glibc keeps freed memory. Otherwise a large result is given
# back to the system and faulted in afresh at every call. (As large a threshold for mmap needs glibc 2.35.)
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "268435456",
}
_MALLOPT = {"MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_TOP_PAD_": -2, "MALLOC_MMAP_MAX_": -4}  # their numbers in malloc.h
RELEASE_SECONDS = 60.0  # what was released has to be faulted in again
MAPPED_BYTES = 1 << 20  # a tensor as large as this is not copied into every worker

_progress: Progress | None = None  # set in a worker process
_released = time.monotonic()


def forwarding_progress() -> Progress | None:
    """In a worker process, the progress that reports to the parent; elsewhere None."""
    return _progress


@contextmanager
def one_torch_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def global_seed(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        torch.manual_seed(seed)
        yield


class _WorkerTraceback(Exception):  # noqa: N818 (it is shown as a cause, never raised by itself)
    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def allocator() -> dict[str, str]:
    """`ALLOCATOR`, or nothing where the environment has settings of its own."""
    return {} if any(name.startswith("MALLOC_") for name in os.environ) else ALLOCATOR


def keep_freed_memory() -> None:
    """Give this process what workers start with (`ALLOCATOR`), if its C library is glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for name, value in allocator().items():
            mallopt(_MALLOPT[name], min(int(value), 2**31 - 1))


def release_freed_memory() -> None:
    """Give freed memory back to the system, at most once in `RELEASE_SECONDS`, if the C library is glibc.

    Of what is kept, little fits what the next piece of work asks for, as small blocks that stay lie in between: over
    hundreds of rounds a worker came to hold gigabytes that it did not use.
    """
    global _released
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None and time.monotonic() - _released >= RELEASE_SECONDS:
        trim(0)
        _released = time.monotonic()


def map_in_processes(run: Run, function: Callable[[Run, T], R], items: Sequence[T], label: str, task: Task) -> list[R]:
    queue = [_pickled((i, item), f"items[{i}] is a {type(item).__name__}") for i, item in enumerate(items)][::-1]
    results: dict[int, R] = {}
    context = multiprocessing.get_context("spawn")
    team: dict[Connection, BaseProcess] = {}
    started: set[Connection] = set()
    finished = False
    file = os.fdopen(os.memfd_create("rtl"), "w+b")  # gone when no process has it open any more
    try:
        # In the file too: starting a process waits for it to take its arguments, for ever if it dies while it imports.
        place = _pickled_into(file, (run, function, label), f"function is {function!r}")
        with environment_variables(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", **allocator()), _interrupts_held():
            for number in range(min(run.workers, len(items))):
                ours, theirs = context.Pipe()
                name = f"{label}-worker-{number}"
                process: BaseProcess = context.Process(
                    target=_work, args=(theirs, place, _Descriptor(file), os.getcwd()), name=name, daemon=True
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
        file.close()
    return [results[position] for position in range(len(items))]


def _work(pipe: Connection, place: tuple[int, int], file: int, folder: str) -> None:
    """What a worker process does: one item after another until the parent closes the pipe."""
    global _progress
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent stops its workers
    threading.Thread(target=exit_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    os.chdir(folder)
    sending = threading.Lock()

    def send(data: bytes) -> None:
        with sending:
            pipe.send_bytes(data)

    def forward(event: Event) -> None:
        send(pickle.dumps(("event", event)))

    _progress = Progress(forward=forward)
    with suppress(EOFError, ConnectionError):  # the parent closed the pipe, or died
        send(pickle.dumps(("ready",)))
        common: Any = None
        while True:
            item = pipe.recv_bytes()
            try:
                if common is None:
                    common = _rebuilt(_mapped(file, *place), file)
                answer = _answer(*common, *_rebuilt(item))
            except BaseException as error:
                answer = pickle.dumps(("error", _portable(error), traceback.format_exc()))
            send(answer)


def _rebuilt(data: bytes | mmap.mmap, file: int = -1) -> Any:
    try:
        return _Unpickler(data, file).load()
    except (AttributeError, ImportError) as error:
        raise InputError(f"function and items cannot be rebuilt in a worker ({error}): pass workers=1") from error


def _answer(run: Run, function: Callable[[Run, T], R], label: str, position: int, item: T) -> bytes:
    with global_seed(run.seed_for("map", label, position)):
        result = function(run, item)
    return _pickled(("result", position, result), f"the result for items[{position}] is a {type(result).__name__}")


def exit_with_parent() -> None:
    """Wait for the process that started this one to end, and end this one too."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _pickled(value: Any, what: str) -> bytes:
    with _sendable(what):
        return pickle.dumps(value)


@contextmanager
def _sendable(what: str) -> Iterator[None]:
    try:
        yield
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise InputError(f"{what}, which worker processes cannot be sent ({error}): pass workers=1") from error


def _pickled_into(file: IO[bytes], value: Any, what: str) -> tuple[int, int]:
    """Write `value`, and before it its large tensors, one by one: its offset and size. Errors as for `_pickled`."""
    stream = io.BytesIO()
    with _sendable(what):
        _Pickler(stream, file).dump(value)
    data = stream.getbuffer()
    place = _append(file, data), len(data)
    file.flush()
    return place


def _append(file: IO[bytes], data: Any) -> int:
    """Write `data` where a page begins; its offset there."""
    offset = -(-file.tell() // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
    file.seek(offset)
    file.write(data)
    return offset


def _mapped(file: int, offset: int, size: int) -> mmap.mmap:
    return mmap.mmap(file, size, access=mmap.ACCESS_COPY, offset=offset)


class _Pickler(pickle.Pickler):
    """Puts large tensors into a file, each where a page begins."""

    def __init__(self, stream: IO[bytes], file: IO[bytes]) -> None:
        super().__init__(stream)
        self._file = file
        self._places: dict[tuple[Any, ...], tuple[int, Tensor]] = {}  # tensors, so that no other takes their memory

    def persistent_id(self, value: Any) -> Any:
        if type(value) is not Tensor or value.requires_grad or value.device.type != "cpu":
            return None
        if value.layout is not torch.strided or not value.is_contiguous() or value.nbytes < MAPPED_BYTES:
            return None
        content = value.data_ptr(), value.dtype, tuple(value.shape)
        if content not in self._places:
            self._places[content] = _append(self._file, value.flatten().view(torch.uint8).numpy().data), value
        return self._places[content][0], value.nbytes, *content[1:]


class _Unpickler(pickle.Unpickler):
    """Maps what `_Pickler` put into the file: processes share it until one of them writes to it, for itself alone."""

    def __init__(self, data: bytes | mmap.mmap, file: int) -> None:
        super().__init__(io.BytesIO(data))
        self._file = file

    def persistent_load(self, place: Any) -> Tensor:
        offset, size, dtype, shape = place
        return torch.frombuffer(_mapped(self._file, offset, size), dtype=dtype).view(shape)


class _Descriptor:
    """An open file, which a process that is being started gets as its descriptor there."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return _detached, (reduction.DupFd(self._file.fileno()),)


def _detached(descriptor: Any) -> int:
    number: int = descriptor.detach()
    return number


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
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C waits for the end of the block; processes started in it never see one, not even while they import."""
    if not hasattr(signal, "pthread_sigmask"):  # not a Unix
        yield
        return
    resource_tracker.ensure_running()  # or the first process starts it, which unblocks SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def environment_variables(**variables: str) -> Iterator[None]:
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
