"""What jobs print fits a terminal of 80 columns, with long names and large numbers in it."""

from __future__ import annotations

import io
import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from af2_ray import console
from af2_ray.data.data_check import Survey
from af2_ray.evaluate.paired import Comparison, PairedRow
from jobs import check_data, evaluate

JOBS = Path(__file__).parents[2] / "jobs"
SURVEY = Survey(
    manifest="s3://a-bucket-with-a-name/of/a/team/and/a/corpus/with/a/lname/train.json",
    split="train",
    weight=0.25,
    num_samples=8_037_712,
    num_clips=2_000_000,
    hours=22_326.98,
    duration_s=(10.0, 300.0),
    text_words=(12, 14),
    set_aside={"empty answer": 1234},
    unreadable={f"{number}.flac": "missing" for number in range(1000)},
    num_probed=200_000,
    duplicates=("x",) * 999,
    clips=frozenset(),
)


def printed(what: Any) -> list[str]:
    """Its lines on a terminal of 80 columns."""
    file = io.StringIO()
    Console(file=file, width=80).print(what)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_check_data(capsys: pytest.CaptureFixture[str]) -> None:
    lines = list(check_data._lines([SURVEY, replace(SURVEY, manifest="mine/train.json", split="test")]))
    assert [line for line in lines if len(line) > 80] == [f"{SURVEY.manifest} (train, weight 0.25)"], "a name is whole"
    assert "mine/train.json (test)" in lines
    assert " ".join(lines[2].split()) == "8,037,712 2,000,000 22326.98 155.0 13 1,234 1,000 of 200,000 999"
    places = [len(lines[0][: lines[0].index(heading)]) + len(heading) for heading in check_data.HEADINGS]
    assert all(lines[2][place - 1] != " " for place in places), "figures end below their headings"


def test_evaluate() -> None:
    row = {"questions": 12_345, "ci95": {"model": (0.475, 0.555)}}
    row |= dict.fromkeys(("model", "pairs", "deaf", "majority", "text_only", "chance"), 1.0)
    benchmarks = {f"short ({SURVEY.manifest})": {"all": row}, "long": {"all": row}, "captions": {"captions": {}}}
    details = {"all": row, "by_skill": {"identification": row}, "by_duration": {"90-300": row}}
    details |= {"by_benchmark": benchmarks}
    lines = printed(evaluate._table(details))
    assert max(map(len, lines)) <= 80
    assert lines[2].split()[-2:] == ["only", "chance"], "headings are whole"
    assert any("short (" in line and "…" in line and "12345" in line for line in lines)
    assert any("identification" in line and "47.5-55.5" in line and "12345" in line for line in lines)


def test_plan_and_its_json(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = runpy.run_path(str(JOBS / "plan.py"))
    for more in ([], ["--json"]):
        screen = io.StringIO()
        monkeypatch.setattr(console, "console", Console(file=screen, width=80))
        monkeypatch.setattr(sys, "argv", ["plan.py", "af2-0.5b", "--gpus", "100000", *more])
        plan["main"]()
        if more:
            assert {"stages", "total", "notes"} <= json.loads(screen.getvalue()).keys()
        else:
            lines = screen.getvalue().splitlines()
            assert max(len(line.rstrip()) for line in lines) <= 80
            assert "…" not in screen.getvalue()
            assert "{" not in screen.getvalue()


def test_loading_bars_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.enable_progress_bar()
    console.main(lambda: None)
    assert not transformers_logging.is_progress_bar_enabled()


def test_comparison() -> None:
    row = PairedRow(12_345, 0.123, 1.0, (0.1, 0.2), None, 0.877, (-0.1234, 1.0), 10_000, 1234, 1111, 0.25)
    names = ("identification", f"{SURVEY.manifest}/a", f"{SURVEY.manifest}/b", "[/bold]", "a\x1b[2Jb")
    both = {"captions": 7, "exact": 0.5, "event_f1": 0.25}
    found = Comparison(row, dict.fromkeys(names, row), {"90-300": row}, {"before": both, "after": both}, 3, 0)
    lines = printed(console.comparison(found, "old test"))
    assert max(map(len, lines)) <= 80
    figures = ["12345", "12.3", "100.0", "+87.7", "-12.3,", "+100.0", "10000/1234", "25.0"]
    for name in ("all", "identification", "…a", "…b", "[/bold]", "a?[2Jb"):
        assert [name, *figures] in [line.split() for line in lines]
    alone = replace(row, change_ci95=None, chance=None)
    lines = printed(console.comparison(Comparison(alone, {}, {}), "test"))
    assert ["all", *figures[:4], "-", figures[6], "-"] in [line.split() for line in lines]
    notes = list(console.comparison_notes(replace(found, all=None)))
    assert notes[0].startswith("no question was answered by both")
    assert notes[1] == "7 captions: in exactly the true words, % 50.0 -> 50.0; event F1 0.25 -> 0.25"
    assert notes[2:] == ["3 questions were answered only before: they are left out of the comparison"]
