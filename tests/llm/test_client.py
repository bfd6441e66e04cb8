"""An LLM over HTTP: replies in JSON, another try with the reason, what it costs, verdicts, replies that are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scripted import Scripted

from af2_ray.llm.client import Client, Endpoint, NoReply, Spent
from af2_ray.llm.journal import Journal
from af2_ray.llm.judge import judge

NUMBER = {"type": "integer"}
ASKED = [{"role": "user", "content": "a number"}]


def test_a_reply_is_one_key_of_the_json(llm: Scripted) -> None:
    llm.answers = [{"n": 3}, {"other": 3}, "text"]
    client = Client(llm.endpoint)
    assert [client.reply(ASKED, "n", NUMBER) for _ in range(3)] == [3, None, None]
    schema = llm.asked[0]["response_format"]["json_schema"]["schema"]
    assert (schema["properties"], schema["required"]) == ({"n": NUMBER}, ["n"])
    assert client.spent == Spent(requests=3, prompt_tokens=300, completion_tokens=30)


def test_a_reply_that_does_not_hold_is_tried_again_with_the_reason(llm: Scripted) -> None:
    llm.answers = [{"n": 3}, {"n": 4}, {"n": 5}]
    client = Client(llm.endpoint)
    found = client.reply_that_holds(ASKED, "n", NUMBER, lambda n: "" if n == 4 else f"{n} is odd", attempts=3)
    assert found == 4
    first, again = llm.asked[1]["messages"][1:]
    assert (first["role"], json.loads(first["content"])) == ("assistant", {"n": 3})
    assert "3 is odd" in again["content"]
    with pytest.raises(NoReply, match="5 is odd"):
        client.reply_that_holds(ASKED, "n", NUMBER, lambda n: f"{n} is odd", attempts=1)


def test_an_endpoint_that_refuses_is_named(llm: Scripted) -> None:
    llm.answers = [401]
    with pytest.raises(NoReply, match="the endpoint failed"):
        Client(llm.endpoint).reply(ASKED, "n", NUMBER)


def test_what_was_spent_has_its_price() -> None:
    spent = Spent(requests=2, prompt_tokens=500_000, completion_tokens=100_000)
    assert Endpoint("m", price_prompt=2.0, price_completion=10.0).cost(spent) == 2.0


def test_a_judge_gives_a_verdict_on_each_text(llm: Scripted) -> None:
    llm.answers = [{"verdicts": ["yes", "no"]}, {"verdicts": ["yes"]}]
    client = Client(llm.endpoint)
    assert judge(client, "Is it true?", "A dog barks.", ["a dog", "a cat"], ("yes", "no")) == ["yes", "no"]
    assert llm.asked[0]["messages"][1]["content"] == "A dog barks.\nTexts:\n1. a dog\n2. a cat"
    assert judge(client, "Is it true?", "A dog barks.", ["a dog", "a cat"], ("yes", "no")) == [], "incomplete"


def test_a_journal_keeps_what_decides_apart(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "replies")
    journal.write(["m", "a"], [1])
    journal.write(["m", "b"], {"two": 2})
    assert (journal.read(["m", "a"]), journal.read(["m", "b"]), journal.read(["n", "a"])) == ([1], {"two": 2}, None)
    assert all(path.suffix == ".json" for path in (tmp_path / "replies").glob("*/*"))
