"""What a ticket learns: which samples one epoch draws for it, their targets, and the loss.

A task is stateless. `draw` gives the sample positions of one epoch, `target` what they should give, `losses` one loss a
sample from the model's output; `ticket` is always a position in the partition. A task without classes also says how
its outputs are judged (`Measured`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from rtl.errors import InputError
from rtl.partition import Partition


class Task(Protocol):
    """What extraction, retraining and evaluation ask of a task."""

    @property
    def name(self) -> str: ...

    def draw(self, parts: Partition, ticket: int, generator: torch.Generator) -> Tensor:
        """Positions in `parts.data` of one epoch's samples, int64 (n,), in the order they are presented."""

    def target(self, parts: Partition, ticket: int, index: Tensor) -> Tensor:
        """Targets (n, ...) of the samples at `index` for one ticket."""

    def losses(self, output: Tensor, target: Tensor, ticket: Tensor) -> Tensor:
        """One loss for each row, float (n,). `output` is the model's (n, ...), `ticket` int64 (n,)."""


@runtime_checkable
class Measured(Task, Protocol):
    """A task whose samples are each judged by one number."""

    @property
    def metric(self) -> str:
        """The name of the figure among `rtl.evaluate`'s metrics, such as "psnr"."""

    def measure(self, output: Tensor, target: Tensor) -> Tensor:
        """One number for each row, float (n,). `summary` turns its mean over any set of samples into the figure."""

    def summary(self, mean: float) -> float: ...


@dataclass(frozen=True)
class OneVsRest:
    """Ticket k tells its subset from the rest: logit k of the model, binary cross-entropy, as many negatives as
    positives, drawn afresh every epoch from the other subsets (all of them, where there are fewer).
    """

    name = "one_vs_rest"

    def draw(self, parts: Partition, ticket: int, generator: torch.Generator) -> Tensor:
        positives = parts[ticket]
        others = ((parts.index >= 0) & (parts.index != ticket)).nonzero().flatten()
        if len(others) == 0:
            raise InputError(
                f"parts has no samples outside {parts.names[ticket]!r}: one-vs-rest needs two subsets or more, "
                "use rtl.tasks.MultiClass() for one"
            )
        negatives = others[torch.randperm(len(others), generator=generator)[: len(positives)]]
        both = torch.cat([positives, negatives])
        return both[torch.randperm(len(both), generator=generator)]

    def target(self, parts: Partition, ticket: int, index: Tensor) -> Tensor:
        return (parts.index[index] == ticket).float()

    def losses(self, output: Tensor, target: Tensor, ticket: Tensor) -> Tensor:
        _check_logits(output, int(ticket.max()), "ticket")
        logit = output.gather(1, ticket[:, None]).squeeze(1)
        return F.binary_cross_entropy_with_logits(logit, target, reduction="none")


@dataclass(frozen=True)
class MultiClass:
    """Cross-entropy on the data's own labels, over the samples of the ticket's subset."""

    name = "multi_class"

    def draw(self, parts: Partition, ticket: int, generator: torch.Generator) -> Tensor:
        if parts.data.targets.dtype != torch.int64:
            raise InputError(
                f"targets are {parts.data.targets.dtype}, expected labels (int64), or rtl.tasks.Regression()"
            )
        return _shuffled(parts[ticket], generator)

    def target(self, parts: Partition, ticket: int, index: Tensor) -> Tensor:
        return parts.data.targets[index]

    def losses(self, output: Tensor, target: Tensor, ticket: Tensor) -> Tensor:
        _check_logits(output, int(target.max()), "label")
        return F.cross_entropy(output, target, reduction="none")


@dataclass(frozen=True)
class Regression:
    """Squared error on the data's float targets, over the ticket's subset; a sample's loss is its mean."""

    name = "regression"
    metric = "mse"

    def draw(self, parts: Partition, ticket: int, generator: torch.Generator) -> Tensor:
        return _shuffled(parts[ticket], generator)

    def target(self, parts: Partition, ticket: int, index: Tensor) -> Tensor:
        return parts.data.targets[index]

    def losses(self, output: Tensor, target: Tensor, ticket: Tensor) -> Tensor:
        return _squared_errors(output, target)

    def measure(self, output: Tensor, target: Tensor) -> Tensor:
        return _squared_errors(output, target)

    def summary(self, mean: float) -> float:
        return mean


@dataclass(frozen=True)
class Pixels:
    """Colours, with 1 for white, at the pixels of the ticket's region: squared error, judged by PSNR in dB.

    Args:
        samples: pixels an epoch presents, so that regions of any size take equally many steps: all of the region in
            random order, again and again. None: each pixel once.
        by_area: `samples` are of all regions together, each its share of the area.

    Raises:
        InputError: samples below 1, or none given to share by area.
    """

    samples: int | None = None
    by_area: bool = False
    name = "pixels"
    metric = "psnr"

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 1:
            raise InputError(f"samples is {self.samples}, expected 1 or more, or None")
        if self.by_area and self.samples is None:
            raise InputError("by_area is True with samples None, expected a number of pixels to share")

    def draw(self, parts: Partition, ticket: int, generator: torch.Generator) -> Tensor:
        region = parts[ticket]
        samples = len(region) if self.samples is None else self.samples
        if self.by_area:  # rounded so that the shares of all regions add up
            before, total = int((parts.index < ticket).sum()), len(parts.data)
            samples = round(samples * (before + len(region)) / total) - round(samples * before / total)
        passes = -(-samples // max(len(region), 1))
        return torch.cat([region[:0], *(_shuffled(region, generator) for _ in range(passes))])[:samples]

    def target(self, parts: Partition, ticket: int, index: Tensor) -> Tensor:
        return parts.data.targets[index]

    def losses(self, output: Tensor, target: Tensor, ticket: Tensor) -> Tensor:
        return _squared_errors(output, target)

    def measure(self, output: Tensor, target: Tensor) -> Tensor:
        """Of what is shown: colours outside [0, 1] are cut off."""
        return _squared_errors(output.clamp(0, 1), target)

    def summary(self, mean: float) -> float:
        return psnr(mean)


@dataclass(frozen=True)
class Enhancement:
    """Clean speech from noisy: weighted SDR loss, judged by the improvement of SI-SNR over the mixture's, in dB.

    Data holds mixtures as inputs, clean speech as targets, float32 (N, samples), not normalised. A target is both:
    (n, 2, samples), clean speech and mixture.
    """

    name = "enhancement"
    metric = "si_snri"

    def draw(self, parts: Partition, ticket: int, generator: torch.Generator) -> Tensor:
        return _shuffled(parts[ticket], generator)

    def target(self, parts: Partition, ticket: int, index: Tensor) -> Tensor:
        return torch.stack([parts.data.targets[index], parts.data.inputs[index]], 1)

    def losses(self, output: Tensor, target: Tensor, ticket: Tensor) -> Tensor:
        return weighted_sdr_losses(output, target[:, 0], target[:, 1])

    def measure(self, output: Tensor, target: Tensor) -> Tensor:
        try:
            from torchmetrics.functional.audio import scale_invariant_signal_noise_ratio as si_snr
        except ImportError as error:
            raise InputError(f"SI-SNR needs torchmetrics ({error}): pip install 'rtl-kernels[speech]'") from error
        clean, mixture = target[:, 0].double(), target[:, 1].double()
        return si_snr(output.double(), clean) - si_snr(mixture, clean)

    def summary(self, mean: float) -> float:
        return mean


def weighted_sdr_losses(output: Tensor, clean: Tensor, mixture: Tensor) -> Tensor:
    """−α·cos(clean, output) − (1 − α)·cos(noise, mixture − output), α the clean speech's share of the energy.

    Args: all (n, samples); gives (n,), in [−1, 1]. Source: H.-S. Choi et al., arXiv 1903.03107, equation 8.
    """
    noise = mixture - clean
    energies = clean.square().sum(1), noise.square().sum(1)
    share = energies[0] / (energies[0] + energies[1]).clamp(min=1e-12)
    speech = F.cosine_similarity(clean, output, dim=1)
    rest = F.cosine_similarity(noise, mixture - output, dim=1)
    return -share * speech - (1 - share) * rest


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error, the peak being 1; a perfect picture has 100 dB."""
    return -10 * math.log10(max(mse, 1e-10))


TASKS: dict[str, Task] = {
    task.name: task for task in (OneVsRest(), MultiClass(), Regression(), Pixels(), Enhancement())
}


def _check_logits(output: Tensor, largest: int, of: str) -> None:
    if output.dim() != 2 or output.shape[1] <= largest:
        raise InputError(
            f"the model gives outputs of shape {tuple(output.shape)}, but there is a {of} {largest}: expected a logit "
            f"for each {of}, (batch, {largest + 1}) or more"
        )


def _squared_errors(output: Tensor, target: Tensor) -> Tensor:
    if output.shape != target.shape:
        raise InputError(f"targets have shape {tuple(target.shape)}, but the model gives {tuple(output.shape)}")
    return (output - target).square().flatten(1).mean(1)


def _shuffled(index: Tensor, generator: torch.Generator) -> Tensor:
    return index[torch.randperm(len(index), generator=generator)]
