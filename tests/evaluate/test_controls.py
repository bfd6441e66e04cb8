from __future__ import annotations

import numpy as np
from quiz import question

from af2_ray.data.samples import Sample
from af2_ray.evaluate.answers import Prediction
from af2_ray.evaluate.controls import KnownAnswers, control_scores, deaf_pairs
from af2_ray.evaluate.scoring import control_systems


def _quiz(num: int, seed: int, *, leak: bool = False) -> list[Sample]:
    """Counterbalanced two-way questions; with `leak` the wording gives the answer away."""
    rng = np.random.default_rng(seed)
    samples = []
    for number in range(num):
        options = tuple(str(label) for label in rng.permutation(["low", "high"]))
        answer = ["low", "high"][number % 2]
        hint = f" It is really {answer}, by the way." if leak else ""
        prompt = f"Which comes first?{hint} (A) {options[0]} (B) {options[1]}"
        samples.append(question(number, answer, options=options, prompt=prompt, uri=f"{seed}/{number}.flac"))
    return samples


def test_deaf_clip_has_the_band_the_skill_and_another_answer() -> None:
    samples = [
        question(
            number, ["low", "high"][number % 2], duration_s=[8.0, 60.0][number // 8], skill=["a", "b"][number // 4 % 2]
        )
        for number in range(16)
    ]
    chosen = deaf_pairs(samples)
    assert chosen == deaf_pairs(samples)
    assert sorted(chosen) == list(range(16))
    for index, other in chosen.items():
        assert samples[index].skill == samples[other].skill
        assert samples[index].duration_s == samples[other].duration_s
        assert samples[index].answer != samples[other].answer
        assert samples[index].pair != samples[other].pair, "the mirrored clip would make the control too weak"


def test_deaf_clip_where_there_is_little_choice() -> None:
    pair = [question(0, "low"), question(1, "high")]
    assert deaf_pairs(pair) == {0: 1, 1: 0}
    assert deaf_pairs([question(0, "low"), question(2, "low")]) == {}
    other_band = [question(0, "low"), question(2, "high", duration_s=60.0)]
    assert deaf_pairs(other_band) == {0: 1, 1: 0}


def test_majority_answers_among_the_options() -> None:
    train = [question(0, "high"), question(1, "high"), question(2, "low"), question(3, "drum", options=())]
    known = KnownAnswers(train)
    assert known.majority(question(9, "low")) == "high"
    assert known.majority(question(9, "low", options=("low", "bell"))) == "low"
    assert known.majority(question(9, "low", options=())) == "high"
    assert known.majority(question(9, "low", options=(), template="new")) == ""


def test_text_only_is_at_chance_where_the_words_tell_nothing() -> None:
    scores = control_scores(_quiz(1000, 0), _quiz(600, 1))
    assert abs(scores["text_only"].mean() - 0.5) < 0.06
    assert scores["chance"].mean() == 0.5


def test_a_leak_in_the_words_is_found() -> None:
    scores = control_scores(_quiz(400, 0, leak=True), _quiz(200, 1, leak=True))
    assert scores["text_only"].mean() > 0.95
    assert scores["chance"].mean() < 0.6


def test_text_only_uses_duration() -> None:
    """Longer clips with one answer: the classifier must see it, or a corpus fault would stay hidden."""
    train = [question(number, ["low", "high"][number % 2], duration_s=[5.0, 25.0][number % 2]) for number in range(300)]
    assert control_scores(train, train[:100])["text_only"].mean() > 0.95


def test_without_training_questions_the_controls_guess_the_first() -> None:
    scores = control_scores([], [question(0, "low"), question(1, "high"), question(2, "x", options=())])
    assert scores["majority"].tolist() == [1, 0, 0]
    assert scores["text_only"].tolist() == [1, 0, 0]


def test_an_open_question_that_names_its_answers_is_a_choice_between_them() -> None:
    def ask(number: int, prompt: str, answer: str) -> Sample:
        return question(number, answer, options=(), prompt=prompt)

    pairs = [("dog", "cat"), ("cat", "bell"), ("bell", "dog")]
    train = [ask(number, f"Which is louder, the {a} or the {b}?", a) for number, (a, b) in enumerate(pairs)]
    known = KnownAnswers(train)
    assert known.candidates(ask(9, "Which is louder, the cat or the dog?", "dog")) == ["cat", "dog"]
    assert known.chance(ask(9, "Which is louder, the cat or the dog?", "dog")) == 0.5
    assert len(known.candidates(ask(9, "Which is loudest?", "dog"))) == 3


def test_controls_are_fitted_to_questions_of_the_kinds_that_are_asked() -> None:
    """Drills in the same words, with other answers, would weaken a control; where none are alike, all count."""
    train, test = _quiz(200, 0, leak=True), _quiz(100, 1, leak=True)
    drills = [
        question(1000 + n, ["shrill", "deep"][n % 2], options=(), template="drill", prompt=sample.prompt)
        for n, sample in enumerate(train * 3)
    ]
    asked = [Prediction(sample, "low") for sample in test]
    alone, beside, only = (control_systems(asked, fitted)["text_only"] for fitted in (train, [*drills, *train], drills))
    assert alone.mean() > 0.95
    np.testing.assert_array_equal(beside, alone)
    assert only.mean() < 0.7
