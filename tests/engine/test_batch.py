"""Whole manifests: the plan, the answers, the files, and how many replicas an online load wants."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow.parquet
import pytest
import serve_toy

from af2_ray.audio.hear import Stretch, hear
from af2_ray.config import Serve
from af2_ray.data.samples import Sample
from af2_ray.engine import batch
from af2_ray.engine.batch import AnswerLimits, Question
from af2_ray.engine.engine import Engine
from af2_ray.engine.request import Answer, Clip, Request
from serve_apps.scaling import ByWindows


def sample(name: str, duration_s: float, prompt: str = "what?") -> Sample:
    return Sample(name, name, 0.0, duration_s, prompt, "", "AQA", "mine")


def test_questions_without_answers_are_asked_and_bad_ones_told() -> None:
    samples = [sample("a", 5.0), sample("b", float("nan")), sample("c", 5.0, " ")]
    asked, refused = batch.questions_of(samples)
    assert [one.index for one in asked] == [0]
    rows = [result.to_row() for result in refused]
    assert [(row["index"], row["error"]) for row in rows] == [(1, "no duration"), (2, "empty prompt")]
    asked, refused = batch.questions_of(samples, "Which sound?")
    assert [(one.index, one.prompt) for one in asked] == [(0, "Which sound?"), (2, "Which sound?")]


def test_chunks_are_of_like_length_and_keep_a_clip_together() -> None:
    samples = [sample(f"{n % 7}", 5.0 + 30 * (n % 7)) for n in range(28)]
    asked, _ = batch.questions_of(samples)
    chunks = batch.plan_chunks(asked, 6, 30)
    assert sorted(one.index for chunk in chunks for one in chunk) == list(range(28))
    assert [len(chunk) for chunk in chunks] == [8, 8, 8, 4]
    longest = [max(one.stretch.duration_s for one in chunk) for chunk in chunks]
    assert longest == sorted(longest, reverse=True)
    homes = {one.clip_key: {n for n, chunk in enumerate(chunks) if one in chunk} for one in asked}
    assert all(len(home) == 1 for home in homes.values())


def test_answers_equal_single_ones_and_bad_files_are_told(tiny_tokenizer: Any, make_sound: Any, tmp_path: Path) -> None:
    model = serve_toy.build(tiny_tokenizer)
    engine = Engine(model, tiny_tokenizer, Serve(num_slots=2))
    files = [make_sound(f"{n}.flac", 3.0 + 9 * n, hz=200.0 + 300 * n) for n in range(3)]
    (tmp_path / "bad.wav").write_bytes(b"no audio at all")
    uris = [files[0], str(tmp_path / "bad.wav"), files[1], files[0], files[2], str(tmp_path / "none.wav")]
    lengths = [3.0, 3.0, 12.0, 3.0, 21.0, 3.0]
    asked = [Question(n, str(n), Stretch(uri, 0.0, lengths[n]), f"question {n}?") for n, uri in enumerate(uris)]
    results = batch.answer_all(engine, asked, AnswerLimits(30, 6))
    assert [result.question for result in results] == asked
    rows = [result.to_row() for result in results]
    assert {row["index"]: row["error"].split(":")[0] for row in rows if "error" in row} == {
        1: "unreadable",
        5: "missing",
    }
    for row, one in zip(rows, asked, strict=True):
        if "answer" in row:
            clip = Clip.of(hear(one.stretch, 30))
            (single,) = Engine(model, tiny_tokenizer).answer([Request(one.prompt, (clip,), max_new_tokens=6)])
            assert isinstance(single, Answer)
            assert row["answer"] == single.text


def test_parts_are_joined_in_input_order(tmp_path: Path) -> None:
    folder = str(tmp_path / "out.jsonl.parts")
    assert batch.parts_there(folder) == set()
    batch.write_rows(batch.part_uri(folder, 0), [{"index": 2, "id": "c", "answer": "ein „Hund“"}])
    assert batch.parts_there(folder) == {0}
    with pytest.raises(ValueError, match="1 chunks"):
        batch.join(folder, 2, [], str(tmp_path / "out.jsonl"))
    batch.write_rows(batch.part_uri(folder, 1), [{"index": 0, "id": "a", "answer": "a bell"}])
    refused = [{"index": 1, "id": "b", "error": "no duration"}]
    out = tmp_path / "out.jsonl"
    assert batch.join(folder, 2, refused, str(out)) == (3, 2)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in rows] == ["a", "b", "c"]
    batch.join(folder, 2, refused, str(tmp_path / "out.parquet"))
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert table["answer"].to_pylist() == ["a bell", None, "ein „Hund“"]
    with pytest.raises(ValueError, match="ends in"):
        batch.join(folder, 2, refused, str(tmp_path / "out.csv"))


def test_another_export_at_the_same_address_is_another_job(tmp_path: Path) -> None:
    """Chunks that an earlier model has answered are not taken for this one's."""
    with pytest.raises(ValueError, match=r"the one with config\.json"):
        batch.model_facts(str(tmp_path))
    (tmp_path / "config.json").write_text('{"max_windows": 9}')
    (tmp_path / "model.safetensors").write_bytes(b"one")
    facts = batch.model_facts(str(tmp_path))
    assert facts["max_windows"] == 9
    assert batch.model_facts(str(tmp_path)) == facts
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert batch.model_facts(str(tmp_path)) != facts


def test_replicas_for_windows_and_requests() -> None:
    policy = ByWindows(windows=60, requests=4)

    def wanted(windows: dict[str, float] | None, requests: float) -> int:
        metrics = None if windows is None else {"windows": windows}
        return policy(cast(Any, SimpleNamespace(aggregated_metrics=metrics, total_num_requests=requests)))[0]

    assert wanted(None, 0) == 0
    assert wanted({"a": 10.0}, 1) == 1
    assert wanted({"a": 61.0}, 1) == 2
    assert wanted({"a": 60.0, "b": 60.0}, 1) == 2
    assert wanted({}, 9) == 3
