from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from quiz import question, write_corpus

from af2_ray.evaluate import report
from af2_ray.evaluate.answers import Prediction
from af2_ray.evaluate.evaluate import choose_examples
from af2_ray.evaluate.report.plots import running_mean
from af2_ray.evaluate.report.run import licence_rows, write_report
from af2_ray.evaluate.scenes import read_scenes
from af2_ray.evaluate.scoring import score, summary_of


def _predictions() -> list[Prediction]:
    samples = [
        question(number, ["low", "high"][number % 2], duration_s=[8.0, 60.0][number // 20]) for number in range(40)
    ]
    return [Prediction(s, "low" if n % 5 else s.answer, "low", "x.flac") for n, s in enumerate(samples)]


def _summary(details: dict[str, Any]) -> dict[str, Any]:
    stage = {"steps": 4, "loss_first": 4.0, "loss_last": 1.0, "padding_share": 0.02, "padding_share_unplanned": 0.4}
    return {
        "total_s": 1700.0,
        "peak_rss_gib": 6.0,
        "corpus": {"source_clips": 400, "classes": 18, "hours": 9.0, "sha256": "ab" * 32},
        "stages": [{"name": name, **stage} for name in ("pretrain", "finetune", "long")],
        "clap": {"gallery": 200, "t2a_r1": 0.2, "t2a_r1_chance": 0.005, "order_accuracy": 0.7},
        "accuracy": summary_of(details),
        "answer": {"question": "Which <b>one</b>?", "expected": "low", "text": "low"},
        "mlflow_runs": 6,
    }


def test_the_page_is_whole_and_needs_no_network(tmp_path: Path) -> None:
    predictions = _predictions()
    details = score(predictions, [prediction.sample for prediction in predictions])
    corpus = write_corpus(tmp_path, num_pairs=1)
    scene = read_scenes(str(corpus / "test.scenes.jsonl"))["00000.flac"]
    page = tmp_path / "report.html"
    table = tmp_path / "sources.csv"
    rows = ["package,licence,label,duration_s", *("scratch,CC-BY-SA-3.0,dog,1.5" for _ in range(2))]
    table.write_text("\n".join(rows))
    assert licence_rows(table) == [
        {"source": "scratch", "licence": "CC-BY-SA-3.0", "clips": 2, "classes": 1, "seconds": 3}
    ]
    curve = [(step, 3.0 / step) for step in range(1, 30)]
    write_report(
        page,
        _summary(details),
        losses={"lm": curve, "clap": curve, "pretrain": curve, "finetune": curve, "long": []},
        details=details,
        scene={**scene, "uri": str(corpus / "test" / scene["name"]), "duration_s": scene["duration"]},
        predictions=[prediction.to_json() for prediction in choose_examples(predictions)],
        corpus=licence_rows(table),
    )
    text = page.read_text(encoding="utf-8")
    HTMLParser().feed(text)
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', text), "nothing is loaded from elsewhere"
    assert text.count("<svg") == 5
    assert "data:audio/flac;base64," in text
    for part in ("Does it hear?", "AF-CLAP", "How it learned", "Padding", "Some answers", "CC-BY-SA-3.0"):
        assert part in text
    assert "Which &lt;b&gt;one&lt;/b&gt;?" in text, "text from outside is escaped"


def test_parts_without_facts_are_left_out(tmp_path: Path) -> None:
    write_report(tmp_path / "deep" / "report.html", {}, losses={})
    text = (tmp_path / "deep" / "report.html").read_text()
    assert "<h2>" not in text


def test_examples_hold_right_and_wrong_ones() -> None:
    chosen = choose_examples(_predictions())
    assert [prediction.right for prediction in chosen] == [True] * 6 + [False] * 4


def test_running_mean_keeps_the_level_at_the_ends() -> None:
    assert np.allclose(running_mean(np.full(9, 2.0), 5), 2.0)


def test_all_pages_fill_one_skeleton_and_its_palette() -> None:
    folder = Path(report.__file__).parent
    texts = {path.name: path.read_text() for path in folder.glob("*.html")}
    pages = set(texts) - {"page.html", "parts.html"}
    assert pages == {"run.html", "sweep.html", "data_check.html", "captions.html", "finetune.html"}
    for name in pages:
        assert texts[name].startswith('{% extends "page.html" %}')
        assert "<style" not in texts[name]
    for name, text in texts.items():
        assert not re.search(r"#[0-9a-fA-F]{3,8}\b", text), f"{name}: colours are in palette.py"
