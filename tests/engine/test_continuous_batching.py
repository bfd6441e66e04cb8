"""The engine alone, on tiny random models: what shares a step must not matter."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import serve_toy
import torch
from engine_questions import clip, generated

from af2_ray.config import Serve
from af2_ray.engine.engine import Engine
from af2_ray.engine.request import Answer, Clip, Event, Piece, Request, RequestFailure
from af2_ray.engine.runner import Runner
from af2_ray.engine.text_stream import StopCutter, TextStream
from af2_ray.text import format_prompt

SETTINGS = Serve(num_slots=3, encode_windows=2, prefill_tokens=60, max_new_tokens=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    torch.set_num_threads(1)
    return serve_toy.export(tmp_path_factory.mktemp("model"), tiny_tokenizer)


@pytest.fixture(scope="module")
def shared(folder: Path) -> Engine:
    return Engine.from_pretrained(str(folder), "cpu", SETTINGS)


@pytest.fixture
def engine(shared: Engine) -> Engine:
    """With nothing heard yet."""
    return Engine(shared.model, shared.tokenizer, SETTINGS)


SHORT, LONG, OTHER = clip(2, 300), clip(23, 1900), clip(12, 900)


def mixed_requests() -> list[Request]:
    return [
        Request("a dog?", (SHORT,), max_new_tokens=9),
        Request("which sound is heard? (a) bell (b) drum", (LONG,), max_new_tokens=17),
        Request("no sound at all", (), max_new_tokens=5),
        Request("which of the two?", (LONG, SHORT), max_new_tokens=12),
        Request("by chance", (SHORT,), max_new_tokens=14, temperature=1.3, top_p=0.9, seed=7),
        Request("by another chance", (LONG,), max_new_tokens=14, temperature=0.7, seed=8),
        Request("the first <audio> and the second <audio> of the same", (OTHER, OTHER), max_new_tokens=11),
    ]


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Piece))


@pytest.mark.parametrize("num", [24, pytest.param(200, marks=pytest.mark.slow)])
def test_greedy_answers_under_load_equal_generate(engine: Engine, num: int) -> None:
    """Three slots, clips of unlike length shared and not, requests that come while others are being answered."""
    rng = np.random.default_rng(0)
    clips = [SHORT, LONG, OTHER, clip(31, 2500), clip(7, 5000)]
    requests = []
    for number in range(num):
        heard = tuple(clips[index] for index in rng.integers(0, len(clips), rng.integers(0, 3)))
        length = int(rng.integers(1, 24))
        least = length if number % 3 else 0
        words = "word " * int(rng.integers(1, 12))
        requests.append(Request(f"{words}{number}?", heard, max_new_tokens=length, min_new_tokens=least))
    results: dict[int, Event] = {}
    for number, request in enumerate(requests):
        engine.submit(request, lambda event, number=number: results.__setitem__(number, event))  # type: ignore[misc]
        for _ in range(int(rng.integers(0, 6))):
            engine.step()
    while engine.step():
        pass
    assert engine.counts.rows > 2 * engine.counts.decode_steps, "hardly anything shared a step"
    for number, request in enumerate(requests):
        answer = results[number]
        assert isinstance(answer, Answer)
        assert (answer.text, answer.completion_tokens) == generated(engine, request), f"request {number}"
    assert len({answer.text for answer in results.values() if isinstance(answer, Answer)}) > 12


@pytest.mark.parametrize(
    "settings", [{"fusion": "prefix"}, {"audio_features": "pooled"}, {"llama": True, "cross_attn_every": 2}]
)
def test_other_models_equal_generate(settings: dict[str, Any], tiny_tokenizer: Any) -> None:
    engine = Engine(serve_toy.build(tiny_tokenizer, **settings), tiny_tokenizer, SETTINGS)
    requests = [replace(request, min_new_tokens=request.max_new_tokens) for request in mixed_requests()[:4]]
    for request, answer in zip(requests, engine.answer(requests), strict=True):
        assert isinstance(answer, Answer)
        assert answer.text == generated(engine, request)[0]


def test_batched_answers_equal_single_ones(engine: Engine) -> None:
    requests = mixed_requests()
    together = engine.answer(requests)
    assert together == [engine.answer([request])[0] for request in requests]
    assert together == list(reversed(engine.answer(requests[::-1])))
    assert len({answer.text for answer in together if isinstance(answer, Answer)}) > 3, "the model says one thing only"


def test_the_audio_is_heard(engine: Engine) -> None:
    texts = [engine.answer([Request("what?", (clip(3, hz),), max_new_tokens=24)])[0] for hz in (100, 3000)]
    assert texts[0] != texts[1]


def test_a_second_question_skips_the_encoder(engine: Engine) -> None:
    def ask(*clips: Clip) -> Answer:
        (answer,) = engine.answer([Request("what is it?", clips, max_new_tokens=8)])
        assert isinstance(answer, Answer)
        return answer

    first = ask(LONG)
    assert first.encoded_windows == engine.encoder.num_encoded == LONG.num_windows
    assert ask(LONG) == ask(Clip(LONG.key, LONG.num_windows)) == first  # the second without any samples
    assert ask(LONG).encoded_windows == 0
    both = ask(LONG, SHORT)
    assert both.encoded_windows == SHORT.num_windows
    assert engine.encoder.num_encoded == LONG.num_windows + SHORT.num_windows
    assert (engine.memory.hits, engine.memory.misses) == (4, 2)


def test_a_clip_that_is_not_kept_is_asked_for(engine: Engine) -> None:
    (answer,) = engine.answer([Request("what?", (Clip("unknown", 1), SHORT), max_new_tokens=3)])
    assert isinstance(answer, RequestFailure)
    assert answer.missing == ("unknown",)
    assert not answer.by_caller


def test_memory_is_bounded(shared: Engine) -> None:
    """One MiB: the least recently heard goes, keys and values before states, and what is running stays."""
    settings = SETTINGS.model_copy(update={"audio_memory_mb": 1})
    engine = Engine(shared.model, shared.tokenizer, settings)
    clips = [clip(40, 200.0 + 90 * number) for number in range(6)]
    answers = engine.answer([Request("which?", (each,), max_new_tokens=6) for each in clips])
    assert all(isinstance(answer, Answer) for answer in answers)
    assert engine.memory.num_bytes <= 2**20
    assert 0 < len(engine.memory) < 7
    again = engine.answer([Request("which?", (each,), max_new_tokens=6) for each in clips])
    assert again == answers
    big = Engine(shared.model, shared.tokenizer, settings)
    whole = tuple(clip(200, 300.0 + number) for number in range(3))  # more than all the memory: alone, but answered
    (answer,) = big.answer([Request("and all of this?", whole, max_new_tokens=4)])
    assert isinstance(answer, Answer)
    assert big.memory.num_bytes <= 2**20


def test_encoding_does_not_hold_up_running_answers(engine: Engine) -> None:
    """While 29 windows come in two at a time, a running answer gets a token at every step, and a short clip passes."""
    running: list[Event] = []
    engine.submit(Request("go on", max_new_tokens=40, min_new_tokens=40), running.append)
    engine.step()
    order: list[str] = []
    engine.submit(Request("long", (clip(290, 70),), max_new_tokens=2), lambda _: order.append("long"))
    for step in range(5):
        engine.step()
        if step == 1:
            engine.submit(Request("short", (SHORT,), max_new_tokens=2), lambda _: order.append("short"))
    assert order[0] == "short"
    assert "long" not in order
    assert engine.encoder.num_encoded <= 12
    while engine.step():
        pass
    assert "long" in order
    assert isinstance(running[-1], Answer)
    assert running[-1].completion_tokens == 40


def test_sampling_repeats_with_its_seed_only(engine: Engine) -> None:
    def ask(seed: int | None) -> Answer | RequestFailure:
        return engine.answer([Request("say", max_new_tokens=24, temperature=2.0, seed=seed)])[0]

    assert ask(1) == ask(1)
    assert len({ask(seed).text for seed in (1, 2, None, None)}) == 4  # type: ignore[union-attr]


def test_log_probabilities(engine: Engine) -> None:
    (answer,) = engine.answer([Request("say", (SHORT,), max_new_tokens=6, min_new_tokens=6, top_logprobs=3)])
    assert isinstance(answer, Answer)
    assert len(answer.logprobs) == 6
    for place in answer.logprobs:
        assert place.logprob == pytest.approx(max(value for _, value in place.top))  # greedy: the likeliest
        assert len(place.top) == 3
        assert place.logprob < 0
    ids = engine.tokenizer(format_prompt("say"), add_special_tokens=False, return_tensors="pt")["input_ids"]
    waveforms = torch.from_numpy(SHORT.windows)
    logits = engine.model(ids, waveforms=waveforms, windows_per_clip=[1]).logits[0, -1].log_softmax(-1)
    assert logits.max().item() == pytest.approx(answer.logprobs[0].logprob, abs=1e-3)


def test_stream_adds_up_to_the_answer(engine: Engine) -> None:
    for request in mixed_requests():
        *pieces, last = engine.stream(request)
        assert last == engine.answer([request])[0]
        assert isinstance(last, Answer)
        assert text_of(pieces) == last.text


def test_stop_strings_end_answers(engine: Engine) -> None:
    lively = {"max_new_tokens": 24, "min_new_tokens": 24, "temperature": 1.5}
    asked = [Request("tell me more", (SHORT,), seed=seed, **lively) for seed in range(60)]  # type: ignore[arg-type]
    plain, whole = next(
        (request, answer)
        for request, answer in zip(asked, engine.answer(asked), strict=True)
        if isinstance(answer, Answer) and "\ufffd" not in answer.text[:3]  # a random model writes half characters
    )
    stop = whole.text[1:3]
    request = replace(plain, stop=("never this", stop))
    cut, other = engine.answer([request, plain])
    assert isinstance(cut, Answer)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.completion_tokens < whole.completion_tokens
    assert other == whole
    *pieces, last = engine.stream(request)
    assert text_of(pieces) == cut.text
    assert last == cut


def test_a_bad_request_does_not_take_others_along(engine: Engine) -> None:
    good = mixed_requests()
    bad = [
        Request("<audio> marker without audio"),
        Request("long " * 2000),
        Request("shape", (Clip("x", 1, np.zeros((1, 5), np.int16)),)),
        Request("31 windows", (Clip.of(np.zeros((31, 160_000), np.int16)),)),
        Request("too much", max_new_tokens=301),
    ]
    results = engine.answer([bad[0], good[0], bad[1], good[1], *bad[2:]])
    assert [isinstance(result, RequestFailure) for result in results] == [True, False, True, False, True, True, True]
    assert [results[1], results[3]] == engine.answer(good[:2])
    assert all(result.by_caller for result in results if isinstance(result, RequestFailure))
    assert [*engine.stream(bad[1])] == [results[2]]


def test_a_failing_prompt_fails_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = engine._decoder._forward

    def explode(embeds: torch.Tensor, *rest: Any) -> torch.Tensor:
        if embeds.shape[1] > 50:
            raise RuntimeError("out of memory")
        return forward(embeds, *rest)

    monkeypatch.setattr(engine._decoder, "_forward", explode)
    heavy = Request("x" * 200, (SHORT,), max_new_tokens=3)
    first, second, third = engine.answer([Request("a", max_new_tokens=3), heavy, Request("b", max_new_tokens=3)])
    assert isinstance(first, Answer)
    assert isinstance(second, RequestFailure)
    assert not second.by_caller
    assert isinstance(third, Answer)
    assert [*engine.stream(heavy)] == [second]
    assert (engine.num_running, engine.num_waiting, engine.num_windows) == (0, 0, 0)


def test_failing_steps_and_clips_fail_whom_they_concern(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(engine.model.audio_tower, "forward", lambda _: (_ for _ in ()).throw(RuntimeError("no tower")))
        heard, deaf = engine.answer([Request("hear", (LONG,), max_new_tokens=3), Request("text", max_new_tokens=3)])
    assert isinstance(heard, RequestFailure)
    assert isinstance(deaf, Answer)
    with monkeypatch.context() as broken:
        broken.setattr(engine._decoder, "decode", lambda _: (_ for _ in ()).throw(RuntimeError("no step")))
        assert isinstance(engine.answer([Request("text", max_new_tokens=3, min_new_tokens=3)])[0], RequestFailure)
    answer = engine.answer([Request("hear", (LONG,), max_new_tokens=3)])[0]
    assert isinstance(answer, Answer)
    assert engine.memory._pins == {}


def test_cancelling_frees_the_slot(engine: Engine) -> None:
    events: list[Event] = []
    ticket = engine.submit(Request("go on", (SHORT,), max_new_tokens=300, min_new_tokens=300), events.append)
    waiting = engine.submit(Request("long", (clip(290, 70),), max_new_tokens=3), events.append)
    for _ in range(5):
        engine.step()
    ticket.cancel()
    waiting.cancel()
    assert not engine.step()
    assert isinstance(events[-1], RequestFailure)
    assert (engine.num_running, engine.num_waiting, engine.encoder.num_waiting) == (0, 0, 0)
    assert engine.memory._pins == {}
    stream = engine.stream(Request("go on", max_new_tokens=300, min_new_tokens=300))
    next(stream)
    stream.close()
    assert not engine.step()


def test_what_takes_too_long_ends(shared: Engine) -> None:
    engine = Engine(shared.model, shared.tokenizer, SETTINGS.model_copy(update={"request_timeout_s": 1e-6}))
    (late,) = engine.answer([Request("soon?", max_new_tokens=5)])
    assert isinstance(late, RequestFailure)
    assert "no answer within" in late.message


def test_a_runner_serves_many_threads(engine: Engine) -> None:
    requests = mixed_requests() * 2
    expected = engine.answer(requests)
    runner = Runner(engine)
    results: list[Event | None] = [None] * len(requests)
    done = threading.Semaphore(0)

    def ask(number: int) -> None:
        def listen(event: Event) -> None:
            if not isinstance(event, Piece):
                results[number] = event
                done.release()

        runner.submit(requests[number], listen)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(requests))]
    for thread in threads:
        thread.start()
    for _ in requests:
        assert done.acquire(timeout=60)
    assert results == expected
    for _ in range(200):  # the last answer is told before its step is over
        if runner.num_windows == 0:
            break
        time.sleep(0.05)
    assert runner.num_windows == 0
    cancelled = threading.Event()
    call = runner.submit(
        Request("go on", max_new_tokens=300, min_new_tokens=300),
        lambda event: cancelled.set() if isinstance(event, RequestFailure) else None,
    )
    call.cancel()
    assert cancelled.wait(30)
    runner.close()
    with pytest.raises(RuntimeError, match="closed"):
        runner.submit(requests[0], lambda _: None)
    assert runner.stalled_s() == 0


def test_a_model_in_an_object_store(engine: Engine, folder: Path) -> None:
    store = fsspec.filesystem("memory")
    for file in folder.iterdir():
        store.pipe_file(f"/bucket/model/{file.name}", file.read_bytes())
    requests = mixed_requests()[:2]
    stored = Engine.from_pretrained("memory://bucket/model/", "cpu", SETTINGS)
    assert stored.answer(requests) == engine.answer(requests)


def test_no_model_in_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model in"):
        Engine.from_pretrained(str(tmp_path))


def test_half_characters_are_held_back(tiny_tokenizer: Any) -> None:
    text = "a bell – naïve, 鐘 rings"
    stream = TextStream(tiny_tokenizer, ["rin"])
    pieces = [stream.add(token) for token in tiny_tokenizer(text)["input_ids"]]
    assert "".join(pieces) == stream.text == text[: text.index("rin")]
    assert stream.stopped
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize(
    ("pieces", "stops", "text", "found"),
    [
        (["ab", "cd"], [], "abcd", False),
        (["ab", "cd", "ef"], ["cde"], "ab", True),
        (["a#", "#b", "##", "#c"], ["###"], "a##b", True),
        (["a#", "#"], ["###"], "a##", False),
        (["xyz"], ["z", "y"], "x", True),
    ],
)
def test_stop_cutter(pieces: list[str], stops: list[str], text: str, found: bool) -> None:
    cutter = StopCutter(stops)
    assert "".join([*map(cutter.feed, pieces), cutter.rest()]) == text
    assert cutter.stopped is found
