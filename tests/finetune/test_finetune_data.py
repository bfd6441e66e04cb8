"""The data of a fine-tuning: parted by recording, checked, written down."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from af2_ray.audio.hear import Stretch
from af2_ray.config import Dataset
from af2_ray.data.manifest import read_samples
from af2_ray.data.manifest_rows import write_samples
from af2_ray.data.samples import Sample, Turn
from af2_ray.finetune.data import Sources, check_audio, check_lengths, hold_out, places_of, read_parts, write_parts

MakeSound = Callable[..., str]


def sample(uri: str, number: int = 0, **more: object) -> Sample:
    given = {"id": f"{uri}#{number}", "uri": uri, "offset_s": 0.0, "duration_s": 1.0, "prompt": f"what {number}?"}
    return Sample(**{**given, "answer": "a tone", "task": "AQA", "dataset": "mine", **more})  # type: ignore[arg-type]


def manifest(path: Path, samples: list[Sample]) -> list[Dataset]:
    write_samples(str(path), samples)
    return [Dataset(manifest=str(path))]


@pytest.fixture
def clips(make_sound: MakeSound) -> list[str]:
    return [make_sound(f"clips/{number}.flac", hz=200.0 + 50 * number) for number in range(12)]


def test_samples_come_back_as_they_were_written(tmp_path: Path) -> None:
    plain = sample("/a.wav", skill="order", options=("a", "b"), pair="p", template="t", meta={"note": 3})
    more = sample("/b.wav", 1, offset_s=2.5, history=(Turn("x?", "y"),), more_audio=(Stretch("/c.wav", 1.0, 2.0),))
    write_samples(str(tmp_path / "m.jsonl"), [plain, more])
    assert list(read_samples(str(tmp_path / "m.jsonl"))) == [plain, more]


def test_recordings_are_held_out_whole(clips: list[str]) -> None:
    samples = [sample(uri, number) for uri in clips for number in range(3)]
    train, held = hold_out(samples, 0.25, seed=1)
    assert len(held) == 9
    assert not {one.uri for one in train} & {one.uri for one in held}
    assert hold_out(samples, 0.25, seed=1) == (train, held)
    assert hold_out(samples, 0.25, seed=2)[1] != held


def test_recordings_that_are_heard_together_stay_together() -> None:
    samples = [sample(f"/{n}.wav", more_audio=(Stretch(f"/{n + 1}.wav", 0.0, 1.0),)) for n in (0, 1, 2, 5, 7, 9)]
    train, held = hold_out(samples, 0.5)
    heard = [{stretch.uri for one in part for stretch in one.stretches} for part in (train, held)]
    assert held
    assert not heard[0] & heard[1]


def test_names_are_kept_whole(clips: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    samples = [sample(f"clips/{Path(uri).name}", number) for uri in clips for number in range(2)]
    (tmp_path / "m.json").write_text(
        json.dumps([{"audio": one.uri, "question": "?", "answer": "a"} for one in samples])
    )
    parts = read_parts(Sources([Dataset(manifest="m.json")]))
    assert {one.uri for one in (*parts.train, *parts.validation)} == set(clips)


def test_one_recording_cannot_be_parted() -> None:
    with pytest.raises(ValueError, match="of one recording"):
        hold_out([sample("/a.wav", number) for number in range(30)])


def test_what_is_not_given_is_held_out(clips: list[str], tmp_path: Path) -> None:
    samples = [sample(uri, number) for uri in clips for number in range(4)]
    parts = read_parts(Sources(manifest(tmp_path / "m.jsonl", samples)))
    assert len(parts.train) == 36
    assert parts.test == parts.validation
    assert len(parts.remarks) == 2
    write_parts(parts, str(tmp_path / "run"))
    assert list(read_samples(places_of(parts, str(tmp_path / "run"))["train"])) == list(parts.train)
    assert [row["part"] for row in parts.counts()] == ["train", "validation", "test"]


def test_replay_without_an_old_test_gives_one(clips: list[str], tmp_path: Path) -> None:
    new = [sample(uri, number) for uri in clips[:6] for number in range(5)]
    old = [sample(uri, number) for uri in clips[6:] for number in range(5)]
    parts = read_parts(Sources(manifest(tmp_path / "m.jsonl", new), replay=manifest(tmp_path / "old.jsonl", old)))
    assert len(parts.old_test) == 5
    assert not {one.uri for one in parts.old_test} & {one.uri for one in parts.replay}


def test_too_few_samples(clips: list[str], tmp_path: Path) -> None:
    samples = [sample(uri) for uri in clips] + [sample("/nowhere.wav", duration_s=0.0)]
    with pytest.raises(ValueError, match=r"12 usable samples, and at least 20 .* \(set aside: zero duration 1\)"):
        read_parts(Sources(manifest(tmp_path / "m.jsonl", samples)))


def test_a_recording_under_another_name_is_found_in_the_test(
    clips: list[str], tmp_path: Path, make_sound: MakeSound
) -> None:
    copy = tmp_path / "elsewhere" / "test.flac"
    copy.parent.mkdir()
    copy.write_bytes(Path(clips[3]).read_bytes())
    train = [sample(uri, number) for uri in clips for number in range(2)]
    sources = Sources(manifest(tmp_path / "m.jsonl", train), test=manifest(tmp_path / "t.jsonl", [sample(str(copy))]))
    with pytest.raises(ValueError, match=r"1 recordings are in both train and test[\s\S]*test\.flac is [\s\S]*3\.flac"):
        read_parts(sources)


def test_long_answers_and_long_audio_are_named(clips: list[str], tmp_path: Path) -> None:
    samples = [sample(uri, number) for uri in clips for number in range(2)]
    samples[5] = sample(clips[2], 9, duration_s=25.0)
    parts = read_parts(Sources(manifest(tmp_path / "m.jsonl", samples)))
    with pytest.raises(ValueError, match=r"train: 1 samples have more than 96 tokens[\s\S]*model\.max_text"):
        check_lengths(parts, {"train": np.array([97] + [4] * (len(parts.train) - 1))}, max_tokens=96)
    check_lengths(parts, {"train": np.full(len(parts.train), 4)}, max_tokens=96)
    with pytest.raises(ValueError, match=r"recordings have more than the 20 s[\s\S]*--cut-audio"):
        check_audio(parts, 2, cut=False)
    assert check_audio(parts, 2, cut=True).num_cut >= 1
    assert check_audio(parts, 3, cut=False) == parts


def test_clips_of_a_folder_of_labels_are_asked_several_times(tmp_path: Path, make_sound: MakeSound) -> None:
    for label in range(6):
        for number in range(6):
            make_sound(f"sounds/label_{label}/{number}.flac", hz=200.0 + 50 * label + number)
    parts = read_parts(Sources([Dataset(manifest=str(tmp_path / "sounds"))]))
    assert len(parts.train) == 4 * 28
    assert len(parts.validation) == 8
    asked = [one for one in parts.train if one.uri == parts.train[0].uri]
    assert len({one.id for one in asked}) == 4
    assert len({one.options for one in asked}) > 1
    assert all(one.answer in one.options and f"{one.options[0]} (B)" in one.prompt for one in asked)
