"""Worker processes of `Run.map`: one pipe each to the parent, gone when either side is.

Messages are pickled here, by value: torch's own reduction for processes passes file descriptors, which die with the
worker. concurrent.futures neither stops running work nor says how a worker died.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from rtl.errors import InputError
from rtl.progress import Event, Progress, Task

if TYPE_CHECKING:
    from rtl.run import Run

T = TypeVar("T")
R = TypeVar("R")

_progress: Progress | None = None  # set in a worker process


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


def map_in_processes(run: Run, function: Callable[[Run, T], R], items: Sequence[T], label: str, task: Task) -> list[R]:
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
    global _progress
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

    _progress = Progress(forward=forward)
    with suppress(EOFError, ConnectionError):  # the parent closed the pipe, or died
        send(pickle.dumps(("ready",)))
        common: Any = None
        while True:
            item = pipe.recv_bytes()
            try:
                if common is None:
                    common = _rebuilt(head)
                    del head
                answer = _answer(*common, *_rebuilt(item))
            except BaseException as error:
                answer = pickle.dumps(("error", _portable(error), traceback.format_exc()))
            send(answer)


def _rebuilt(data: bytes) -> Any:
    try:
        return pickle.loads(data)
    except (AttributeError, ImportError) as error:
        raise InputError(f"function and items cannot be rebuilt in a worker ({error}): pass workers=1") from error


def _answer(run: Run, function: Callable[[Run, T], R], label: str, position: int, item: T) -> bytes:
    with global_seed(run.seed_for("map", label, position)):
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
