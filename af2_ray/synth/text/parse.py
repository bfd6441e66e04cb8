"""Captions read back: those of the grammar exactly, and those that people wrote as far as the grammar goes.

A caption like `a loud dog followed by two people talking while it rains` says which sounds there are by its joins
alone; what stands between two joins is taken as one sound, whatever it says. So paraphrases and wrong captions of a
manifest without any truth come from the same code as those of composed scenes (`captions.by_grammar`), and are as
alike. The price is what no join says: a caption of one sound can only be wrong about which sound it is.
"""

from __future__ import annotations

import re
from functools import lru_cache

from af2_ray.synth.facts import PARTS
from af2_ray.synth.text.grammar import FRAMES, JOINS, TIMES, TOGETHER, Composition, Item, Phrases, write_item

_BACKWARDS = re.compile(r",? (?:preceded by|after) ")
_FORWARDS = re.compile(r",? (?:and )?(?:followed by|then|before) |,? and then ")
_TOGETHER = re.compile(r",? (?:while|with|as) ")
_MAX_SOUNDS = 16


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
        write_item(Item(label, attribute), phrase): Item(label, attribute)
        for label, both in phrases
        for phrase in both
        for attribute in attributes
    }


def read_caption(text: str) -> tuple[Composition, Phrases]:
    """What a caption says, and the phrases of its sounds (each its own label).

    Raises:
        ValueError: it is empty, names one sound twice, or joins sounds both forwards and backwards in time.
    """
    plain = " ".join(text.strip().rstrip(".").split())
    plain = plain[:1].lower() + plain[1:]
    for frame in FRAMES[1:]:
        plain = plain.removeprefix(frame)
    if not plain:
        raise ValueError("the caption is empty")
    backwards = _BACKWARDS.split(plain)
    forwards = _FORWARDS.split(plain)
    if len(backwards) > 1 and len(forwards) > 1:
        raise ValueError(f"{text!r} joins sounds both forwards and backwards in time: which comes first is not said")
    groups = backwards[::-1] if len(backwards) > 1 else forwards
    composition = tuple(
        tuple(sorted((_item(name) for name in _TOGETHER.split(group)), key=lambda item: item.label)) for group in groups
    )
    labels = [item.label for group in composition for item in group]
    if len(set(labels)) < len(labels):
        raise ValueError(f"{text!r} names one sound twice: what would be changed is not clear")
    if len(labels) > _MAX_SOUNDS:
        raise ValueError(f"{text!r} has {len(labels)} sounds, more than {_MAX_SOUNDS}")
    return composition, {label: (label, label) for label in labels}


def _item(name: str) -> Item:
    """A sound and its attribute, if it is one that the grammar can change."""
    for number, word in TIMES.items():
        if name.endswith(f" {word}"):
            return Item(name.removesuffix(f" {word}"), str(number))
    for word in ("louder", "softer"):
        if name.endswith(f" getting {word}"):
            return Item(name.removesuffix(f" getting {word}"), word)
    for part in PARTS:
        tail = f" {'in' if part == 'middle' else 'at'} the {part}"
        if name.endswith(tail):
            return Item(name.removesuffix(tail), part)
    words = name.split(" ")
    for word in ("loud", "soft"):
        if words[0] == word and len(words) > 1:
            return Item(" ".join(words[1:]), word)
        if len(words) > 2 and words[0] in ("a", "an") and words[1] == word:
            return Item(" ".join(("a", *words[2:])), word)
    if not name.strip():
        raise ValueError("a join has nothing on one side")
    return Item(name)
