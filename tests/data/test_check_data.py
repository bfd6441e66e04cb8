"""`jobs/check_data.py`: what it counts, what it finds, and its exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from job_runner import run_job


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
