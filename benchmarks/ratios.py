"""Ratio of the masked operators to dense PyTorch and nothing else, unchecked: what one wants while tuning a kernel.

python -m benchmarks.ratios [--threads 1] [--only TEXT] [--train] [--seconds 2]
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence

from benchmarks.cases import CASES, SPARSITIES, Case
from rtl.workers import ALLOCATOR

if any(os.environ.get(key) != value for key, value in ALLOCATOR.items()):  # read by glibc when a process starts
    os.execve(sys.executable, [sys.executable, "-m", "benchmarks.ratios", *sys.argv[1:]], {**os.environ, **ALLOCATOR})

import torch
from torch import Tensor

from benchmarks.timing import RoundRobin


def contenders(case: Case, sparsities: Sequence[float], train: bool) -> list[Callable[[], object]]:
    x, weight, _, _, _ = case.make(0.5)
    leaves = [x.requires_grad_(train), weight.requires_grad_(train)]

    def step(forward: Callable[[], Tensor]) -> Callable[[], object]:
        if not train:
            return forward
        dy = torch.randn_like(forward())
        return lambda: torch.autograd.grad(forward(), leaves, dy)

    runs = [step(lambda: case.dense(x, weight, None, **case.options))]
    for sparsity in sparsities:
        _, _, _, bank, route = case.make(sparsity)
        runs.append(step(lambda bank=bank, route=route: case.operator(x, weight, bank, route, **case.options)))
    return runs


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--sparsity", type=float, nargs="*", default=SPARSITIES)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each case")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ratios: list[list[float]] = []
    print(
        f"{'case':55s} {'dense':>9s}  "
        + "  ".join(f"{s:>11.0%}" for s in args.sparsity)
        + "   (median, lower quartile)"
    )
    for case in CASES.values():
        if args.only not in case.name:
            continue
        runs = contenders(case, args.sparsity, args.train)
        robin = RoundRobin({str(number): run for number, run in enumerate(runs)})
        for _ in range(robin.rounds(args.seconds)):
            robin.round()
        dense, *masked = robin.timings().values()
        ratios.append([m.median / dense.median for m in masked])
        print(
            f"{case.name:55s} {dense.median * 1e3:7.2f}ms  "
            + "  ".join(f"{m.median / dense.median:5.2f} {m.low / dense.low:5.2f}" for m in masked),
            flush=True,
        )
    means = [math.exp(sum(map(math.log, column)) / len(column)) for column in zip(*ratios, strict=True)]
    print(f"{'geometric mean':55s} {'':9s}  " + "  ".join(f"{m:5.2f}      " for m in means))


if __name__ == "__main__":
    main()
