"""Slots of running answers: room for texts of any length."""

from __future__ import annotations

from typing import Any

import serve_toy

from af2_ray.config import Serve
from af2_ray.engine.engine import Engine
from af2_ray.engine.request import Answer, Request


def test_a_prompt_that_is_longer_than_any_before_leaves_running_answers_as_they_are(tiny_tokenizer: Any) -> None:
    """The slots become longer under them."""
    model = serve_toy.build(tiny_tokenizer, max_text_tokens=16)
    settings = Serve(num_slots=3, max_new_tokens=40)
    short = Request("which sound is heard?", max_new_tokens=40, min_new_tokens=40)
    long = Request("bell and dog " * 60, max_new_tokens=12, min_new_tokens=12)
    alone = [Engine(model, tiny_tokenizer, settings).answer([request])[0] for request in (short, long)]
    engine = Engine(model, tiny_tokenizer, settings)
    answers: list[Any] = []
    engine.submit(short, answers.append)
    for _ in range(10):
        engine.step()
    engine.submit(long, answers.append)
    while engine.step():
        pass
    ended = [event for event in answers if isinstance(event, Answer)]
    assert sorted(event.text for event in ended) == sorted(
        answer.text for answer in alone if isinstance(answer, Answer)
    )
    assert len(ended) == 2
