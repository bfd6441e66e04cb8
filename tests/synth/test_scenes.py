"""Scenes sound as their truth says: measured on the rendered audio."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from composed import blocks

from af2_ray.config import SceneSet
from af2_ray.synth.facts import PARTS
from af2_ray.synth.scenes import compose_block, render_scene
from af2_ray.synth.sounds.bank import Bank
from af2_ray.synth.sounds.curate import frame_rms

SHORT = SceneSet(name="s", split="test", num_scenes=400, duration_s=(5, 30), num_events=(1, 4))
LONG = SceneSet(name="l", split="test", num_scenes=24, duration_s=(60, 300), num_events=(2, 4))


@pytest.mark.parametrize("scenes", [SHORT, LONG])
def test_events_fit_and_follow_one_another(scenes: SceneSet, bank: Bank) -> None:
    for scene in (scene for block in blocks(scenes, bank) for scene in block):
        assert len(set(scene.labels)) == len(scene.labels)
        spans = [event.span_s for event in scene.events]
        assert spans[0][0] >= 0
        assert max(end for _, end in spans) <= scene.duration_s
        if not scene.together:
            assert all(end < start for (_, end), (start, _) in itertools.pairwise(spans))
        assert all(event.hit_s >= 0.05 for event in scene.events)


def test_mirrored_scenes_differ_in_one_relation_only(bank: Bank) -> None:
    kinds = set()
    for block in blocks(SHORT, bank):
        assert len({scene.duration_s for scene in block}) == 1
        assert len({len(scene.events) for scene in block}) == 1
        assert not set(block[0].labels) & set(block[2].labels)
        for first, second in (block[:2], block[2:]):
            kinds.add(first.kind)
            assert first.relation != second.relation
            assert sorted(first.labels) == sorted(second.labels)
            assert {event.clip for event in first.events} == {event.clip for event in second.events}
            assert (first.bed, first.bed_db, first.kind) == (second.bed, second.bed_db, second.kind)
            counts = [{event.label: event.count for event in scene.events} for scene in (first, second)]
            if first.kind == "order":
                assert first.labels == second.labels[::-1]
            if first.kind == "count":
                assert counts[0].pop(first.focus[0]) != counts[1].pop(first.focus[0])
            assert counts[0] == counts[1]
        if block[0].kind == "count":
            assert sorted(scene.relation for scene in block) == ["1", "2", "3", "4"]
    assert kinds == {"order", "count", "attribute", "position"}


def test_sounds_stand_out_and_levels_are_true(bank: Bank) -> None:
    for scene in (scene for block in blocks(SHORT, bank)[:40] for scene in block):
        audio = render_scene(scene, bank).astype(np.float64)
        assert len(audio) == round(scene.duration_s * 16000)
        assert np.abs(audio).max() == pytest.approx(scene.peak * 32767, abs=2)
        levels = frame_rms(audio.astype(np.float32))
        quiet = np.ones(len(levels), bool)
        for event in scene.events:
            for onset_s in event.onsets_s:
                quiet[max(0, int(onset_s * 100) - 2) : int((onset_s + event.hit_s) * 100) + 3] = False

        def hit_level(event, number: int, levels=levels) -> float:  # loudest 50 ms of a hit
            start = int(event.onsets_s[number] * 100)
            hit = levels[start : start + max(6, int(event.hit_s * 100))]
            return float(np.convolve(hit**2, np.full(5, 0.2), "valid").max() ** 0.5)

        if quiet.sum() > 20:
            bed = max(0.1, float(np.sqrt((levels[quiet] ** 2).mean())))
            softest = min(hit_level(event, number) for event in scene.events for number in range(event.count))
            assert 20 * np.log10(softest / bed) >= 9
        by_label = {event.label: event for event in scene.events}
        if scene.relation in ("louder", "softer"):
            event = by_label[scene.focus[0]]
            change_db = 20 * np.log10(hit_level(event, -1) / hit_level(event, 0))
            assert change_db > 6 if scene.relation == "louder" else change_db < -6
        elif scene.kind == "attribute" and not scene.together:
            first, second = (hit_level(by_label[label], 0) for label in scene.focus)
            assert (first > 1.5 * second) if scene.relation == "loud" else (second > 1.5 * first)
        elif scene.kind == "position":
            start_s, end_s = by_label[scene.focus[0]].span_s
            part = PARTS.index(scene.relation) * scene.duration_s / 3
            assert part <= start_s
            assert end_s <= part + scene.duration_s / 3


def test_training_clips_are_augmented_and_others_are_not(bank: Bank) -> None:
    def variants(scenes: SceneSet) -> int:
        found = {event.clip for block in blocks(scenes, bank) for scene in block for event in scene.events}
        return max(sum(entry.id == other.id for other in found) for entry in found)

    train = SceneSet(name="s", split="train", num_scenes=400, duration_s=(5, 9), num_events=(1, 3))
    assert variants(train) > 1
    assert variants(train.model_copy(update={"split": "test"})) == 1
    assert variants(train.model_copy(update={"split": "seen"})) == 1


def test_a_block_depends_on_its_number_alone(bank: Bank) -> None:
    assert compose_block(SHORT, bank, 7, seed=0) == compose_block(SHORT, bank, 7, seed=0)
    assert compose_block(SHORT, bank, 7, seed=0) != compose_block(SHORT, bank, 7, seed=1)
    assert compose_block(SHORT, bank, 7, seed=0) != compose_block(SHORT, bank, 8, seed=0)


def test_rendering_is_quick(bank: Bank, tmp_path: Path) -> None:
    """Guards against a slow path creeping in; the bound is ten times what it takes here."""
    import time

    block = compose_block(LONG, bank, 0, seed=0)
    start = time.perf_counter()
    seconds = sum(len(render_scene(scene, bank)) for scene in block) / 16000
    assert time.perf_counter() - start < seconds / 100
