"""Scenes told in words, for an LM that learns to answer from a text before it learns to answer from sound.

A language model that never read what came first, how often or how loud cannot put an answer together from what it
hears: its own layers are frozen by then. Large LMs bring that with them; a small one learns it here, from the truth of
training scenes, event by event in time: `beginning: loud dog, middle: bell three times. Which sound is heard first?`
"""

from __future__ import annotations

from af2_ray.synth.scenes import Event, Scene
from af2_ray.synth.skills.questions import NUMBERS


def narrate(scene: Scene) -> str:
    """The events of a scene in order of onset: part of the clip, class, and the attribute that its mirror changes."""
    return ", ".join(_tell(event, scene) for event in scene.events) + "."


def _tell(event: Event, scene: Scene) -> str:
    words = [event.label]
    if event.label in scene.focus:
        if scene.kind == "count":
            words.append(f"{NUMBERS[event.count - 1]} times")
        elif scene.relation in ("louder", "softer"):
            words.append(f"getting {scene.relation}")
        elif scene.kind == "attribute":
            other = "soft" if scene.relation == "loud" else "loud"
            words.insert(0, scene.relation if event.label == scene.focus[0] else other)
    return f"{scene.part_of(event)}: {' '.join(words)}"
