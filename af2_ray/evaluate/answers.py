"""What a question's answer is worth: normalised text, exact match, duration bands.

Scoring is by exact match after normalisation, never by similarity: a model that answers beside the options is wrong,
and a score can be recomputed from the predictions file with a few lines. The trade-off is that a right answer in other
words counts as wrong; questions whose answer is free text (captions) are therefore scored apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from af2_ray.data.samples import Sample

Rule = Callable[[Sample, str | None], bool]
"""Whether an answer to a question (none: there is none) is right."""

Groups = Callable[[Sample], Mapping[str, str]]
"""The group that a question is reported under, by what divides them: `{"skill": "order", "duration": "<=30"}`."""

DURATION_BANDS: tuple[tuple[str, float], ...] = (("<=30", 30.0), ("30-90", 90.0), ("90-300", float("inf")))

_MARKER = re.compile(r"^\(?[a-z]\)\s*")
_NOT_WORD = re.compile(r"[\W_]+")
_OPTIONS = re.compile(r"\s*\(A\)\s.*$", re.DOTALL | re.IGNORECASE)


def normalise_answer(text: str) -> str:
    """Lower case, without an option's marker, punctuation and doubled spaces: `(B) The bell.` -> `the bell`."""
    return _NOT_WORD.sub(" ", _MARKER.sub("", text.strip().casefold())).strip()


def match_option(text: str, options: Sequence[str]) -> str | None:
    """The option that `text` names exactly after normalisation; a bare letter names its option; else None."""
    for option in options:
        if normalise_answer(option) == normalise_answer(text):
            return option
    if letter := re.fullmatch(r"\(?([a-z])[).]?", text.strip().lower()):
        index = ord(letter[1]) - ord("a")
        if index < len(options):
            return options[index]
    return None


def is_right(sample: Sample, text: str | None) -> bool:
    """Whether `text` answers the question: the right option for multiple choice, else the exact normalised answer."""
    if text is None:
        return False
    if sample.options:
        choice = match_option(text, sample.options)
        return choice is not None and normalise_answer(choice) == normalise_answer(sample.answer)
    return normalise_answer(text) == normalise_answer(sample.answer)


def is_caption(sample: Sample) -> bool:
    """Captions have no one right wording; they are scored by the events they name, apart from accuracy."""
    return "caption" in sample.skill.lower() or "caption" in sample.task.lower()


def question_words(sample: Sample) -> str:
    """The question without its options."""
    return _OPTIONS.sub("", sample.prompt).strip() if sample.options else sample.prompt.strip()


def duration_band(duration_s: float) -> str:
    """Name of the duration band that `duration_s` falls in; what is longer than 300 s is heard to there only."""
    return next(name for name, upper_s in DURATION_BANDS if duration_s <= upper_s)


def groups_of(sample: Sample) -> dict[str, str]:
    """A question's skill and duration band."""
    return {"skill": sample.skill or "unnamed", "duration": duration_band(sample.duration_s)}


@dataclass(frozen=True)
class Prediction:
    """One question, the model's answer, and its answer when it hears another clip in place of the right one.

    Attributes:
        sample: question with its true answer.
        text: answer of the model.
        deaf_text: its answer over `deaf_uri`; none: not asked, or that clip cannot be read.
        deaf_uri: recording heard in place of the right one.
        is_right: rule of the question's benchmark.
    """

    sample: Sample
    text: str
    deaf_text: str | None = None
    deaf_uri: str | None = None
    is_right: Rule = field(default=is_right, repr=False, compare=False)

    @property
    def right(self) -> bool:
        """Whether the answer is right."""
        return self.is_right(self.sample, self.text)

    def to_json(self) -> dict[str, Any]:
        """A flat row for predictions.jsonl."""
        sample = self.sample
        return {
            "id": sample.id,
            "uri": sample.uri,
            "offset_s": sample.offset_s,
            "duration_s": sample.duration_s,
            "skill": sample.skill,
            "template": sample.template,
            "pair": sample.pair,
            "question": sample.prompt,
            "options": list(sample.options),
            "expected": sample.answer,
            "text": self.text,
            "choice": match_option(self.text, sample.options) if sample.options else None,
            "right": None if is_caption(sample) else self.right,
            "deaf_text": self.deaf_text,
            "deaf_uri": self.deaf_uri,
        }
