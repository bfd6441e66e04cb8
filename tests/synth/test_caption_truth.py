"""Every positive is true of its scene and no negative is, on 2000 held-out scenes."""

from __future__ import annotations

from collections import Counter

import numpy as np
from composed import blocks
from truth import is_true, parse

from af2_ray.config import SceneSet
from af2_ray.synth.captions.by_grammar import captions_of
from af2_ray.synth.facts import PARTS
from af2_ray.synth.scenes import facts_of
from af2_ray.synth.sounds.bank import Bank
from af2_ray.synth.text.grammar import Composition, composition_of

HELD_OUT = SceneSet(name="text", split="test", num_scenes=2000, duration_s=(5, 30), num_events=(1, 4))


def relation_of(truth: Composition, wrong: Composition) -> str:
    """What a negative has otherwise."""
    items, others = ([item for group in composition for item in group] for composition in (truth, wrong))
    if {item.label for item in items} != {item.label for item in others}:
        return "class"
    by_label = {item.label: item.attribute for item in others}
    moved = [(item.attribute, by_label[item.label]) for item in items if by_label[item.label] != item.attribute]
    if not moved:
        return "order"
    if len(moved) == 2:
        return "order" if any(part in PARTS for pair in moved for part in pair) else "binding"
    (before, _), *_ = moved
    return "position" if before in PARTS else "count" if before.isdigit() else "loudness"


def test_no_negative_of_2000_scenes_is_true_and_every_positive_is(bank: Bank) -> None:
    rng = np.random.default_rng(3)
    kinds: Counter[str] = Counter()
    num_scenes = 0
    for block in blocks(HELD_OUT, bank):
        for scene in block:
            num_scenes += 1
            truth = composition_of(facts_of(scene))
            made = captions_of(truth, bank.phrases, bank.askable(scene.bed_kind), 3, 3, rng)
            positives = (made.caption, *made.paraphrases)
            assert len(set(positives)) == 3
            for positive, negatives in zip(positives, made.negatives, strict=True):
                assert parse(positive, bank.phrases) == truth, positive
                assert is_true(truth, scene), positive
                assert len(set(negatives)) == 3
                for negative in negatives:
                    wrong = parse(negative, bank.phrases)
                    assert not is_true(wrong, scene), (negative, positive)
                    kinds[relation_of(truth, wrong)] += 1
    assert num_scenes == 2000
    assert set(kinds) == {"order", "binding", "position", "count", "loudness", "class"}, kinds
    assert min(kinds.values()) > 100, kinds
