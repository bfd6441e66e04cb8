"""The paper's weighted bucketed blending (arXiv 2503.03983, Algorithm 1): which samples make up an epoch.

A dataset's weight counts its epochs in one epoch of the blend: 0.25 shows a quarter of it, another quarter in the next
one; 6 shows all of it six times. Clips (with all their questions) lie in duration buckets, and epoch e takes the slice
[e*n*w, (e+1)*n*w) of each bucket of n clips, modulo n, in an order that is shuffled anew on every wrap. So every clip
comes equally often, each epoch has the dataset's mix of durations, and any epoch can be computed without those before.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from af2_ray.data.columns import clip_numbers, durations
from af2_ray.data.packing import Index, ragged
from af2_ray.data.samples import Item

BUCKET_EDGES_S = (2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 90.0, 180.0, 300.0)


class Blend:
    """Datasets with their weights, sorted into clips and buckets once; `epoch` draws from them.

    Args:
        datasets: samples and weight of each dataset.
        seed: seed of the shuffles.
    """

    def __init__(self, datasets: Sequence[tuple[Sequence[Item], float]], seed: int) -> None:
        self._buckets: list[tuple[float, tuple[int, ...], Index, Index, Index]] = []
        base = 0
        for number, (samples, weight) in enumerate(datasets):
            if not weight > 0:
                raise ValueError(f"dataset {number}: weight {weight} must be above 0; leave the dataset out instead")
            order, starts = _groups(clip_numbers(samples))
            bucket_of = np.digitize(durations(samples)[order[starts[:-1]]], BUCKET_EDGES_S)
            order = order + base
            for bucket in np.unique(bucket_of).tolist():
                members = np.flatnonzero(bucket_of == bucket)
                self._buckets.append((weight, (seed, number, bucket), members, starts, order))
            base += len(samples)

    def epoch(self, epoch: int) -> Index:
        """The samples of one epoch, from 0 on: int64 [N], indices into the datasets laid end to end.

        They are grouped by dataset and bucket; a weight above 1 repeats an index.
        """
        chosen = [
            order[ragged(starts, members[epoch_slice(len(members), weight, epoch, seed)])[0]]
            for weight, seed, members, starts, order in self._buckets
        ]
        return np.concatenate(chosen) if chosen else np.empty(0, np.int64)


def epoch_slice(n: int, weight: float, epoch: int, seed: tuple[int, ...]) -> Index:
    """Positions [floor(e*n*w), floor((e+1)*n*w)) of an endless series of shuffles of `range(n)`."""
    first, last = int(np.floor(epoch * n * weight)), int(np.floor((epoch + 1) * n * weight))
    parts = []
    while first < last:
        wrap, start = divmod(first, n)
        stop = min(n, start + last - first)
        parts.append(np.random.default_rng((*seed, wrap)).permutation(n)[start:stop])
        first += stop - start
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _groups(labels: Index) -> tuple[Index, Index]:
    """Positions sorted by label (stable) and where each label's run starts, with the end: [N], [num_labels + 1]."""
    order = np.argsort(labels, kind="stable")
    return order, np.append(np.flatnonzero(np.diff(labels[order], prepend=-1)), len(labels))
