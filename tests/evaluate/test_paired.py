"""Two models on the same questions: what is paired, what is left out, and how sure the difference is."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from quiz import question

from af2_ray.audio.hear import Stretch
from af2_ray.data.samples import Sample
from af2_ray.evaluate.answers import Prediction
from af2_ray.evaluate.intervals import interval95, question_units
from af2_ray.evaluate.paired import chance, compare


def answered(samples: list[Sample], right: list[bool]) -> list[Prediction]:
    """Each question answered, rightly or wrongly."""
    return [Prediction(s, s.answer if fine else "neither") for s, fine in zip(samples, right, strict=True)]


def alone(number: int, **changes: Any) -> Sample:
    """A question of no pair about a recording of its own."""
    return question(number, **{"answer": "low", "pair": "", **changes})


def test_shares_change_and_counts_are_those_of_the_questions() -> None:
    samples = [alone(n, skill="order" if n < 6 else "count", duration_s=8.0 if n < 4 else 60.0) for n in range(10)]
    before = [True, True, False, False, False, False, True, False, True, False]
    after = [True, False, True, True, True, False, True, True, True, True]
    found = compare(answered(samples, before), answered(samples[::-1], after[::-1]))
    assert found.all is not None
    assert (found.all.questions, found.all.better, found.all.worse, found.all.same) == (10, 5, 1, 4)
    assert (found.all.before, found.all.after, found.all.change) == pytest.approx((0.4, 0.8, 0.4))
    change = np.array(after, dtype=float) - np.array(before, dtype=float)
    assert found.all.change_ci95 == pytest.approx(interval95(change[None], np.arange(10)))
    assert found.all.chance == 0.5
    assert list(found.by_skill) == ["count", "order"]
    assert list(found.by_duration) == ["<=30", "30-90"], "from short to long"
    assert sum(row.questions for row in found.by_skill.values()) == 10
    assert [answer.sample.id for answer in found.worse] == ["test/1"]
    assert (found.worse[0].before, found.worse[0].after) == ("low", "neither")
    assert json.loads(json.dumps(found.to_json()))["by_skill"]["order"]["better"] == 3


def test_questions_of_one_side_alone_are_counted_and_left_out() -> None:
    samples = [alone(n) for n in range(8)]
    found = compare(answered(samples[:5], [True] * 5), answered(samples[2:], [False] * 6))
    assert found.all is not None
    assert (found.all.questions, found.only_before, found.only_after) == (3, 2, 3)
    none = compare(answered(samples[:2], [True] * 2), [])
    assert (none.all, none.by_skill, none.only_before, none.only_after) == (None, {}, 2, 0)
    assert compare([], []).to_json()["all"] is None


def test_a_question_that_stands_twice_counts_once() -> None:
    twice = answered([alone(0), alone(0), alone(1)], [True, True, False])
    assert compare(twice, twice).to_json()["all"]["questions"] == 2


def test_questions_about_one_recording_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    gains = rng.random(20) < 0.5
    apart = [alone(n) for n in range(200)]
    together = [alone(n, uri=f"{n // 10}.flac") for n in range(200)]
    widths = []
    for samples in (apart, together):
        right = [bool(gains[n // 10]) for n in range(200)]
        row = compare(answered(samples, [False] * 200), answered(samples, right)).all
        assert row
        assert row.change_ci95
        widths.append(row.change_ci95[1] - row.change_ci95[0])
    assert widths[1] > 2.5 * widths[0]


def test_the_second_recording_of_a_question_ties_it_too() -> None:
    samples = [alone(0), alone(1, more_audio=(Stretch("0.flac", 0.0, 5.0),))]
    samples += [question(2, "low"), question(3, "low"), alone(4)]
    assert question_units(samples).tolist() == [0, 0, 1, 1, 2]
    assert question_units([]).tolist() == []


def test_one_recording_alone_has_no_interval() -> None:
    samples = [alone(n, uri="one.flac") for n in range(4)]
    row = compare(answered(samples, [False] * 4), answered(samples, [True] * 4)).all
    assert row is not None
    assert (row.change, row.change_ci95, row.before_ci95) == (1.0, None, None)


def test_an_interval_stays_within_what_is_possible() -> None:
    samples = [alone(n) for n in range(6)]
    row = compare(answered(samples, [True] * 5 + [False]), answered(samples, [True] * 6)).all
    assert row
    assert row.before_ci95
    assert row.change_ci95
    assert row.before_ci95[1] == 1.0
    assert row.change_ci95[0] < 0 < row.change_ci95[1]


def test_chance_is_known_where_all_questions_have_options() -> None:
    four = alone(0, options=("a", "b", "c", "d"))
    assert chance([alone(1), four]) == pytest.approx(0.375)
    assert chance([alone(1), alone(2, options=())]) is None
    assert chance([]) is None


def test_a_free_answer_counts_by_its_exact_words_and_a_benchmark_by_its_own_rule() -> None:
    free = alone(0, options=(), answer="A dog barks")
    found = compare([Prediction(free, "a cat")], [Prediction(free, "A dog barks!")])
    assert found.all is not None
    assert found.all.better == 1
    anything = [Prediction(free, "whatever", is_right=lambda sample, text: True)]
    assert compare(anything, anything).to_json()["all"]["after"] == 1.0


def test_captions_are_scored_beside_the_questions() -> None:
    labels = alone(0, skill="identification", options=("dog", "bell"), answer="dog")
    captions = [alone(n, skill="caption", options=(), answer="dog, then bell") for n in (1, 2)]
    before = [Prediction(labels, "dog"), *(Prediction(caption, "dog") for caption in captions)]
    after = [Prediction(labels, "dog"), Prediction(captions[0], "dog, then bell"), Prediction(captions[1], "dog")]
    found = compare(before, after)
    assert found.all
    assert found.captions
    assert (found.all.questions, found.better, found.worse) == (1, (), ())
    assert [found.captions[side]["exact"] for side in ("before", "after")] == [0.0, 0.5]
    assert found.captions["after"]["event_f1"] > found.captions["before"]["event_f1"]
    assert [answer.sample.id for answer in found.rewritten] == ["test/1"]
    assert "caption" not in found.by_skill


def test_examples_come_from_all_skills_and_from_many_recordings() -> None:
    samples = [alone(n, skill="order", uri=f"{n // 5}.flac") for n in range(30)]
    samples += [alone(n, skill="count") for n in range(30, 33)]
    found = compare(answered(samples, [False] * 33), answered(samples, [True] * 33))
    assert len(found.better) == 10
    skills = [answer.sample.skill for answer in found.better]
    assert skills[:6] == ["count", "order"] * 3
    orders = [answer.sample.uri for answer in found.better if answer.sample.skill == "order"]
    assert orders == [f"{n}.flac" for n in (0, 1, 2, 3, 4, 5, 0)], "each recording once before any is there twice"
    again = compare(answered(samples, [False] * 33), answered(samples, [True] * 33))
    assert again.better == found.better
