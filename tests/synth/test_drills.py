"""Drills: what they answer is true of the scene, and training sets alone have them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from af2_ray.config import Corpus, SceneSet
from af2_ray.synth.corpus import make_corpus
from af2_ray.synth.scenes import Scene, compose_block, facts_of
from af2_ray.synth.skills.questions import make_drills
from af2_ray.synth.sounds.bank import Bank
from af2_ray.synth.text.grammar import NUMBERS
from af2_ray.train.stage_lm import read_pairs

OPTIONS = {"num_scenes": 80, "duration_s": (8, 12), "num_events": (2, 3)}
TRAIN, TEST = (SceneSet(name="short", split=split, **OPTIONS) for split in ("train", "test"))
SINGLE = SceneSet(name="single", split="train", num_scenes=4, duration_s=(10, 10), num_events=(1, 1))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(Corpus(dir=str(folder), sources="rendered", sets=[TRAIN, TEST, SINGLE]), num_processes=1)
    return folder


def drills_of(made: Path) -> list[tuple[Scene, str, str]]:
    bank, rng = Bank(made / "sources"), np.random.default_rng(0)
    scenes = [scene for index in range(20) for scene in compose_block(TRAIN, bank, index, seed=0)]
    return [(scene, d.prompt, d.answer) for scene in scenes for d in make_drills(0, facts_of(scene), rng)]


def test_order_is_the_scene_s_order(made: Path) -> None:
    seen = set()
    for scene, prompt, answer in drills_of(made):
        if prompt.startswith("Which sounds"):
            assert answer.split(", ") == list(scene.labels[:: 1 if "in order" in prompt else -1])
        if not prompt.startswith("Which comes "):
            continue
        a, b = prompt.partition(", the ")[2].removesuffix("?").split(" or the ")
        earlier, later = sorted((a, b), key=scene.labels.index)
        word = prompt.split()[2].rstrip(",")
        assert answer == (earlier if word == "first" else later)
        assert not scene.together
        seen.add((word, answer == a))
    assert len(seen) == 4, "both words, and the answer named first as well as second"


def test_place_number_and_loudness_are_the_scene_s(made: Path) -> None:
    kinds = set()
    for scene, prompt, answer in drills_of(made):
        events = {event.label: event for event in scene.events}
        named = [label for label in events if f"the {label} " in f"{prompt.rstrip('?')} "]
        if prompt.startswith("When"):
            assert answer == scene.part_of(events[named[0]])
        elif prompt.startswith("How many"):
            assert answer == NUMBERS[events[named[0]].count - 1]
        elif prompt.startswith("Does"):
            gains = events[named[0]].gains_db
            assert answer == ("louder" if gains[-1] > gains[0] else "softer")
        elif "louder" in prompt or "softer" in prompt:
            by_level = sorted(named, key=lambda label: events[label].gains_db[0])
            assert answer == (by_level[-1] if "louder" in prompt else by_level[0])
        else:
            continue
        kinds.add(prompt.split()[0])
    assert kinds == {"When", "How", "Does", "Which"}


def test_training_sets_alone_have_them(made: Path) -> None:
    manifest = json.loads((made / "short" / "train.drills.json").read_text())
    assert manifest["total_num"] == len(manifest["data"]) > 80 * 3
    names = {row["name"] for row in json.loads((made / "short" / "train.json").read_text())["data"].values()}
    assert {row["name"] for row in manifest["data"].values()} <= names
    assert not (made / "short" / "test.drills.json").exists()
    assert not (made / "single" / "train.drills.json").exists(), "a sound that fills its clip has no order or place"
    pairs = read_pairs(made / "short" / "train.drills.reading.jsonl")
    assert len(pairs) == manifest["total_num"]
    prompts = [prompt for prompt, _ in pairs]
    assert all(prompt.endswith(row["prompt"]) for prompt, row in zip(prompts, manifest["data"].values(), strict=True))
