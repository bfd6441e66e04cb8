"""Drills: short open questions about everything that is known of a scene, for training alone.

A question of `skills` asks for one relation among four listed sounds, in one of two opposite forms (first or last,
louder or softer). To a small model that is one bit in thirty tokens, and of opposite sign in every other question: the
fusion of `tiny` stayed at a coin's accuracy on order for whole runs of it. Drills ask about all pairs and all sounds of
the same clip in a dozen tokens each, so the relation is learned first, and its forms and listings afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np

from af2_ray.synth.scenes import SOUND, Event, Scene
from af2_ray.synth.skills.questions import NUMBERS, Question

Rng = np.random.Generator
FIRST = ("Which sound is heard first?", "What sound does the clip begin with?")
LAST = ("Which sound is heard last?", "What sound does the clip end with?")


def make_drills(index: int, scene: Scene, rng: Rng) -> list[Question]:
    """The drills of one scene, without options or pairs; none of a scene of one sound that fills the clip.

    Args:
        index: of the scene in its block; `Question.scene` of each drill.
        scene: whose truth they ask for.
        rng: draws the words, and which of two forms is asked.
    """
    if scene.kind == SOUND:
        return []
    asked = [*_order(scene, rng), *(_place(scene, event) for event in scene.events), *_relation(scene, rng)]
    return [Question(index, text, answer, skill, f"{skill}-drill") for skill, text, answer in asked]


def _order(scene: Scene, rng: Rng) -> Iterator[tuple[str, str, str]]:
    """All sounds in order; who of each two comes first, or last; what begins, ends, or follows."""
    labels = scene.labels
    if scene.together:  # sounds that are heard at the same time have no order
        return
    if rng.random() < 0.5:
        yield "order", "Which sounds are heard, in order?", ", ".join(labels)
    else:
        yield "order", "Which sounds are heard, from last to first?", ", ".join(labels[::-1])
    if len(labels) < 2:
        return
    for earlier, later in combinations(labels, 2):
        a, b = (earlier, later) if rng.random() < 0.5 else (later, earlier)
        word, answer = ("first", earlier) if rng.random() < 0.5 else ("last", later)
        yield "order", f"Which comes {word}, the {a} or the {b}?", answer
    if len(labels) > 2 and rng.random() < 0.2:
        yield "order", f"What is heard right after the {labels[1]}?", labels[2]
    else:
        texts, answer = (FIRST, labels[0]) if rng.random() < 0.5 else (LAST, labels[-1])
        yield "order", str(rng.choice(texts)), answer


def _place(scene: Scene, event: Event) -> tuple[str, str, str]:
    return "grounding", f"When is the {event.label} heard?", scene.part_of(event)


def _relation(scene: Scene, rng: Rng) -> Iterator[tuple[str, str, str]]:
    """What the scene's mirror has otherwise: how often, how loud."""
    focus = scene.focus[0]
    if scene.kind == "count":
        yield "counting", f"How many times is the {focus} heard?", NUMBERS[int(scene.relation) - 1]
    elif scene.relation in ("louder", "softer"):
        yield "attribute", f"Does the {focus} get louder or softer?", scene.relation
    elif scene.kind == "attribute":
        loud, soft = scene.focus if scene.relation == "loud" else scene.focus[::-1]
        a, b = scene.focus if rng.random() < 0.5 else scene.focus[::-1]
        word, answer = ("louder", loud) if rng.random() < 0.5 else ("softer", soft)
        yield "attribute", f"Which is {word}, the {a} or the {b}?", answer
