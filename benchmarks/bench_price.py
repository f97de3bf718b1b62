"""What RTL costs: presented samples a second of a whole run, against one network and against dense PyTorch.

python -m benchmarks.bench_price --data DIR [--protocol reduced] [--only rtl profile] [--out FILE]

One whole run of the CIFAR-10 recipe (by default under its protocol "reduced", the one the README reports: all rounds,
retrainings, evaluation), and then the same rounds by each of the others, one after another, alone on the machine, each
in a process of its own. An interrupted measurement goes on with the contenders it lacks.

rtl               the package as `rtl run cifar10 --methods rtl` runs it: a worker process a core.
rtl_batched       the same, but extraction trains all tickets of a round in one mixed batch, through untied weights and
                  our kernels, in one process with torch's own threads (`extract(..., batched=True)`).
imp_single        the package on one pruned network for all data, presented with as many samples. Its rounds are one
                  chain, which one process runs on one core while the others idle.
dense_loop        RTL on plain PyTorch: ordinary modules, a loop over tickets, torch's own threads on all cores. A
                  ticket's extraction has weights of its own, so that pruned ones are set to zero once and only their
                  gradients masked; joint retraining shares weights, so that m_k * θ is formed at every step.
dense_workers     the same in a worker process a core, tickets and retrainings shared out as the package does.
dense_imp_single  IMP single on plain PyTorch, torch's own threads on all cores: what one network costs without us.

"seconds" are wall seconds from before the first worker starts to the last metric, "processor seconds" those of all
threads and processes added up: a contender that leaves cores idle looks better by these. Both are shown in units of
either IMP single's too. Ratios are to be read from one run. All contenders have the allocator settings that the command
`rtl` and its workers have (`rtl.workers.ALLOCATOR`), and the same optimiser (Adam, foreach).

The profile sorts one thread's time of the training loop and of evaluation (torch.profiler, steps of the recipe's batch
size at 50 %) into data, forward, backward, optimiser, batch norm, and what Python does between operators.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import multiprocessing
import os
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rtl_kernels as rk
from benchmarks.__main__ import state_of_code
from rtl.data import Data
from rtl.errors import InputError
from rtl.evaluate import classification_metrics, evaluate
from rtl.extract import extract, kept_at, prune
from rtl.fit import Fit, masked_copy, new_optimizer, split, step
from rtl.partition import Partition, by_label, whole
from rtl.progress import Progress, duration
from rtl.recipes import Classification, recipe
from rtl.recipes.classification import load, new_model, run_classification
from rtl.report import environment, markdown
from rtl.retrain import presented, retrain, schedule
from rtl.run import Run, write_atomically
from rtl.tickets import TicketNetwork, Tickets
from rtl.workers import ALLOCATOR, environment_variables, exit_with_parent

CONTENDERS = ("rtl", "rtl_batched", "imp_single", "dense_loop", "dense_workers", "dense_imp_single")
# Training samples a second and core, as once measured on two cores with AVX-512: for the plan's seconds alone.
OURS, DENSE = 2600, 900
EVALUATED = 0.25  # what an evaluated sample costs, in trained ones
DEFAULT = Path("benchmarks/results/price.json")


# The method on plain PyTorch


@dataclasses.dataclass(frozen=True, eq=False)
class Plain:
    """RTL, or with one subset IMP single, without our kernels; batch norm statistics per ticket, as ours by default."""

    model: nn.Module  # at θ0; model.prunable says what masks cover
    parts: Partition
    rounds: Sequence[int]  # weights kept after each
    levels: Mapping[float, int]  # sparsity -> weights kept
    fit: Fit
    round_epochs: int
    retrain_epochs: int
    run: Run  # whose seed decides who is presented when, as it does for ours

    def prunable(self) -> list[str]:
        """Names of the masked weights."""
        layers = self.model.named_modules()
        return [f"{name}.weight" for name, module in layers if self.model.prunable(name, module)]  # type: ignore[operator]

    def extract(self, ticket: int) -> dict[float, dict[str, Tensor]]:
        """A ticket's masks at every level."""
        masks = {name: torch.ones_like(self.model.get_parameter(name)) for name in self.prunable()}
        found = {}
        for number, keep in enumerate(self.rounds):
            generator = self.run.generator("extract", self.parts.names[ticket], number)
            model = copy.deepcopy(self.model).train()
            optimizer = torch.optim.Adam(model.parameters(), lr=self.fit.lr, foreach=True)
            with torch.no_grad():
                for name, mask in masks.items():
                    model.get_parameter(name).mul_(mask)
            for _ in range(self.round_epochs):
                for index in split(self.fit.task.draw(self.parts, ticket, generator), self.fit.batch_size):
                    loss = self._losses(model(self.parts.data.batch(index)[0]), ticket, index).mean()
                    optimizer.zero_grad()
                    loss.backward()
                    for name, mask in masks.items():  # zero from the first step on, so that moments stay zero too
                        gradient = model.get_parameter(name).grad
                        assert gradient is not None
                        gradient.mul_(mask)
                    optimizer.step()
            weights = {name: model.get_parameter(name).detach() for name in masks}
            kept = prune(weights, {name: mask.bool() for name, mask in masks.items()}, keep)
            masks = {name: mask.to(weights[name].dtype) for name, mask in kept.items()}
            found |= {level: masks for level, count in self.levels.items() if count == keep}
        return found

    def retrain(self, level: float, tickets: Sequence[Mapping[float, Mapping[str, Tensor]]]) -> Retrained:
        """Algorithm 2: one ticket's batch a step, through m_k * θ, the update masked by m_k."""
        masks = [ticket[level] for ticket in tickets]
        model = copy.deepcopy(self.model).train()
        buffers = [{name: t.clone() for name, t in model.named_buffers()} for _ in masks]
        optimizer = torch.optim.Adam(model.parameters(), lr=self.fit.lr, foreach=True)
        for epoch in range(self.retrain_epochs):
            generator = self.run.generator("retrain", *self.parts.names, epoch)
            for batch in schedule(self.parts, list(range(len(masks))), self.fit, generator):
                for k, _, index in batch:
                    self._masked_step(model, masks[k], buffers[k], optimizer, k, index)
        return Retrained(model.eval(), masks, buffers)

    def _masked_step(
        self,
        model: nn.Module,
        masks: Mapping[str, Tensor],
        buffers: dict[str, Tensor],
        optimizer: torch.optim.Optimizer,
        ticket: int,
        index: Tensor,
    ) -> None:
        inputs = self.parts.data.batch(index)[0]
        loss = self._losses(_through(model, masks, buffers, inputs), ticket, index).mean()
        optimizer.zero_grad()
        loss.backward()
        before = []
        for name, mask in masks.items():
            weight = model.get_parameter(name)
            moments = optimizer.state.get(weight, {})
            kept = [t for t in (weight, moments.get("exp_avg"), moments.get("exp_avg_sq")) if t is not None]
            before.append((weight, mask.bool(), [t.detach().clone() for t in kept]))
        optimizer.step()
        with torch.no_grad():
            for weight, mask, values in before:
                state = optimizer.state[weight]
                if len(values) == 1:  # the step that made the moments
                    values += [torch.zeros_like(weight), torch.zeros_like(weight)]
                for tensor, old in zip((weight, state["exp_avg"], state["exp_avg_sq"]), values, strict=True):
                    tensor.copy_(torch.where(mask, tensor, old))

    def _losses(self, output: Tensor, ticket: int, index: Tensor) -> Tensor:
        target = self.fit.task.target(self.parts, ticket, index)
        return self.fit.task.losses(output, target, torch.full((len(index),), ticket))


@dataclasses.dataclass(frozen=True, eq=False)
class Retrained:
    """Plain shared weights, and of each ticket its masks and its batch norm statistics."""

    model: nn.Module
    masks: Sequence[Mapping[str, Tensor]]
    buffers: Sequence[dict[str, Tensor]]

    @torch.no_grad()
    def scores(self, data: Data, multi_class: bool, batch_size: int = 512) -> Tensor:
        """(N, C): softmax of a multi-class network, or sigmoid of each ticket's own logit."""
        parts = []
        for index in torch.arange(len(data)).split(batch_size):
            inputs, every = data.batch(index)[0], zip(self.masks, self.buffers, strict=True)
            logits = [_through(self.model, masks, buffers, inputs) for masks, buffers in every]
            if multi_class:
                parts.append(logits[0].softmax(1))
            else:
                parts.append(torch.stack([own[:, k] for k, own in enumerate(logits)], 1).sigmoid())
        return torch.cat(parts)


def _through(model: nn.Module, masks: Mapping[str, Tensor], buffers: dict[str, Tensor], inputs: Tensor) -> Tensor:
    """f(x; m ⊙ θ) with these batch norm statistics, which training moves."""
    masked = {name: model.get_parameter(name) * mask for name, mask in masks.items()}
    output: Tensor = torch.func.functional_call(model, {**buffers, **masked}, (inputs,))
    return output


def _plain_extract(plain: Plain, _: Run, ticket: int) -> dict[float, dict[str, Tensor]]:
    return plain.extract(ticket)


def _plain_finish(
    plain: Plain, tickets: Sequence[Mapping[float, Mapping[str, Tensor]]], test: Data, _: Run, level: float
) -> dict[str, float]:
    multi_class = plain.fit.task.name == "multi_class"
    scores = plain.retrain(level, tickets).scores(test, multi_class)
    return classification_metrics(scores.numpy(), test.targets.numpy()).metrics


def plain_run(plain: Plain, test: Data, run: Run, *, workers: bool) -> dict[float, dict[str, float]]:
    """Extraction, a retraining a level, evaluation: metrics by level. In worker processes, or here with all threads."""
    extract = functools.partial(_plain_extract, plain)
    tickets = range(len(plain.parts))
    masks = run.map(extract, tickets, label="extract") if workers else [extract(run, k) for k in tickets]
    finish = functools.partial(_plain_finish, plain, masks, test)
    levels = sorted(plain.levels)
    metrics = run.map(finish, levels, label="retrain") if workers else [finish(run, level) for level in levels]
    return dict(zip(levels, metrics, strict=True))


def _batched(config: Classification, train: Data, test: Data, run: Run) -> dict[float, dict[str, float]]:
    """Metrics by level of RTL whose extraction is batched; retrained and evaluated as it always is."""
    model, parts = new_model(config, train, run), by_label(train)
    tickets = extract(model, parts, config.plan, config.fit("rtl", config.round_epochs), run, batched=True)
    fit, levels = config.fit("rtl", config.retrain_epochs), sorted(config.sparsities)
    finish = functools.partial(_batched_finish, model, parts, tickets, fit, test)
    return dict(zip(levels, run.map(finish, levels, label="retrain"), strict=True))


def _batched_finish(
    model: nn.Module, parts: Partition, tickets: Tickets, fit: Fit, test: Data, run: Run, level: float
) -> dict[str, float]:
    return evaluate(retrain(model, tickets.at(level), parts, fit, run), test).metrics


# One measurement


def measure(name: str, config: Classification, train: Data, test: Data, workers: int, quiet: bool) -> dict[str, Any]:
    """Wall and processor seconds, presented samples and metrics of one contender."""
    single, threaded = name.endswith("imp_single"), name in ("dense_loop", "dense_imp_single", "rtl_batched")
    with tempfile.TemporaryDirectory() as folder:
        run = Run(folder, seed=config.seeds[0], workers=workers, progress=Progress(quiet=quiet))
        began, processor = time.perf_counter(), _processor_seconds()
        if name in ("rtl", "imp_single"):
            rows, _ = run_classification(dataclasses.replace(config, methods=(name,)), run, train, test)
            metrics = {row["sparsity"]: row["metrics"] for row in rows}
        elif name == "rtl_batched":
            metrics = _batched(config, train, test, run)
        else:
            metrics = plain_run(plain(config, train, run, single), test, run, workers=name == "dense_workers")
        seconds, processor = time.perf_counter() - began, _processor_seconds() - processor
    samples = sum(presented_samples(config, train, single))
    return {
        "contender": name,
        "seconds": seconds,
        "processor_seconds": processor,
        "samples": samples,
        "samples_per_second": samples / seconds,
        "workers": 1 if threaded else workers,
        "threads": torch.get_num_threads() if threaded else 1,
        "balanced_accuracy.threshold": {str(s): m["balanced_accuracy.threshold"] for s, m in metrics.items()},
        "accuracy": {str(s): m["accuracy"] for s, m in metrics.items()},
    }


def _processor_seconds() -> float:
    """Of this process, and of those that it started and that ended."""
    return sum(os.times()[:4])


def measure_apart(name: str, config: Classification, root: Path | None, workers: int, quiet: bool) -> dict[str, Any]:
    """`measure` in a process of its own, under the settings that the command `rtl` gives itself and its workers."""
    with (
        environment_variables(**ALLOCATOR),
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
    ):
        return pool.submit(_measure_loaded, name, config, root, workers, quiet).result()


def _measure_loaded(name: str, config: Classification, root: Path | None, workers: int, quiet: bool) -> dict[str, Any]:
    threading.Thread(target=exit_with_parent, daemon=True).start()  # what measures must not outlive who asked for it
    return measure(name, config, *load(config, root), workers, quiet)


def plain(config: Classification, train: Data, run: Run, single: bool) -> Plain:
    """The recipe's rounds for the plain contender."""
    model, parts = new_model(config, train, run), by_label(train)
    prunable = _prunable(model)
    fit = config.fit("imp_single" if single else "rtl", 1)  # a single model has no negatives: two epochs for one
    epochs = config.retrain_epochs
    if single:  # as many samples as joint retraining presents, which repeats the batches of small subsets
        wanted = presented(parts, list(range(len(parts))), config.fit("rtl", 1))
        epochs = max(1, round(epochs * sum(wanted.values()) / len(train)))
    return Plain(
        model,
        whole(train) if single else parts,
        config.plan.rounds(prunable),
        {level: kept_at(prunable, level) for level in config.sparsities},
        fit,
        config.round_epochs * fit.epochs,
        epochs,
        run,
    )


def presented_samples(config: Classification, train: Data, single: bool) -> tuple[int, int]:
    """Over all rounds, and over all retrainings."""
    one = plain(config, train, Run("."), single)
    epoch = sum(len(one.fit.task.draw(one.parts, k, torch.Generator())) for k in range(len(one.parts)))
    batches = schedule(one.parts, list(range(len(one.parts))), one.fit, torch.Generator())
    together = sum(len(index) for batch in batches for _, _, index in batch)
    return len(one.rounds) * one.round_epochs * epoch, len(one.levels) * one.retrain_epochs * together


def expected_seconds(name: str, config: Classification, train: Data, test: Data, workers: int) -> float:
    """About how long a contender takes."""
    single = name.endswith("imp_single")
    rounds, retrained = presented_samples(config, train, single)
    levels = len(config.sparsities)
    retrained += round(EVALUATED * levels * len(test) * (1 if single else len(by_label(train))))
    if name in ("dense_loop", "dense_imp_single"):
        return (rounds + retrained) / (DENSE * torch.get_num_threads())
    chains = 1 if name in ("imp_single", "rtl_batched") else workers
    return (rounds / chains + retrained / min(workers, levels)) / (DENSE if name == "dense_workers" else OURS)


def _prunable(model: nn.Module) -> int:
    return sum(bank.shape.numel() for bank in masked_copy(model, 1, "shared").banks.values())


# Where the time goes

PARTS = ("data", "forward", "batch norm forward", "backward", "batch norm backward", "optimiser", "other")


def profile(config: Classification, train: Data, test: Data, sparsity: float = 0.5, steps: int = 5) -> dict[str, Any]:
    """Milliseconds of each part of a training step (extraction, joint retraining) and of an evaluated batch.

    One thread. Masks are random. "other" is what no operator accounts for: Python, and torch's own bookkeeping.
    """
    parts = by_label(train)
    model = new_model(config, train, Run("."))
    generator = torch.Generator().manual_seed(0)
    tables: dict[str, Any] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for what in ("extraction", "retraining", "evaluation"):
            masks = 1 if what == "extraction" else len(parts)
            net = masked_copy(model, masks, "shared" if masks == 1 else "per_ticket")
            net.banks = {
                name: rk.MaskBank.from_dense(torch.rand((masks, *bank.shape), generator=generator) >= sparsity)
                for name, bank in net.banks.items()
            }
            work = _evaluated(net, parts, test) if what == "evaluation" else _trained(net, config, parts, what)
            for _ in range(3):
                next(work)
            tables[what] = _sorted_time(net, work, steps)
    finally:
        torch.set_num_threads(threads)
    return tables


def _trained(net: rk.nn.RoutedModel, config: Classification, parts: Partition, what: str) -> Iterator[int]:
    """Training steps, without end; gives the samples of each."""
    fit, generator = config.fit("rtl", 1), torch.Generator().manual_seed(0)
    optimizer = new_optimizer(net, fit)
    net.train()
    while True:
        if what == "extraction":
            batches = [[(0, 0, index)] for index in split(fit.task.draw(parts, 0, generator), fit.batch_size)]
        else:
            batches = list(schedule(parts, list(range(len(parts))), fit, generator))
        for batch in batches:
            step(net, optimizer, fit, parts, batch)
            yield sum(len(index) for _, _, index in batch)


def _evaluated(net: rk.nn.RoutedModel, parts: Partition, test: Data) -> Iterator[int]:
    tickets = TicketNetwork(net.eval(), parts.names, range(len(parts)), "one_vs_rest", 0.5)
    while True:
        for index in torch.arange(len(test)).split(512 // len(parts)):  # as rtl.evaluate does
            with torch.no_grad():
                tickets.every(test.batch(index)[0])
            yield len(index) * len(parts)


@contextmanager
def _labelled(net: rk.nn.RoutedModel) -> Iterator[None]:
    """Mark reading of data, the model's forward pass and its batch norms' in the profile."""
    running: list[Any] = []
    original = Data.batch

    def batch(self: Data, index: Tensor) -> tuple[Tensor, Tensor]:
        with torch.profiler.record_function("part: data"):
            return original(self, index)

    def enter(module: nn.Module, *_: Any) -> None:
        norm = isinstance(module, nn.BatchNorm2d)
        running.append(torch.profiler.record_function("part: batch_norm" if norm else "part: forward"))
        running[-1].__enter__()

    def leave(*_: Any) -> None:
        running.pop().__exit__(None, None, None)

    marked = [net, *(module for module in net.modules() if isinstance(module, nn.BatchNorm2d))]
    hooks = [hook for m in marked for hook in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
    Data.batch = batch  # type: ignore[method-assign]
    try:
        yield
    finally:
        Data.batch = original  # type: ignore[method-assign]
        for hook in hooks:
            hook.remove()


def _sorted_time(net: rk.nn.RoutedModel, work: Iterator[int], steps: int) -> dict[str, Any]:
    with _labelled(net):
        began = time.perf_counter()
        unprofiled = sum(next(work) for _ in range(steps))
        plain_seconds = time.perf_counter() - began
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
            began = time.perf_counter()
            for _ in range(steps):
                next(work)
            wall = time.perf_counter() - began
    spent = dict.fromkeys(PARTS, 0.0)
    for event in recorded.events():
        spent[_part(event)] += event.self_cpu_time_total / 1e6
    spent["other"] += max(0.0, wall - sum(spent.values()))
    return {
        "milliseconds": {part: 1e3 * seconds / steps for part, seconds in spent.items()},
        "share": {part: seconds / wall for part, seconds in spent.items()},
        "milliseconds_unprofiled": 1e3 * plain_seconds / steps,
        "samples_per_second_unprofiled": unprofiled / plain_seconds,
    }


def _part(event: Any) -> str:
    """The part of a profiled event: what the outermost mark around it says; batch norm's own are told apart."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    norm = any("batch_norm" in name.lower() or "batchnorm" in name.lower() for name in names)
    for name in reversed(names):
        if name == "part: data":
            return "data"
        if name == "part: forward":
            return "batch norm forward" if norm else "forward"
        if name.startswith("Optimizer."):
            return "optimiser"
        if name.startswith("autograd::engine"):
            return "batch norm backward" if norm else "backward"
    return "other"


def table(results: Mapping[str, Any]) -> str:
    """The measurements and the profile as Markdown."""
    runs = {row["contender"]: row for row in results["runs"] if "seconds" in row}
    units = [name for name in ("imp_single", "dense_imp_single") if name in runs]
    lines = [["contender", "workers × threads", "samples", "samples/s", "seconds", "processor seconds"]]
    lines[0] += [f"{what} / {unit}'s" for unit in units for what in ("seconds", "processor seconds")]
    for name, row in runs.items():
        counts = [f"{row[key]:,.0f}" for key in ("samples", "samples_per_second", "seconds", "processor_seconds")]
        ratios = [f"{row[key] / runs[unit][key]:.2f}" for unit in units for key in ("seconds", "processor_seconds")]
        lines.append([name, f"{row['workers']} × {row['threads']}", *counts, *ratios])
    tables = [markdown(lines)] if runs else []
    tables += [f"{row['contender']}: {row['skipped']}\n" for row in results["runs"] if "skipped" in row]
    if results.get("profile"):
        head = ["one thread, ms (share)", *results["profile"]]
        body = [
            [part, *(f"{p['milliseconds'][part]:.1f} ({p['share'][part]:.0%})" for p in results["profile"].values())]
            for part in PARTS
        ]
        body.append(["unprofiled", *(f"{p['milliseconds_unprofiled']:.1f}" for p in results["profile"].values())])
        per_second = (f"{p['samples_per_second_unprofiled']:,.0f}" for p in results["profile"].values())
        tables.append(markdown([head, *body, ["samples/s", *per_second]]))
    return "\n".join(tables)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0; 2 for bad input; 130 if interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", type=Path, help="data root (default: the environment variable RTL_DATA)")
    parser.add_argument("--protocol", default="reduced", help="of the recipe cifar10 (default: reduced)")
    parser.add_argument("--workers", type=int, help="default: one a core")
    parser.add_argument("--only", nargs="+", choices=[*CONTENDERS, "profile"], default=[*CONTENDERS, "profile"])
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--out", type=Path, default=DEFAULT, help=f"default: {DEFAULT}")
    options = parser.parse_args(arguments)
    try:
        print(table(_measured(options, _published(arguments))))
    except InputError as error:
        print(f"bench_price: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench_price: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


def _published(arguments: Sequence[str]) -> str:
    """The command for anybody: where the data lies is not part of it."""
    words = ["--data=DIR" if word.startswith("--data=") else word for word in arguments]
    words = ["DIR" if before == "--data" else word for before, word in zip(["", *words], words, strict=False)]
    return shlex.join(["python", "-m", "benchmarks.bench_price", *words])


def _measured(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measure what the results lack, writing them after each."""
    config: Any = dataclasses.replace(recipe("cifar10", options.protocol), methods=("rtl",))
    train, test = load(config, options.data)
    workers = Run(".", workers=options.workers).workers
    show: Callable[[str], None] = (lambda _: None) if options.quiet else functools.partial(print, file=sys.stderr)
    fields = {key: value for key, value in dataclasses.asdict(config).items() if key != "methods"}
    same = {"config": fields, "workers": workers, "code": state_of_code(("rtl_kernels", "benchmarks", "rtl"))}
    results = _begun(options.out, json.loads(json.dumps(same)))
    results |= {"command": command, "environment": environment()}
    found = {row["contender"] for row in results["runs"]}
    todo = [name for name in CONTENDERS if name in options.only and name not in found]
    expected = {name: expected_seconds(name, config, train, test, workers) for name in todo}
    for name in todo:
        rounds, retrained = presented_samples(config, train, name.endswith("imp_single"))
        show(f"{name}: {rounds:,} + {retrained:,} samples, about {duration(expected[name])}")
    show(f"all of it: about {duration(sum(expected.values()))}")
    for name in todo:
        try:
            results["runs"].append(measure_apart(name, config, options.data, workers, options.quiet))
            show(f"{name}: {results['runs'][-1]['seconds']:.0f} s")
        except InputError as error:
            if name != "rtl_batched":  # which needs subsets of equally many batches
                raise
            results["runs"].append({"contender": name, "skipped": str(error)})
        _write(options.out, results)
    if "profile" in options.only and not results["profile"]:
        results["profile"] = profile(config, train, test)
    results["complete"] = True
    _write(options.out, results)
    return results


def _begun(file: Path, same: Mapping[str, Any]) -> dict[str, Any]:
    """The unfinished results in `file` if they are of the same code and settings, else new ones."""
    if file.exists():
        results: dict[str, Any] = json.loads(file.read_text())
        if results.get("complete") is False and all(results.get(key) == value for key, value in same.items()):
            return results
    return {**same, "complete": False, "runs": [], "profile": {}}


def _write(file: Path, results: Mapping[str, Any]) -> None:
    write_atomically(file, (json.dumps(results, indent=1) + "\n").encode())
    write_atomically(file.with_suffix(".md"), table(results).encode())


if __name__ == "__main__":
    from benchmarks import bench_price  # so that a process finds by its module's name what it is sent

    sys.exit(bench_price.main())
