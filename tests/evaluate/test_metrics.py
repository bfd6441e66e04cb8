from __future__ import annotations

import numpy as np
import pytest
from quiz import question

from af2_ray.evaluate.answers import Prediction, groups_of
from af2_ray.evaluate.metrics import (
    Bootstrap,
    by_group,
    caption_scores,
    event_mentions,
    pair_accuracy,
    summarise,
)


def test_pairs_count_only_when_both_are_right() -> None:
    samples = [question(number, "low") for number in range(6)]
    assert pair_accuracy(samples, np.array([1.0, 1, 1, 0, 0, 0])) == pytest.approx(1 / 3, abs=1e-3)
    assert pair_accuracy([question(0, "low", pair="")], np.array([1.0])) is None


def test_bootstrap_resamples_pairs_not_questions() -> None:
    """Whole pairs right or wrong: the spread is that of N/2 draws, not of N."""
    samples = [question(number, "low") for number in range(200)]
    right = np.repeat(np.arange(100) % 2, 2).astype(float)
    spread = Bootstrap(samples).means(right).std()
    assert spread == pytest.approx(0.5 / np.sqrt(100), rel=0.1)


def test_bootstrap_resamples_what_shares_a_recording() -> None:
    """Ten questions about each of 20 recordings, all right or all wrong: 20 draws, however many pairs there are."""
    samples = [question(number, "low", uri=f"{number // 10}.flac") for number in range(200)]
    bootstrap = Bootstrap(samples)
    assert bootstrap.num_units == 20
    spread = bootstrap.means(np.repeat(np.arange(20) % 2, 10).astype(float)).std()
    assert spread == pytest.approx(0.5 / np.sqrt(20), rel=0.1)


def test_lead_over_the_best_control() -> None:
    samples = [question(number, "low") for number in range(100)]
    places = np.arange(100)
    systems = {
        "model": (places % 10 < 8).astype(float),
        "deaf": (places % 10 < 3).astype(float),
        "majority": (places % 2).astype(float),
        "chance": np.full(100, 0.5),
    }
    row = summarise(samples, systems)
    assert (row["model"], row["best_control"]) == (0.8, "majority")
    assert row["above_best_control"] == pytest.approx(0.3)
    low, high = row["above_best_control_ci95"]
    assert 0 < low < 0.3 < high
    assert row == summarise(samples, systems), "the bootstrap is seeded"


def test_missing_deaf_answers_are_left_out_of_its_mean() -> None:
    samples = [question(number, "low") for number in range(4)]
    row = summarise(samples, {"model": np.ones(4), "deaf": np.array([1.0, np.nan, 0.0, np.nan])})
    assert row["deaf"] == 0.5


def test_groups_and_nothing_to_score() -> None:
    samples = [question(0, "low"), question(1, "low", duration_s=200.0), question(2, "low", skill="counting")]
    systems = {"model": np.array([1.0, 0.0, 1.0])}
    groups = by_group(samples, systems, groups_of)
    assert {name: row["model"] for name, row in groups["skill"].items()} == {"counting": 1.0, "order": 0.5}
    assert list(groups["duration"]) == ["<=30", "90-300"]
    with pytest.raises(ValueError, match="no questions"):
        summarise([], {"model": np.zeros(0)})


def test_captions_by_their_events() -> None:
    labels = {"bell": "bell", "church bell": "church bell", "dog": "dog", "barking": "dog"}
    assert event_mentions("A dog barking before a church bell, and a dog.", labels) == ["dog", "church bell"]
    assert event_mentions("", labels | {"!": "nothing"}) == [], "a wording without words is never found"
    wanted = question(0, "a dog, then a bell", options=(), skill="caption")
    predictions = [Prediction(wanted, "a bell and a dog"), Prediction(wanted, "a dog", "nothing")]
    scores = caption_scores(predictions, labels)
    assert scores["event_f1"] == pytest.approx(2 * 3 / (3 + 4), abs=1e-3)
    assert (scores["same_events"], scores["exact"], scores["deaf_event_f1"]) == (0.5, 0.0, 0.0)
