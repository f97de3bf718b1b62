"""Checkpoints of a training that is not finished: what its next epoch needs, as artefacts `STEM-EPOCHS` of its run.

The one before is dropped after the next was saved, and the last when the result was (`discard`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rtl.run import Artefact, Run


def save(
    run: Run,
    stem: str,
    epochs: int,
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    info: Mapping[str, Any],
    generator: torch.Generator | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Save what was reached after `epochs` epochs, `info` and `tensors` beside it, then drop what was saved before.

    With a `generator`, its state and that of torch's global one are kept too.
    """
    kept = {f"own/{name}": t for name, t in (tensors or {}).items()}
    kept |= {f"net/{name}": t for name, t in net.state_dict().items()}
    for parameter, entries in optimizer.state_dict()["state"].items():
        kept |= {f"optimizer/{parameter}/{key}": torch.as_tensor(value) for key, value in entries.items()}
    if generator is not None:
        kept |= {"random/generator": generator.get_state(), "random/global": torch.get_rng_state()}
    run.save(_key(stem, epochs), Artefact(kept, info))
    discard(run, stem, epochs)


def resume(
    run: Run,
    stem: str,
    epochs: int,
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator | None = None,
) -> tuple[int, Artefact]:
    """Continue a training of `epochs` epochs from its newest checkpoint.

    Returns how many epochs are behind, and the `tensors` and `info` saved then; 0 and nothing without a checkpoint.
    """
    found = [number for number in range(epochs) if run.done(_key(stem, number))]
    if not found:
        return 0, Artefact()
    saved = run.load(_key(stem, found[-1]))

    def under(prefix: str) -> dict[str, Tensor]:
        return {name[len(prefix) :]: t for name, t in saved.tensors.items() if name.startswith(prefix)}

    net.load_state_dict(under("net/"))
    entries: dict[int, dict[str, Tensor]] = {}
    for name, tensor in under("optimizer/").items():
        parameter, key = name.split("/")
        entries.setdefault(int(parameter), {})[key] = tensor
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
    if generator is not None:
        generator.set_state(saved.tensors["random/generator"])
        torch.set_rng_state(saved.tensors["random/global"])
    return found[-1], Artefact(under("own/"), saved.info)


def discard(run: Run, stem: str, epochs: int) -> None:
    """Drop checkpoints of fewer than `epochs` epochs."""
    for number in range(epochs):
        run.discard(_key(stem, number))


def _key(stem: str, epochs: int) -> str:
    return f"{stem}-{epochs:04d}"
