"""What the paper says, as data: its tables, and its clusters of CIFAR-100 (arXiv 2601.22141, experiments 1 and 2).

Its tickets, and the networks of IMP multiple, predict where their score is at least ½; its single model's figures are
those of argmax, read one-vs-rest.
"""

from __future__ import annotations

from typing import Any

from rtl.errors import InputError

_SPARSITIES = (0.25, 0.5, 0.75)
# Recipe -> method -> balanced accuracy, precision, recall at those sparsities, and thousands of #Params.
_TABLES: dict[str, dict[str, tuple[tuple[float, float, float], ...]]] = {
    "cifar10": {
        "rtl": ((0.781, 0.778, 0.772), (0.282, 0.276, 0.257), (0.821, 0.810, 0.816), (103, 72, 38)),
        "imp_single": ((0.711, 0.711, 0.732), (0.479, 0.478, 0.515), (0.480, 0.480, 0.518), (94, 63, 31)),
        "imp_multiple": ((0.712, 0.710, 0.760), (0.233, 0.222, 0.262), (0.701, 0.702, 0.766), (944, 629, 314)),
    },
    "cifar100": {
        "rtl": ((0.765, 0.751, 0.759), (0.298, 0.290, 0.289), (0.764, 0.729, 0.754), (108, 76, 40)),
        "imp_single": ((0.722, 0.707, 0.742), (0.450, 0.463, 0.522), (0.420, 0.421, 0.463), (94, 63, 31)),
        "imp_multiple": ((0.712, 0.700, 0.744), (0.276, 0.271, 0.286), (0.660, 0.637, 0.732), (944, 629, 314)),
    },
}


def published(recipe: str) -> list[dict[str, Any]]:
    """The paper's rows for a recipe: method, sparsity, rule, params and the metrics; none for other recipes.

    `rule` is the decision rule of ours to compare with, "threshold" or "argmax".
    """
    rows = []
    for method, (balanced_accuracy, precision, recall, thousands) in _TABLES.get(recipe, {}).items():
        for i, sparsity in enumerate(_SPARSITIES):
            rows.append(
                {
                    "method": method,
                    "sparsity": sparsity,
                    "rule": "argmax" if method == "imp_single" else "threshold",
                    "params": int(thousands[i]) * 1000,
                    "balanced_accuracy": balanced_accuracy[i],
                    "precision": precision[i],
                    "recall": recall[i],
                }
            )
    return rows


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
