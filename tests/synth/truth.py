"""Whether a caption is true of a scene: read back word by word, and compared with what is mixed."""

from __future__ import annotations

import itertools
from functools import lru_cache

import numpy as np

from af2_ray.synth.facts import PARTS
from af2_ray.synth.scenes import Scene
from af2_ray.synth.text.grammar import FRAMES, JOINS, TAILS, TOGETHER, Composition, Item, Phrases, write_item


def parse(text: str, phrases: Phrases) -> Composition:
    """Read a caption of the grammar back; one that is not of it is a `ValueError`."""
    for frame in FRAMES[1:]:
        text = text.removeprefix(frame)
    join = next((join for join in (" and then ", *JOINS) if join in text), JOINS[0])
    groups = text.split(join)
    written = _written(tuple((label, tuple(both)) for label, both in phrases.items()))
    out: list[tuple[Item, ...]] = []
    for group in reversed(groups) if join == " after " else groups:
        together = next((word for word in TOGETHER if word in group), TOGETHER[0])
        names = group.split(together)
        if unknown := [name for name in names if name not in written]:
            raise ValueError(f"{unknown[0]!r} in caption {text!r} is no sound of this corpus")
        out.append(tuple(sorted(written[name] for name in names)))
    return tuple(out)


@lru_cache(maxsize=8)  # one for a corpus: writing it anew took nine tenths of reading a caption
def _written(phrases: tuple[tuple[str, tuple[str, ...]], ...]) -> dict[str, Item]:
    """Every way to write every item."""
    return {
        write_item(Item(label, attribute), phrase): Item(label, attribute)
        for label, both in phrases
        for phrase in both
        for attribute in ("", "loud", "soft", *TAILS)
    }


def is_true(composition: Composition, scene: Scene) -> bool:
    """Whether a caption is true of a scene: its sounds are there, in this order, with these attributes."""
    known = {event.label: event for event in scene.events}
    items = [item for group in composition for item in group]
    if any(item.label not in known for item in items):
        return False
    spans = [[known[item.label].span_s for item in group] for group in composition]
    if any(max(end for _, end in a) > min(start for start, _ in b) for a, b in itertools.pairwise(spans)):
        return False
    if any(len(group) > 1 and max(s for s, _ in group) >= min(e for _, e in group) for group in spans):
        return False
    levels = {label: float(np.mean(event.gains_db)) for label, event in known.items()}
    for item in items:
        event = known[item.label]
        change_db = event.gains_db[-1] - event.gains_db[0]
        true = {
            "": True,
            "loud": levels[item.label] == max(levels.values()),
            "soft": levels[item.label] == min(levels.values()),
            "louder": change_db > 3,
            "softer": change_db < -3,
            **{part: scene.part_of(event) == part for part in PARTS},
            **{str(number): event.count == number for number in range(1, 5)},
        }
        if not true[item.attribute]:
            return False
    return True
