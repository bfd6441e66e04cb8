"""Slots of running answers: room for texts of any length."""

from __future__ import annotations

from typing import Any

import numpy as np
import serve_toy

from af2_ray.config import Serve
from af2_ray.engine.engine import Engine
from af2_ray.engine.request import Answer, Clip, Request


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


def test_an_answer_ends_where_the_lm_has_no_position_left(tiny_tokenizer: Any) -> None:
    model = serve_toy.build(tiny_tokenizer)
    positions = model.config.text_config.max_position_embeddings
    engine = Engine(model, tiny_tokenizer, Serve(max_new_tokens=positions))
    (answer,) = engine.answer([Request("bell and dog", max_new_tokens=positions, min_new_tokens=positions)])
    assert isinstance(answer, Answer)
    assert answer.finish_reason == "length"
    assert answer.prompt_tokens + answer.completion_tokens == positions


def test_audio_before_the_text_takes_none_of_the_text_s_positions(tiny_tokenizer: Any) -> None:
    """A small LM has 512 positions, and was trained with more of audio before them."""
    model = serve_toy.build(tiny_tokenizer, fusion="prefix", max_windows=20)
    engine = Engine(model, tiny_tokenizer)
    clip = Clip.of(np.random.default_rng(0).integers(-9999, 9999, (20, 160_000), dtype=np.int16))
    assert 20 * model.tokens_per_window > model.config.text_config.max_position_embeddings
    (answer,) = engine.answer([Request("which sound is heard?", (clip,), max_new_tokens=3)])
    assert isinstance(answer, Answer)
