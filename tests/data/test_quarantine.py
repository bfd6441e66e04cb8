"""The list of what was set aside, and its end."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from af2_ray.data.quarantine import Failure, Quarantine, TooManyBad
from af2_ray.storage.files import read_rows

BAD = Failure("a.flac", "truncated", 1.0, "half", row=3)


def test_listed_once_even_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "run" / "quarantine.jsonl"
    first = Quarantine(str(path), 0.5)
    first.add([BAD], 10)
    first.add([], 10)
    assert first.bad_share == 0.05
    assert first.reasons == {"truncated": 1}
    again = Quarantine(str(path), 0.5)
    again.add([asdict(BAD), Failure("b.flac", "missing")], 10)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["uri"], line["reason"]) for line in lines] == [("a.flac", "truncated"), ("b.flac", "missing")]


def test_too_many_end_the_run_with_reasons(tmp_path: Path) -> None:
    quarantine = Quarantine(str(tmp_path / "q.jsonl"), 0.1, min_items=20)
    quarantine.add([BAD] * 3, 10)  # too few to judge
    with pytest.raises(
        TooManyBad, match=r"5 of 20 items were set aside \(25\.0%, allowed 10\.0%.*truncated 3, missing 2"
    ):
        quarantine.add([Failure(f"{i}.flac", "missing") for i in range(2)], 10)
    assert len((tmp_path / "q.jsonl").read_text().splitlines()) == 3


def test_a_line_that_was_cut_costs_itself_alone(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    Quarantine(str(path)).add([BAD], 5)
    with path.open("a") as file:
        file.write('{"uri": "b.fl')
    again = Quarantine(str(path))
    again.add([BAD, Failure("c.flac", "missing")], 5)
    assert [row["uri"] for row in read_rows(path)] == ["a.flac", "c.flac"]
