"""How loud: whether a sound gets louder or softer, and which of two is the louder one."""

from __future__ import annotations

from collections.abc import Iterator

from af2_ray.synth.facts import Facts
from af2_ray.synth.skills.question import RELATION, Ask, Pair, Rng, Skill

CHANGES = ("louder", "softer")


def _asks(pair: Pair, rng: Rng) -> list[Ask]:
    if pair.first.relation in CHANGES:
        label = pair.first.focus[0]
        which = f"Does the {label} get louder or softer?"
        return [
            Ask("change-choice", which, CHANGES, RELATION),
            Ask("change-how", f"How does the loudness of the {label} change?", CHANGES, RELATION),
            Ask("change-open", which, CHANGES, RELATION),
        ]
    a, b = pair.first.focus
    return [
        Ask("loudest", "Which sound is the loudest?", (a, b, *pair.wrong), _louder),
        Ask("softest", "Which sound is the softest?", (a, b, *pair.wrong), _softer),
        Ask("louder-choice", f"Which sound is louder, the {a} or the {b}?", (a, b), _louder),
        Ask("softer-open", f"Which is softer, the {a} or the {b}?", (a, b), _softer),
    ]


def _louder(facts: Facts) -> str:
    return facts.focus[0 if facts.relation == "loud" else 1]


def _softer(facts: Facts) -> str:
    return facts.focus[1 if facts.relation == "loud" else 0]


def _drills(facts: Facts, rng: Rng) -> Iterator[tuple[str, str]]:
    if facts.relation in CHANGES:
        yield f"Does the {facts.focus[0]} get louder or softer?", facts.relation
    elif facts.kind == "attribute":
        a, b = facts.focus if rng.random() < 0.5 else facts.focus[::-1]
        word, answer = ("louder", _louder) if rng.random() < 0.5 else ("softer", _softer)
        yield f"Which is {word}, the {a} or the {b}?", answer(facts)


SKILL = Skill("attribute", _asks, _drills)
