"""How well inputs find their ticket (`rtl.route`): by context, by centroid and by confidence, each calibrated.

The digits by class, and by clusters that k-means found in their pixels without a label: there a ticket tells the ten
digits apart within its cluster, and nobody says which cluster a new sample is of. CIFAR-10 by class, with the tickets
that its results keep. Calibration and measurement are two-fold on the test set (`rtl.route.compare`). Routing by
context, which somebody gives, is the oracle's row where the context is right.

    python -m benchmarks.routing --data DIR         # minutes; writes results/routing
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rtl import retrain, route
from rtl.data import Data, data_root
from rtl.extract import extract
from rtl.fit import Fit
from rtl.partition import Partition, by_cluster, by_label
from rtl.recipes import load_data, recipe
from rtl.recipes.classification import Classification, new_model
from rtl.report import environment, markdown
from rtl.run import Run, write_atomically
from rtl.tasks import MultiClass
from rtl.tickets import TicketNetwork

CLUSTERS = 6
ROUTERS = {"oracle": "context (oracle)", "centroid": "centroid", "confidence": "confidence"}


def digits(out: Run) -> Iterator[dict[str, Any]]:
    """Tickets of both partitions, of three seeds, at the recipe's sparsities."""
    config: Any = recipe("digits")
    train, test = load_data(config, None)
    by_class = by_label(train), config.fit("rtl", config.round_epochs), config.fit("rtl", config.retrain_epochs)
    for seed in config.seeds:
        clusters = by_cluster(train, CLUSTERS, seed=seed)
        alone = [dataclasses.replace(fit, task=MultiClass()) for fit in by_class[1:]]
        for name, parts, round_fit, retrain_fit in (("class", *by_class), ("cluster", clusters, *alone)):
            run = out.child(f"digits-{name}").child(f"seed-{seed}", seed)
            for net in _networks(config, train, parts, round_fit, retrain_fit, run):
                yield from _rows(f"digits by {name}", seed, net, parts, test)


def _networks(
    config: Classification, train: Data, parts: Partition, round_fit: Fit, retrain_fit: Fit, run: Run
) -> Iterator[TicketNetwork]:
    model = new_model(config, train, run)
    tickets = extract(model, parts, config.plan, round_fit, run)
    for masks in tickets.levels.values():
        yield retrain(model, masks, parts, retrain_fit, run)


def cifar10(root: Path, kept: Path) -> Iterator[dict[str, Any]]:
    """The tickets of results/cifar10, which are of the paper's protocol, by the centroids of all training images."""
    config: Any = recipe("cifar10", "paper")
    train, test = load_data(config, root)
    for folder in sorted(kept.glob("tickets/*")):
        yield from _rows("CIFAR-10 by class", 0, TicketNetwork.from_pretrained(folder), by_label(train), test)


def _rows(task: str, seed: int, net: TicketNetwork, parts: Partition, test: Data) -> Iterator[dict[str, Any]]:
    routers = [route.by_centroid(net, parts), route.by_confidence(net)]
    found = route.compare(net, routers, parts.apply(test))
    for router, values in found.items():
        yield {"task": task, "seed": seed, "sparsity": net.sparsity, "router": router, "metrics": values}


def lines(rows: list[dict[str, Any]]) -> list[list[str]]:
    groups: dict[tuple[str, float, str], list[dict[str, float]]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["sparsity"], row["router"]), []).append(row["metrics"])
    head = ["tickets", "sparsity", "routed by", "own ticket", "end task: accuracy", "calibration error"]
    body = []
    for (task, sparsity, router), found in groups.items():
        cells = [_spread([values[key] for values in found]) for key in ("routing", "accuracy", "calibration")]
        body.append([task, f"{sparsity:.0%}", ROUTERS[router], *cells])
    return [head, *body]


def _spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="data root (default: the environment variable RTL_DATA)")
    parser.add_argument("--runs", type=Path, default=Path("runs/routing"), help="where tickets are kept")
    parser.add_argument("--workers", type=int, help="processes (default: one a core)")
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args()
    torch.set_num_threads(1)  # what networks as small as these are fastest on
    rows = [
        *digits(Run(options.runs, workers=options.workers)),
        *cifar10(data_root(options.data), options.results / "cifar10"),
    ]
    command = "python -m benchmarks.routing --data DIR"
    table = {"recipe": "routing", "command": command, "environment": environment(), "rows": rows}
    folder = options.results / "routing"
    write_atomically(folder / "table.md", markdown(lines(rows)).encode())
    write_atomically(folder / "table.json", (json.dumps(table, indent=1) + "\n").encode())
    print(markdown(lines(rows)))
