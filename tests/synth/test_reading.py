"""Clips in words: a reader who knows only the words can answer what is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from af2_ray.config import Corpus, SceneSet
from af2_ray.synth.corpus import make_corpus
from af2_ray.synth.facts import Facts, Sound
from af2_ray.synth.scenes import compose_block, facts_of
from af2_ray.synth.sounds.bank import Bank
from af2_ray.synth.text.narrate import narrate
from af2_ray.train.stage_lm import read_pairs

SCENES = SceneSet(
    name="short", split="train", num_scenes=80, duration_s=(8, 12), num_events=(2, 3), questions_per_scene=4
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(Corpus(dir=str(folder), sources="rendered", sets=[SCENES]), num_processes=1)
    return folder


def test_mirrored_scenes_are_narrated_by_what_they_exchange(made: Path) -> None:
    bank, kinds = Bank(made / "sources"), set()
    for index in range(20):
        block = [facts_of(scene) for scene in compose_block(SCENES, bank, index, seed=0)]
        for first, second in (block[:2], block[2:]):
            kinds.add(first.kind)
            assert narrate(first) != narrate(second)
            assert all(label in narrate(first) for label in first.labels)
    assert kinds == {"order", "count", "attribute", "position"}


def test_readings_stand_beside_the_manifest_and_hold_the_answers(made: Path) -> None:
    pairs = read_pairs(made / "short" / "train.reading.jsonl")
    counts = [(prompt, answer) for prompt, answer in pairs if "How many times" in prompt]
    assert len(pairs) == 80 * 5
    assert counts
    assert all(f" {answer} times" in prompt.partition(".")[0] for prompt, answer in counts)


def test_what_is_not_known_is_left_out() -> None:
    known = Facts((Sound("dog", "loud", place="end"), Sound("bell", "3"), Sound("rain")))
    assert narrate(known) == "end: loud dog, bell three times, rain."


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "reading.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(ValueError, match=r"reading.jsonl, line 2: .*answer"):
        read_pairs(path)
    with pytest.raises(ValueError, match=r"pretrain: no file .*set reading and drills to \[\]"):
        read_pairs(tmp_path / "missing.jsonl")
