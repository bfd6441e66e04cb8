"""Manifests of all formats give the same samples; durations are found once; shards are read by offset."""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import tarfile
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from af2_ray.audio import shards
from af2_ray.audio.decode import AudioError, decode, probe
from af2_ray.data import durations as durations_module
from af2_ray.data.columns import Joined, Pickled, SampleTable, clip_numbers, portable
from af2_ray.data.durations import fill_durations
from af2_ray.data.manifest import read_captions, read_samples
from af2_ray.data.samples import CaptionSet, Sample, check_samples, fingerprint

ROWS = [
    {"name": f"audio/{c}.flac", "prompt": f"question {q}?", "output": f"answer {c}{q}", "duration": 2.0 + c}
    for c in range(4)
    for q in range(2)
]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return str(path)


def write_arrow(folder: Path, rows: list[dict[str, Any]]) -> str:
    """As `datasets` saves to disk: an Arrow stream and two JSON files."""
    folder.mkdir()
    table = pa.Table.from_pylist(rows)
    with (
        pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as out,
    ):
        out.write_table(table)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text("{}")
    return str(folder)


def cut(number: int, **more: Any) -> dict[str, Any]:
    row = ROWS[2 * number]
    supervisions = [
        {"id": f"{number}-{q}", "text": ROWS[2 * number + q]["output"], "custom": {"prompt": f"question {q}?"}}
        for q in range(2)
    ]
    source = {"type": "file", "channels": [0], "source": row["name"]}
    recording = {"id": str(number), "sources": [source], "sampling_rate": 16000, "num_samples": 1}
    common = {"id": f"cut-{number}", "start": 0.0, "duration": row["duration"], "channel": 0, "type": "MonoCut"}
    return common | {"supervisions": supervisions, "recording": recording} | more


def told(samples: Any) -> list[tuple[Any, ...]]:
    return [(s.uri, s.offset_s, s.duration_s, s.prompt, s.answer) for s in samples]


@pytest.mark.parametrize(
    "form", ["jsonl", "jsonl.gz", "parquet", "folder of parquet", "datasets", "lhotse", "lhotse.gz"]
)
def test_all_formats_say_the_same(tmp_path: Path, form: str) -> None:
    other_names = [
        {"audio": r["name"], "question": r["prompt"], "answer": r["output"], "duration": r["duration"]} for r in ROWS
    ]
    folder = tmp_path
    if form.startswith("jsonl"):
        uri = write_lines(tmp_path / f"train.{form}", other_names)
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(other_names), uri := str(tmp_path / "train.parquet"))
    elif form == "folder of parquet":
        folder = tmp_path / "train"
        folder.mkdir()
        for part in range(2):
            pq.write_table(pa.Table.from_pylist(other_names[4 * part : 4 * part + 4]), folder / f"{part}.parquet")
        uri = str(folder)
    elif form == "datasets":
        folder = tmp_path / "train"
        uri = write_arrow(folder, other_names)
    else:
        name = "cuts.jsonl.gz" if form.endswith("gz") else "cuts.jsonl"
        uri = write_lines(tmp_path / name, [cut(c) for c in range(4)])
    samples = read_samples(uri)
    assert told(samples) == [(f"{folder}/{r['name']}", 0.0, r["duration"], r["prompt"], r["output"]) for r in ROWS]
    assert len({s.id for s in samples}) == len(samples)
    assert read_samples(uri, root="s3://bucket")[0].uri == "s3://bucket/audio/0.flac"
    assert check_samples(samples)[1] == []


def test_what_a_dataset_keeps_beside_its_data_is_not_read(tmp_path: Path) -> None:
    """`map` and `filter` leave their results in the folder; `state.json` names the data."""
    uri = write_arrow(tmp_path / "train", ROWS)
    (data,) = (tmp_path / "train").glob("*.arrow")
    (tmp_path / "train" / "cache-0123.arrow").write_bytes(data.read_bytes())
    assert len(read_samples(uri)) == len(ROWS)
    (tmp_path / "train" / "other.arrow").write_bytes(data.read_bytes())
    (tmp_path / "train" / "state.json").write_text(json.dumps({"_data_files": [{"filename": data.name}]}))
    assert len(read_samples(uri)) == len(ROWS)


def test_compressed_manifests_and_line_breaks_within_a_text(tmp_path: Path) -> None:
    facts = {"split": "train", "split_path": ".", "flamingo_task": "a-AQA", "data": {"0": ROWS[0]}}
    with gzip.open(tmp_path / "train.json.gz", "wt") as file:
        json.dump(facts, file)
    assert [sample.prompt for sample in read_samples(str(tmp_path / "train.json.gz"))] == [ROWS[0]["prompt"]]
    caption = "a bell\u2028and a dog"
    row = {"name": "a.flac", "duration": 1.0, "caption": caption}
    (tmp_path / "c.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [one.caption for one in read_captions(str(tmp_path / "c.jsonl"))] == [caption]


def test_what_a_cut_says_of_channel_and_stretch_is_heard_or_refused(tmp_path: Path) -> None:
    one = cut(0)
    first, _ = one["supervisions"]
    first |= {"start": 0.5, "duration": 1.0}
    samples = read_samples(write_lines(tmp_path / "cuts.jsonl", [one]))
    assert [(s.offset_s, s.duration_s) for s in samples] == [
        (one.get("start", 0.0) + 0.5, 1.0),
        (one.get("start", 0.0), one["duration"]),
    ]
    with pytest.raises(ValueError, match="channel 1"):
        read_samples(write_lines(tmp_path / "right.jsonl", [one | {"channel": 1}]))


def test_plain_lhotse_cuts_are_told_from_our_caption_lines(tmp_path: Path) -> None:
    cuts = write_lines(tmp_path / "cuts.jsonl", [cut(c) for c in range(4)])
    ours = [{"name": r["name"], "caption": r["output"], "duration": r["duration"]} for r in ROWS]
    assert read_captions(cuts) == read_captions(write_lines(tmp_path / "captions.jsonl", ours))


@pytest.mark.skipif(find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_a_store_without_its_client_says_what_to_install() -> None:
    for read in (lambda: read_samples("gs://bucket/train.jsonl"), lambda: decode("gs://bucket/a.flac")):
        with pytest.raises((ValueError, AudioError), match="gcsfs"):
            read()


def test_a_table_parts_usable_samples_as_a_list_does() -> None:
    good = Sample("a", "a.flac", 0.0, 1.0, "which?", "bell", "AQA", "d")
    wrong = [{"duration_s": math.nan}, {"duration_s": 0.0}, {"offset_s": -1.0}, {"prompt": " \n"}, {"answer": ""}]
    wrong.append({"prompt": "Audio 1: <audio> Audio 2: <AUDIO> Which is louder?"})
    samples = [good, *(replace(good, id=str(n), **change) for n, change in enumerate(wrong)), replace(good, id="b")]
    of_table, of_list = check_samples(SampleTable.from_samples(samples)), check_samples(samples)
    assert list(of_table[0]) == of_list[0] == [samples[0], samples[-1]]
    assert [(s.id, reason) for s, reason in of_table[1]] == [(s.id, reason) for s, reason in of_list[1]]


def test_remote_and_unreadable(tmp_path: Path) -> None:
    local = write_lines(tmp_path / "train.jsonl", ROWS)
    fsspec.filesystem("memory").pipe_file("/m/train.jsonl", Path(local).read_bytes())
    assert read_samples("memory://m/train.jsonl")[0].uri == "memory://m/audio/0.flac"
    (tmp_path / "lines.jsonl").write_text(json.dumps(ROWS[0]) + "\n{oops\n")
    with pytest.raises(ValueError, match=r"lines\.jsonl, line 2: not JSON"):
        read_samples(str(tmp_path / "lines.jsonl"))
    with pytest.raises(ValueError, match=r"some\.jsonl, line 1: key 'prompt' is missing"):
        read_samples(write_lines(tmp_path / "some.jsonl", [{"name": "a", "output": "b"}]))
    pq.write_table(pa.table({"audio": ["a"], "text": ["b"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="no column 'prompt'"):
        read_samples(str(tmp_path / "a.parquet"))
    held = write_arrow(tmp_path / "held", [{"audio": {"bytes": b"RIFF", "path": "a.wav"}, "prompt": "q", "text": "a"}])
    with pytest.raises(ValueError, match="audio bytes inside the table"):
        read_samples(held)
    with pytest.raises(ValueError, match="no such manifest"):
        read_samples(str(tmp_path / "none"))
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match=r"name one of .*splits/train"):
        read_samples(str(tmp_path / "splits"))


def test_captions_of_other_formats(tmp_path: Path) -> None:
    row = {"name": "a.flac", "duration": 3.0, "caption": "a", "positives": ["b"], "negatives": [["c"], ["d"]]}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "train.parquet")
    wanted = CaptionSet(f"{tmp_path}/a.flac", 0.0, 3.0, "a", ("b",), (("c",), ("d",)))
    assert read_captions(str(tmp_path / "train.parquet")) == [wanted]
    cuts = write_lines(tmp_path / "cuts.jsonl.gz", [cut(0)])
    assert [clip.caption for clip in read_captions(cuts)] == ["answer 00", "answer 01"]


def test_a_table_is_the_list_it_was_made_of() -> None:
    samples = [
        Sample(
            f"{i}", f"s3://b/{i // 2}.flac", i % 3 * 1.0, 5.0, "q?", f"a {i}", "AQA", "d", options=("x", "y")[: i % 3]
        )
        for i in range(10)
    ]
    samples[3] = replace(samples[3], meta={"source": 7}, offset_s=0.5)
    table = SampleTable.from_samples(samples)
    assert list(table) == samples == [table[i] for i in range(10)]
    assert table[-1] == samples[-1]
    assert list(table[2:9:3]) == samples[2:9:3]
    assert clip_numbers(table).tolist() == clip_numbers(samples).tolist()
    both = Joined([table[:4], table[4:]])
    assert list(both) == samples
    assert both[7] == samples[7]
    assert clip_numbers(both).tolist() == clip_numbers(samples).tolist()
    assert list(portable(Joined([samples[:4], table[4:]]))) == samples
    assert list(Pickled(samples)) == samples
    assert portable(table) is table
    moved = SampleTable.from_samples([replace(s, uri=s.uri.replace("s3://", "/mnt/x/")) for s in samples])
    assert fingerprint(moved) == fingerprint(table)
    assert fingerprint(table[::-1]) != fingerprint(table) != fingerprint(table[:-1])
    with pytest.raises(IndexError):
        table[10]


def test_durations_are_read_once(make_sound: Callable[..., str], tmp_path: Path, monkeypatch: Any) -> None:
    uris = [make_sound(f"{i}.flac", 1.0 + i) for i in range(3)] + ["none.flac"]
    rows = [{"name": uri, "prompt": "q", "output": "a", "audio_start": 0.5} for uri in uris]
    manifest = write_lines(tmp_path / "train.jsonl", rows)
    for read in (read_samples(manifest), list(read_samples(manifest))):
        filled, failures = fill_durations(read, manifest)
        assert [s.duration_s for s in filled][:3] == [0.5, 1.5, 2.5]
        assert failures == {"none.flac": "missing"} or failures == {f"{tmp_path}/none.flac": "missing"}
        assert [reason for _, reason in check_samples(filled)[1]] == ["no duration"]
    asked: list[str] = []
    monkeypatch.setattr(durations_module, "probe", lambda uri: asked.append(uri) or 9.0)
    fill_durations(read_samples(manifest), manifest)
    assert [Path(uri).name for uri in asked] == ["none.flac"]
    monkeypatch.setattr(durations_module, "_save", lambda caches, known: asked.extend(caches))
    fill_durations(read_samples(manifest), "s3://b/m.jsonl".replace("s3://b", str(tmp_path / "new")), fallback="run")
    assert asked[-2].endswith("m.jsonl.durations.json")
    assert asked[-1].startswith("run/")


def test_clips_of_a_shard(make_sound: Callable[..., str], tmp_path: Path, monkeypatch: Any) -> None:
    paths = [make_sound(f"{i}.flac", 2.0, hz=300 + i) for i in range(3)]
    shard = str(tmp_path / "shard.tar")
    with tarfile.open(shard, "w") as tar:
        for path in paths:
            tar.add(path, arcname=f"clips/{Path(path).name}")
    uris = [f"{shard}#{member}" for member in shards.index_of(shard).files]
    assert uris == [f"{shard}#clips/{i}.flac" for i in range(3)]
    for uri, path in zip(uris, paths, strict=True):
        np.testing.assert_array_equal(decode(uri, 0.5, 1.0), decode(path, 0.5, 1.0))
        assert probe(uri) == 2.0
    assert (tmp_path / "shard.tar.index.json").is_file()
    size = Path(shard).stat().st_size
    with tarfile.open(shard, "w") as tar:  # the same clips in another order, in as many bytes
        for path in reversed(paths):
            tar.add(path, arcname=f"clips/{Path(path).name}")
    assert Path(shard).stat().st_size == size
    np.testing.assert_array_equal(decode(uris[0], 0.5, 1.0), decode(paths[0], 0.5, 1.0))
    monkeypatch.setattr("af2_ray.audio.decode._WHOLE_BYTES", 1000)  # by ranged reads
    np.testing.assert_array_equal(decode(uris[1], 0.5, 1.0), decode(paths[1], 0.5, 1.0))
    fsspec.filesystem("memory").pipe_file("/s/shard.tar", Path(shard).read_bytes())
    np.testing.assert_array_equal(decode("memory://s/shard.tar#clips/2.flac"), decode(paths[2]))
    for uri, reason in ((f"{shard}#clips/9.flac", "missing"), (f"{tmp_path}/no.tar#a", "missing")):
        with pytest.raises(AudioError) as caught:
            decode(uri)
        assert caught.value.reason == reason
    index = tmp_path / "shard.tar.index.json"
    for odd in ("null", "[]", '{"format": 2}', '{"format": 2, "version": null, "files": 3}', "{" * 10_000, "", "\0"):
        shards._known.clear()  # as another process
        index.write_text(odd)
        np.testing.assert_array_equal(decode(uris[1], 0.5, 1.0), decode(paths[1], 0.5, 1.0))
    told = json.loads(index.read_text())
    for place in ([-5, 10, "x"], [512, -1, "x"], [10**12, 5, "x"], ["a"], None):
        shards._known.clear()
        index.write_text(json.dumps(told | {"files": told["files"] | {"clips/1.flac": place}}))
        np.testing.assert_array_equal(decode(uris[1], 0.5, 1.0), decode(paths[1], 0.5, 1.0))
    (tmp_path / "bad.tar").write_bytes(b"not a tar" * 1000)
    with pytest.raises(AudioError, match="not a readable tar"):
        decode(f"{tmp_path}/bad.tar#a")


def test_a_shard_written_anew_is_noticed_whatever_its_names_are(make_sound: Callable[..., str], tmp_path: Path) -> None:
    """Of names that are not ASCII a tar header shows `?` alone; the clips are of equal size and date."""
    names = ["\u72d7.wav", "\u732b.wav", "a" * 120 + "1.wav", "a" * 120 + "2.wav"]
    paths = [make_sound(f"{number}.wav", 1.0, hz=200 + 900 * number) for number in range(len(names))]
    shard = str(tmp_path / "shard.tar")

    def write(order: list[int]) -> None:
        with tarfile.open(shard, "w") as tar:
            for place in order:
                member = tarfile.TarInfo(names[place])
                member.size = Path(paths[place]).stat().st_size
                tar.addfile(member, io.BytesIO(Path(paths[place]).read_bytes()))

    for order in ([0, 1, 2, 3], [1, 0, 3, 2]):
        write(order)
        for name, path in zip(names, paths, strict=True):
            np.testing.assert_array_equal(decode(f"{shard}#{name}"), decode(path))


def test_pipes_and_links_below_a_located_place_are_not_followed(make_sound: Callable[..., str], tmp_path: Path) -> None:
    sound = make_sound("a.flac", 1.0)
    shard, victim = tmp_path / "s.tar", tmp_path / "victim"
    with tarfile.open(shard, "w") as tar:
        tar.add(sound, arcname="a.flac")
    os.mkfifo(tmp_path / "s.tar.index.json")
    assert len(decode(f"{shard}#a.flac")) == 16_000
    shards._known.clear()
    (tmp_path / "s.tar.index.json").unlink()
    victim.write_text("mine")
    (tmp_path / "s.tar.index.json").symlink_to(victim)
    assert len(decode(f"{shard}#a.flac")) == 16_000
    assert victim.read_text() == "mine"
    for name in ("x.arrow", "part.parquet", "state.json", "dataset_dict.json"):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / "y.arrow").write_bytes(b"")
        os.mkfifo(folder / name)
        with pytest.raises(ValueError, match=r"not a regular file|not readable as"):
            read_samples(str(folder))
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "x.arrow").write_bytes(b"")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../victim"}]}))
    with pytest.raises(ValueError, match="no name of a file below a folder"):
        read_samples(str(folder))
