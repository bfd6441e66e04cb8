"""Questions of a table with named columns, and of a folder of labels, are asked and scored by their options."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import serve_toy
from job_runner import run_job

from af2_ray.data.manifest import read_samples
from af2_ray.evaluate.answers import is_right, match_option


def test_named_columns_and_labels(
    make_sound: Callable[..., str], tmp_path: Path, tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = serve_toy.export(tmp_path / "model", tiny_tokenizer)
    for place, label in enumerate(("dog", "church_bell", "drum", "phone")):
        make_sound(f"sounds/{label}/0.wav", 0.5, hz=200 + 100 * place)
    table = tmp_path / "t.csv"
    table.write_text("path,q,a,options\nsounds/dog/0.wav,Which?,dog,dog|bell\nsounds/drum/0.wav,Which?,drum,dog|drum\n")
    columns = ("--columns", "audio=path,question=q,answer=a")
    out, sounds = tmp_path / "out", tmp_path / "sounds"
    assert run_job("evaluate", model, table, *columns, "--train", table, "--out", out, "--max-new-tokens", 4) == 0
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [(row["question"], row["options"], row["expected"]) for row in rows] == [
        ("Which?", ["dog", "bell"], "dog"),
        ("Which?", ["dog", "drum"], "drum"),
    ]
    assert run_job("evaluate", model, sounds, "--train", sounds, "--out", out, "--max-new-tokens", 4) == 0
    details = json.loads((out / "metrics.json").read_text())["details"]
    assert details["by_skill"]["identification"]["questions"] == 4
    assert details["all"]["chance"] == 0.25
    assert run_job("evaluate", model, table, "--out", out) == 2
    assert "t.csv, line 2: key 'prompt' is missing (or question, instruction)" in capsys.readouterr().err


def test_an_option_is_right_by_name_and_by_letter(make_sound: Callable[..., str], tmp_path: Path) -> None:
    for label in ("dog", "church_bell", "drum"):
        make_sound(f"sounds/{label}/0.wav", 0.1)
    for sample in read_samples(str(tmp_path / "sounds")):
        letter = "ABC"[sample.options.index(sample.answer)]
        for text in (sample.answer.upper(), f"({letter}) {sample.answer}.", f"({letter})"):
            assert is_right(sample, text)
        wrong = next(option for option in sample.options if option != sample.answer)
        assert match_option(wrong, sample.options) == wrong
        assert not is_right(sample, wrong)
