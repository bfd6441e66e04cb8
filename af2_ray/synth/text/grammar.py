"""Captions in a small grammar: which sounds, in which order, with which attribute, and how that is worded.

A caption is a COMPOSITION (sounds, order, attributes) in a STYLE (wording). The grammar is regular, so a test can read
back what `realise` wrote. The price is plain English: 4 openings, 5 joins, 2 phrases a class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from af2_ray.synth.facts import Facts

Phrases = Mapping[str, Sequence[str]]
NUMBERS = ("one", "two", "three", "four")
TAILS = {  # what an attribute adds after the phrase of its sound; loud and soft stand before it
    "1": " once",
    "2": " twice",
    "3": " three times",
    "4": " four times",
    "louder": " getting louder",
    "softer": " getting softer",
    "beginning": " at the beginning",
    "middle": " in the middle",
    "end": " at the end",
}
JOINS = (" followed by ", " then ", " before ", " and then ", " after ")  # the last one goes backwards in time
TOGETHER = (" while ", " with ")
FRAMES = ("", "we hear ", "the sound of ", "a recording of ")


@dataclass(frozen=True, order=True)
class Item:
    """One sound of a caption. `attribute`: "", loud, soft, or one of `TAILS`."""

    label: str
    attribute: str = ""


Composition = tuple[tuple[Item, ...], ...]  # in time; the items of one group, in order, sound together


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
            groups[-1] = tuple(sorted((*groups[-1], item)))
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
    return phrase + TAILS.get(item.attribute, "")
