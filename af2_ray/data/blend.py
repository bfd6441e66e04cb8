"""The paper's weighted bucketed blending (PAPER 4, Algorithm 1): which samples make up an epoch.

A dataset's weight counts its epochs in one epoch of the blend: 0.25 shows a quarter of it, another quarter in the next
one; 6 shows all of it six times. Clips (with all their questions) lie in duration buckets, and epoch e takes the slice
[e*n*w, (e+1)*n*w) of each bucket of n clips, modulo n, in an order that is shuffled anew on every wrap. So every clip
comes equally often, each epoch has the dataset's mix of durations, and any epoch can be computed without those before.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from af2_ray.data.manifest import Stretch

BUCKET_EDGES_S = (2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 90.0, 180.0, 300.0)

Index = NDArray[np.int64]


def blend(datasets: Sequence[tuple[Sequence[Stretch], float]], epoch: int, seed: int) -> Index:
    """Choose the samples of one epoch.

    Args:
        datasets: samples and weight of each dataset.
        epoch: from 0 on.
        seed: of the shuffles.

    Returns:
        int64 [N]: indices into the datasets laid end to end, grouped by dataset; a weight above 1 repeats an index.
    """
    chosen, base = [], 0
    for number, (samples, weight) in enumerate(datasets):
        if not weight > 0:
            raise ValueError(f"dataset {number}: weight {weight} must be above 0; leave the dataset out instead")
        clips = clip_numbers(samples)
        clip_order, starts = _groups(clips)
        durations = np.array([samples[i].duration_s for i in clip_order[starts[:-1]]])
        buckets = np.digitize(durations, BUCKET_EDGES_S)
        for bucket in np.unique(buckets):
            members = np.flatnonzero(buckets == bucket)
            taken = members[epoch_slice(len(members), weight, epoch, (seed, number, int(bucket)))]
            chosen += [base + clip_order[starts[clip] : starts[clip + 1]] for clip in taken]
        base += len(samples)
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


def clip_numbers(samples: Sequence[Stretch]) -> Index:
    """Number the distinct stretches (uri, offset, duration) in order of appearance: int64 [N]."""
    numbers: dict[tuple[str, float, float], int] = {}
    return np.fromiter(
        (numbers.setdefault((s.uri, s.offset_s, s.duration_s), len(numbers)) for s in samples), np.int64, len(samples)
    )


def _groups(labels: Index) -> tuple[Index, Index]:
    """Positions sorted by label (stable) and where each label's run starts, with the end: [N], [num_labels + 1]."""
    order = np.argsort(labels, kind="stable")
    return order, np.append(np.flatnonzero(np.diff(labels[order], prepend=-1)), len(labels))
