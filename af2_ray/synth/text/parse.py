"""Captions that people wrote, read as far as the grammar goes.

A caption like `a loud dog followed by two people talking while it rains` says which sounds there are by its joins
alone; what stands between two joins is taken as one sound, whatever it says. So paraphrases and wrong captions of a
manifest without any truth come from the same code as those of composed scenes (`captions.by_grammar`), and are as
alike. The price is what no join says: a caption of one sound can only be wrong about which sound it is.
"""

from __future__ import annotations

import re

from af2_ray.synth.text.grammar import FRAMES, TAILS, Composition, Item, Phrases

_BACKWARDS = re.compile(r",? (?:preceded by|after) ")
_FORWARDS = re.compile(r",? (?:and )?(?:followed by|then|before) |,? and then ")
_TOGETHER = re.compile(r",? (?:while|with|as) ")
_LEVEL = re.compile(r"(?P<article>an? )?(?P<level>loud|soft) (?P<noun>.+)")
_MAX_SOUNDS = 16


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
    composition = tuple(tuple(sorted(map(_item, _TOGETHER.split(group)))) for group in groups)
    labels = [item.label for group in composition for item in group]
    if len(set(labels)) < len(labels):
        raise ValueError(f"{text!r} names one sound twice: what would be changed is not clear")
    if len(labels) > _MAX_SOUNDS:
        raise ValueError(f"{text!r} has {len(labels)} sounds, more than {_MAX_SOUNDS}")
    return composition, {label: (label, label) for label in labels}


def _item(name: str) -> Item:
    """A sound and its attribute, if it is one that the grammar can change."""
    for attribute, tail in TAILS.items():
        if name.endswith(tail):
            return Item(name.removesuffix(tail), attribute)
    if level := _LEVEL.fullmatch(name):
        return Item(("a " if level["article"] else "") + level["noun"], level["level"])
    if not name.strip():
        raise ValueError("a join has nothing on one side")
    return Item(name)
