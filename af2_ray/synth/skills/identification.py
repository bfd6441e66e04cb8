"""Which sound is heard: the one skill that needs no relation, so it pairs any two clips of different sounds."""

from __future__ import annotations

from af2_ray.synth.facts import SOUND, Facts
from af2_ray.synth.skills.question import Ask, Pair, Rng, Skill


def identify(pair: Pair, rng: Rng) -> Ask:
    """Which of four sounds is heard: one is in the first clip, one in the second, two in neither."""
    first, second = pair.first.labels, pair.second.labels
    heard = (str(rng.choice(sorted(first))), str(rng.choice(sorted(second))))

    def answer(facts: Facts) -> str:
        return next(label for label in heard if label in facts.labels)

    if len(first) == 1 and rng.random() < 0.3:
        text = ("What sound is heard?", "What is this sound?")[int(rng.integers(2))]
        return Ask("identification-open", text, (), answer)
    absent = [label for label in pair.pool if label not in first + second]
    options = heard + tuple(str(label) for label in rng.choice(absent, 2, replace=False))
    text = ("Which sound is heard?", "Which of these sounds is in the clip?")[int(rng.integers(2))]
    return Ask("identification-choice", text, options, answer)


SKILL = Skill(SOUND, asks=lambda pair, rng: [identify(pair, rng)])
