"""Blending: equal shares, weights above and below 1, reshuffled on wrap."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from af2_ray.data.blend import Blend, clip_numbers, epoch_slice
from af2_ray.data.samples import Sample


def make_samples(num_clips: int, *, per_clip: int = 2, name: str = "d", seconds: float | None = None) -> list[Sample]:
    rng = np.random.default_rng(len(name) + num_clips)
    durations = [seconds or float(rng.choice([3.0, 8.0, 25.0, 70.0])) for _ in range(num_clips)]
    return [
        Sample(f"{name}/{c}.{q}", f"{name}/{c}.flac", 0.0, durations[c], "q", "a", "AQA", name)
        for c in range(num_clips)
        for q in range(per_clip)
    ]


@pytest.mark.parametrize("weight", [0.026, 0.5, 1.0, 1.5, 6.0])
def test_slices_go_round_evenly(weight: float) -> None:
    n, epochs = 37, 40
    counts = Counter(int(i) for e in range(epochs) for i in epoch_slice(n, weight, e, (7,)))
    total = sum(counts.values())
    assert total == int(np.floor(epochs * n * weight))
    per_clip = [counts[i] for i in range(n)]
    assert max(per_clip) - min(per_clip) <= 1


def test_a_wrap_reshuffles() -> None:
    first, second = epoch_slice(50, 1.0, 0, (3,)), epoch_slice(50, 1.0, 1, (3,))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first.tolist() != second.tolist()
    np.testing.assert_array_equal(epoch_slice(50, 2.0, 0, (3,)), np.concatenate([first, second]))


def test_weight_one_is_every_sample_once() -> None:
    samples = make_samples(40)
    index = Blend([(samples, 1.0)], 0).epoch(3)
    assert sorted(index.tolist()) == list(range(len(samples)))


def test_weights_count_epochs_and_questions_stay_with_their_clip() -> None:
    a, b = make_samples(40, seconds=8.0), make_samples(20, name="other", seconds=8.0)
    index = Blend([(a, 0.25), (b, 3.0)], 0).epoch(0)
    counts = Counter(index.tolist())
    assert sum(i < len(a) for i in index) == 0.25 * len(a)
    assert all(counts[i] == 3 for i in range(len(a), len(a) + len(b)))
    assert all(counts[i] == counts[i ^ 1] for i in range(len(a)))  # two questions a clip


def test_every_epoch_has_the_mix_of_durations() -> None:
    samples = make_samples(400, per_clip=1)
    durations = np.array([s.duration_s for s in samples])
    for epoch in range(4):
        drawn = durations[Blend([(samples, 0.25)], 0).epoch(epoch)]
        for value in np.unique(durations):
            assert abs((drawn == value).sum() - 0.25 * (durations == value).sum()) <= 1


def test_same_seed_same_blend() -> None:
    samples = make_samples(40)
    np.testing.assert_array_equal(Blend([(samples, 0.5)], 9).epoch(2), Blend([(samples, 0.5)], 9).epoch(2))
    assert Blend([(samples, 0.5)], 9).epoch(2).tolist() != Blend([(samples, 0.5)], 10).epoch(2).tolist()
    with pytest.raises(ValueError, match="weight 0 must be above 0"):
        Blend([(samples, 0)], 0).epoch(0)


def test_clip_numbers() -> None:
    assert clip_numbers(make_samples(3)).tolist() == [0, 0, 1, 1, 2, 2]
