"""Captions in a small grammar: which sounds, in which order, with which attribute, and how that is worded.

A caption is a COMPOSITION (sounds, order, attributes) in a STYLE (wording). The grammar is regular: `parse.parse` reads
back what `realise` wrote. The price is plain English: 4 openings, 5 joins, 2 phrases a class.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from af2_ray.synth.facts import PARTS, Facts, Sound

Phrases = Mapping[str, Sequence[str]]
NUMBERS = ("one", "two", "three", "four")
TIMES = {1: "once", 2: "twice", 3: "three times", 4: "four times"}
JOINS = (" followed by ", " then ", " before ", " and then ", " after ")  # the last one goes backwards in time
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


def composition_of(facts: Facts) -> Composition:
    """What a clip's caption says."""
    groups: list[tuple[Item, ...]] = []
    for sound in facts.sounds:
        item = Item(sound.label, sound.attribute)
        if facts.together and item.label in facts.focus and groups and groups[-1][0].label in facts.focus:
            groups[-1] = tuple(sorted((*groups[-1], item), key=lambda i: i.label))
        else:
            groups.append((item,))
    return tuple(groups)


def realise(composition: Composition, style: Style, phrases: Phrases) -> str:
    """Write a composition down in a style."""
    numbers = iter(style.phrases)
    groups = [
        TOGETHER[style.together].join(write_item(item, phrases[item.label][next(numbers)]) for item in group)
        for group in composition
    ]
    join = JOINS[style.join]
    return FRAMES[style.frame] + join.join(reversed(groups) if join == " after " else groups)


def write_item(item: Item, phrase: str) -> str:
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


def is_true(composition: Composition, facts: Facts) -> bool:
    """Whether a caption is true of a clip: its sounds are there, in this order, with these attributes.

    Raises:
        ValueError: the clip's facts do not say when a sound is heard.
    """
    known = {sound.label: sound for sound in facts.sounds}
    items = [item for group in composition for item in group]
    if any(item.label not in known for item in items):
        return False
    spans = [[_span(known[item.label]) for item in group] for group in composition]
    if any(max(end for _, end in a) > min(start for start, _ in b) for a, b in itertools.pairwise(spans)):
        return False
    if any(len(group) > 1 and max(s for s, _ in group) >= min(e for _, e in group) for group in spans):
        return False
    levels = {label: float(np.mean(sound.gains_db)) for label, sound in known.items()}
    for item in items:
        sound = known[item.label]
        change_db = sound.gains_db[-1] - sound.gains_db[0]
        true = {
            "": True,
            "loud": levels[item.label] == max(levels.values()),
            "soft": levels[item.label] == min(levels.values()),
            "louder": change_db > 3,
            "softer": change_db < -3,
            **{part: sound.place == part for part in PARTS},
            **{str(number): sound.count == number for number in TIMES},
        }
        if not true[item.attribute]:
            return False
    return True


def _span(sound: Sound) -> tuple[float, float]:
    if sound.span_s is None:
        raise ValueError(f"it is not known when the {sound.label} is heard, so no caption of it can be checked")
    return sound.span_s
