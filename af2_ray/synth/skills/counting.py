"""How many times a sound is heard."""

from __future__ import annotations

from collections.abc import Iterator

from af2_ray.synth.facts import Facts
from af2_ray.synth.skills.question import Ask, Pair, Rng, Skill
from af2_ray.synth.text.grammar import NUMBERS


def _asks(pair: Pair, rng: Rng) -> list[Ask]:
    label = pair.first.focus[0]
    many = f"How many times is the {label} heard?"
    return [
        Ask("counting-choice", many, NUMBERS, _count),
        Ask("counting-often", f"How often does the {label} sound?", NUMBERS, _count),
        Ask("counting-open", many, NUMBERS, _count),
    ]


def _count(facts: Facts) -> str:
    return NUMBERS[int(facts.relation) - 1]


def _drills(facts: Facts, rng: Rng) -> Iterator[tuple[str, str]]:
    if facts.kind == "count":
        yield f"How many times is the {facts.focus[0]} heard?", _count(facts)


SKILL = Skill("count", _asks, _drills)
