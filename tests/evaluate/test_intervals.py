"""Intervals: what counts as one unit, and how often they hold the truth."""

from __future__ import annotations

import numpy as np
import pytest

from af2_ray.evaluate.intervals import interval95, units_of


def test_items_tied_by_a_recording_or_a_pair_or_through_others_are_one_unit() -> None:
    pairs = ["p", "p", "q", "q", "r", "alone"]
    recordings = ["a", "b", "b", "c", "d", "e"]
    assert units_of(pairs, recordings).tolist() == [0, 0, 0, 0, 1, 2]
    assert units_of(recordings).tolist() == [0, 1, 1, 2, 3, 4]
    assert units_of([]).tolist() == []


@pytest.mark.parametrize("between_seeds", [0.0, 0.01, 0.03])
def test_the_interval_holds_the_truth_as_often_as_it_says(between_seeds: float) -> None:
    """Three seeds, 60 blocks of ten questions that are alike, whatever differs: at least 93 of 100 times."""
    rng = np.random.default_rng(0)
    units = np.repeat(np.arange(60), 10)
    held = 0
    for _ in range(400):
        chance = 0.5 + rng.normal(0, 0.1, 60)[units] + rng.normal(0, between_seeds, (3, 1))
        low, high = interval95((rng.random((3, 600)) < chance).astype(float), units) or (1.0, 0.0)
        held += low <= 0.5 <= high
    assert held / 400 >= 0.93


def test_one_seed_is_an_interval_of_questions_and_one_value_is_none() -> None:
    right = (np.arange(400) % 2).astype(float)[None]
    low, high = interval95(right, np.arange(400)) or (0.0, 0.0)
    assert (low + high) / 2 == pytest.approx(0.5)
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.02)
    assert interval95(np.array([[1.0]]), np.zeros(1, np.int64)) is None
    seeds = np.array([[1.0], [2.0], [3.0]])
    assert interval95(seeds, np.zeros(1, np.int64)) == pytest.approx((2 - 2.484, 2 + 2.484), abs=1e-3)
