"""Captions of scenes in a small grammar, their paraphrases, and captions that are wrong in one relation (PAPER 1).

A caption is a COMPOSITION (which sounds, in which order, with which attribute) in a STYLE (wording). A positive and its
negatives share the style, and a negative is a composition that is true of some other scene about equally often, so the
text alone cannot tell them apart. The grammar is regular: `parse` reads back what `realise` wrote.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from af2_ray.synth.scenes import MAX_COUNT, PARTS, Scene

Phrases = Mapping[str, Sequence[str]]
Rng = np.random.Generator
TIMES = {1: "once", 2: "twice", 3: "three times", 4: "four times"}
JOINS = (" followed by ", " then ", " before ", " and then ", " after ")  # the last one is told backwards
TOGETHER = (" while ", " with ")
FRAMES = ("", "we hear ", "the sound of ", "a recording of ")


@dataclass(frozen=True)
class Item:
    """One sound of a caption. `attribute`: "", a count ("3"), loud, soft, louder, softer, or one of PARTS."""

    label: str
    attribute: str = ""


Composition = tuple[tuple[Item, ...], ...]  # in time; the items of one group sound together


@dataclass(frozen=True)
class Style:
    """Wording: opening, join, join of simultaneous sounds, and which of its two phrases each class gets."""

    frame: int = 0
    join: int = 0
    together: int = 0
    phrases: tuple[int, ...] = (0,) * 16


@dataclass(frozen=True)
class Captions:
    """What AF-CLAP learns from a scene: `negatives[m]` belong to the m-th of (caption, *paraphrases)."""

    caption: str
    paraphrases: tuple[str, ...]
    negatives: tuple[tuple[str, ...], ...]


def composition_of(scene: Scene) -> Composition:
    """What a scene's caption says."""
    attributes: dict[str, str] = {}
    if scene.kind in ("count", "position") or scene.relation in ("louder", "softer"):
        attributes[scene.focus[0]] = scene.relation
    elif scene.kind == "attribute":
        other = "soft" if scene.relation == "loud" else "loud"
        attributes = {scene.focus[0]: scene.relation, scene.focus[1]: other}
    groups: list[tuple[Item, ...]] = []
    for event in scene.events:
        item = Item(event.label, attributes.get(event.label, ""))
        if scene.together and event.label in scene.focus and groups and groups[-1][0].label in scene.focus:
            groups[-1] = tuple(sorted((*groups[-1], item), key=lambda i: i.label))
        else:
            groups.append((item,))
    return tuple(groups)


# --- Wording -----------------------------------------------------------------------------------------------------


def realise(composition: Composition, style: Style, phrases: Phrases) -> str:
    """Write a composition down in a style."""
    numbers = iter(style.phrases)
    groups = [
        TOGETHER[style.together].join(_item(item, phrases[item.label][next(numbers)]) for item in group)
        for group in composition
    ]
    join = JOINS[style.join]
    return FRAMES[style.frame] + join.join(reversed(groups) if join == " after " else groups)


def _item(item: Item, phrase: str) -> str:
    if item.attribute in ("loud", "soft"):
        article, _, noun = phrase.partition(" ")
        return f"a {item.attribute} {noun}" if article in ("a", "an") else f"{item.attribute} {phrase}"
    return phrase + _tail(item.attribute)


def _tail(attribute: str) -> str:
    if attribute in ("", "loud", "soft"):
        return ""
    if attribute in ("louder", "softer"):
        return f" getting {attribute}"
    if attribute in PARTS:
        return f" {'in' if attribute == 'middle' else 'at'} the {attribute}"
    return " " + TIMES[int(attribute)]


def parse(text: str, phrases: Phrases) -> Composition:
    """Read a caption back.

    Raises:
        ValueError: not of this grammar.
    """
    for frame in FRAMES[1:]:
        text = text.removeprefix(frame)
    join = next((join for join in (" and then ", *JOINS) if join in text), JOINS[0])
    groups = text.split(join)
    written = _written(phrases)
    out: list[tuple[Item, ...]] = []
    for group in reversed(groups) if join == " after " else groups:
        together = next((word for word in TOGETHER if word in group), TOGETHER[0])
        names = group.split(together)
        if unknown := [name for name in names if name not in written]:
            raise ValueError(f"{unknown[0]!r} in caption {text!r} is no sound of this corpus")
        out.append(tuple(sorted((written[name] for name in names), key=lambda item: item.label)))
    return tuple(out)


def _written(phrases: Phrases) -> dict[str, Item]:
    """Every way to write every item."""
    return _written_of(tuple((label, tuple(both)) for label, both in phrases.items()))


@lru_cache(maxsize=8)  # one for a corpus: writing it anew took nine tenths of reading a caption
def _written_of(phrases: tuple[tuple[str, tuple[str, ...]], ...]) -> dict[str, Item]:
    attributes = ("", "loud", "soft", "louder", "softer", *PARTS, *map(str, TIMES))
    return {
        _item(Item(label, attribute), phrase): Item(label, attribute)
        for label, both in phrases
        for phrase in both
        for attribute in attributes
    }


def is_true(composition: Composition, scene: Scene) -> bool:
    """Whether a caption is true of a scene: its sounds are there, in this order, with these attributes."""
    events = {event.label: event for event in scene.events}
    items = [item for group in composition for item in group]
    if any(item.label not in events for item in items):
        return False
    onsets = [[events[item.label].span_s for item in group] for group in composition]
    if any(max(end for _, end in a) > min(start for start, _ in b) for a, b in itertools.pairwise(onsets)):
        return False
    if any(len(group) > 1 and max(s for s, _ in group) >= min(e for _, e in group) for group in onsets):
        return False
    levels = {label: float(np.mean(event.gains_db)) for label, event in events.items()}
    for item in items:
        event = events[item.label]
        change_db = event.gains_db[-1] - event.gains_db[0]
        true = {
            "": True,
            "loud": levels[item.label] == max(levels.values()),
            "soft": levels[item.label] == min(levels.values()),
            "louder": change_db > 3,
            "softer": change_db < -3,
            **{part: scene.part_of(event) == part for part in PARTS},
            **{str(number): event.count == number for number in TIMES},
        }
        if not true[item.attribute]:
            return False
    return True


# --- Positives and negatives -------------------------------------------------------------------------------------


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
        if not (others := _others(marked[0].attribute)):
            return None  # loud and soft are told of two sounds only: alone, either may be true
        in_order = len(items) > 1 and marked[0].attribute in PARTS  # its place in the sequence says the part already
        return (
            None
            if in_order
            else _mapped(composition, {marked[0]: replace(marked[0], attribute=str(rng.choice(others)))})
        )
    return None


def _others(attribute: str) -> list[str]:
    """The other values of an attribute."""
    families = (("louder", "softer"), PARTS, tuple(str(number) for number in range(1, MAX_COUNT + 1)))
    return [value for family in families if attribute in family for value in family if value != attribute]


def _mapped(composition: Composition, changes: Mapping[Item, Item]) -> Composition:
    groups = (tuple(changes.get(item, item) for item in group) for group in composition)
    return tuple(tuple(sorted(group, key=lambda item: item.label)) for group in groups)


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


RELATIONS = ("order", "binding", "attribute")


def make_captions(
    scene: Scene, phrases: Phrases, pool: Sequence[str], num_positives: int, num_negatives: int, rng: Rng
) -> Captions:
    """The captions of a scene, from its truth (`captions_of`)."""
    return captions_of(composition_of(scene), phrases, pool, num_positives, num_negatives, rng)


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
