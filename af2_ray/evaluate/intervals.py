"""How sure a mean is: which items are independent of one another, and the interval over items and seeds.

Questions about one recording, and the two questions of a counterbalanced pair, are right or wrong together, so the unit
of an interval is all that hangs together so. In a composed corpus that is a block of scenes.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import t as student

from af2_ray.data.samples import Sample

Units = NDArray[np.int64]
"""[N] the unit of each item, from 0 on."""


def units_of(*ties: Sequence[Hashable]) -> Units:
    """The units of N items: two are in one if they agree in any tie (recording, pair), or if other items connect them.

    Args:
        ties: values [N] of one tie or more.
    """
    items = np.arange(len(ties[0]))
    nodes, size = [], len(items)  # of the graph: items, then what ties them, each tie's values after the other's
    for tie in ties:
        _, values = np.unique([str(each) for each in tie], return_inverse=True)
        nodes.append(size + values)
        size += int(values.max(initial=-1)) + 1
    edges = (np.tile(items, len(ties)), np.concatenate(nodes))
    graph = coo_array((np.ones(len(edges[0])), edges), shape=(size, size))
    _, found = connected_components(graph, directed=False)
    return np.unique(found[items], return_inverse=True)[1].astype(np.int64)


def question_units(samples: Sequence[Sample]) -> Units:
    """The units of N questions: two are in one if they share a recording or a pair, or if others connect them."""
    heard = [(place, stretch.uri) for place, sample in enumerate(samples) for stretch in sample.stretches]
    places = [place for place, _ in heard]
    pairs = [samples[place].pair or f"alone:{place}" for place in places]
    first = np.searchsorted(places, np.arange(len(samples)))
    return units_of(places, [uri for _, uri in heard], pairs)[first]


def interval95(values: NDArray[np.float64], units: Units) -> tuple[float, float] | None:
    """The 95 % interval of the mean of `values` [S, N] over S seeds and N items.

    Both are samples, of trainings and of questions, so the squared errors of the mean add up: that between seeds and
    that between units (each with its own noise, which errs on the wide side). Student's t for as many degrees of
    freedom as the two have together (Satterthwaite). With three seeds this is wide where they differ. A percentile
    bootstrap is not: of three seeds it cannot draw a mean beyond the largest.

    Args:
        units: unit of each item [N]. One unit alone says nothing of questions, as one seed says nothing of trainings.

    Returns:
        None with one seed and one unit.
    """
    num_units = int(units.max()) + 1
    mean = float(values.mean())
    by_seed = (values - mean).sum(1)
    by_unit = np.bincount(units, (values - mean).sum(0), num_units)
    parts = [
        (float((sums**2).sum()) / values.size**2 * len(sums) / (len(sums) - 1), len(sums) - 1)
        for sums in (by_seed, by_unit)
        if len(sums) > 1
    ]
    if not parts:
        return None
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return mean, mean
    freedom = variance**2 / sum(part**2 / free for part, free in parts)
    half = float(student.ppf(0.975, freedom)) * variance**0.5
    return mean - half, mean + half
