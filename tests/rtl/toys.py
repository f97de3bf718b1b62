"""Small data, models and networks that the tests of the method share."""

import torch
from torch import nn

import rtl
from rtl.data import Data
from rtl.fit import masked_copy
from rtl.progress import Progress
from rtl.run import Run
from rtl.tickets import TicketNetwork


def quiet(path, seed=0, workers=1):
    return Run(path, seed=seed, workers=workers, progress=Progress(quiet=True))


def blobs(sizes=(40, 40, 40), features=6, seed=0):
    """Gaussian classes (N, features), named a, b, c, ..."""
    return _classes(sizes, (features,), seed)


def images(sizes=(24, 24, 24), seed=0):
    """Classes of images (N, 1, 8, 8)."""
    return _classes(sizes, (1, 8, 8), seed)


def _classes(sizes, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(len(sizes), *shape, generator=generator)
    labels = torch.cat([torch.full((n,), k) for k, n in enumerate(sizes)])
    labels = labels[torch.randperm(len(labels), generator=generator)]
    inputs = centres[labels] + torch.randn(len(labels), *shape, generator=generator)
    return Data(inputs, labels, tuple("abcdefghij"[: len(sizes)]))


def seeded(make, *arguments, seed=0):
    """A model of weights that follow from `seed`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make(*arguments)


def mlp(classes=3, features=6):
    """72 prunable weights for three classes."""
    return seeded(rtl.models.mlp, features, [8], classes)


class Wide(nn.Module):
    """A model that computes in float64, on float32 data."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner.double()

    def forward(self, x):
        return self.inner(x.double())


class TinyConv(nn.Module):
    """36 + 144 prunable weights, two batch norms and a dense head."""

    def __init__(self, classes=3):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        )
        self.classifier = nn.Linear(4, classes)

    def forward(self, x):
        return self.classifier(self.features(x).relu().mean((2, 3)))

    def prunable(self, name, module):
        return isinstance(module, nn.Conv2d)


def identity_network(names="abc", outputs=None, task="one_vs_rest", classes=None, masks=None):
    """Tickets whose logits are their inputs (N, classes); `masks` (K, classes, classes) may cut some."""
    classes = len(names) if classes is None else classes
    model = nn.Linear(classes, classes, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(classes))
    net = masked_copy(model, len(names), "shared")
    if masks is not None:
        net.banks = {layer: rtl.tickets.rk.MaskBank.from_dense(masks) for layer in net.banks}
    return TicketNetwork(net, tuple(names), outputs or range(len(names)), task, 0.0)


def dense_masks(banks, ticket):
    """A ticket's masks by layer, bool."""
    return {layer: bank.dense(ticket) for layer, bank in banks.items()}


def flat_masks(masks):
    """All masks of `TicketMasks` as bool (K, prunable)."""
    return torch.cat([bank.to_dense().flatten(1) for bank in masks.banks.values()], 1)


def tree(folder):
    """Every file's bytes, by path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
