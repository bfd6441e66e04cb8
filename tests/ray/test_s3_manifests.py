"""Manifests on a real S3 server: folders of labels, tables, recordings inside rows, and copies found by content."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from weed import Server

from af2_ray.data.data_check import same_recordings
from af2_ray.data.durations import fill_durations
from af2_ray.data.manifest import read_samples
from af2_ray.data.samples import check_samples


def test_formats_and_copies(server: Server, make_sound: Callable[..., str], tmp_path: Path) -> None:
    client = server.client()
    names = ("a_b/0.wav", "a_b/1.wav", "dog/0.wav", "dog/1.wav")
    local = [make_sound(f"sounds/{name}", 1.0, hz=200 + 50 * place) for place, name in enumerate(names)]
    for path in local:
        client.upload_file(path, "audio", f"mine/{Path(path).relative_to(tmp_path)}")
    large = make_sound("large.wav", 300.0)
    client.upload_file(large, "audio", "mine/large.wav")
    client.put_object(
        Bucket="audio", Key="mine/t.csv", Body=b"f,q,a\nsounds/dog/0.wav,Which?,dog\nlarge.wav,Which?,x\n"
    )
    content = base64.b64encode(Path(local[0]).read_bytes()).decode()
    part = {"type": "input_audio", "input_audio": {"data": content, "format": "wav"}}
    row = {"messages": [{"role": "user", "content": [part, "Which?"]}, {"role": "assistant", "content": "a b"}]}
    client.put_object(Bucket="audio", Key="mine/chat.jsonl", Body=json.dumps(row).encode())

    labels = read_samples("s3://audio/mine/sounds")
    assert [sample.uri for sample in labels] == [
        f"s3://audio/mine/{Path(path).relative_to(tmp_path)}" for path in local
    ]
    assert [sample.prompt for sample in labels] == [sample.prompt for sample in read_samples(str(tmp_path / "sounds"))]
    table = read_samples("s3://audio/mine/t.csv", None, {"audio": "f", "question": "q", "answer": "a"})
    chat = read_samples("s3://audio/mine/chat.jsonl")
    for samples, uri in ((labels, "sounds"), (table, "t.csv"), (chat, "chat.jsonl")):
        filled, unread = fill_durations(samples, f"s3://audio/mine/{uri}")
        assert (unread, check_samples(filled)[1]) == ({}, [])
    assert chat[0].uri.startswith("s3://audio/mine/chat.jsonl.clips/")
    assert same_recordings(chat, labels) == [f"{labels[0].uri} is {chat[0].uri}"]
    here = read_samples(str(tmp_path / "sounds"))
    assert len(same_recordings(here, table)) == 1
    (tmp_path / "big.csv").write_text("audio,question,answer\nlarge.wav,q,a\n")
    assert same_recordings(read_samples(str(tmp_path / "big.csv")), table) == [f"s3://audio/mine/large.wav is {large}"]
    with pytest.raises(ValueError, match="no such manifest, or of no known format"):
        read_samples("s3://audio/none")
