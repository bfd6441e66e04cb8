from __future__ import annotations

import pytest
from quiz import question

from af2_ray.evaluate.answers import duration_band, is_right, match_option, normalise_answer, question_words


def test_answers_in_any_script_are_told_apart() -> None:
    assert not is_right(question(0, "\u72d7", options=()), "\u9ce5")
    assert is_right(question(0, "\u72d7", options=()), " \u72d7. ")
    assert is_right(question(0, "Stra\u00dfe", options=()), "STRASSE")


def test_normalise() -> None:
    assert normalise_answer(" (B) The  Bell. ") == "the bell"


@pytest.mark.parametrize(
    ("text", "choice"),
    [("High.", "high"), ("(b) high", "high"), ("b", "high"), ("(A)", "low"), ("higher", None), ("", None), ("d", None)],
)
def test_only_an_exact_option_counts(text: str, choice: str | None) -> None:
    assert match_option(text, ("low", "high")) == choice


def test_open_answers_match_exactly() -> None:
    sample = question(0, "three", options=())
    assert is_right(sample, "Three.")
    assert not is_right(sample, "three times")
    assert not is_right(sample, None)


def test_question_without_its_options() -> None:
    assert question_words(question(0, "low")) == "Which comes first?"


def test_bands() -> None:
    assert [duration_band(s) for s in (5, 30, 30.1, 90, 91, 300, 400)] == [
        *("<=30", "<=30", "30-90", "30-90"),
        *("90-300", "90-300", "90-300"),
    ]
