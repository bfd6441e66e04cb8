"""Manifests: what is read, what stops the run, what is set aside."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from af2_ray.data.manifest import read_captions, read_samples
from af2_ray.data.samples import CaptionSet, Sample, check_samples, fingerprint


def write_manifest(folder: Path, data: dict[str, Any]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {
        "split": "train",
        "split_path": "train",
        "flamingo_task": "Scenes-AQA",
        "total_num": len(data),
        "data": data,
    }
    (folder / "train.json").write_text(json.dumps(manifest, indent=1))
    return str(folder / "train.json")


QUESTION = {"name": "00001.flac", "prompt": "Which?", "output": "Dog", "duration": 4.5}


def test_nvidia_manifest(tmp_path: Path) -> None:
    extra = {"audio_start": 2, "skill": "order", "options": ["a", "b"], "pair": "p1", "template": "t", "source": 7}
    uri = write_manifest(tmp_path / "short", {"0": QUESTION, "1": QUESTION | extra})
    first, second = read_samples(uri)
    assert first == Sample(
        "short/train/0", f"{tmp_path}/short/train/00001.flac", 0.0, 4.5, "Which?", "Dog", "AQA", "short"
    )
    assert (second.offset_s, second.skill, second.options, second.pair) == (2.0, "order", ("a", "b"), "p1")
    assert second.meta == {"source": 7}
    assert read_samples(uri, root="s3://bucket/audio")[0].uri == "s3://bucket/audio/train/00001.flac"


def test_absolute_names_stay(tmp_path: Path) -> None:
    names = ["/data/a.flac", "s3://bucket/a.flac"]
    uri = write_manifest(tmp_path, {str(i): QUESTION | {"name": name} for i, name in enumerate(names)})
    assert [sample.uri for sample in read_samples(uri)] == names


@pytest.mark.parametrize(
    ("item", "told"),
    [
        ({"name": "a.flac", "output": "x", "duration": 1}, "'prompt' is missing"),
        (QUESTION | {"name": 3}, "'name' must be a string"),
        (QUESTION | {"duration": "long"}, "long"),
        ("a.flac", "expected an object"),
    ],
)
def test_a_bad_sample_is_named_with_its_line(tmp_path: Path, item: Any, told: str) -> None:
    uri = write_manifest(tmp_path, {"0": QUESTION, "1": item})
    line = next(n for n, text in enumerate(Path(uri).read_text().splitlines(), 1) if '"1":' in text)
    with pytest.raises(ValueError, match=rf"train\.json, line {line}: sample '1': .*{told}"):
        read_samples(uri)


def test_a_broken_file_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text('{"data":\n {"0": }}')
    with pytest.raises(ValueError, match=r"m\.json, line 2: not JSON"):
        read_samples(str(tmp_path / "m.json"))
    (tmp_path / "m.json").write_text("[]")
    with pytest.raises(ValueError, match="a manifest is an object"):
        read_samples(str(tmp_path / "m.json"))
    with pytest.raises(ValueError, match="no such manifest"):
        read_samples(str(tmp_path / "none.json"))


def test_captions(tmp_path: Path) -> None:
    line = {
        "name": "train/1.flac",
        "duration": 8,
        "caption": "a then b",
        "positives": ["b after a"],
        "negatives": [["b then a"], ["a after b"]],
        "relations": ["order"],
    }
    path = tmp_path / "train.captions.jsonl"
    path.write_text(json.dumps(line) + "\n\n")
    (clip,) = read_captions(str(path))
    assert clip == CaptionSet(
        f"{tmp_path}/train/1.flac", 0.0, 8.0, "a then b", ("b after a",), (("b then a",), ("a after b",)), ("order",)
    )
    path.write_text(json.dumps(line) + "\n{oops\n")
    with pytest.raises(ValueError, match=r"train\.captions\.jsonl, line 2"):
        read_captions(str(path))


def test_unusable_samples_are_set_aside(tmp_path: Path) -> None:
    faults = [{"duration": None}, {"duration": 0}, {"audio_start": -1}, {"prompt": " "}, {"output": ""}, {}]
    uri = write_manifest(tmp_path, {str(i): QUESTION | fault for i, fault in enumerate(faults)})
    good, bad = check_samples(read_samples(uri))
    assert [sample.id[-1] for sample in good] == ["5"]
    assert [reason for _, reason in bad] == [
        "no duration",
        "zero duration",
        "negative offset",
        "empty prompt",
        "empty answer",
    ]
    ragged = CaptionSet("a.flac", 0.0, 1.0, "a", ("b",), (("c",),))
    assert check_samples([ragged])[1] == [(ragged, "ragged captions")]


def test_fingerprint_sees_what_is_said_not_where_it_lies(tmp_path: Path) -> None:
    samples = list(read_samples(write_manifest(tmp_path, {"0": QUESTION, "1": QUESTION | {"duration": 2}})))
    moved = [replace(sample, uri=sample.uri.replace(str(tmp_path), "s3://bucket")) for sample in samples]
    assert fingerprint(samples) == fingerprint(moved)
    assert fingerprint(samples) != fingerprint(samples[::-1])
    assert fingerprint(samples) != fingerprint([samples[0], replace(samples[1], answer="cat")])


def test_a_key_that_comes_twice_stands_for_two_samples_and_a_wrong_count_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    item = json.dumps(QUESTION)
    path = tmp_path / "train.json"
    path.write_text(f'{{"total_num": 1000, "data": {{"0": {item}, "1": {item}, "0": {item}}}}}')
    with caplog.at_level("WARNING"):
        samples = read_samples(str(path))
    folder = tmp_path.name
    assert [sample.id for sample in samples] == [f"{folder}/train/{key}" for key in ("0", "1", "0#2")]
    assert samples.remarks == (
        "the key '0' stands for 2 samples; all are read",
        "total_num is 1000, and there are 3 samples: is the file whole?",
    )
    assert all(remark in caplog.text for remark in samples.remarks)
    path.write_text('{"data": {"0": {"name": "a", "name": "b", "prompt": "?", "output": "x"}}}')
    samples = read_samples(str(path))
    assert (samples[0].uri, samples.remarks) == (f"{tmp_path}/b", ("sample '0' has a key twice; the last one counts",))


@pytest.mark.parametrize("kind", ["json", "jsonl", "captions.jsonl"])
def test_objects_within_objects_end_in_an_error_that_names_the_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"train.{kind}"
    path.write_text('{"data": ' * 100_000 + "1" + "}" * 100_000)
    with pytest.raises(ValueError, match=rf"train\.{kind}"):
        (read_captions if kind.startswith("captions") else read_samples)(str(path))


def test_lines_of_caption_sets_have_the_documented_keys_alone(tmp_path: Path) -> None:
    """A clip that was cut out keeps `start` as a note: it is no offset."""
    path = tmp_path / "train.captions.jsonl"
    path.write_text('{"name": "a.wav", "duration": 10, "caption": "", "text": "a dog", "start": 30}\n')
    (one,) = read_captions(str(path))
    assert (one.offset_s, one.caption) == (0.0, "")
    assert check_samples([one])[1] == [(one, "empty caption")]
