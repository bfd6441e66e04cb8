"""The corpus as it is written: splits that share nothing, the same bytes always, no answer in the words."""

from __future__ import annotations

import csv
import json
import multiprocessing
from collections import Counter, defaultdict
from dataclasses import asdict
from pathlib import Path

import fsspec
import numpy as np
import pytest
import soundfile
from truth import is_true, parse

from af2_ray.config import Corpus, SceneSet
from af2_ray.data.manifest import read_samples
from af2_ray.synth.corpus import make_corpus
from af2_ray.synth.scenes import compose_block, facts_of
from af2_ray.synth.sounds.bank import Bank
from af2_ray.synth.text.grammar import composition_of

SETS = [
    SceneSet(name="short", split="train", num_scenes=24, duration_s=(5, 8), num_events=(1, 3), questions_per_scene=3),
    SceneSet(name="short", split="test", num_scenes=16, duration_s=(5, 8), num_events=(1, 3), questions_per_scene=3),
    SceneSet(name="short", split="seen", num_scenes=4, duration_s=(5, 8), num_events=(1, 2), questions_per_scene=2),
    SceneSet(name="long", split="test", num_scenes=4, duration_s=(60, 65), num_events=(2, 4), questions_per_scene=5),
]


def recipe(folder: Path, **changes: object) -> Corpus:
    """A small corpus of rendered sounds."""
    return Corpus.model_validate({"dir": str(folder), "sources": "rendered", "sets": SETS, **changes})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(recipe(folder), num_processes=1)
    return folder


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def questions(path: Path) -> list[dict]:
    return list(json.loads(path.read_text())["data"].values())


def test_splits_share_no_clip_and_no_group(made: Path) -> None:
    rows = list(csv.DictReader((made / "sources.csv").open()))
    assert {row["split"] for row in rows} == {"train", "val", "test"}
    for column in ("id", "group"):
        homes = defaultdict(set)
        for row in rows:
            if not row["label"].endswith("bed)") or row["label"] != "(quiet bed)":
                homes[row[column]].add(row["split"])
        assert all(len(splits) == 1 for splits in homes.values())
    assert all(row["licence"] for row in rows)
    for label in {row["label"] for row in rows}:
        assert {"train", "test"} <= {row["split"] for row in rows if row["label"] == label}


def test_scenes_use_clips_of_their_own_split(made: Path) -> None:
    home = {row["id"]: row["split"] for row in csv.DictReader((made / "sources.csv").open())}
    for name, split, wanted in (("short", "train", "train"), ("short", "test", "test"), ("short", "seen", "train")):
        for scene in lines(made / name / f"{split}.scenes.jsonl"):
            assert {home[event["clip"]] for event in scene["events"]} == {wanted}
            if scene["bed"]["kind"] != "quiet":
                assert home[scene["bed"]["id"]] == wanted


def test_audio_is_what_the_manifest_says(made: Path) -> None:
    for row in lines(made / "long" / "test.scenes.jsonl") + lines(made / "short" / "test.scenes.jsonl"):
        folder = "long" if row["duration"] >= 60 else "short"
        info = soundfile.info(made / folder / "test" / row["name"])
        assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")
        assert info.frames == pytest.approx(row["duration"] * 16000, abs=1)


def test_same_bytes_with_two_processes_and_again_after_a_cut(made: Path, tmp_path: Path) -> None:
    first = make_corpus(recipe(made))  # nothing to do
    other = make_corpus(recipe(tmp_path), num_processes=2)
    assert other.sha256 == first.sha256
    for path in made.glob("*/*.json*"):
        if path.parent.name != "sources":
            assert (tmp_path / path.relative_to(made)).read_bytes() == path.read_bytes()
    (tmp_path / "corpus.json").unlink()
    (tmp_path / "short" / "test.done.json").unlink()
    kept = (tmp_path / "short" / "train" / "00001.flac").stat().st_mtime_ns
    assert make_corpus(recipe(tmp_path), num_processes=1).sha256 == first.sha256
    assert (tmp_path / "short" / "train" / "00001.flac").stat().st_mtime_ns == kept
    assert make_corpus(recipe(tmp_path, seed=1), num_processes=2).sha256 != first.sha256


def test_two_jobs_that_need_a_corpus_make_it_once(made: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=make_corpus, args=(recipe(tmp_path / "c"),)) for _ in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0, 0]
    assert make_corpus(recipe(tmp_path / "c")).sha256 == make_corpus(recipe(made)).sha256
    assert not list((tmp_path / "c").glob("**/*.part*"))


def test_every_closed_question_has_a_counterpart(made: Path) -> None:
    for name in ("short", "long"):
        pairs = defaultdict(list)
        for question in questions(made / name / "test.json"):
            if question["skill"] != "caption":
                pairs[question["pair"]].append(question)
        for first, second in pairs.values():
            assert first["prompt"] == second["prompt"]
            assert first["output"] != second["output"]
            assert first["name"] != second["name"]
            assert first["skill"] == second["skill"]
            assert first["num_events"] == second["num_events"]
            assert abs(first["duration"] - second["duration"]) <= 0.1 * first["duration"]
            for question in (first, second):
                assert question["output"] == question["output"].lower()
                if question.get("options"):
                    assert question["output"] in question["options"]
                    assert (f") {question['output']}" in question["prompt"]) != question["template"].endswith("-open")


def test_mix_of_skills(tmp_path: Path) -> None:
    sets = [SceneSet(name="mix", split="test", num_scenes=64, duration_s=(5, 6), num_events=(1, 2))]
    make_corpus(recipe(tmp_path, sets=sets))
    count = Counter(question["skill"] for question in questions(tmp_path / "mix" / "test.json"))
    closed = sum(count.values()) - count["caption"]
    assert count["caption"] == 64
    assert 0.3 <= count["identification"] / closed <= 0.4
    for skill in ("order", "counting", "attribute", "grounding"):
        assert 0.13 <= count[skill] / closed <= 0.22


def test_positives_are_true_and_negatives_false(made: Path) -> None:
    bank = Bank(made / "sources")
    for scenes in SETS:
        rows = iter(lines(made / scenes.name / f"{scenes.split}.captions.jsonl"))
        for block in range(scenes.num_scenes // 4):
            for scene in compose_block(scenes, bank, block, seed=0):
                row = next(rows)
                positives = [row["caption"], *row["positives"]]
                assert len(set(positives)) == 3
                assert [len(set(group)) for group in row["negatives"]] == [3, 3, 3]
                for text in positives:
                    assert parse(text, bank.phrases) == composition_of(facts_of(scene))
                    assert is_true(parse(text, bank.phrases), scene)
                    assert len(text.split()) < 30
                for text in (text for group in row["negatives"] for text in group):
                    assert not is_true(parse(text, bank.phrases), scene), (text, row["caption"])


def test_a_folder_of_clips_is_a_source(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for label in range(7):
        (tmp_path / "clips" / f"kind {label}").mkdir(parents=True)
        for clip in range(5):
            wave = rng.standard_normal(8000) * np.hanning(8000) * 0.3
            soundfile.write(tmp_path / "clips" / f"kind {label}" / f"{clip}.wav", wave, 16000)
    (tmp_path / "clips" / "kind 0" / "silent.wav").write_bytes(
        (tmp_path / "clips" / "kind 1" / "0.wav").read_bytes()[:60]
    )
    sets = [SceneSet(name="own", split="train", num_scenes=4, duration_s=(5, 6), num_events=(1, 2))]
    report = make_corpus(recipe(tmp_path / "out", sources=str(tmp_path / "clips"), sets=sets), num_processes=1)
    assert (report.num_classes, report.num_source_clips) == (7, 35)
    soundfile.write(tmp_path / "clips" / "kind 2" / "0.wav", 0.5 * wave[::-1], 16000)  # another recording in its place
    assert make_corpus(recipe(tmp_path / "out", sources=str(tmp_path / "clips"), sets=sets)).sha256 != report.sha256
    with pytest.raises(ValueError, match="no folder"):
        make_corpus(recipe(tmp_path / "none", sources=str(tmp_path / "nothing"), sets=sets))


def test_too_few_classes_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lower corpus\.min_clips"):
        make_corpus(recipe(tmp_path, min_clips=1000))


def test_a_corpus_is_made_into_an_object_store_once(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same files as on a disk; what the store has is not made again."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    stored = recipe(Path("unused"), dir="memory://bucket/data/demo")
    first = make_corpus(stored, num_processes=1)
    wanted = {str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()}
    root = "/bucket/data/demo/"
    assert {name.removeprefix(root) for name in fs.store} == wanted
    for name in ("short/train.json", "short/train/00001.flac", "sources.csv"):
        assert fs.cat_file(root + name) == (made / name).read_bytes()
    assert len(read_samples("memory://bucket/data/demo/short/test.json")) == 64
    with monkeypatch.context() as patch:
        patch.setattr("af2_ray.synth.corpus.collect.self_rendered", None)
        assert make_corpus(stored) == first
    assert first.dir == "memory://bucket/data/demo"
    other = make_corpus(stored.model_copy(update={"sets": SETS[2:3]}), num_processes=1)
    assert other.sha256 != first.sha256
    assert json.loads(fs.cat_file(root + "corpus.json"))["report"] == asdict(other), "another recipe's is made anew"
    fs.store.clear()
