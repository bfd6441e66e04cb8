"""The page of a fine-tuning: whole, without a network, and with nothing of a manifest that a browser would run."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from quiz import question, write_corpus

from af2_ray.data.samples import Sample, Turn
from af2_ray.evaluate.answers import Prediction
from af2_ray.evaluate.paired import Comparison, compare
from af2_ray.evaluate.report import plots
from af2_ray.evaluate.report.finetune import write_finetune_report
from af2_ray.evaluate.report.palette import DARK, LIGHT

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "$x_{2$ \\frac",
    "{{ 7 * 7 }}",
    "]]></style><svg onload=alert(1)>",
    "a\x00\x1b[31m\nb",
    "long " * 200,
    "\u202eright to left, 貓, 🐈",
)


class Tags(HTMLParser):
    """All tags and their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


def compared(samples: list[Sample], words: str = "neither") -> Comparison:
    """Every third answer became right, every fifth became wrong."""
    before = [Prediction(s, s.answer if n % 5 == 0 else words) for n, s in enumerate(samples)]
    after = [Prediction(s, s.answer if n % 3 == 0 and n % 5 else words) for n, s in enumerate(samples)]
    return compare(before, after)


def written(path: Path, found: Comparison, **facts: object) -> str:
    """The page of one comparison."""
    title = str(facts.pop("title", "Fine-tuning"))
    write_finetune_report(path, title=title, facts=facts, comparisons={"test": found, "old test": None})
    return path.read_text(encoding="utf-8")


def test_the_page_is_whole_and_needs_no_network(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, num_pairs=1)
    clips = [str(corpus / "test" / f"0000{number}.flac") for number in (0, 1)]
    skills = ["order", "count"]
    common = [
        {"uri": uri, "skill": skill, "duration_s": 4.0, "pair": ""} for uri, skill in zip(clips, skills, strict=True)
    ]
    samples = [question(n, "low", **common[n % 2]) for n in range(45)]
    found = compared(samples)
    path = tmp_path / "deep" / "report.html"
    write_finetune_report(
        path,
        title="Fine-tuning of tiny",
        facts={"start": "runs/demo/model", "seconds": 100},
        comparisons={"test": found, "old test": found},
        losses=[(step, 3.0 / step) for step in range(1, 40)],
        validation=[(10, 0.5), (20, 0.25), (30, float("nan"))],
        kept_step=20,
        counts=[{"split": "train", "questions": 100, "set aside": 2}],
        set_aside=["a.flac: empty file"],
    )
    text = path.read_text(encoding="utf-8")
    page = Tags()
    page.feed(text)
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', text), "nothing is loaded from elsewhere"
    assert text.count("<svg") == 5
    assert text.count("data:audio/ogg;base64,") == 2 * (len(found.better) + len(found.worse))
    assert len(found.better) == 10
    parts = ("Before and after: old test", "How it learned", "step 20, validation loss 0.250", "The data", "empty file")
    for part in (*parts, "answers that became right (10)", "runs/demo/model", "kept: step 20"):
        assert part in text
    assert "script" not in page.tags


def test_parts_without_facts_are_left_out(tmp_path: Path) -> None:
    write_finetune_report(tmp_path / "report.html", title="Bare", facts={}, comparisons={"test": None})
    assert "<h2>" not in (tmp_path / "report.html").read_text()
    text = written(tmp_path / "none.html", compare([], []))
    assert "No question was answered by both." in text


def test_hostile_texts_are_shown_as_text(tmp_path: Path) -> None:
    earlier = (Turn(HOSTILE[0], HOSTILE[1]),)
    samples = [
        question(
            n,
            word,
            pair="",
            prompt=f"{word}? (A) {word} (B) no",
            options=(word, "no"),
            skill=word,
            uri=f"{word}.wav",
            history=earlier,
        )
        for n, word in enumerate(HOSTILE * 4)
    ]
    path = tmp_path / "report.html"
    write_finetune_report(
        path,
        title=HOSTILE[0],
        facts=dict.fromkeys(HOSTILE, HOSTILE[1]),
        comparisons={HOSTILE[0]: compared(samples, HOSTILE[1])},
        counts=[{HOSTILE[0]: HOSTILE[1]}],
        set_aside=HOSTILE,
    )
    text = path.read_text(encoding="utf-8")
    page = Tags()
    page.feed(text)
    assert not page.tags & {"script", "img", "iframe"}
    assert not {name for name in page.attributes if name.startswith("on")}
    assert "{{ 7 * 7 }}" in text
    assert "&lt;script&gt;" in text
    assert "cannot be read: " in text, "a recording that is not there is said"


def test_a_long_recording_is_cut_and_the_page_says_so(tmp_path: Path, make_sound: Any) -> None:
    clip = make_sound("long.wav", 40.0)
    sample = question(0, "low", pair="", uri=clip, duration_s=40.0)
    text = written(tmp_path / "page.html", compare([Prediction(sample, "no")], [Prediction(sample, "low")]))
    assert "the first 30 of 40 s" in text
    assert len(text) < 500_000


def test_captions_alone_are_shown(tmp_path: Path) -> None:
    sample = question(0, "dog, then bell", pair="", skill="caption", options=())
    found = compare([Prediction(sample, "a dog")], [Prediction(sample, "dog, then bell")])
    text = written(tmp_path / "page.html", found)
    assert "there are captions alone" in text
    assert "0.0 → 100.0 %" in text
    assert "captions that changed (1)" in text


@pytest.mark.parametrize("kind", ["learning", "changes"])
def test_pictures_have_the_colours_of_the_page_and_equal_bytes(kind: str) -> None:
    row = compared([question(n, "low", pair="") for n in range(9)]).all
    assert row

    def draw() -> str:
        if kind == "changes":
            return plots.changes({"all": row}, "changes")
        return plots.learning([(1, 2.0), (2, float("nan")), (3, 1.0)], [(3, 1.5)], 3)

    text = draw()
    assert text == draw()
    assert f"var(--accent, {LIGHT['accent']})" in text
    bare = re.sub(r"var\([^)]*\)", "", text)
    assert not [colour for colour in LIGHT.values() if colour in bare]


def test_each_colour_has_one_for_dark_pages() -> None:
    assert LIGHT.keys() == DARK.keys()
