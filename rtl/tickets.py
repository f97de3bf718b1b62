"""Tickets as data (masks at a sparsity, from one θ0) and as a network one calls by ticket name."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, SupportsIndex

import safetensors.torch
import torch
from torch import Tensor, nn

import rtl_kernels as rk
from rtl.collapse import Alarm
from rtl.curve import Curve
from rtl.errors import InputError
from rtl.fit import masked_copy
from rtl.run import write_atomically

Ticket = str | SupportsIndex  # a name or a number, also numpy's or torch's


@dataclass(frozen=True, eq=False)
class TicketMasks:
    """The masks of K tickets at one sparsity.

    Attributes:
        names: K names.
        sparsity: fraction of prunable weights removed from each ticket.
        banks: for every prunable layer, by its name in the model, a bank of K masks.
    """

    names: tuple[str, ...]
    sparsity: float
    banks: Mapping[str, rk.MaskBank]

    @property
    def params(self) -> int:
        """#Params: the size of the union of the K masks, which is what has to be stored."""
        return sum(int(bank.union().counts()) for bank in self.banks.values())

    def only(self, *names: str) -> TicketMasks:
        """The named tickets alone, in that order. Raises InputError for an unknown one."""
        chosen = [position(self.names, name) for name in names]
        return TicketMasks(
            tuple(names), self.sparsity, {layer: bank.select(chosen) for layer, bank in self.banks.items()}
        )


@dataclass(frozen=True, eq=False)
class Tickets:
    """What extraction gives: nested masks at every reported sparsity.

    Attributes:
        names: K names.
        levels: by sparsity, ascending.
        prunable: prunable weights of the model.
        samples: training samples presented up to each sparsity, all tickets together.
        seconds: time taken up to each sparsity, summed over tickets (wall seconds of the process that ran each).
        curve: what the tickets share after every round; None if their rounds are not known.
        stages: by reported sparsity, what they would share had they been pruned after each epoch of its round.
        stopped: alarms of the tickets that `PrunePlan.stop_on_collapse` stopped, by name. Where a level is sparser than
            their last good masks, it holds those.
    """

    names: tuple[str, ...]
    levels: Mapping[float, TicketMasks]
    prunable: int
    samples: Mapping[float, int]
    seconds: Mapping[float, float]
    curve: Curve | None = None
    stages: Mapping[float, Curve] = field(default_factory=dict)
    stopped: Mapping[str, Alarm] = field(default_factory=dict)

    def at(self, sparsity: float) -> TicketMasks:
        """The tickets at a reported sparsity. Raises InputError, naming those there are, for another."""
        if sparsity not in self.levels:
            raise InputError(f"sparsity is {sparsity}, but the tickets were kept at {', '.join(map(str, self.levels))}")
        return self.levels[sparsity]


_DESCRIBED = {"names", "outputs", "task", "sparsity", "samples", "seconds", "batch_norm", "model"}  # in tickets.json


class TicketNetwork(nn.Module):
    """K tickets over one set of weights: `net(x, ticket="cat")`, `net(x, ticket=["cat", "dog", ...])`.

    Made by `retrain` or `from_pretrained`.

    Attributes:
        net: the routed model (rtl_kernels) with its masks.
        names: K names; ticket k is mask k.
        outputs: for each ticket, its position in the partition it learnt from (its logit, for one-vs-rest).
        task: name of what the tickets learnt.
        sparsity: of each ticket.
        samples, seconds: training samples presented in retraining, and the wall seconds it took.
    """

    def __init__(
        self,
        net: rk.nn.RoutedModel,
        names: Sequence[str],
        outputs: Sequence[int],
        task: str,
        sparsity: float,
        samples: int = 0,
        seconds: float = 0.0,
    ) -> None:
        super().__init__()
        self.training = net.training
        self.net = net
        self.names = tuple(names)
        self.outputs = tuple(outputs)
        self.task = task
        self.sparsity = sparsity
        self.samples = samples
        self.seconds = seconds

    def forward(self, x: Tensor, ticket: Ticket | Sequence[Ticket] | Tensor) -> Any:
        """The model's output for each sample through the ticket named for it.

        Args:
            x: (B, ...).
            ticket: a name or number for all samples, or B of them. A tensor of B numbers may hold -1: no mask.

        Raises:
            InputError: an unknown ticket, or a number of tickets other than B.
            IndexError, TypeError: a tensor holds what is no number of a ticket.
        """
        if isinstance(ticket, Tensor) and ticket.dim() > 0:
            index = ticket
        elif isinstance(ticket, Iterable) and not isinstance(ticket, str | Tensor):
            index = torch.tensor([self.position(t) for t in ticket], dtype=torch.int64, device=x.device)
        else:
            index = torch.full((len(x),), self.position(ticket), device=x.device)
        if len(index) != len(x):
            raise InputError(f"ticket names {len(index)} tickets, but x holds {len(x)} samples")
        return self.net(x, index)

    def every(self, x: Tensor) -> Any:
        """Every sample through every ticket in one pass: (K, B, ...)."""
        return self.net(x, rk.Route.every(len(self.names), len(x), device=x.device))

    def export(self, ticket: Ticket) -> nn.Module:
        """One ticket as a plain dense module, its weights the ticket's bit for bit."""
        return rk.nn.extract(self.net, self.position(ticket))

    @property
    def params(self) -> int:
        """#Params: the union of the masks."""
        return sum(int(bank.union().counts()) for bank in self.net.banks.values())

    @property
    def batch_norm_params(self) -> int:
        """Scales, shifts and running statistics of batch norm, all tickets together."""
        norms = (m for m in self.net.modules() if isinstance(m, nn.BatchNorm2d))
        tensors = ((m.weight, m.bias, m.running_mean, m.running_var) for m in norms)
        return sum(t.numel() for group in tensors for t in group if t is not None)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the network to `folder`: tickets.safetensors (weights, bits, statistics) and tickets.json, last."""
        folder = Path(folder)
        state = {name: t.detach().cpu().contiguous().clone() for name, t in self.net.model.state_dict().items()}
        description = {
            "names": self.names,
            "outputs": self.outputs,
            "task": self.task,
            "sparsity": self.sparsity,
            "samples": self.samples,
            "seconds": self.seconds,
            "batch_norm": _batch_norm(self.net),
            "model": getattr(self.net.model, "recipe", None),
        }
        (folder / "tickets.json").unlink(missing_ok=True)  # an older network's names never stand beside these weights
        write_atomically(folder / "tickets.safetensors", safetensors.torch.save(state))
        write_atomically(folder / "tickets.json", (json.dumps(description, indent=2) + "\n").encode())

    @classmethod
    def from_pretrained(cls, folder: str | Path, model: nn.Module | None = None) -> TicketNetwork:
        """Read what `save_pretrained` wrote.

        Args:
            folder: where it is.
            model: a dense model of the same architecture; only needed if it is not one of `rtl.models`.

        Raises:
            InputError: the folder holds no such network, or the model is not known or does not fit.
        """
        folder = Path(folder)
        try:
            description = json.loads((folder / "tickets.json").read_text())
            state = safetensors.torch.load_file(folder / "tickets.safetensors")
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise InputError(f"folder is {str(folder)!r}, which holds no saved tickets: {error}") from error
        missing = sorted(_DESCRIBED - set(description)) if isinstance(description, dict) else ["an object"]
        if missing:
            raise InputError(f"{folder / 'tickets.json'} is damaged, it lacks {', '.join(missing)}: get it again")
        if model is None:
            model = _known_model(description["model"])
        affine = description["batch_norm"] == "affine_per_ticket"
        batch_norm = "per_ticket" if affine else description["batch_norm"]
        net = masked_copy(model, len(description["names"]), batch_norm, affine)
        lost = sorted(f"{layer}.mask_words" for layer in net.masked_modules() if f"{layer}.mask_words" not in state)
        if lost:  # they would load as all ones
            raise InputError(
                f"model is a {type(model).__name__} with {lost[0]}, which {folder / 'tickets.safetensors'} lacks: pass "
                "the model the tickets were saved from, or get the file again"
            )
        try:
            net.model.load_state_dict(state)
        except RuntimeError as error:
            raise InputError(
                f"model is a {type(model).__name__}, which the saved tickets do not fit: {' '.join(str(error).split())}"
            ) from error
        net.eval()
        fields = (description[key] for key in ("names", "outputs", "task", "sparsity", "samples", "seconds"))
        return cls(net, *fields)

    def position(self, ticket: Ticket) -> int:
        """The number of a ticket, 0..K-1, by its name or number. Raises InputError for one that is not there."""
        if isinstance(ticket, str):
            return position(self.names, ticket)
        try:
            number = operator.index(ticket)  # a fraction has none
        except TypeError as error:
            raise InputError(f"ticket is {ticket!r}, expected a name or a number") from error
        if not 0 <= number < len(self.names):
            raise InputError(f"ticket is {number}, but there are {len(self.names)} (0..{len(self.names) - 1})")
        return number


def saved_levels(run: str | Path) -> dict[float, Path]:
    """The folders of tickets that a run left, by sparsity, ascending: `tickets/SPARSITY`, whatever else lies there."""
    found = {}
    for file in Path(run).glob("tickets/*/tickets.json"):
        try:
            found[float(file.parent.name)] = file.parent
        except ValueError:
            continue  # not named by a sparsity: somebody else's
    return dict(sorted(found.items()))


def position(names: Sequence[str], name: str) -> int:
    """Where `name` stands. Raises InputError, naming those there are, for an unknown one."""
    if name not in names:
        raise InputError(f"ticket is {name!r}, expected one of {', '.join(names)}")
    return list(names).index(name)


def _batch_norm(net: rk.nn.RoutedModel) -> str:
    for module in net.modules():
        if isinstance(module, rk.nn.SubsetBatchNorm2d) and module.per_ticket:
            return "affine_per_ticket" if module.affine_per_ticket else "per_ticket"
    return "shared"


def _known_model(recipe: Mapping[str, Any] | None) -> nn.Module:
    import rtl.models

    if recipe is None:
        raise InputError("model is not given, but the saved tickets are of a model of your own: pass model=")
    if recipe["name"] not in rtl.models.__all__:
        raise InputError(
            f"model is {recipe['name']!r} in the saved tickets, which rtl.models does not have: pass model="
        )
    model: nn.Module = getattr(rtl.models, recipe["name"])(**recipe["arguments"])
    return model
