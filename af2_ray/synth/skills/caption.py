"""Describing a clip: the answer is its caption, and no other clip is its counterpart."""

from __future__ import annotations

from af2_ray.synth.skills.question import Question, Rng, Skill

PROMPTS = ("Describe the sounds.", "What happens in this clip?", "Write a caption for this clip.")
SKILL = Skill()


def describe(scene: int, rng: Rng) -> Question:
    """A request to describe a clip, by its number in its block; its answer is for the caller to fill in."""
    return Question(scene, PROMPTS[int(rng.integers(len(PROMPTS)))], "", "caption", "caption")
