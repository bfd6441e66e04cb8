"""What the words alone give away must be nothing: classifiers that never hear a sound stay at chance."""

from __future__ import annotations

import itertools
from collections import defaultdict

import numpy as np
from composed import blocks
from numpy.typing import NDArray

from af2_ray.config import SceneSet
from af2_ray.synth.captions.by_grammar import captions_of
from af2_ray.synth.scenes import Scene, facts_of
from af2_ray.synth.skills.question import Question
from af2_ray.synth.skills.questions import make_questions
from af2_ray.synth.sounds.bank import Bank
from af2_ray.synth.text.grammar import composition_of

TRAIN = SceneSet(name="text", split="train", num_scenes=1200, duration_s=(5, 30), num_events=(1, 4))
TEST = SceneSet(name="text", split="test", num_scenes=1200, duration_s=(5, 30), num_events=(1, 4))


def hashed(rows: list[list[str]], size: int = 2048) -> NDArray[np.float32]:
    """Bags of strings as vectors, by a hash that is the same in every process."""
    import zlib

    out = np.zeros((len(rows), size), np.float32)
    for row, words in zip(out, rows, strict=True):
        for word in words:
            row[zlib.crc32(word.encode()) % size] = 1
    return out


def ngrams(text: str) -> list[str]:
    words = text.lower().replace("?", "").split()
    return words + [" ".join(pair) for pair in itertools.pairwise(words)]


def fit(x: NDArray[np.float32], y: NDArray[np.intp], num_classes: int, steps: int = 200) -> NDArray[np.float32]:
    """Weights [features, classes] of a logistic regression (full-batch gradient descent with momentum, L2)."""
    weights = np.zeros((x.shape[1], num_classes), np.float32)
    momentum = np.zeros_like(weights)
    target = np.eye(num_classes, dtype=np.float32)[y]
    for _ in range(steps):
        scores = x @ weights
        odds = np.exp(scores - scores.max(1, keepdims=True))
        gradient = x.T @ (odds / odds.sum(1, keepdims=True) - target) / len(x) + 1e-4 * weights
        momentum = 0.9 * momentum - 2.0 * gradient
        weights += momentum
    return weights


def choose(row: NDArray[np.float32], question: Question, names: list[str], seen: dict[str, set[str]]) -> str:
    """The likeliest answer among the options (an open question without: among the answers seen to its template)."""
    allowed = question.options or tuple(seen[question.template])
    known = [name for name in allowed if name in names]
    return max(known, key=lambda name: row[names.index(name)]) if known else ""


def test_questions_cannot_be_answered_from_text_and_duration(bank: Bank) -> None:
    asked: dict[str, list[tuple[Question, Scene]]] = {"train": [], "test": []}
    for scenes in (TRAIN, TEST):
        rng = np.random.default_rng(1)
        for block in blocks(scenes, bank):
            made = make_questions([*map(facts_of, block)], 3, 1, bank.askable(block[0].bed_kind), rng)
            asked[scenes.split] += [(q, block[q.scene]) for q in made if q.skill != "caption"]

    def features(items: list[tuple[Question, Scene]]) -> NDArray[np.float32]:
        return hashed(
            [
                [
                    *ngrams(q.prompt),
                    f"{q.template}:{round(s.duration_s)}",
                    *(f"{q.template}:{w}" for w in ngrams(q.prompt)),
                ]
                for q, s in items
            ]
        )

    names = sorted({q.answer for q, _ in asked["train"]})
    seen: dict[str, set[str]] = defaultdict(set)
    for question, _ in asked["train"]:
        seen[question.template].add(question.answer)
    weights = fit(
        features(asked["train"]), np.array([names.index(q.answer) for q, _ in asked["train"]]), len(names), steps=60
    )
    right: dict[str, list[float]] = defaultdict(list)
    chance: dict[str, list[float]] = defaultdict(list)
    for (question, _), row in zip(asked["test"], features(asked["test"]) @ weights, strict=True):
        right[question.skill].append(choose(row, question, names, seen) == question.answer)
        chance[question.skill].append(1 / (len(question.options) or len(seen[question.template])))
    assert set(right) == {"identification", "order", "counting", "attribute", "grounding"}
    for skill, hits in right.items():
        assert np.mean(hits) <= np.mean(chance[skill]) + 0.05, (skill, np.mean(hits), np.mean(chance[skill]))


def test_positives_and_negatives_are_alike(bank: Bank) -> None:
    rows: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    for scenes in (TRAIN, TEST):
        rng = np.random.default_rng(2)
        for block in blocks(scenes, bank):
            for scene in block:
                truth = composition_of(facts_of(scene))
                made = captions_of(truth, bank.phrases, bank.askable(scene.bed_kind), 3, 3, rng)
                for positive, negatives in zip((made.caption, *made.paraphrases), made.negatives, strict=True):
                    # as many negatives as positives, so that chance is one half
                    rows[scenes.split] += [(positive, 1), (str(rng.choice(negatives)), 0)]
    x, y = (hashed([ngrams(text) for text, _ in rows["train"]]), np.array([label for _, label in rows["train"]]))
    weights = fit(x, y, 2, steps=100)
    guess = (hashed([ngrams(text) for text, _ in rows["test"]]) @ weights).argmax(1)
    assert np.mean(guess == np.array([label for _, label in rows["test"]])) <= 0.55
