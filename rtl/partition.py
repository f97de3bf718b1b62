"""Partitions of data into named subsets, one for each ticket: by label, by metadata, by clustering, by region, or by
the text of class names.

The method does not care how subsets were found (arXiv 2601.22141, section 3). A partition keeps the rule that made it,
so that new data, a test set for one, is assigned to the same subsets.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rtl.data.base import Data, listed
from rtl.errors import InputError
from rtl.text import Encoder, embed, umap

Rule = Callable[[Data], Tensor]
Features = Callable[[Data], "Tensor | np.ndarray"]


@dataclass(frozen=True, eq=False)
class Partition:
    """K named subsets of data.

    Args:
        data: N samples.
        names: of the K subsets, unique and not empty.
        index: (N,) int64, the position in `names` of each sample's subset, -1 for a sample in none.
        rule: gives the `index` of new data.

    Raises:
        InputError: an argument that does not fit the above.
    """

    data: Data
    names: tuple[str, ...]
    index: Tensor
    rule: Rule

    def __post_init__(self) -> None:
        if not self.names or "" in self.names or len(set(self.names)) < len(self.names):
            raise InputError(f"names is {self.names}, but every subset needs a name of its own")
        if self.index.dtype != torch.int64 or self.index.shape != (len(self.data),):
            raise InputError(
                f"index is {self.index.dtype} of shape {tuple(self.index.shape)}, but int64 of shape "
                f"({len(self.data)},) is needed, one entry for each sample"
            )
        outside = self.index[(self.index < -1) | (self.index >= len(self))]
        if len(outside):
            raise InputError(f"index holds {int(outside[0])}, but there are {len(self)} subsets (-1..{len(self) - 1})")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, name: str | int) -> Tensor:
        """Positions of a subset's samples, ascending, (M,) int64. By number, one past the last raises IndexError."""
        if isinstance(name, str):
            name = self.position(name)
        if not 0 <= name < len(self):
            raise IndexError(f"subset {name}, but there are {len(self)} (0..{len(self) - 1})")
        return torch.nonzero(self.index == name).flatten()

    def position(self, name: str) -> int:
        """The number of a subset, 0..K-1. An unknown name raises InputError with the names there are."""
        if name not in self.names:
            raise InputError(f"name is {name!r}, but the subsets are {', '.join(self.names)}")
        return self.names.index(name)

    def counts(self) -> dict[str, int]:
        """Samples in each subset."""
        sizes = torch.bincount(self.index + 1, minlength=len(self) + 1)[1:]
        return dict(zip(self.names, sizes.tolist(), strict=True))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything training sees: samples, targets, normalisation, and who is in which subset."""
        data = self.data
        sha = hashlib.sha256(repr((self.names, data.name, data.class_names, data.mean, data.std)).encode())
        for tensor in (self.index, data.targets, data.inputs):
            sha.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
            sha.update(tensor.cpu().contiguous().numpy().data)
        return sha.hexdigest()

    def apply(self, data: Data) -> "Partition":
        """The same subsets of other data, found by the same rule. A subset may be empty there."""
        return Partition(data, self.names, self.rule(data), self.rule)


@dataclass(frozen=True)
class LabelRule:
    """The subset of each label: `subset[label]`, -1 for none."""

    subset: tuple[int, ...]
    class_names: tuple[str, ...]

    def __call__(self, data: Data) -> Tensor:
        if data.targets.dtype != torch.int64:
            raise InputError(f"data {data.name!r} has {data.targets.dtype} targets, but labels (int64) are needed")
        if data.class_names != self.class_names:
            raise InputError(
                f"data {data.name!r} has the classes {data.class_names}, but the partition was made of those of "
                f"{self.class_names}: give data with the same classes"
            )
        table = torch.tensor([*self.subset, -1], dtype=torch.int64)
        return table[data.targets.cpu().clamp(max=len(self.subset))]


@dataclass(frozen=True)
class MetadataRule:
    """The subset whose value a sample's metadata holds, -1 for another value."""

    key: str
    values: tuple[Any, ...]

    def __call__(self, data: Data) -> Tensor:
        subset = {value: k for k, value in enumerate(self.values)}
        return torch.tensor([subset.get(value, -1) for value in _column(data, self.key)], dtype=torch.int64)


@dataclass(frozen=True, eq=False)
class ClusterRule:
    """The subset whose centroid is the nearest in feature space.

    `centroids` is (K, D) float64. `features` None: inputs flattened. A `Tensor` or array given at construction
    belongs to that data alone, hence `fixed`: new data is refused.
    """

    centroids: Tensor
    features: Features | None = None
    fixed: bool = False

    def __call__(self, data: Data) -> Tensor:
        if self.fixed:
            raise InputError(
                "features was an array, which says nothing of new data: give by_cluster a function from data to it"
            )
        return nearest(features_of(data, self.features), self.centroids)


@dataclass(frozen=True)
class WholeRule:
    """Every sample in the one subset there is."""

    def __call__(self, data: Data) -> Tensor:
        return torch.zeros(len(data), dtype=torch.int64)


def whole(data: Data) -> Partition:
    """All data in one subset, "all": what a single model learns from. Raises InputError if there are no samples."""
    return _filled(data, ("all",), WholeRule(), "data")


def by_label(data: Data, groups: Mapping[str, Sequence[str | int]] | None = None) -> Partition:
    """One subset a class, or one a group of classes.

    Args:
        data: has labels as targets.
        groups: for each subset the classes in it, by name or label. None: every class is a subset, under its own
            name. Samples of classes in no group are in no subset.

    Raises:
        InputError: targets that are no labels; a class that is unknown or in two groups; a name that several classes
            have; a subset without samples.
    """
    if data.targets.dtype != torch.int64:
        raise InputError(f"data {data.name!r} has {data.targets.dtype} targets, but labels (int64) are needed")
    classes = data.class_names or tuple(str(label) for label in range(int(data.targets.max()) + 1 if len(data) else 0))
    if groups is None:
        twice = next((name for label, name in enumerate(classes) if name in classes[:label]), None)
        if twice is not None:
            raise InputError(f"data {data.name!r} calls several classes {twice!r}: give groups, with labels in them")
        groups = {name: (label,) for label, name in enumerate(classes)}
    subset = [-1] * len(classes)
    names = tuple(groups)
    for k, (name, members) in enumerate(groups.items()):
        for member in members:
            label = _label(member, classes, name)
            if subset[label] not in (-1, k):
                raise InputError(
                    f"groups has the class {classes[label]!r} in {names[subset[label]]!r} and in {name!r}: leave one"
                )
            subset[label] = k
    return _filled(data, names, LabelRule(tuple(subset), data.class_names), "groups")


def by_metadata(data: Data, key: str) -> Partition:
    """One subset for each distinct value of `data.metadata[key]`, sorted, named by `str(value)`.

    Samples whose value is None, NaN or "" are in no subset, nor are samples of new data with an unknown value.

    Raises:
        InputError: no such key, no value at all, or values that cannot be sorted.
    """
    column = _column(data, key)
    try:
        missing = (None, "")
        ordered = tuple(sorted({value for value in column if value not in missing and value == value}))  # NaN is not
    except TypeError as error:
        raise InputError(f"metadata[{key!r}] holds values that cannot be sorted ({error}): give one type") from None
    return _filled(data, tuple(str(value) for value in ordered), MetadataRule(key, ordered), f"metadata[{key!r}]")


def by_cluster(
    data: Data,
    num_clusters: int | None = None,
    method: Literal["kmeans", "hdbscan"] = "kmeans",
    features: "Features | Tensor | np.ndarray | None" = None,
    seed: int = 0,
    min_cluster_size: int = 5,
) -> Partition:
    """Subsets found by clustering, "cluster-0" on; new data goes to the nearest centroid (Euclidean).

    Args:
        data: N samples.
        num_clusters: K for k-means. HDBSCAN finds its own, so leave None there.
        method: "kmeans", or "hdbscan", whose noise points go to the nearest centroid (the mean of a cluster).
        features: (N, D) array or tensor, or a function from data to that, or None for the normalised inputs
            flattened. Clustering is in float64. Only a function or None can assign new data.
        seed: of k-means.
        min_cluster_size: samples in HDBSCAN's smallest cluster.

    Raises:
        InputError: arguments that do not fit the above, features that are not finite, or no cluster found.
    """
    if method not in ("kmeans", "hdbscan"):
        raise InputError(f"method is {method!r}, but 'kmeans' or 'hdbscan' is needed")
    points = features_of(data, features)
    if method == "kmeans":
        if num_clusters is None or not 1 <= num_clusters <= len(data):
            raise InputError(f"num_clusters is {num_clusters}, but k-means needs 1..{len(data)}, at most one a sample")
        from sklearn.cluster import KMeans

        found = KMeans(num_clusters, n_init=10, random_state=seed).fit(points.numpy())
        centroids = torch.from_numpy(found.cluster_centers_)
        index = nearest(points, centroids)
    else:
        if num_clusters is not None:
            raise InputError(f"num_clusters is {num_clusters}, but HDBSCAN finds it: leave it out, or take 'kmeans'")
        index, centroids = _hdbscan(points, min_cluster_size)
    given = features if callable(features) else None
    rule = ClusterRule(centroids, given, fixed=features is not None and given is None)
    names = tuple(f"cluster-{k}" for k in range(len(centroids)))
    return _not_empty(Partition(data, names, index, rule), "num_clusters")


def by_text(
    data: Data,
    *,
    encoder: "str | Encoder" = "wordllama",
    dimensions: int | None = 5,
    neighbors: int = 5,
    min_cluster_size: int = 4,
    seed: int = 0,
    show: Callable[[str], None] = print,
) -> Partition:
    """One subset for each cluster of classes whose names are alike: embedded, reduced by UMAP, clustered by HDBSCAN.

    Classes that HDBSCAN calls noise go to the nearest cluster (its mean). A subset is named after the class in the
    middle of it.

    Args:
        data: has labels as targets, and class names; underscores in them are read as spaces.
        encoder: "wordllama" (a language model's tokens; the extra `text`), "wordnet" (nouns; needs WordNet's files, see
            `rtl.semantics.wordnet`), "ngrams" (spelling alone), or a function from texts to (N, D). WordLlama splits
            rarer nouns into pieces that mean little: for names such as CIFAR-100's take WordNet's.
        dimensions: UMAP's (the extra `text`); None: cluster the embeddings themselves.
        neighbors: that UMAP keeps together, 2 or more.
        min_cluster_size: classes in the smallest cluster, 2 or more.
        seed: of UMAP.
        show: receives the composition, one line a cluster.

    Raises:
        InputError: arguments that do not fit the above, no cluster found, or a package that is missing.

    Source: arXiv 2601.22141, experiment 2, which embeds the names with CLIP.
    """
    names = data.class_names
    if len(names) < 4:
        raise InputError(f"data {data.name!r} has {len(names)} class names, but clustering them needs 4 or more")
    if dimensions is not None and not 1 <= dimensions <= len(names) - 2:
        raise InputError(f"dimensions is {dimensions}, but 1..{len(names) - 2} is needed, or None")
    if not 2 <= neighbors < len(names):
        raise InputError(f"neighbors is {neighbors}, but 2..{len(names) - 1} is needed")
    vectors = embed([name.replace("_", " ") for name in names], encoder)
    points = torch.from_numpy(vectors if dimensions is None else umap(vectors, dimensions, neighbors, seed))
    index, centroids = _hdbscan(points, min_cluster_size)
    groups: dict[str, list[int]] = {}  # labels: several classes may have one name
    for k in range(len(centroids)):
        members = (index == k).nonzero().flatten().tolist()
        middle = members[int((points[members] - centroids[k]).norm(dim=1).argmin())]
        groups[f"{names[middle]} and {len(members) - 1} more"] = members
    partition = by_label(data, groups)
    for name, count in partition.counts().items():
        show(f"{name} ({count:,} samples): {', '.join(names[label] for label in groups[name])}")
    return partition


def _hdbscan(points: Tensor, min_cluster_size: int) -> tuple[Tensor, Tensor]:
    """(index (N,), centroids (K, D)) of points (N, D); noise goes to the nearest centroid, the mean of a cluster."""
    if not 2 <= min_cluster_size <= len(points):
        raise InputError(f"min_cluster_size is {min_cluster_size}, but 2..{len(points)} is needed")
    from sklearn.cluster import HDBSCAN

    found = HDBSCAN(min_cluster_size=min_cluster_size, copy=True).fit(points.numpy())
    index = torch.from_numpy(found.labels_).to(torch.int64)
    if int(index.max()) < 0:
        raise InputError(f"min_cluster_size is {min_cluster_size}, but HDBSCAN finds no cluster then: lower it")
    centroids = torch.stack([points[index == k].mean(dim=0) for k in range(int(index.max()) + 1)])
    return torch.where(index < 0, nearest(points, centroids), index), centroids


def by_region(data: Data, num_regions: int = 6, seed: int = 0, position: float = 0.5) -> Partition:
    """Regions of an image, found by k-means on colour and position: "region-0" on, the largest first.

    Args:
        data: pixels, as `rtl.data.picture` gives them: inputs (N, 2) coordinates in [-1, 1], targets (N, 3) colours in
            [0, 1]. Centres are found on 10,000 pixels where there are more; every pixel goes to the nearest.
        num_regions: K.
        seed: of k-means.
        position: weight of a distance in coordinates against an equal one in colour.

    Raises:
        InputError: data that are no pixels, or fewer different ones than regions.
    """
    if data.inputs.dim() != 2 or data.inputs.shape[1] != 2 or data.targets.shape != (len(data), 3):
        shapes = f"inputs {tuple(data.inputs.shape)} and targets {tuple(data.targets.shape)}"
        raise InputError(f"data {data.name!r} has {shapes}, but pixels, (N, 2) and (N, 3), are needed")
    features = PixelFeatures(position)
    points = features_of(data, features)
    different = len(torch.unique(points, dim=0))
    if not 1 <= num_regions <= different:
        raise InputError(f"num_regions is {num_regions}, but there are {different} different pixels: give 1 to that")
    from sklearn.cluster import KMeans

    some = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))[:10_000]
    found = KMeans(num_regions, n_init=3, random_state=seed).fit(points[some].numpy())
    centroids = torch.from_numpy(found.cluster_centers_)
    sizes = torch.bincount(nearest(points, centroids), minlength=num_regions)
    centroids = centroids[sizes.argsort(descending=True, stable=True)]
    names = tuple(f"region-{k}" for k in range(num_regions))
    return _filled(data, names, ClusterRule(centroids, features), "num_regions")


@dataclass(frozen=True)
class PixelFeatures:
    """(N, 5): colour, and coordinates times a weight."""

    position: float

    def __call__(self, data: Data) -> Tensor:
        return torch.cat([data.targets, self.position * data.inputs], 1)


def nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """For each of `points` (N, D) the number of the nearest of `centroids` (K, D), both float64: (N,) int64."""
    if points.shape[1] != centroids.shape[1]:
        raise InputError(
            f"features has {points.shape[1]} columns, but the centroids {centroids.shape[1]}: give as many"
        )
    return torch.cdist(points, centroids, compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=1)


def _filled(data: Data, names: tuple[str, ...], rule: Rule, argument: str) -> Partition:
    if not names:
        raise InputError(f"{argument} gives no subset: give at least one")
    return _not_empty(Partition(data, names, rule(data), rule), argument)


def _not_empty(partition: Partition, argument: str) -> Partition:
    for name, count in partition.counts().items():
        if count == 0:
            raise InputError(
                f"{argument} gives the subset {name!r} no sample: leave it out, or give data that has some"
            )
    return partition


def _label(member: str | int, classes: tuple[str, ...], group: str) -> int:
    if isinstance(member, str) and member in classes:
        if classes.count(member) > 1:
            raise InputError(f"groups[{group!r}] holds {member!r}, as several classes are called: give their labels")
        return classes.index(member)
    if isinstance(member, int) and 0 <= member < len(classes):
        return member
    raise InputError(f"groups[{group!r}] holds {member!r}, but the classes are {', '.join(classes)}")


def _column(data: Data, key: str) -> list[Any]:
    if key not in data.metadata:
        raise InputError(f"key is {key!r}, but the metadata of {data.name!r} has {', '.join(data.metadata) or 'none'}")
    return listed(data.metadata[key])


def features_of(data: Data, features: "Features | Tensor | np.ndarray | None") -> Tensor:
    """What samples are clustered by: (N, D) float64 on the CPU, finite. None: normalised inputs, flattened."""
    if features is None:
        values, _ = data.batch(torch.arange(len(data), device=data.inputs.device))
        values = values.flatten(1)
    else:
        values = torch.as_tensor(features(data) if callable(features) else features)
    if values.dim() != 2 or len(values) != len(data) or values.shape[1] == 0:
        raise InputError(f"features has the shape {tuple(values.shape)}, but ({len(data)}, D) is needed")
    values = values.detach().to("cpu", torch.float64)
    if not torch.isfinite(values).all():
        raise InputError("features holds NaN or infinity: give finite ones")
    return values
