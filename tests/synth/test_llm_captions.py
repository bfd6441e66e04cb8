"""The LLM's captions: asked for over HTTP, checked, tried again, kept, and paid for once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted import Scripted

from af2_ray.llm.client import Client
from af2_ray.llm.journal import Journal
from af2_ray.synth.captions.by_llm import LlmCaptions, faults

CAPTION = "a dog followed by a bell"


def one(text: str, *wrong: tuple[str, str]) -> dict[str, Any]:
    return {"text": text, "negatives": [{"relation": relation, "text": words} for relation, words in wrong]}


GOOD = [
    one(CAPTION, ("order", "a bell followed by a dog"), ("class", "a cat followed by a bell")),
    one("a bell after a dog", ("order", "a dog after a bell"), ("class", "a bell after a cow")),
]


@pytest.fixture
def llm() -> Iterator[Scripted]:
    scripted = Scripted()
    yield scripted
    scripted.close()


def test_a_good_set_is_taken_judged_kept_and_not_paid_for_again(llm: Scripted, tmp_path: Path) -> None:
    llm.answers = [{"sets": GOOD}, {"verdicts": ["all"] + ["none"] * 4}]
    engine = LlmCaptions(Client(llm.endpoint), 2, 2, Journal(tmp_path))
    made = engine(CAPTION)
    assert made.caption == CAPTION
    assert made.paraphrases == ("a bell after a dog",)
    assert made.negatives[1] == ("a dog after a bell", "a bell after a cow")
    form = llm.asked[0]["response_format"]
    assert form["type"] == "json_schema"
    assert form["json_schema"]["schema"]["properties"]["sets"]["minItems"] == 2
    assert "2. a bell followed by a dog" in llm.asked[1]["messages"][1]["content"]
    assert "Texts:\n1. a bell after a dog\n2." in llm.asked[1]["messages"][1]["content"]
    assert engine.spent == {"requests": 2, "prompt_tokens": 200, "completion_tokens": 20}
    assert llm.endpoint.cost(engine.spent) == pytest.approx(600e-6)
    again = LlmCaptions(Client(llm.endpoint), 2, 2, Journal(tmp_path))
    assert again(CAPTION) == made
    assert again.spent == {"cached": 1}
    llm.answers = [{"sets": GOOD}, {"verdicts": ["all"]}]
    with pytest.raises(ValueError, match="the check of the set came back incomplete"):
        LlmCaptions(Client(llm.endpoint), 2, 2, attempts=1)(CAPTION)


def test_what_does_not_hold_goes_back_with_the_reason(llm: Scripted) -> None:
    bad = [GOOD[0], one(CAPTION.upper(), *(("order", "a"), ("class", "b")))]
    llm.answers = [
        {"sets": bad},
        {"sets": GOOD},
        {"verdicts": ["all", "none", "some", "none", "none"]},
        503,
        {"sets": GOOD},
    ]
    llm.answers.append({"verdicts": ["all"] + ["none"] * 4})
    engine = LlmCaptions(Client(llm.endpoint), 2, 2)
    assert engine(CAPTION).paraphrases == ("a bell after a dog",)
    said = [asked["messages"][-1]["content"] for asked in llm.asked]
    assert "two of the paraphrases are the same" in said[1]
    assert "'a cat followed by a bell' could be true too" in said[3]
    assert said[3] == said[4], "a busy endpoint is asked the same again"


def test_a_paraphrase_that_says_more_or_another_number_is_named(llm: Scripted) -> None:
    llm.answers = [{"sets": GOOD}, {"verdicts": ["some"] + ["none"] * 4}]
    with pytest.raises(ValueError, match="the paraphrase 'a bell after a dog' says more or other"):
        LlmCaptions(Client(llm.endpoint), 2, 2, attempts=1)(CAPTION)
    twice = [one("a dog barks twice"), one("a dog barks three times")]
    assert "other numbers than the caption" in faults("a dog barks twice", twice, 2, 0)
    assert faults("a dog barks twice", [one("a dog barks twice"), one("two barks of a dog")], 2, 0) == ""


def test_a_caption_that_never_works_is_an_error_with_the_last_reason(llm: Scripted) -> None:
    llm.answers = [{"sets": []}, "nonsense"]
    with pytest.raises(ValueError, match=r"no usable captions for 'a dog.*there must be 2 sets"):
        LlmCaptions(Client(llm.endpoint), 2, 2, attempts=2)(CAPTION)
    llm.answers = [{"sets": []}] * 3
    engine = LlmCaptions(Client(llm.endpoint), 2, 2)
    with pytest.raises(ValueError, match="there must be 2 sets"):
        engine(CAPTION)
    assert (engine.spent["requests"], engine.spent["prompt_tokens"]) == (3, 300), "what is given up was paid for"
    llm.answers = [401]
    with pytest.raises(ValueError, match="the endpoint failed"):
        LlmCaptions(Client(llm.endpoint), 2, 2)(CAPTION)


@pytest.mark.parametrize(
    ("text", "relation", "wrong", "message"),
    [
        ("a dog then a bell", "order", "a bell then a cat", "changes 'cat' too"),
        ("a loud dog then a soft bell", "binding", "a loud bell then a soft dog", ""),
        ("a loud dog then a soft bell", "binding", "a loud dog then a loud bell", "in binding alone"),
        ("a dog barks twice", "count", "a dog barks three times", ""),
        ("a dog barks twice", "count", "a cat barks three times", "in count alone"),
        ("a dog barks twice", "count", "barks a dog twice", "changes no word of count"),
        ("rain getting louder", "loudness", "rain getting softer", ""),
        ("rain at the end", "position", "rain in the middle", ""),
        ("rain", "class", "wind", ""),
        ("rain on a roof", "class", "rain on roof", "names no other sound"),
        ("a dog then a bell", "order", "a dog before a bell", "tells of the same order"),
        ("a dog then a bell", "order", "a dog after a bell", ""),
        ("rain", "mood", "sad rain", "none of the relations"),
    ],
)
def test_a_wrong_caption_is_wrong_in_what_it_says_alone(text: str, relation: str, wrong: str, message: str) -> None:
    found = faults(text, [one(text, (relation, wrong))], 1, 1)
    assert (message in found) if message else (found == ""), found
