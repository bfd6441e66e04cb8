"""A clip in words, for an LM that learns to answer from a text before it learns to answer from sound.

A language model that never read what came first, how often or how loud cannot put an answer together from what it
hears: its own layers are frozen by then. Large LMs bring that with them; a small one learns it here, from the truth of
training scenes, event by event in time: `beginning: loud dog, middle: bell three times. Which sound is heard first?`
"""

from __future__ import annotations

from af2_ray.synth.facts import Facts, Sound
from af2_ray.synth.text.grammar import NUMBERS


def narrate(facts: Facts) -> str:
    """The sounds of a clip in order of first start: part of the clip (where known), class, and attribute."""
    return ", ".join(_words(sound) for sound in facts.sounds) + "."


def _words(sound: Sound) -> str:
    words = sound.label
    if sound.attribute.isdigit():
        words = f"{words} {NUMBERS[int(sound.attribute) - 1]} times"
    elif sound.attribute in ("louder", "softer"):
        words = f"{words} getting {sound.attribute}"
    elif sound.attribute in ("loud", "soft"):
        words = f"{sound.attribute} {words}"
    return f"{sound.place}: {words}" if sound.place else words
