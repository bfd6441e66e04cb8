"""Captions that people wrote, read by the corpus's grammar as far as it goes: sounds, their order, one attribute each.

A caption like `a loud dog followed by two people talking while it rains` says which sounds there are by its joins
alone; what stands between two joins is taken as one sound, whatever it says. So paraphrases and wrong captions of a
manifest without any truth come from the same code as those of composed scenes (`captions.captions_of`), and are as
alike. The price is what no join tells: a caption of one sound can only be wrong about which sound it is.
"""

from __future__ import annotations

import re

from af2_ray.synth.scenes import PARTS
from af2_ray.synth.text.grammar import FRAMES, TIMES, Composition, Item, Phrases

_BACKWARDS = re.compile(r",? (?:preceded by|after) ")
_FORWARDS = re.compile(r",? (?:and )?(?:followed by|then|before) |,? and then ")
_TOGETHER = re.compile(r",? (?:while|with|as) ")
_MAX_SOUNDS = 16


def read_caption(text: str) -> tuple[Composition, Phrases]:
    """What a caption says, and the phrases of its sounds (each its own label).

    Raises:
        ValueError: it is empty, names one sound twice, or joins sounds both forwards and backwards in time.
    """
    told = " ".join(text.strip().rstrip(".").split())
    told = told[:1].lower() + told[1:]
    for frame in FRAMES[1:]:
        told = told.removeprefix(frame)
    if not told:
        raise ValueError("the caption is empty")
    backwards = _BACKWARDS.split(told)
    forwards = _FORWARDS.split(told)
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
