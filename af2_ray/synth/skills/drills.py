"""Drills: short open questions about everything that is known of a clip, for training alone.

A question of `questions` asks for one relation among four listed sounds, in one of two opposite forms (first or last,
louder or softer). To a small model that is one bit in thirty tokens, and of opposite sign in every other question: the
fusion of `tiny` stayed at a coin's accuracy on order for whole runs of it. Drills ask about all pairs and all sounds of
the same clip in a dozen tokens each, so the relation is learned first, and its forms and listings afterwards.
"""

from __future__ import annotations

from af2_ray.synth.facts import SOUND, Facts
from af2_ray.synth.skills.question import Question, Rng
from af2_ray.synth.skills.table import SKILLS


def make_drills(index: int, facts: Facts, rng: Rng) -> list[Question]:
    """The drills of one clip, without options or pairs; none of a clip that one sound fills.

    Args:
        index: number of the clip in its block, `Question.scene` of each drill.
        facts: truth that they ask for.
        rng: source of the words, and of which of two forms is asked.
    """
    if facts.kind == SOUND:
        return []
    return [
        Question(index, text, answer, name, f"{name}-drill")
        for name, skill in SKILLS.items()
        if skill.drills
        for text, answer in skill.drills(facts, rng)
    ]
