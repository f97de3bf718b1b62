"""What the paper says, as data: its tables, and its clusters of CIFAR-100 (arXiv 2601.22141, experiments 1 to 4).

Its tickets, and the networks of IMP multiple, predict where their score is at least ½; its single model's figures are
those of argmax, read one-vs-rest (`REMARKS` says where they cannot be).
"""

from __future__ import annotations

from typing import Any

from rtl.errors import InputError

_SPARSITIES = (0.25, 0.5, 0.75)
_Values = tuple[float, float, float]  # at those sparsities


def _classes(rule: str, balanced_accuracy: _Values, precision: _Values, recall: _Values) -> dict[str, _Values]:
    """By the metrics' keys in table.json, for a decision rule of ours, "threshold" or "argmax"."""
    values = {"balanced_accuracy": balanced_accuracy, "precision": precision, "recall": recall}
    return {f"{name}.{rule}": found for name, found in values.items()}


# Recipe -> method -> metrics, and thousands of #Params.
_TABLES: dict[str, dict[str, tuple[dict[str, _Values], _Values]]] = {
    "cifar10": {
        "rtl": (
            _classes("threshold", (0.781, 0.778, 0.772), (0.282, 0.276, 0.257), (0.821, 0.810, 0.816)),
            (103, 72, 38),
        ),
        "imp_single": (
            _classes("argmax", (0.711, 0.711, 0.732), (0.479, 0.478, 0.515), (0.480, 0.480, 0.518)),
            (94, 63, 31),
        ),
        "imp_multiple": (
            _classes("threshold", (0.712, 0.710, 0.760), (0.233, 0.222, 0.262), (0.701, 0.702, 0.766)),
            (944, 629, 314),
        ),
    },
    "cifar100": {
        "rtl": (
            _classes("threshold", (0.765, 0.751, 0.759), (0.298, 0.290, 0.289), (0.764, 0.729, 0.754)),
            (108, 76, 40),
        ),
        "imp_single": (
            _classes("argmax", (0.722, 0.707, 0.742), (0.450, 0.463, 0.522), (0.420, 0.421, 0.463)),
            (94, 63, 31),
        ),
        "imp_multiple": (
            _classes("threshold", (0.712, 0.700, 0.744), (0.276, 0.271, 0.286), (0.660, 0.637, 0.732)),
            (944, 629, 314),
        ),
    },
    "inr": {
        "rtl": ({"psnr": (18.86, 17.25, 14.87)}, (48.0, 36.5, 22.0)),
        "imp_single": ({"psnr": (15.94, 14.72, 12.69)}, (40.5, 27.0, 13.5)),
    },
    "speech": {
        "rtl": ({"si_snri": (7.248, 7.178, 6.992)}, (32.0, 22.8, 12.3)),
        "imp_single": ({"si_snri": (6.885, 6.970, 6.967)}, (28.0, 18.6, 9.3)),
        "imp_multiple": ({"si_snri": (5.295, 5.775, 5.899)}, (84.1, 56.1, 28.0)),
    },
}

# What is to be known of a method's figures for a recipe ("": of every method's), where they stand beside ours.
REMARKS = {
    ("cifar100", "imp_single"): (
        "The paper's IMP single on CIFAR-100 cannot be read as plain accuracy under argmax: its balanced accuracy of "
        ".722 with a recall of .420 would take a true-negative rate of 2 × .722 − .420 = 1.024."
    ),
    ("inr", ""): (
        "The paper's PSNR is of ten images of ADE20K's training split: of other images, or smaller ones, it does not "
        "compare, but what one method has above another does."
    ),
    ("speech", ""): (
        "The paper's recordings are of the DNS Challenge and TAU Urban Acoustic Scenes, both of 2020: of others "
        "SI-SNRi does not compare, but what one method has above another does."
    ),
}


def published(recipe: str) -> list[dict[str, Any]]:
    """The paper's rows for a recipe, each with its "method", "sparsity", "params" and "metrics" as a row of table.json
    has them; none for other recipes."""
    return [
        {
            "method": method,
            "sparsity": sparsity,
            "params": round(thousands[i] * 1000),
            "metrics": {key: values[i] for key, values in metrics.items()},
        }
        for method, (metrics, thousands) in _TABLES.get(recipe, {}).items()
        for i, sparsity in enumerate(_SPARSITIES)
    ]


# The paper names every one of the hundred classes, each once.
_CIFAR100 = {
    "aquatic animals": "aquarium_fish dinosaur dolphin flatfish ray seal shark trout whale",
    "people and objects": """baby bed bicycle bottle bowl boy bridge can castle chair clock couch cup girl house
        keyboard lamp man plain plate road rocket skyscraper table telephone television wardrobe woman""",
    "mammals": """bear beaver camel cattle chimpanzee elephant fox hamster kangaroo leopard lion mouse otter porcupine
        possum rabbit raccoon shrew skunk squirrel tiger wolf""",
    "reptiles and insects": """bee beetle butterfly caterpillar cockroach crab crocodile lizard lobster mushroom snail
        snake spider turtle worm""",
    "vehicles": "bus lawn_mower motorcycle pickup_truck streetcar tank tractor train",
    "natural scenes": "cloud forest maple_tree mountain oak_tree palm_tree pine_tree sea willow_tree",
    "fruits": "apple orange pear sweet_pepper",
    "flowers": "orchid poppy rose sunflower tulip",
}


def clusters(dataset: str) -> dict[str, tuple[str, ...]]:
    """The paper's clusters of a data set's classes: name -> class names. They came from CLIP embeddings of the class
    names, reduced by UMAP and clustered by HDBSCAN. Raises InputError for a data set without.
    """
    if dataset != "cifar100":
        raise InputError(f"dataset is {dataset!r}, but the paper has clusters of 'cifar100' alone")
    return {name: tuple(members.split()) for name, members in _CIFAR100.items()}
