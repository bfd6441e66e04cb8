"""When a sound is heard: in which part of the clip."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from af2_ray.synth.facts import PARTS, Facts
from af2_ray.synth.skills.question import RELATION, Ask, Pair, Rng, Skill
from af2_ray.synth.text.grammar import TAILS


def _asks(pair: Pair, rng: Rng) -> list[Ask]:
    label = pair.first.focus[0]
    asks = [
        Ask("when-choice", f"When is the {label} heard?", PARTS, RELATION),
        Ask("part-choice", f"In which part of the clip is the {label} heard?", PARTS, RELATION),
        Ask("when-open", f"When is the {label} heard?", PARTS, RELATION),
    ]
    for part in (pair.first.relation, pair.second.relation):
        here = [_at(facts, part) for facts in (pair.first, pair.second)]
        if here[0] and here[1] and here[0] != here[1]:
            text = f"Which sound is heard{TAILS[part]}?"
            asks.append(Ask("which-at", text, (here[0], here[1], *pair.wrong), partial(_at, part=part)))
    return asks


def _at(facts: Facts, part: str) -> str:
    """The sound in a part of the clip, or ""."""
    return next((sound.label for sound in facts.sounds if sound.place == part), "")


def _drills(facts: Facts, rng: Rng) -> Iterator[tuple[str, str]]:
    yield from ((f"When is the {sound.label} heard?", sound.place) for sound in facts.sounds if sound.place)


SKILL = Skill("position", _asks, _drills)
