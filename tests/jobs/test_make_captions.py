"""Captions of one's own get their sets, in order; those that get none are listed with the reason."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from job_runner import run_job

from af2_ray.data.manifest import read_captions

run = partial(run_job, "make_captions")


def write(path: Path, *captions: str) -> Path:
    rows = ({"name": f"{n}.flac", "duration": 5.0, "caption": text} for n, text in enumerate(captions))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_grammar_makes_sets_that_training_reads(ray_cluster: Any, tmp_path: Path, capsys: Any) -> None:
    source = write(
        tmp_path / "in.jsonl",
        "A dog followed by a bell.",
        "rain then rain",
        "a horn while a man speaks",
        "wind",
        "a cow",
    )
    out = tmp_path / "out.captions.jsonl"
    assert run(source, out, "--positives", 2, "--negatives", 2, "--max-bad-share", 0.2, "--concurrency", 2) == 0
    told = capsys.readouterr().out
    assert "4 of 5 captions" in told
    assert "1 have not" in told
    sets = read_captions(str(out))
    assert [Path(each.uri).name for each in sets] == ["0.flac", "2.flac", "3.flac", "4.flac"]
    assert sets[0].caption == "A dog followed by a bell."
    for each in sets:
        assert len(each.positives) == 1
        assert [len(group) for group in each.negatives] == [2, 2]
    (bad,) = map(json.loads, out.with_name(out.name + ".failed.jsonl").read_text().splitlines())
    assert bad["name"] == "1.flac"
    assert "one sound twice" in bad["reason"]
    before = out.read_text()
    assert run(source, out, "--positives", 2, "--negatives", 2, "--concurrency", 2) == 1, "a fifth is too many"
    assert out.read_text() == before, "the same seed makes the same sets"


def test_input_that_cannot_be_used(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "bad.jsonl").write_text('{"name": "a.flac"}\n')
    assert run(tmp_path / "bad.jsonl", tmp_path / "out.jsonl") == 2
    assert "line 1" in capsys.readouterr().err
    assert run(write(tmp_path / "in.jsonl", "a dog"), tmp_path / "out.jsonl", "--engine", "llm") == 2
    assert "needs --model" in capsys.readouterr().err
