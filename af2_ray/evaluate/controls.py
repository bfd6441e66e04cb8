"""What a listener without ears would score: the deaf model, the majority answer, a classifier on words alone.

A score says something about hearing only beside these three. The deaf control is the model itself with another clip in
place of the right one; the other two are fitted on the training questions and never see audio. All are deterministic.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import torch

from af2_ray.data.samples import Sample
from af2_ray.evaluate.answers import duration_band, is_caption, normalise_answer, question_words
from af2_ray.evaluate.metrics import Scores, event_mentions

MOST_CANDIDATES = 64  # of an open question


def deaf_pairs(samples: Sequence[Sample]) -> dict[int, int]:
    """For each question the index of a sample whose clip is played instead: same duration band and skill, other answer.

    The partner of a counterbalanced pair is left out where another clip will do: it is built to make the opposite
    answer true, so a model that hears would be wrong every time and the control would look weaker than guessing.
    Where the band and skill hold no such clip, first the band, then the skill is given up; a question for which no
    other clip has another answer is left out.
    """
    pools: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        for key in _pool_keys(sample):
            pools[key].append(index)
    chosen: dict[int, int] = {}
    for index, sample in enumerate(samples):
        candidates = (pools[key] for key in _pool_keys(sample))
        other = next((found for pool in candidates if (found := _pick(samples, index, pool)) is not None), None)
        if other is not None:
            chosen[index] = other
    return chosen


def _pool_keys(sample: Sample) -> tuple[tuple[str, ...], ...]:
    band = duration_band(sample.duration_s)
    return (("both", band, sample.skill), ("skill", sample.skill), ("all",))


def _pick(samples: Sequence[Sample], index: int, pool: Sequence[int]) -> int | None:
    """The first fitting sample of `pool`, starting at a place drawn from the question's id."""
    asked = samples[index]
    start = zlib.crc32(asked.id.encode()) % len(pool)
    partner = None
    for other in (*pool[start:], *pool[:start]):
        sample = samples[other]
        hears_it = not set(asked.stretches).isdisjoint(sample.stretches)
        if hears_it or normalise_answer(sample.answer) == normalise_answer(asked.answer):
            continue
        if asked.pair and sample.pair == asked.pair:
            partner = other
            continue
        return other
    return partner


class KnownAnswers:
    """The answers that training questions of a template had: what a guess is drawn from."""

    def __init__(self, train: Iterable[Sample]) -> None:
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        for sample in train:
            self.counts[_template(sample)][normalise_answer(sample.answer)] += 1

    def candidates(self, sample: Sample) -> list[str]:
        """The options of a multiple-choice question; of an open one the known answers, most frequent first.

        An open question that names two or more of them (`louder or softer?`) is a choice between those.
        """
        if sample.options:
            return [normalise_answer(option) for option in sample.options]
        answers = [answer for answer, _ in self.counts[_template(sample)].most_common(MOST_CANDIDATES)]
        named = event_mentions(sample.prompt, {answer: answer for answer in answers})
        return named if len(named) > 1 else answers

    def majority(self, sample: Sample) -> str:
        """The most frequent candidate; the first of equals; empty for an open template never seen."""
        counts = self.counts[_template(sample)]
        return max(self.candidates(sample), key=lambda answer: counts[answer], default="")

    def chance(self, sample: Sample) -> float:
        """Probability that a blind guess among the candidates is right."""
        return 1 / max(1, len(self.candidates(sample)))


def _template(sample: Sample) -> str:
    return sample.template or sample.skill


class TextOnly:
    """Conditional logistic regression that picks among the candidates from words, options and duration.

    Features are hashed n-grams crossed with the candidate; one weight each. Fitted by full-batch Adam; the number of
    steps is the one that scores best on a held-out tenth of the pairs, so that the control is as strong as it can be.
    """

    num_bins = 1 << 18

    def __init__(self, train: Sequence[Sample], known: KnownAnswers, *, max_steps: int = 60, lr: float = 0.05) -> None:
        self.known = known
        self.weight = torch.zeros(self.num_bins)
        usable = [s for s in train if normalise_answer(s.answer) in known.candidates(s)]
        held_out = [s for s in usable if zlib.crc32((s.pair or s.id).encode()) % 10 == 0]
        fitted = [s for s in usable if zlib.crc32((s.pair or s.id).encode()) % 10 != 0]
        if fitted and held_out:
            self._fit(fitted, held_out, max_steps, lr)

    def answers(self, samples: Sequence[Sample]) -> list[str]:
        """The best-scoring candidate of each question; empty where there is none."""
        if not samples:
            return []
        best = self._scores(*self._tensors(samples), self.weight).argmax(dim=1).tolist()
        named = [self.known.candidates(sample) for sample in samples]
        return [candidates[index] if candidates else "" for candidates, index in zip(named, best, strict=True)]

    def _fit(self, fitted: Sequence[Sample], held_out: Sequence[Sample], max_steps: int, lr: float) -> None:
        inputs, target = self._tensors(fitted), self._targets(fitted)
        test_inputs, test_target = self._tensors(held_out), self._targets(held_out)
        weight = torch.zeros(self.num_bins, requires_grad=True)
        optimizer = torch.optim.Adam([weight], lr=lr)
        best = -1.0
        for _ in range(max_steps):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(self._scores(*inputs, weight), target).backward()
            optimizer.step()
            with torch.no_grad():
                scored = (self._scores(*test_inputs, weight).argmax(1) == test_target).double().mean().item()
            if scored > best:
                best, self.weight = scored, weight.detach().clone()

    def _targets(self, samples: Sequence[Sample]) -> torch.Tensor:
        return torch.tensor([self.known.candidates(s).index(normalise_answer(s.answer)) for s in samples])

    def _tensors(self, samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hashed features of all candidates, flat; where each candidate begins; its (question, place) [num, 2]."""
        features: list[int] = []
        starts: list[int] = []
        places: list[tuple[int, int]] = []
        for row, sample in enumerate(samples):
            candidates = self.known.candidates(sample) or [""]
            words = _ngrams(question_words(sample))
            for place in range(len(candidates)):
                starts.append(len(features))
                places.append((row, place))
                features += [
                    zlib.crc32(f.encode()) % self.num_bins for f in _features(sample, words, candidates, place)
                ]
        return torch.tensor(features), torch.tensor(starts), torch.tensor(places)

    @staticmethod
    def _scores(
        features: torch.Tensor, starts: torch.Tensor, places: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """[N, K] a score a candidate; -inf where a question has fewer than K."""
        flat = torch.nn.functional.embedding_bag(features, weight[:, None], starts, mode="sum")[:, 0]
        num_rows, num_places = (places.max(dim=0).values + 1).tolist()
        return torch.full((num_rows, num_places), -torch.inf).index_put((places[:, 0], places[:, 1]), flat)


def _ngrams(text: str) -> list[str]:
    words = normalise_answer(text).split()
    return words + [" ".join(pair) for pair in pairwise(words)]


def _features(sample: Sample, words: Sequence[str], candidates: Sequence[str], place: int) -> list[str]:
    candidate, template = candidates[place], _template(sample)
    half_octave = round(2 * math.log2(max(1.0, sample.duration_s)))
    found = [f"{word}|{candidate}" for word in words]
    found += [f"bias|{candidate}", f"template|{template}|{candidate}", f"long|{half_octave}|{template}|{candidate}"]
    if sample.options:
        found += [f"place|{place}|{len(candidates)}|{template}", f"letters|{len(candidate)}"]
        found += [f"beside|{other}|{candidate}" for other in candidates if other != candidate]
    return found


def control_scores(train: Sequence[Sample], test: Sequence[Sample]) -> dict[str, Scores]:
    """Scores [N] of `majority`, `text_only` and `chance` on the closed test questions, fitted on the training ones."""
    closed = [sample for sample in train if not is_caption(sample)]
    known = KnownAnswers(closed)
    text_only = TextOnly(closed, known).answers(test)
    wanted = [normalise_answer(sample.answer) for sample in test]
    return {
        "majority": np.array([known.majority(s) == w for s, w in zip(test, wanted, strict=True)], dtype=float),
        "text_only": np.array([a == w for a, w in zip(text_only, wanted, strict=True)], dtype=float),
        "chance": np.array([known.chance(sample) for sample in test], dtype=float),
    }
