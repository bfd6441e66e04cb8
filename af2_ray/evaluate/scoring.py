"""Answers to scores: all questions pooled, and a row for each benchmark, beside the controls.

The controls are fitted once, on the training questions like those asked anywhere, so that rows can be compared.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from af2_ray.data.samples import Sample
from af2_ray.evaluate.answers import Groups, Prediction, groups_of, is_caption
from af2_ray.evaluate.controls import control_scores
from af2_ray.evaluate.metrics import Accuracy, CaptionScores, Scores, by_group, caption_scores, summarise

_ARTICLE = re.compile(r"^(an?|the) ")


@dataclass(frozen=True)
class Answered:
    """The predictions of one benchmark, under its name, and how it groups them."""

    name: str
    predictions: list[Prediction]
    groups: Groups = groups_of


@dataclass(frozen=True)
class AnswerScores:
    """What was measured of some answers.

    Attributes:
        all: accuracy over all closed questions; none: there are captions alone.
        groups: accuracies of groups, by what divides them (`skill`, `duration`).
        captions: scores of the captions; none: there are none.
        seen: accuracy on new scenes of training clips; none: not asked.
        benchmarks: scores of each benchmark alone, by its name.
    """

    all: Accuracy | None
    groups: Mapping[str, Mapping[str, Accuracy]]
    captions: CaptionScores | None
    seen: Accuracy | None = None
    benchmarks: Mapping[str, AnswerScores] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The `details` of metrics.json: `all`, `by_skill` and so on, `captions`, `seen`, `by_benchmark`."""
        facts: dict[str, Any] = {
            f"by_{division}": {name: row.to_json() for name, row in rows.items()}
            for division, rows in self.groups.items()
        }
        facts |= {name: row.to_json() for name, row in (("all", self.all), ("seen", self.seen)) if row}
        if self.captions:
            facts["captions"] = asdict(self.captions)
        if self.benchmarks:
            facts["by_benchmark"] = {name: scores.to_json() for name, scores in self.benchmarks.items()}
        return facts

    def summary(self) -> dict[str, Any]:
        """The `accuracy` block of summary.json."""
        if self.all is None:
            return {"questions": 0}
        means = self.all.means
        return {
            "all": means["model"],
            "pairs": self.all.pairs,
            **{name: means.get(name) for name in ("deaf", "majority", "text_only")},
            "questions": self.all.questions,
            "ci95": self.all.lead.above_best_control_ci95 if self.all.lead else None,
            **{
                f"by_{division}": {name: row.means["model"] for name, row in self.groups[division].items()}
                for division in ("skill", "duration")
            },
            "seen_clips": self.seen.means["model"] if self.seen else None,
        }


def score(
    predictions: Sequence[Prediction],
    train: Sequence[Sample] = (),
    seen: Sequence[Prediction] = (),
    wordings: Mapping[str, Sequence[str]] = MappingProxyType({}),
    benchmarks: Sequence[Answered] = (),
) -> AnswerScores:
    """Everything that is measured of predictions.

    Args:
        predictions: answers on clips that no training saw.
        train: training questions, on which the controls are fitted.
        seen: answers on new scenes of training clips.
        wordings: texts by which captions may name a label; the label itself always counts.
        benchmarks: the same predictions by benchmark, a row each.

    Raises:
        ValueError: no predictions.
    """
    closed = _closed(predictions)
    systems = control_systems(closed, train)
    words = event_wordings([*train, *(prediction.sample for prediction in closed)], wordings)
    places = {id(prediction): place for place, prediction in enumerate(closed)}
    rows = {}
    for each in benchmarks:
        own = [places[id(prediction)] for prediction in _closed(each.predictions)]
        parts = {name: scores[own] for name, scores in systems.items()}
        rows[each.name] = _scores(each.predictions, parts, words, each.groups)
    pooled, known = _scores(predictions, systems, words, groups_of), _closed(seen)
    on_seen = summarise([prediction.sample for prediction in known], {"model": _rights(known)}) if known else None
    return replace(pooled, seen=on_seen, benchmarks=rows)


def _scores(
    predictions: Sequence[Prediction], systems: Mapping[str, Scores], words: Mapping[str, str], groups: Groups
) -> AnswerScores:
    samples = [prediction.sample for prediction in _closed(predictions)]
    captions = [prediction for prediction in predictions if is_caption(prediction.sample)]
    none: dict[str, dict[str, Accuracy]] = {"skill": {}, "duration": {}}  # of captions alone
    return AnswerScores(
        summarise(samples, systems) if samples or not captions else None,
        none | by_group(samples, systems, groups),
        caption_scores(captions, words) if captions else None,
    )


def control_systems(closed: Sequence[Prediction], train: Sequence[Sample]) -> dict[str, Scores]:
    """Scores [N] of the model and of each control that there is, on closed questions."""
    systems: dict[str, Scores] = {"model": _rights(closed)}
    if any(prediction.deaf_text is not None for prediction in closed):
        systems["deaf"] = np.array(
            [np.nan if p.deaf_text is None else p.is_right(p.sample, p.deaf_text) for p in closed], dtype=float
        )
    # Drills do not help a control that is asked other questions: fitted to them too, text-only scored 1.3 points less.
    asked = {prediction.sample.template for prediction in closed}
    alike = [sample for sample in train if sample.template in asked] or train
    if alike:
        systems |= control_scores(alike, [prediction.sample for prediction in closed])
    return systems


def event_wordings(samples: Sequence[Sample], wordings: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Labels by wording, for reading captions: those that identification questions name, and `wordings` of labels.

    A wording counts without its article, so that `a loud dog` names the dog.
    """
    labels = {
        label.lower()
        for sample in samples
        if sample.skill == "identification"
        for label in (*sample.options, sample.answer)
    }
    words = {label: label for label in labels}
    return words | {_ARTICLE.sub("", text.lower()): label for label, texts in wordings.items() for text in texts}


def _closed(predictions: Sequence[Prediction]) -> list[Prediction]:
    return [prediction for prediction in predictions if not is_caption(prediction.sample)]


def _rights(closed: Sequence[Prediction]) -> Scores:
    return np.array([prediction.right for prediction in closed], dtype=float)
