"""Measures of a joint space of clips and texts, on arrays: retrieval, zero-shot classification, alignment, uniformity.

Ties count against the model everywhere: a model that finds everything equally similar scores nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
"""[N, J] unit vectors."""
RECALLS = (1, 5, 10)
MAP_CUT = 10  # mAP@10, as the captioned-audio benchmarks report it


def retrieval(similarity: Vectors, relevant: NDArray[np.bool_]) -> dict[str, float]:
    """`r1`, `r5`, `r10` and `map10` of queries [Q] against items [K].

    Args:
        similarity: array [Q, K].
        relevant: array [Q, K]; every query has at least one. Recall asks for any relevant item among the first k;
            average precision for all of them.
    """
    before = num_before(similarity, relevant)
    found = {f"r{k}": float((before < k).mean()) for k in RECALLS}
    pairs = zip(similarity, relevant, strict=True)
    found["map10"] = float(np.mean([average_precision(row, right, MAP_CUT) for row, right in pairs]))
    return found


def num_before(similarity: Vectors, relevant: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Irrelevant items that each query [Q] finds before its first relevant one; 0: it is found at once."""
    if not relevant.any(axis=1).all():
        raise ValueError("a query without a relevant item cannot be scored")
    best = np.where(relevant, similarity, -np.inf).max(axis=1, keepdims=True)
    return np.asarray(((similarity >= best) & ~relevant).sum(axis=1), np.int64)


def first_hits(similarity: Vectors, relevant: NDArray[np.bool_]) -> list[float]:
    """1.0 for each query whose nearest item is relevant, else 0.0."""
    return [float(hit) for hit in num_before(similarity, relevant) == 0]


def average_precision(scores: NDArray[Any], relevant: NDArray[np.bool_], cut: int | None = None) -> float:
    """Mean over the relevant items (of `cut` at most) of the precision at their place; beyond `cut` it is 0."""
    order = np.lexsort((relevant, -scores))  # among equals the irrelevant come first
    places = np.flatnonzero(relevant[order])
    precision = np.arange(1, len(places) + 1) / (places + 1)
    if cut is None:
        return float(precision.mean())
    return float(precision[places < cut].sum() / min(len(places), cut))


def zero_shot(similarity: Vectors, relevant: NDArray[np.bool_], names: Sequence[str]) -> dict[str, Any]:
    """Classification of clips by the nearest class.

    Args:
        similarity: array [C, classes].
        relevant: array [C, classes]; every clip has one class or several.
        names: names of the classes.

    Returns:
        clips, classes, `top1` (the nearest class is one of the clip's), its chance, `map` (mean over the classes that
        occur of the average precision over clips), `by_class` (top1 of the clips of each class).
    """
    taken = num_before(similarity, relevant) == 0
    occurring = np.flatnonzero(relevant.any(axis=0)).tolist()
    return {
        "clips": len(relevant),
        "classes": len(names),
        "top1": round(float(taken.mean()), 4),
        "top1_chance": round(float(relevant.mean(axis=1).mean()), 4),
        "map": round(float(np.mean([average_precision(similarity[:, k], relevant[:, k]) for k in occurring])), 4),
        "by_class": {names[k]: round(float(taken[relevant[:, k]].mean()), 4) for k in occurring},
    }


def alignment(audio: Vectors, text: Vectors) -> float:
    """Mean squared distance of pairs [N, J] (Wang and Isola 2020, arXiv 2005.10242); 0 is perfect."""
    return float(np.square(audio - text).sum(axis=1).mean())


def uniformity(vectors: Vectors) -> float | None:
    """Logarithm of the mean of exp(-2 distance^2) over different pairs; the lower, the more of the sphere is used."""
    if len(vectors) < 2:
        return None
    above = np.triu_indices(len(vectors), 1)
    squared = np.clip(2 - 2 * (vectors @ vectors.T)[above], 0, None)
    return float(np.log(np.exp(-2 * squared.astype(np.float64)).mean()))
