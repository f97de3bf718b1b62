"""How early the collapse alarm (`rtl.collapse`) warns: digits, CIFAR-10 and one image, to 98 or 99 % sparsity.

Each experiment prunes 12 % of what is left a round, and retrains all tickets jointly after some of the rounds, which
gives each ticket's performance there. What counts as a fall, and as a warning in time, is laid down in
`rtl.collapse.verdicts`. The alarm's limit is chosen on some seeds of the digits (`choose`) and then shown on others, on
CIFAR-10 and on the image. Beside it stands the rule that looks at nothing, "warn at a fixed sparsity", with a sparsity
chosen likewise: an alarm that does no better says no more than that.

    python -m benchmarks.collapse --data DIR                    # runs, or goes on: over an hour on two cores
    python -m benchmarks.collapse cifar10 --seeds 1 2 --data DIR     # some alone; the results keep the others
    python -m benchmarks.collapse --redraw                      # from results/collapse/details.json alone
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import rtl.models
from rtl import plots, semantics
from rtl.alignment import alignment
from rtl.collapse import PREMATURE, Verdict, alarms, verdicts
from rtl.curve import Curve, mean_to_others
from rtl.data import data_root
from rtl.data.pictures import pictures
from rtl.errors import InputError
from rtl.extract import PrunePlan
from rtl.fit import masked_copy
from rtl.partition import Partition, by_label
from rtl.recipes import Inr, recipe
from rtl.recipes import load_data as load
from rtl.recipes.classification import Classification, new_model
from rtl.recipes.experiment import Outcome, Trial, run_trials
from rtl.recipes.inr import regions
from rtl.report import environment, markdown
from rtl.run import Run, write_atomically
from rtl.tasks import psnr

REMOVE = 0.12  # of the surviving weights a round
UNTIL = {"digits": 0.99, "cifar10": 0.98, "inr": 0.98}
SEEDS = {"digits": range(6), "cifar10": range(3), "inr": range(2)}
CHOOSING = range(3)  # of the digits
IMAGE = "cocostuff_000000001584"
ALIGNED = (0.25, 0.5, 0.75, 0.9)  # sparsities at which sharing is set against meaning: past them most are collapsed
TEST = 3000  # images of CIFAR-10's test set
KINDS = ("early", "quiet", "premature", "late", "miss", "false")
COMMAND = "python -m benchmarks.collapse"


def config_of(name: str, sparsities: tuple[float, ...]) -> Classification | Inr:
    """What the experiment changes in a recipe: settings that move masks apart within minutes."""
    base: Any = recipe(name)
    own: dict[str, Any] = {
        "digits": {"retrain_epochs": 6},
        "cifar10": {"batch_size": 64, "lr": 2e-3, "round_epochs": 1, "retrain_epochs": 2},
        "inr": {"longest_side": 96, "batch_size": 1024, "round_steps": 300, "retrain_steps": 500, "images": (IMAGE,)},
    }[name]
    changed: Any = dataclasses.replace(
        base, protocol=base.protocol, methods=("rtl",), sparsities=sparsities, remove=REMOVE, **own
    )
    return changed


def sparsities_of(prunable: int, until: float) -> tuple[float, ...]:
    """Where tickets are retrained: after rounds 1, 3 and 5, then every fourth, and the last."""
    kept = PrunePlan(REMOVE, until).rounds(prunable)
    if len(kept) > 1 and kept[-1] > (1 - REMOVE / 2) * kept[-2]:  # it would be a short one
        kept.pop()
    numbers = sorted({0, 2, 4, *range(8, len(kept) - 1, 4), len(kept) - 1})
    return tuple(1 - kept[number] / prunable for number in numbers)


def trial(name: str, seed: int, root: Path | None, run: Run) -> tuple[Trial, PrunePlan]:
    """One experiment: the method on the data from the θ0 of a seed."""
    here = run.child(name).child(f"seed-{seed}", seed)
    config: Any = config_of(name, (0.5,))
    if name == "inr":
        data: Any = pictures((root or Path()) / "segmentation", config.images, config.longest_side)
        parts = regions(config, data[0])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(here.seed_for("theta0"))
            model: Any = rtl.models.inr()
        round_fit, retrain_fit = config.fits("rtl", len(parts))
        test: Any = parts
    else:
        train, test = load(config, root)
        parts = by_label(train)
        model = new_model(config, train, here)
        round_fit, retrain_fit = (config.fit("rtl", n) for n in (config.round_epochs, config.retrain_epochs))
        test = test.select(torch.arange(min(TEST, len(test))))
    prunable = sum(bank.shape.numel() for bank in masked_copy(model, 1, "shared").banks.values())
    levels = sparsities_of(prunable, UNTIL[name])
    rows = 8192 if name == "inr" else 512 // len(parts)  # of a forward pass through one ticket
    trial = Trial("rtl", here, model, parts, round_fit, retrain_fit, test, batch_size=rows)
    return trial, PrunePlan(REMOVE, levels[-1], levels)


def record(name: str, outcomes: list[Outcome]) -> dict[str, Any]:
    """What the analysis needs of one experiment."""
    own, metric = outcomes[0].trial, "psnr" if name == "inr" else "balanced_accuracy.threshold"
    curve = outcomes[0].tickets.curve
    assert curve is not None
    performance: dict[str, dict[str, float]] = {ticket: {} for ticket in curve.names}
    for outcome in outcomes:
        for ticket, value in zip(curve.names, outcome.found["per_class"][metric], strict=True):
            performance[ticket][repr(outcome.masks.sparsity)] = value
    floors = dict.fromkeys(curve.names, 0.5) if name != "inr" else dict(zip(curve.names, _flat(own.parts), strict=True))
    whole = Curve(curve.names, {"all": sum(curve.sizes.values())}, {"all": curve.overlap()})
    baselines = {"independent": curve.independent(), "identical": curve.identical()}
    found = {
        "task": name,
        "seed": own.run.seed,
        "metric": metric,
        "curve": whole.to_json(),
        "baselines": {key: mean_to_others(values).mean(1).tolist() for key, values in baselines.items()},
        "performance": performance,
        "floor": floors,
        "samples": outcomes[-1].samples,
    }
    if semantics.known(curve.names) is not None:  # what they share by layer, to set against their meaning
        rounds = [int((curve.sparsity.mean(1) - s).abs().argmin()) for s in ALIGNED]
        some = Curve(curve.names, curve.sizes, {layer: counts[rounds] for layer, counts in curve.overlaps.items()})
        found["layers"] = some.to_json()
    return found


def _flat(parts: Partition) -> list[float]:
    """PSNR of each region painted in its mean colour."""
    regions = [parts.data.targets[parts[k]] for k in range(len(parts))]
    return [psnr(float((colours - colours.mean(0)).square().mean())) for colours in regions]


def run(tasks: Sequence[str], seeds: Sequence[int], root: Path | None, out: Run) -> None:
    """Every experiment, or what is left of it; each leaves record.json in its folder."""
    for name in tasks:
        for seed in seeds or SEEDS[name]:
            one, plan = trial(name, seed, root, out)
            file = one.run.path / "record.json"
            if not file.exists():
                found = record(name, run_trials([one], plan, one.run))
                write_atomically(file, (json.dumps(found, indent=1) + "\n").encode())


def gathered(runs: Path, results: Path) -> list[dict[str, Any]]:
    """The records that the results hold, and those of finished experiments in their place, by task and seed."""
    details = results / "details.json"
    found = json.loads(details.read_text())["records"] if details.exists() else []
    found += [json.loads(file.read_text()) for task in SEEDS for file in (runs / task).glob("seed-*/record.json")]
    newest = {(one["task"], one["seed"]): one for one in found}
    tasks = list(SEEDS)
    return [newest[key] for key in sorted(newest, key=lambda key: (tasks.index(key[0]), key[1]))]


# What the records say


def performance(one: Mapping[str, Any]) -> dict[str, dict[float, float]]:
    return {ticket: {float(s): v for s, v in values.items()} for ticket, values in one["performance"].items()}


def by_similarity(one: Mapping[str, Any], limit: float) -> list[Verdict]:
    """The alarm at a limit, against performance."""
    at = {alarm.ticket: alarm.sparsity for alarm in alarms(Curve.from_json(one["curve"]), limit=limit)}
    return verdicts(at, performance(one), one["floor"])


def at_fixed_sparsity(one: Mapping[str, Any], sparsity: float) -> list[Verdict]:
    """The rule that looks at nothing, against performance."""
    return verdicts(dict.fromkeys(one["performance"], sparsity), performance(one), one["floor"])


RULES: dict[str, tuple[Callable[[Mapping[str, Any], float], list[Verdict]], tuple[float, ...]]] = {
    "similarity": (by_similarity, (2, 2.5, 3, 3.5, 4, 5, 6, 8, 10, 15, 20)),
    "fixed sparsity": (at_fixed_sparsity, tuple(round(1 - (1 - REMOVE) ** n, 4) for n in range(1, 37))),
}


def right(found: Iterable[Verdict]) -> int:
    """Warnings in time, and silence where nothing falls."""
    return sum(one.kind in ("early", "quiet") for one in found)


def choose(records: Sequence[Mapping[str, Any]], rule: str) -> float:
    """The parameter under which most of the choosing seeds' tickets are judged right; of equals the last.

    Raises InputError without a record of each of those seeds.
    """
    judge, candidates = RULES[rule]
    own = [one for one in records if chosen_on(one)]
    if seeds := sorted(set(CHOOSING) - {one["seed"] for one in own}):
        raise InputError(f"records lack the digits' seeds {seeds}, on which parameters are chosen: run these too")
    return max(reversed(candidates), key=lambda value: sum(right(judge(one, value)) for one in own))


def chosen_on(one: Mapping[str, Any]) -> bool:
    return one["task"] == "digits" and one["seed"] in CHOOSING


def analyse(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each rule, experiment and seed: how many tickets' warnings were of each kind, and the median lead."""
    rows = []
    for rule, (judge, _) in RULES.items():
        value = choose(records, rule)
        for one in records:
            found = judge(one, value)
            leads = [v.lead for v in found if v.lead is not None]
            rows.append(
                {
                    "rule": rule,
                    "parameter": value,
                    "task": one["task"],
                    "role": "choosing" if chosen_on(one) else "test",
                    "seed": one["seed"],
                    "tickets": len(found),
                    **{kind: sum(v.kind == kind for v in found) for kind in KINDS},
                    "lead": statistics.median(leads) if leads else None,
                    "samples": one["samples"],
                }
            )
    return rows


def lines(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The table: seeds added up, right warnings with their deviation over seeds."""
    head = ["tickets of", "seeds", "rule", "tickets", "right", *KINDS, "median lead, halvings of density"]
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        name = f"{row['rule']} ({row['parameter']:g})"
        groups.setdefault((row["task"], row["role"], name), []).append(row)
    body = []
    for (task, role, rule), group in groups.items():
        shares = [100 * (row["early"] + row["quiet"]) / row["tickets"] for row in group]
        spread = f" ± {statistics.stdev(shares):.0f}" if len(shares) > 1 else ""
        leads = [row["lead"] for row in group if row["lead"] is not None]
        counts = [str(sum(row[key] for row in group)) for key in ("tickets", *KINDS)]
        lead = f"{statistics.median(leads):+.1f}" if leads else "–"
        seeds = f"{len(group)}{' (chosen on)' if role == 'choosing' else ''}"
        body.append([task, seeds, rule, counts[0], f"{statistics.mean(shares):.0f} %{spread}", *counts[1:], lead])
    return [head, *sorted(body, key=lambda line: (list(SEEDS).index(line[0]), "chosen" not in line[1]))]


def sensitivity(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[int]]]:
    """By rule and experiment, how many tickets every parameter would have judged right: none of it was used."""
    tests = [one for one in records if not chosen_on(one)]

    def count(rule: str, task: str, value: float) -> int:
        return sum(right(RULES[rule][0](one, value)) for one in tests if one["task"] == task)

    return {rule: {task: [count(rule, task, v) for v in of] for task in SEEDS} for rule, (_, of) in RULES.items()}


def draw(records: Sequence[Mapping[str, Any]], folder: Path) -> None:
    from matplotlib.figure import Figure

    limit = choose(records, "similarity")
    shown = [next((r for r in records if r["task"] == task and not chosen_on(r)), None) for task in SEEDS]
    own = [one for one in shown if one is not None]
    figure = Figure(figsize=(4.6 * len(own), 6.4), layout="constrained")
    panels: Any = figure.subplots(2, len(own), squeeze=False, sharex="col")
    for column, one in enumerate(own):
        curve, found = Curve.from_json(one["curve"]), by_similarity(one, limit)
        scores = mean_to_others(curve.jaccard())
        given = {alarm.ticket: alarm for alarm in alarms(curve, limit=limit)}
        upper, lower = panels[:, column]
        for k, (ticket, values) in enumerate(performance(one).items()):
            colour = COLOURS[k % len(COLOURS)]
            x = [_halvings(s) for s in sorted(values)]
            upper.plot(x, [values[s] for s in sorted(values)], color=colour, marker=".", label=ticket)
            lower.plot([_halvings(s) for s in curve.sparsity[:, k].tolist()], scores[:, k], color=colour, label=ticket)
            if found[k].fall is not None:
                upper.plot(_halvings(found[k].fall), values[found[k].fall], "v", color=colour, markersize=9)
            if ticket in given:
                at = given[ticket]
                lower.plot(
                    _halvings(at.sparsity), scores[at.round, k], "x", color=colour, markersize=9, markeredgewidth=2
                )
        mean = [_halvings(s) for s in curve.sparsity.mean(1).tolist()]
        for (name, values), style in zip(one["baselines"].items(), (":", "--"), strict=True):
            lower.plot(mean, values, color="#555555", linestyle=style, label=f"{name} masks")
        unit = "PSNR (dB) of each region" if one["metric"] == "psnr" else "balanced accuracy of each ticket"
        upper.set_title(f"{one['task']}, seed {one['seed']}: {unit}; ▾ fallen", fontsize=10)
        lower.set_title("mean similarity to the other tickets; × alarm", fontsize=10)
        lower.set_ylim(-0.02, 1.02)
        lower.legend(fontsize=6, ncols=3)
        for axis in (upper, lower):
            axis.set_xticks([_halvings(s) for s in SHOWN], [f"{100 * s:g} %" for s in SHOWN], fontsize=8)
            axis.grid(alpha=0.3)
        lower.set_xlabel("sparsity (equal steps: equal factors of density)")
    plots.save(figure, folder / "figures" / "curves.png")

    figure = Figure(figsize=(4.2 * len(SEEDS), 4.2), layout="constrained")
    panels = figure.subplots(1, len(SEEDS), squeeze=False)[0]
    for axis, task in zip(panels, SEEDS, strict=True):
        found = [v for r in records if r["task"] == task and not chosen_on(r) for v in by_similarity(r, limit)]
        ends = [_halvings(s) for s in (SHOWN[0], SHOWN[-1])]
        shift = 0.25
        for number, one in enumerate(found):
            wobble = (number % 7 - 3) * 0.03  # tickets fall at few sparsities: side by side
            x = ends[1] + shift if one.fall is None else _halvings(one.fall) + wobble
            y = ends[1] + shift if one.alarm is None else _halvings(one.alarm) + wobble
            axis.plot(x, y, "o" if one.kind in ("early", "quiet") else "x", color=STYLE[one.kind], alpha=0.7)
        axis.plot(ends, ends, color="#555555", linewidth=1)
        axis.fill_between(ends, [e - math.log2(PREMATURE) for e in ends], ends, color="#0072B2", alpha=0.08)
        ticks = [_halvings(s) for s in SHOWN] + [ends[1] + shift]
        labels = [f"{100 * s:g} %" for s in SHOWN] + ["none"]
        axis.set_xticks(ticks, labels, fontsize=7, rotation=60)
        axis.set_yticks(ticks, labels, fontsize=7)
        axis.set_xlim(ends[0] - 0.1, ends[1] + 0.5)
        axis.set_ylim(ends[0] - 0.1, ends[1] + 0.5)
        axis.set_xlabel("performance has fallen at")
        axis.set_ylabel("alarm at")
        seeds = len({r["seed"] for r in records if r["task"] == task and not chosen_on(r)})
        axis.set_title(f"{task}: {len(found)} tickets, {seeds} seed{'s' * (seeds != 1)}; shaded: in time", fontsize=9)
        axis.grid(alpha=0.3)
    plots.save(figure, folder / "figures" / "lead.png")


def aligned(records: Sequence[Mapping[str, Any]], folder: Path) -> list[list[str]]:
    """Sharing against meaning: a table of every seed, and the figure of the first."""
    lines = [
        ["tickets of", "seed", "sparsity", "ρ, all layers", "p", "layers with p < 0.05", "first layer", "last layer"]
    ]
    drawn = False
    for one in records:
        if "layers" not in one:
            continue
        curve = Curve.from_json(one["layers"])
        meaning = semantics.known(curve.names)
        assert meaning is not None
        found = alignment(curve, meaning)
        if not drawn:
            plots.save(plots.semantic_alignment(curve, found), folder / "figures" / "alignment.png")
            drawn = True
        ends = [mean_to_others(curve.jaccard(layer)).mean(1).tolist() for layer in (curve.layers[0], curve.layers[-1])]
        for stage, sparsity in enumerate(found.sparsity):
            p = found.p_value[stage]
            counted = f"{int((p[1:] < 0.05).sum())} of {int((~p[1:].isnan()).sum())}"
            similar = [f"{values[stage]:.3f}" for values in ends]
            rho = f"{float(found.rho[stage, 0]):+.2f}"
            lines.append(
                [one["task"], str(one["seed"]), f"{sparsity:.0%}", rho, f"{float(p[0]):.2g}", counted, *similar]
            )
    return lines if len(lines) > 1 else []


SHOWN = (0.1, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933", "#882255", "#44AA99")
STYLE = {
    "early": "#0072B2",
    "quiet": "#0072B2",
    "premature": "#E69F00",
    "false": "#E69F00",
    "late": "#D55E00",
    "miss": "#D55E00",
}


def _halvings(sparsity: float) -> float:
    return -math.log2(1 - sparsity)


def write(records: Sequence[Mapping[str, Any]], folder: Path, environment: Mapping[str, Any]) -> None:
    rows = analyse(records)
    table = {"recipe": "collapse", "command": COMMAND, "environment": environment, "rows": rows}
    details = {"candidates": {rule: of for rule, (_, of) in RULES.items()}, "right": sensitivity(records)}
    tables = [markdown(one) for one in (lines(rows), aligned(records, folder)) if one]
    write_atomically(folder / "table.md", "\n".join(tables).encode())
    draw(records, folder)
    text = json.dumps(details | {"records": records}, separators=(",", ":"))
    write_atomically(folder / "details.json", (text + "\n").encode())
    write_atomically(folder / "table.json", (json.dumps(table, indent=1) + "\n").encode())
    print("\n".join(tables))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"some of {', '.join(SEEDS)} (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=(), help="run these alone (default: all)")
    parser.add_argument("--data", type=Path, help="data root (default: the environment variable RTL_DATA)")
    parser.add_argument("--runs", type=Path, default=Path("runs/collapse"), help="where experiments are kept")
    parser.add_argument("--workers", type=int, help="processes (default: one a core)")
    parser.add_argument("--results", type=Path, default=Path("results/collapse"), help="gets the new records added")
    parser.add_argument("--redraw", action="store_true", help="run nothing: judge and draw what the results hold")
    options = parser.parse_args(arguments)
    try:
        if unknown := sorted(set(options.tasks) - set(SEEDS)):
            raise InputError(f"TASK is {unknown[0]!r}, expected some of {', '.join(SEEDS)}")
        if options.redraw:
            details, table = (json.loads((options.results / f"{n}.json").read_text()) for n in ("details", "table"))
            write(details["records"], options.results, table["environment"])
        else:
            out = Run(options.runs, workers=options.workers)
            run(options.tasks or list(SEEDS), options.seeds, data_root(options.data), out)
            write(gathered(options.runs, options.results), options.results, environment())
    except InputError as error:
        print(f"collapse: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
