"""`jobs/check_data.py`: what it counts, what it finds, and its exit codes."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from job_runner import run_job

from af2_ray.audio.hear import Stretch
from af2_ray.config import Dataset
from af2_ray.data.data_check import longer_than, same_recordings, survey
from af2_ray.data.samples import Sample


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def rows(make_sound: Callable[..., str]) -> list[dict[str, Any]]:
    return [
        {"name": make_sound(f"{i}.flac", 1.0 + i), "prompt": "which?", "output": f"bell {i}", "duration": 1.0 + i}
        for i in range(4)
    ]


def test_clean(tmp_path: Path, rows: list[dict[str, Any]], capsys: Any) -> None:
    train, test = write(tmp_path / "train.jsonl", rows[:3]), write(tmp_path / "test.jsonl", rows[3:])
    assert run_job("check_data", train, "--test", test, "--out", tmp_path / "page.html") == 0
    assert "no faults" in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 2
    assert "Nothing stands against" in page


def test_faults(tmp_path: Path, rows: list[dict[str, Any]], capsys: Any) -> None:
    bad = [*rows, rows[0], rows[1] | {"output": " "}, rows[2] | {"name": "none.flac"}]
    train, test = write(tmp_path / "train.jsonl", bad), write(tmp_path / "test.jsonl", rows[3:])
    assert run_job("check_data", train, "--test", test, "--out", tmp_path / "page.html") == 1
    text = capsys.readouterr().out.replace("\n", "")
    for words in ("1 unusable samples (empty answer 1)", "files unreadable", "none.flac: missing", "in training too"):
        assert words in text
    assert "asked twice (1)" in (tmp_path / "page.html").read_text()


def test_input_that_cannot_be_used(tmp_path: Path, capsys: Any) -> None:
    assert run_job("check_data", tmp_path / "none.jsonl") == 2
    assert "no such manifest" in capsys.readouterr().err


def sample(uri: str, duration_s: float = 1.0, *more: Stretch) -> Sample:
    return Sample("id", uri, 0.0, duration_s, "q", "a", "AQA", "d", more_audio=more)


def test_recordings_that_are_longer_than_what_is_heard() -> None:
    clips = [sample("a", 10.0), sample("b", 30.5, Stretch("c", 5.0, 31.0)), sample("b", 30.5), sample("d", 30.0)]
    assert longer_than(clips, 3) == [("c@5", 31.0), ("b", 30.5)]
    assert longer_than(clips, 4) == []


def test_a_recipe_remarks_on_recordings_that_its_stages_cut(tmp_path: Path, capsys: Any) -> None:
    row = {"name": "a.flac", "prompt": "which?", "output": "bell", "duration": 45.0}
    write(tmp_path / "train.jsonl", [row])
    recipe = tmp_path / "mine.yaml"
    stage = "{name: s, max_windows: 3, trainable: [xattn], steps: 1, data: [{manifest: %s}]}" % (
        tmp_path / "train.jsonl"
    )
    evaluation = "{manifests: [], seen_manifests: [], captions: null}"
    recipe.write_text(f"base: tiny\nname: mine\ncorpus: null\nstages: [{stage}]\nevaluation: {evaluation}\n")
    assert run_job("check_data", recipe, "--files", 0, "--out", tmp_path / "page.html") == 0
    assert "stage s hears 30 s of a recording, and 1 are cut there" in capsys.readouterr().out.replace("\n", " ")


def test_columns_of_a_table_and_turns_are_counted(tmp_path: Path, rows: list[dict[str, Any]], capsys: Any) -> None:
    (tmp_path / "t.csv").write_text(f"path,q,a\n{rows[0]['name']},which one?,bell\n")
    asked = (tmp_path / "t.csv", "--columns", "audio=path,question=q,answer=a", "--out", tmp_path / "page.html")
    assert run_job("check_data", *asked) == 0
    turns = [{"role": role, "content": "two words"} for role in ("user", "assistant") * 2]
    audios = [rows[0]["name"], rows[1]["name"]]
    talk = write(tmp_path / "talk.jsonl", [{"messages": turns, "audios": audios}])
    found = survey(Dataset(manifest=talk), "train")
    assert (found.num_samples, found.num_clips, found.text_words, found.num_probed) == (1, 2, (8,), 2)
    assert sorted(found.duration_s) == [1.0, 2.0]
    assert run_job("check_data", tmp_path / "t.csv", "--columns", "audio") == 2
    assert "not key=column" in capsys.readouterr().err


def test_the_same_recording_under_another_name(make_sound: Callable[..., str], tmp_path: Path) -> None:
    paths = [make_sound(f"{name}.wav", 1.0, hz=hz) for name, hz in (("a", 200), ("b", 300), ("c", 400), ("e", 500))]
    copy, stored = tmp_path / "copy.wav", "memory://twins/a.wav"
    copy.write_bytes(Path(paths[1]).read_bytes())
    fsspec.filesystem("memory").pipe_file("/twins/a.wav", Path(paths[0]).read_bytes())
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        tar.add(paths[3], arcname="x.wav")
    train = [sample(paths[0]), sample(paths[1]), sample(paths[2]), sample(paths[3]), sample("none.wav")]
    member = f"{tmp_path}/s.tar#x.wav"
    test = [sample(stored, 1.0, Stretch(str(copy), 0.0, 1.0)), sample(paths[2]), sample(member), sample("none.wav")]
    assert same_recordings(train, test) == [
        f"{stored} is {paths[0]}",
        f"{copy} is {paths[1]}",
        f"{paths[2]} is in both",
        f"{member} is {paths[3]}",
    ]
    assert same_recordings(train, [sample(make_sound("d.wav", 1.0, hz=600))]) == []  # of the same size
    assert same_recordings([], test) == []
