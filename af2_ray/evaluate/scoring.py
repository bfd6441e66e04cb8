"""Answers to scores: all questions pooled, and a row for each benchmark, beside the controls.

The controls are fitted once, on the training questions like those asked anywhere, so that rows can be compared.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from af2_ray.data.samples import Sample
from af2_ray.evaluate.answers import Groups, Prediction, groups_of, is_caption
from af2_ray.evaluate.controls import control_scores
from af2_ray.evaluate.metrics import CONTROLS, Row, Scores, by_group, caption_scores, summarise

_ARTICLE = re.compile(r"^(an?|the) ")


@dataclass(frozen=True)
class Answered:
    """The predictions of one benchmark, and how it groups them."""

    predictions: list[Prediction]
    groups: Groups


def score(
    predictions: Sequence[Prediction],
    train: Sequence[Sample] = (),
    seen: Sequence[Prediction] = (),
    wordings: Mapping[str, Sequence[str]] = MappingProxyType({}),
    benchmarks: Mapping[str, Answered] = MappingProxyType({}),
) -> dict[str, Any]:
    """Everything that is measured of predictions: the `details` of metrics.json.

    Args:
        predictions: answers on clips that no training saw.
        train: training questions, on which the controls are fitted.
        seen: answers on new scenes of training clips.
        wordings: texts by which captions may name a label; the label itself always counts.
        benchmarks: the same predictions by benchmark, a row each.

    Returns:
        Rows (`metrics.Row`): `all` (not of captions alone), `by_skill` and `by_duration`, each a row a group, and
        `seen`; `captions` (`caption_scores`); `by_benchmark`, the same of each alone, by its own groups.

    Raises:
        ValueError: no predictions.
    """
    closed = _closed(predictions)
    systems = control_systems(closed, train)
    words = event_wordings([*train, *(prediction.sample for prediction in closed)], wordings)
    details = _details(predictions, systems, words, groups_of)
    if known := _closed(seen):
        details["seen"] = summarise([prediction.sample for prediction in known], {"model": _rights(known)})
    places = {id(prediction): place for place, prediction in enumerate(closed)}
    for name, each in benchmarks.items():
        own = [places[id(prediction)] for prediction in _closed(each.predictions)]
        parts = {system: scores[own] for system, scores in systems.items()}
        details.setdefault("by_benchmark", {})[name] = _details(each.predictions, parts, words, each.groups)
    return details


def _details(
    predictions: Sequence[Prediction], systems: Mapping[str, Scores], words: Mapping[str, str], groups: Groups
) -> dict[str, Any]:
    samples = [prediction.sample for prediction in _closed(predictions)]
    captions = [prediction for prediction in predictions if is_caption(prediction.sample)]
    found: dict[str, dict[str, Row]] = {"skill": {}, "duration": {}} | by_group(
        samples, systems, groups
    )  # empty of captions alone
    details: dict[str, Any] = {f"by_{division}": rows for division, rows in found.items()}
    if samples or not captions:
        details["all"] = summarise(samples, systems)
    if captions:
        details["captions"] = caption_scores(captions, words)
    return details


def summary_of(details: Mapping[str, Any]) -> dict[str, Any]:
    """The `accuracy` block of summary.json, from what `score` found."""
    if "all" not in details:
        return {"questions": 0}
    row, seen = details["all"], details.get("seen")
    return {
        "all": row["model"],
        "pairs": row["pairs"],
        **{name: row.get(name) for name in CONTROLS},
        "questions": row["questions"],
        "ci95": row.get("above_best_control_ci95"),
        **{key: {name: group["model"] for name, group in details[key].items()} for key in ("by_skill", "by_duration")},
        "seen_clips": seen["model"] if seen else None,
    }


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
