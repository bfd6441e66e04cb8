"""Captions by the grammar: paraphrases, and captions that are wrong in one relation (docs/paper.md, "AF-CLAP").

A positive and its negatives share their wording, and a negative is a composition that is true of some other clip about
equally often, so the text alone cannot tell them apart: a classifier of words stays at 0.55 or less
(`tests/synth/test_shortcuts.py`). An LLM writes more freely (`by_llm`) and costs about two requests a caption.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np

from af2_ray.llm.client import Spent
from af2_ray.synth.captions.sets import Captions
from af2_ray.synth.facts import MAX_COUNT, PARTS
from af2_ray.synth.text.grammar import (
    FRAMES,
    JOINS,
    TOGETHER,
    Composition,
    Item,
    Phrases,
    Style,
    realise,
)
from af2_ray.synth.text.parse import read_caption

Rng = np.random.Generator
RELATIONS = ("order", "binding", "attribute")
MOST_SOUNDS = 4096  # sounds that a wrong caption may name instead
# Loud and soft are in none: they are said of two sounds, and of one alone either may be true.
_FAMILIES = (("louder", "softer"), PARTS, tuple(str(number) for number in range(1, MAX_COUNT + 1)))


def changed(composition: Composition, relation: str, pool: Sequence[str], rng: Rng) -> Composition | None:
    """The composition with exactly one relation changed, or None where it has none of that kind."""
    items = [item for group in composition for item in group]
    if relation == "order":
        return _reordered(composition, rng)
    if relation == "class":
        at = items[int(rng.integers(len(items)))]
        absent = [label for label in pool if label not in {item.label for item in items}]
        return _mapped(composition, {at: replace(at, label=str(rng.choice(absent)))}) if absent else None
    marked = [item for item in items if item.attribute]
    if relation == "binding" and len(marked) == 2:
        first, second = marked
        return _mapped(
            composition,
            {first: replace(first, attribute=second.attribute), second: replace(second, attribute=first.attribute)},
        )
    if relation == "attribute" and len(marked) == 1:
        item = marked[0]
        if len(items) > 1 and item.attribute in PARTS:
            return None  # its place in the sequence says the part already
        family = next((values for values in _FAMILIES if item.attribute in values), ())
        if others := [value for value in family if value != item.attribute]:
            return _mapped(composition, {item: replace(item, attribute=str(rng.choice(others)))})
    return None


def _mapped(composition: Composition, changes: Mapping[Item, Item]) -> Composition:
    groups = (tuple(changes.get(item, item) for item in group) for group in composition)
    return tuple(tuple(sorted(group)) for group in groups)


def _reordered(composition: Composition, rng: Rng) -> Composition | None:
    """Another order in time. What is tied to a place in time (a part) stays; the sounds change places."""
    if len(composition) < 2:
        return None
    order = list(range(len(composition)))
    while order == sorted(order):
        order = [int(index) for index in rng.permutation(len(composition))]
    if not any(item.attribute in PARTS for group in composition for item in group):
        return tuple(composition[index] for index in order)
    labels = [composition[index][0].label for index in order]
    return tuple((replace(group[0], label=label),) for group, label in zip(composition, labels, strict=True))


def captions_of(
    truth: Composition, phrases: Phrases, pool: Sequence[str], num_positives: int, num_negatives: int, rng: Rng
) -> Captions:
    """Caption, M - 1 paraphrases, and N captions with one relation changed for each of these M.

    Args:
        pool: classes that a changed caption may name instead.

    Raises:
        ValueError: the grammar has not that many different wordings or compositions.
    """
    styles, texts = [Style()], [realise(truth, Style(), phrases)]
    for _ in range(200):
        if len(texts) >= num_positives:
            break
        style = _random_style(rng)
        if (text := realise(truth, style, phrases)) not in texts:
            styles.append(style)
            texts.append(text)
    else:
        raise ValueError(f"corpus.num_positives={num_positives}: the grammar has fewer wordings of {texts[0]!r}")
    negatives = []
    for style in styles:
        wrong: dict[str, None] = {}
        for attempt in range(200):
            if len(wrong) >= num_negatives:
                break
            relation = str(rng.choice(RELATIONS)) if attempt < 30 else "class"
            other = changed(truth, relation, pool, rng)
            if other is not None and other != truth:
                wrong[realise(other, style, phrases)] = None
        else:
            raise ValueError(f"corpus.num_negatives={num_negatives}: too few ways to be wrong about {texts[0]!r}")
        negatives.append(tuple(wrong))
    return Captions(texts[0], tuple(texts[1:]), tuple(negatives))


def _random_style(rng: Rng) -> Style:
    return Style(
        int(rng.integers(len(FRAMES))),
        int(rng.integers(len(JOINS))),
        int(rng.integers(len(TOGETHER))),
        tuple(int(bit) for bit in rng.integers(0, 2, 16)),
    )


@dataclass
class GrammarCaptions:
    """Captions of captions by the grammar.

    Args:
        pool: sounds that a wrong caption may name instead.
        num_positives: M of AF-CLAP: the caption and M - 1 paraphrases.
        num_negatives: N of AF-CLAP: wrong captions for each of these M.
        seed: seed of the draws, which are the same for the same number of caption.
        spent: nothing, for this engine is free.
    """

    pool: tuple[str, ...]
    num_positives: int
    num_negatives: int
    seed: int
    spent: Spent = field(default_factory=Spent)

    @classmethod
    def of(cls, captions: Iterable[str], num_positives: int, num_negatives: int, seed: int) -> GrammarCaptions:
        """The engine for these captions: the sounds that it may name instead are theirs."""
        sounds: dict[str, None] = {}
        for caption in captions:
            with suppress(ValueError):  # named when its turn comes
                sounds |= dict.fromkeys(read_caption(caption)[1])
        pool = np.random.default_rng(seed).permutation(sorted(sounds))[:MOST_SOUNDS]
        return cls(tuple(str(sound) for sound in pool), num_positives, num_negatives, seed)

    def __call__(self, caption: str, number: int) -> Captions:
        """The set of caption `number`, drawn anew for each.

        Raises:
            ValueError: the grammar cannot read the caption, or has too few ways to write it.
        """
        composition, phrases = read_caption(caption)
        rng = np.random.default_rng([self.seed, number])
        others = {label: (label, label) for label in self.pool}
        made = captions_of(composition, others | dict(phrases), self.pool, self.num_positives, self.num_negatives, rng)
        return replace(made, caption=caption)
