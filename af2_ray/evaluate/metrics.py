"""Accuracy by skill and duration with intervals, over questions that come in counterbalanced pairs.

Questions that share a recording or a counterbalanced pair stand or fall together, so the bootstrap resamples all that
hangs together so (`intervals.question_units`), not questions: the interval is wider and honest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from af2_ray.data.samples import Sample
from af2_ray.evaluate.answers import DURATION_BANDS, Groups, Prediction, normalise_answer
from af2_ray.evaluate.intervals import question_units

Scores = NDArray[np.float64]
"""[N] one value a question: 1 right, 0 wrong, a probability for chance, NaN where a system gave no answer."""

CONTROLS = ("deaf", "majority", "text_only")

_BAND_PLACES = {name: place for place, (name, _) in enumerate(DURATION_BANDS)}


Row = dict[str, Any]
"""Right answers of every system over some questions, as metrics.json has them.

`questions` is their number and `pairs` the share of complete pairs with both right (none without a pair). Each system
(`model`, CONTROLS, `chance`) has its share of right answers, none where it answered no question, and in `ci95` the 95 %
interval [low, high] of that. With a control there are `best_control`, and `above_best_control` with its interval
`above_best_control_ci95`: how far the model is above it.
"""


def middle95(resampled: Scores) -> list[float]:
    """[low, high]: the middle 95 % of resampled values."""
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return [round(float(low), 4), round(float(high), 4)]


def mean_score(scores: Scores) -> float | None:
    """Mean over the questions that were answered; None when there are none."""
    return round(float(np.nanmean(scores)), 4) if np.isfinite(scores).any() else None


class Bootstrap:
    """Resampled means of any system over the same draws of units, so that differences are paired too."""

    def __init__(self, samples: Sequence[Sample], *, num_draws: int = 2000, seed: int = 0) -> None:
        self.unit = question_units(samples)
        self.num_units = int(self.unit.max(initial=-1)) + 1
        rng = np.random.default_rng(seed)
        self.draws = rng.multinomial(self.num_units, np.full(self.num_units, 1 / max(1, self.num_units)), num_draws)

    def means(self, scores: Scores) -> Scores:
        """[R] the mean of `scores` [N] in each of R draws."""
        answered = np.isfinite(scores)
        total = np.bincount(self.unit, np.where(answered, scores, 0.0), self.num_units)
        count = np.bincount(self.unit, answered, self.num_units)
        with np.errstate(invalid="ignore"):
            return np.asarray((self.draws @ total) / (self.draws @ count))


def pair_accuracy(samples: Sequence[Sample], right: Scores) -> float | None:
    """Share of complete pairs with both questions right; None without a pair."""
    members: dict[str, list[float]] = {}
    for sample, value in zip(samples, right, strict=True):
        if sample.pair:
            members.setdefault(sample.pair, []).append(float(value))
    both = [all(value == 1 for value in values) for values in members.values() if len(values) == 2]
    return round(float(np.mean(both)), 4) if both else None


def summarise(samples: Sequence[Sample], systems: Mapping[str, Scores]) -> Row:
    """Accuracy of every system over all questions, with intervals, and how far the model is above the best control.

    Args:
        samples: N questions (captions left out).
        systems: scores [N] of `model`, of any of CONTROLS and of `chance`.

    Raises:
        ValueError: no questions.
    """
    if not samples:
        raise ValueError("no questions to score: the manifests hold only captions, or every clip was set aside")
    bootstrap = Bootstrap(samples)
    resampled = {name: bootstrap.means(scores) for name, scores in systems.items()}
    row: Row = {"questions": len(samples), "pairs": pair_accuracy(samples, systems["model"])}
    row |= {name: mean_score(scores) for name, scores in systems.items()}
    row["ci95"] = {name: middle95(values) for name, values in resampled.items() if row[name] is not None}
    if controls := [name for name in CONTROLS if row.get(name) is not None]:
        best = max(controls, key=lambda name: row[name])
        # The best control is chosen anew in each draw: the interval then includes the luck of that choice.
        ahead = resampled["model"] - np.nanmax([resampled[name] for name in controls], axis=0)
        row |= {
            "best_control": best,
            "above_best_control": round(row["model"] - row[best], 4),
            "above_best_control_ci95": middle95(ahead),
        }
    return row


def by_group(samples: Sequence[Sample], systems: Mapping[str, Scores], groups_of: Groups) -> dict[str, dict[str, Row]]:
    """`summarise` of each group, by what divides them (`skill`, `duration`); by name, durations from short to long."""
    return {
        division: {
            name: summarise([samples[i] for i in own], {key: scores[own] for key, scores in systems.items()})
            for name, own in named.items()
        }
        for division, named in group_places(samples, groups_of).items()
    }


def group_places(samples: Sequence[Sample], groups_of: Groups) -> dict[str, dict[str, list[int]]]:
    """Places of each group's questions, by what divides them; groups by name, durations from short to long."""
    indices: dict[str, dict[str, list[int]]] = {}
    for index, sample in enumerate(samples):
        for division, group in groups_of(sample).items():
            indices.setdefault(division, {}).setdefault(group, []).append(index)
    return {
        division: dict(sorted(groups.items(), key=lambda item: (_BAND_PLACES.get(item[0], 0), item[0])))
        for division, groups in indices.items()
    }


# --- Captions ------------------------------------------------------------------------------------------------------


def event_mentions(text: str, words: Mapping[str, str]) -> list[str]:
    """The labels of the events that `text` names, in the order of their first mention.

    Args:
        text: words of a question or an answer.
        words: labels by wording; a longer wording wins over one that is a part of it (`snare drum` over `drum`).
    """
    rest, found = f" {normalise_answer(text)} ", dict[str, int]()
    for wording in sorted(words, key=len, reverse=True):
        part = f" {normalise_answer(wording)} "
        while part.strip() and (position := rest.find(part)) >= 0:
            label = words[wording]
            found[label] = min(position, found.get(label, position))
            rest = rest.replace(part, f" {'#' * (len(part) - 2)} ", 1)
    return sorted(found, key=lambda label: found[label])


def caption_scores(predictions: Sequence[Prediction], words: Mapping[str, str]) -> dict[str, Any]:
    """How well captions name the events, with their own clip and with another.

    Args:
        predictions: answers to caption questions.
        words: labels of events, by wording.

    Returns:
        captions, their number; `event_f1`, micro F1 of the labels named (none where none is named or true), and
        `deaf_event_f1`, the same when another clip was heard; `same_events`, the share that names all events and no
        other; `exact`, the share in exactly the true words.
    """

    def named(text: str) -> set[str]:
        return set(event_mentions(text, words))

    true = [named(prediction.sample.answer) for prediction in predictions]
    given = [named(prediction.text) for prediction in predictions]
    deaf = [(named(p.deaf_text), want) for p, want in zip(predictions, true, strict=True) if p.deaf_text is not None]
    same = [a == b for a, b in zip(given, true, strict=True)]
    return {
        "captions": len(predictions),
        "event_f1": micro_f1(given, true),
        "deaf_event_f1": micro_f1([a for a, _ in deaf], [b for _, b in deaf]),
        "same_events": round(float(np.mean(same)), 4),
        "exact": round(float(np.mean([p.right for p in predictions])), 4),
    }


def micro_f1(given: Sequence[set[str]], true: Sequence[set[str]]) -> float | None:
    """Harmonic mean of precision and recall over all sets together; None where both are empty."""
    hits = sum(len(a & b) for a, b in zip(given, true, strict=True))
    total = sum(map(len, given)) + sum(map(len, true))
    return round(2 * hits / total, 4) if total else None
