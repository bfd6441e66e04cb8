"""Two models on the same questions: both accuracies, and their paired difference with its 95 % interval.

A question is right or wrong by its benchmark's rule (`Prediction.right`), whether it has options or not. Captions have
no one right wording: they are left out of the accuracies and scored beside them, as in an evaluation. The interval is
that of the mean over questions of (right after - right before), with all questions about one recording and all of one
pair as one unit (`intervals.question_units`). Where all units changed alike that interval has no
width, which does not mean that it is certain.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, zip_longest
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from af2_ray.data.samples import Sample
from af2_ray.evaluate.answers import Groups, Prediction, groups_of, is_caption
from af2_ray.evaluate.intervals import Units, interval95, question_units
from af2_ray.evaluate.metrics import Scores, caption_scores, group_places
from af2_ray.evaluate.scoring import event_wordings

Interval = tuple[float, float]
"""[low, high], 95 %."""

Pair = tuple[Prediction, Prediction]
"""One question as it was answered before and after."""


@dataclass(frozen=True)
class PairedRow:
    """Some questions, answered before and after.

    Attributes:
        questions: number of them that both sides answered.
        before, after: shares of right answers.
        before_ci95, after_ci95: intervals of these; none with a single unit, as for the next.
        change: difference after - before.
        change_ci95: interval of the paired difference.
        better: number of questions that were wrong before and are right after.
        worse: number of those that were right before and are wrong after.
        same: number of the others.
        chance: share that a blind guess among the options gets right; none if a question has no options.
    """

    questions: int
    before: float
    after: float
    before_ci95: Interval | None
    after_ci95: Interval | None
    change: float
    change_ci95: Interval | None
    better: int
    worse: int
    same: int
    chance: float | None


@dataclass(frozen=True)
class ChangedAnswer:
    """A question whose answer changed.

    Attributes:
        sample: question with its true answer.
        before, after: answers of the two models.
    """

    sample: Sample
    before: str
    after: str

    def to_json(self) -> dict[str, Any]:
        """A flat row."""
        sample = self.sample
        return {
            "id": sample.id,
            "uri": sample.uri,
            "offset_s": sample.offset_s,
            "duration_s": sample.duration_s,
            "skill": sample.skill,
            "question": sample.prompt,
            "options": list(sample.options),
            "expected": sample.answer,
            "before": self.before,
            "after": self.after,
        }


@dataclass(frozen=True)
class Comparison:
    """Two models on the same questions.

    Attributes:
        all: row of all questions but captions; none without any.
        by_skill: rows by skill, by name.
        by_duration: rows by duration band, from short to long.
        captions: scores of the captions (`metrics.caption_scores`) by `before` and `after`; none without captions.
        only_before, only_after: numbers of questions that only one side answered; they count nowhere else.
        better, worse: examples of answers that became right, and that became wrong, taken from all skills in turn.
        rewritten: examples of captions that changed.
    """

    all: PairedRow | None
    by_skill: Mapping[str, PairedRow]
    by_duration: Mapping[str, PairedRow]
    captions: Mapping[str, Mapping[str, Any]] | None = None
    only_before: int = 0
    only_after: int = 0
    better: tuple[ChangedAnswer, ...] = field(default=(), repr=False)
    worse: tuple[ChangedAnswer, ...] = field(default=(), repr=False)
    rewritten: tuple[ChangedAnswer, ...] = field(default=(), repr=False)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain JSON."""
        return {
            "all": asdict(self.all) if self.all else None,
            "by_skill": {name: asdict(row) for name, row in self.by_skill.items()},
            "by_duration": {name: asdict(row) for name, row in self.by_duration.items()},
            "captions": None if self.captions is None else {side: dict(row) for side, row in self.captions.items()},
            "only_before": self.only_before,
            "only_after": self.only_after,
            "better": [answer.to_json() for answer in self.better],
            "worse": [answer.to_json() for answer in self.worse],
            "rewritten": [answer.to_json() for answer in self.rewritten],
        }


def compare(
    before: Iterable[Prediction],
    after: Iterable[Prediction],
    *,
    groups: Groups = groups_of,
    wordings: Mapping[str, Sequence[str]] = MappingProxyType({}),
    num_examples: int = 10,
) -> Comparison:
    """Compare the answers of two models to the same questions.

    Args:
        before, after: answers of the one and of the other, in any order; a question that stands twice counts once.
        groups: skill and duration band of a question.
        wordings: texts by which captions may name a label, for their event F1; the label itself always counts.
        num_examples: number of changed answers kept of each kind.
    """
    first, second = ({prediction.sample: prediction for prediction in side} for side in (before, after))
    pairs = [(prediction, second[sample]) for sample, prediction in first.items() if sample in second]
    closed = [pair for pair in pairs if not is_caption(pair[0].sample)]
    captions = [pair for pair in pairs if is_caption(pair[0].sample)]
    samples = [one.sample for one, _ in closed]
    rights = np.array([[one.right, other.right] for one, other in closed], dtype=float).reshape(-1, 2).T
    units = question_units(samples)
    rows: dict[str, dict[str, PairedRow]] = {
        division: {name: _row([samples[i] for i in own], rights[:, own], units[own]) for name, own in named.items()}
        for division, named in group_places(samples, groups).items()
    }
    words = event_wordings(samples, wordings)
    return Comparison(
        all=_row(samples, rights, units) if closed else None,
        by_skill=rows.get("skill", {}),
        by_duration=rows.get("duration", {}),
        captions=_caption_scores(captions, words) if captions else None,
        only_before=len(first) - len(pairs),
        only_after=len(second) - len(pairs),
        better=_examples([pair for pair in closed if pair[1].right > pair[0].right], groups, num_examples),
        worse=_examples([pair for pair in closed if pair[1].right < pair[0].right], groups, num_examples),
        rewritten=_examples([pair for pair in captions if pair[0].text != pair[1].text], groups, num_examples),
    )


def _row(samples: Sequence[Sample], rights: Scores, units: Units) -> PairedRow:
    """The row of N questions; `rights` [2, N] holds 1 where the answer before, and after, is right."""
    own = np.unique(units, return_inverse=True)[1]
    change = rights[1] - rights[0]
    better, worse = int((change > 0).sum()), int((change < 0).sum())
    return PairedRow(
        questions=len(samples),
        before=float(rights[0].mean()),
        after=float(rights[1].mean()),
        before_ci95=_interval(rights[0], own, 0.0),
        after_ci95=_interval(rights[1], own, 0.0),
        change=float(change.mean()),
        change_ci95=_interval(change, own, -1.0),
        better=better,
        worse=worse,
        same=len(samples) - better - worse,
        chance=chance(samples),
    )


def _interval(values: NDArray[np.float64], units: Units, least: float) -> Interval | None:
    """The interval of a mean of values in [least, 1], cut to what is possible."""
    found = interval95(values[None], units)
    return found and (max(least, found[0]), min(1.0, found[1]))


def chance(samples: Sequence[Sample]) -> float | None:
    """Share that a blind guess among the options gets right; none if a question has no options, or there is none."""
    if not samples or not all(sample.options for sample in samples):
        return None
    return float(np.mean([1 / len(sample.options) for sample in samples]))


def _caption_scores(captions: Sequence[Pair], words: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    sides = ("before", [one for one, _ in captions]), ("after", [other for _, other in captions])
    return {side: caption_scores(predictions, words) for side, predictions in sides}


def _examples(changed: Sequence[Pair], groups: Groups, count: int) -> tuple[ChangedAnswer, ...]:
    """At most `count`, one of each skill in turn; of a skill each recording once, then each a second time."""
    times: Counter[tuple[str, str]] = Counter()
    by_skill: dict[str, list[tuple[int, ChangedAnswer]]] = defaultdict(list)
    for one, other in changed:
        skill, uri = groups(one.sample).get("skill", ""), one.sample.uri
        by_skill[skill].append((times[skill, uri], ChangedAnswer(one.sample, one.text, other.text)))
        times[skill, uri] += 1
    ordered = [sorted(own, key=lambda item: item[0]) for _, own in sorted(by_skill.items())]
    taken = [item[1] for item in chain.from_iterable(zip_longest(*ordered)) if item]
    return tuple(taken[:count])
