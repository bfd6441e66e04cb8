"""Names of a manifest that mean no good: set aside with their reason, never opened, never the end of a run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import hostile_names
import numpy as np
import pytest

from af2_ray.audio.decode import AudioError, decode, probe
from af2_ray.audio.hear import Stretch
from af2_ray.data.batching import Row
from af2_ray.data.collate import LmCollator
from af2_ray.data.durations import fill_durations
from af2_ray.data.feature_store import stamps
from af2_ray.data.manifest import read_captions, read_samples
from af2_ray.data.samples import Sample, check_samples
from af2_ray.engine.batch import AnswerLimits, _read
from af2_ray.storage import places
from af2_ray.storage.stores import retried

NUM_GOOD = 4000


def test_each_is_an_audio_error_of_its_reason(hostile: list[tuple[str, str]]) -> None:
    for name, reason in hostile:
        if reason == "name leads outside" and not name.startswith("s3://"):
            continue  # a person may name ../clip.wav on a command line: it is a manifest that may not
        for read in (decode, probe):
            started = time.perf_counter()
            with pytest.raises(AudioError) as caught:
                read(name)
            assert caught.value.reason == reason, name
            assert hostile_names.SECRET not in str(caught.value)
            assert len(str(caught.value).splitlines()) == 1
            assert len(str(caught.value)) < 600
            assert time.perf_counter() - started < 2.0
        assert stamps([name]) != ["1:1"]


def _manifest(folder: Path, hostile: list[tuple[str, str]], good: str, kind: str, **more: Any) -> str:
    named = [*(name for name, _ in hostile), *[good] * NUM_GOOD]
    items = [{"name": name, "prompt": "What?", "output": "A dog", **more} for name in named]
    path = folder / f"train.{kind}"
    if kind == "json":
        path.write_text(json.dumps({"data": {str(place): item for place, item in enumerate(items)}}))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(item) + "\n" for item in items))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = items
        pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
@pytest.mark.parametrize("known", [True, False], ids=["durations given", "durations read"])
def test_a_manifest_keeps_its_good_rows(
    hostile: list[tuple[str, str]], tmp_path: Path, make_sound: Any, kind: str, known: bool
) -> None:
    """Those that are refused by their text are set aside before anything is opened; the others when it is."""
    make_sound("good.flac", 2.0)
    uri = _manifest(tmp_path, hostile, "good.flac", kind, **({"duration": 2.0} if known else {}))
    table, failures = fill_durations(read_samples(uri), uri, fallback=str(tmp_path))
    good, bad = check_samples(table)
    refused = {"missing", "unreadable", "empty file", "not a regular file"}
    by_text = [(name, reason) for name, reason in hostile if reason not in refused]
    found = [reason for _, reason in bad if reason != "no duration"]
    assert sorted(found) == sorted(reason for _, reason in by_text)
    if known:
        assert len(good) == NUM_GOOD + len(hostile) - len(by_text)
    else:
        assert len(good) == NUM_GOOD
        assert {reason for _, reason in hostile} <= {*failures.values(), *found}
    one_by_one = check_samples(list(table))[1]
    assert [(sample.id, reason) for sample, reason in one_by_one] == [(sample.id, reason) for sample, reason in bad]


def test_captions_too(hostile: list[tuple[str, str]], tmp_path: Path) -> None:
    path = tmp_path / "train.captions.jsonl"
    rows = [{"name": name, "caption": "a dog", "duration": 1.0} for name, _ in hostile]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bad = check_samples(read_captions(str(path)))[1]
    assert {reason for _, reason in bad} > {"chained name", "scheme not allowed", "name leads outside"}


def test_a_batch_and_an_answer_of_such_a_clip_are_failures(hostile: list[tuple[str, str]], tiny_tokenizer: Any) -> None:
    """What bypassed the check of its manifest is refused again where it is opened."""
    for name, reason in hostile:
        if reason == "name leads outside":
            continue
        sample = Sample("id", name, 0.0, 1.0, "What?", "bell", "AQA", "d")
        batch = LmCollator(tiny_tokenizer, max_windows=3)(Row(0, ((sample,),)))
        assert (batch.sample_ids, [failure.reason for failure in batch.failures]) == ((), [reason])
        answer = _read("key", Stretch(name, 0.0, 1.0), AnswerLimits(3, 4))
        assert isinstance(answer, AudioError)
        assert answer.reason == reason


def test_parents_only_where_they_are_allowed(tmp_path: Path, make_sound: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AF2_PARENT_NAMES", "")
    make_sound("sounds/a.flac", 1.0)
    (tmp_path / "set").mkdir()
    path = tmp_path / "set" / "train.json"
    item = {"prompt": "What?", "output": "A dog", "duration": 1.0}
    names = {"0": "../sounds/a.flac", "1": "x/../../sounds/a.flac", "2": "x/../a.flac"}
    path.write_text(json.dumps({"data": {key: item | {"name": name} for key, name in names.items()}}))
    reasons = [reason for _, reason in check_samples(read_samples(str(path)))[1]]
    assert reasons == ["name leads outside"] * 2
    assert read_samples(str(path))[2].uri == str(tmp_path / "set" / "a.flac")
    monkeypatch.setattr(places.os, "environ", dict(places.os.environ))
    places.allow([], parents=True)
    allowed = read_samples(str(path))
    assert [sample.uri for sample in allowed[:2]] == [str(tmp_path / "sounds" / "a.flac")] * 2
    assert check_samples(allowed)[1] == []
    assert len(decode(allowed[0].uri)) == 16_000


def test_a_root_of_the_command_may_lead_up(tmp_path: Path, make_sound: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make_sound("sounds/a.flac", 1.0)
    (tmp_path / "set").mkdir()
    monkeypatch.chdir(tmp_path / "set")
    item = {"name": "a.flac", "prompt": "What?", "output": "A dog", "duration": 1.0}
    Path("train.json").write_text(json.dumps({"data": {"0": item}}))
    (sample,) = read_samples("train.json", "../sounds")
    assert check_samples([sample])[1] == []
    assert len(decode(sample.uri)) == 16_000
    Path("train.json").write_text(json.dumps({"split_path": "../sounds", "data": {"0": item}}))
    (sample,) = read_samples("train.json")  # what the manifest itself says is a name like others
    assert check_samples([sample])[1] == [(sample, "name leads outside")]


def test_a_recipe_adds_schemes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places.os, "environ", {})
    with pytest.raises(places.NameRefused, match=r"scheme not allowed.*access\.schemes"):
        places.locate("memory://folder/a.wav")
    places.allow(["memory"])
    assert places.locate("memory://folder/a.wav")[1] == "/folder/a.wav"
    assert places.environment() == {"AF2_SCHEMES": "memory"}


def test_a_store_that_says_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """One clip may cost two tries, never the run its end."""
    import fsspec

    class Silent(fsspec.AbstractFileSystem):
        protocol = "silent"

        def info(self, path: str, **more: Any) -> dict[str, Any]:
            time.sleep(60)
            return {}

    class Broken(fsspec.AbstractFileSystem):
        protocol = "broken"

        def info(self, path: str, **more: Any) -> dict[str, Any]:
            raise AttributeError("no such thing")

    fsspec.register_implementation("silent", Silent, clobber=True)
    fsspec.register_implementation("broken", Broken, clobber=True)
    monkeypatch.setattr(places.os, "environ", dict(places.os.environ))
    monkeypatch.setattr("af2_ray.audio.decode.READ_S", 0.2)
    places.allow(["silent", "broken"])
    started = time.perf_counter()
    with pytest.raises(AudioError, match="timed out"):
        decode("silent://bucket/a.wav")
    assert time.perf_counter() - started < 5
    with pytest.raises(AudioError, match=r"unreadable \(AttributeError: no such thing"):
        decode("broken://bucket/a.wav")


def test_a_read_that_hangs_costs_its_clip_and_corrupts_no_other(
    make_sound: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A larger recording comes in ranges; one that hangs is asked for again, and what it brings later is not taken."""
    import fsspec

    path = make_sound("long.wav", 120.0)
    data, slow = Path(path).read_bytes(), {"first": 1}

    class Slow(fsspec.AbstractFileSystem):
        protocol = "slow"

        def info(self, path: str, **more: Any) -> dict[str, Any]:
            return {"name": path, "size": len(data), "type": "file"}

        def cat_file(self, path: str, start: int | None = None, end: int | None = None, **more: Any) -> bytes:
            if start and "hangs" in path:
                time.sleep(30)
            if start and slow["first"]:
                slow["first"] = 0
                time.sleep(1)
            return data[start:end]

    fsspec.register_implementation("slow", Slow, clobber=True)
    monkeypatch.setattr(places.os, "environ", dict(places.os.environ))
    monkeypatch.setattr("af2_ray.audio.decode.READ_S", 0.4)
    monkeypatch.setattr("af2_ray.audio.decode._WHOLE_BYTES", 1000)
    places.allow(["slow"])
    np.testing.assert_array_equal(decode("slow://bucket/a.wav"), decode(path))
    assert slow["first"] == 0
    started = time.perf_counter()
    with pytest.raises(AudioError, match="timed out"):
        decode("slow://bucket/hangs.wav")
    assert time.perf_counter() - started < 5


def test_a_client_s_own_timeout_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[int] = []

    def call() -> int:
        tries.append(1)
        if len(tries) < 4:
            raise TimeoutError("of the client")
        return 7

    monkeypatch.setattr("af2_ray.storage.stores.time.sleep", lambda seconds: None)
    assert retried(call) == 7
