"""Words as vectors: encoders that download nothing, and their reduction to a few dimensions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from rtl.errors import InputError

Encoder = Callable[[Sequence[str]], np.ndarray]

_INSTALL = "pip install 'rtl-kernels[text]'"


def wordllama(texts: Sequence[str]) -> np.ndarray:
    """WordLlama, float32 (N, 256): the averaged token embeddings of a language model, which lie in the package's wheel.

    Raises InputError if it is not installed. Source: https://github.com/dleemiller/WordLlama (MIT).
    """
    try:
        import wordllama as package
    except ImportError as error:
        raise InputError(f"encoder is 'wordllama', but {error}: {_INSTALL}, or take 'ngrams'") from error
    # The wheel holds weights and tokenizer, but looks for the latter under another name, unless this is its cache.
    here = Path(package.__file__).parent
    vectors: np.ndarray = package.WordLlama.load(cache_dir=here, disable_download=True).embed(list(texts))
    return vectors


def wordnet(texts: Sequence[str]) -> np.ndarray:
    """How near each noun is to all the others in WordNet, float64 (N, N): see `rtl.semantics.wordnet`, also for errors.

    Needs WordNet's files. To say which sense a name has, encode by a function that calls that one with `senses`.
    """
    from rtl import semantics

    return semantics.wordnet(texts).numpy()


def ngrams(texts: Sequence[str]) -> np.ndarray:
    """TF-IDF of runs of 2 to 4 letters, float64 (N, D): spelling, not meaning. Needs nothing but scikit-learn."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors: np.ndarray = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4)).fit_transform(texts).toarray()
    return vectors


ENCODERS: dict[str, Encoder] = {"wordllama": wordllama, "wordnet": wordnet, "ngrams": ngrams}


def embed(texts: Sequence[str], encoder: str | Encoder) -> np.ndarray:
    """Unit vectors (N, D) float64, by the name of an encoder or by one's own.

    Raises InputError for an unknown name, or vectors that are none.
    """
    if isinstance(encoder, str):
        if encoder not in ENCODERS:
            raise InputError(f"encoder is {encoder!r}, expected one of {', '.join(ENCODERS)}, or a function")
        encoder = ENCODERS[encoder]
    given = encoder(texts)
    try:
        vectors = np.asarray(given, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"encoder gave a {type(given).__name__} that is no array ({error}), expected one") from error
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True) if vectors.ndim == 2 else np.zeros(1)
    if vectors.ndim != 2 or len(vectors) != len(texts) or not np.isfinite(vectors).all() or not (lengths > 0).all():
        raise InputError(
            f"encoder gave an array of shape {vectors.shape}, expected ({len(texts)}, D), finite and no vector zero"
        )
    unit: np.ndarray = vectors / lengths
    return unit


def umap(vectors: np.ndarray, dimensions: int, neighbors: int, seed: int) -> np.ndarray:
    """`vectors` (N, D) in a few dimensions, float64, neighbours by cosine kept together.

    Raises InputError if UMAP is not installed.

    Source: L. McInnes et al., "UMAP: Uniform Manifold Approximation and Projection", arXiv 1802.03426.
    """
    try:
        from umap import UMAP
    except ImportError as error:
        raise InputError(f"dimensions is {dimensions}, but {error}: {_INSTALL}, or give None") from error
    model = UMAP(
        n_components=dimensions, n_neighbors=neighbors, min_dist=0.0, metric="cosine", random_state=seed, n_jobs=1
    )
    return np.asarray(model.fit_transform(vectors), np.float64)
