"""A recording is somebody's: it is not kept for longer than said, and not after it is to be forgotten."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import serve_toy
import torch

from af2_ray.config import Serve
from af2_ray.engine.engine import Engine
from af2_ray.engine.request import Answer, Clip, Event, Piece, Request
from af2_ray.engine.runner import Runner


@pytest.fixture(scope="module")
def model(tiny_tokenizer: Any) -> Any:
    torch.set_num_threads(1)
    return serve_toy.build(tiny_tokenizer)


@pytest.fixture
def make(model: Any, tiny_tokenizer: Any) -> Callable[..., Engine]:
    return lambda **settings: Engine(model, tiny_tokenizer, Serve(num_slots=2, **settings))


def clip(key: str) -> Clip:
    return Clip.of(np.full((1, 160_000), len(key), np.int16), key)


def question(*keys: str, tokens: int = 2) -> Request:
    return Request("what?", tuple(map(clip, keys)), max_new_tokens=tokens, min_new_tokens=tokens)


def wait_for(seen: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 20
    while not seen():
        assert time.monotonic() < end_s
        time.sleep(0.005)


def test_a_recording_and_its_beginnings_are_forgotten(make: Callable[..., Engine]) -> None:
    engine = make()
    engine.answer([question("a", "a:5", "a:12.5", "ab", "b")])
    assert engine.forget(["a", "unknown"]) == 3
    assert [key for key in ("a", "a:5", "a:12.5", "ab", "b") if key in engine.memory] == ["ab", "b"]
    (answer,) = engine.answer([Request("what?", (Clip("a", 1),))])
    assert not isinstance(answer, Answer)
    assert answer.missing == ("a",)
    assert engine.forget(["a"]) == 0


def test_what_is_heard_at_the_moment_goes_with_its_last_answer(make: Callable[..., Engine]) -> None:
    engine = make()
    ends: list[Event] = []
    for tokens in (4, 8, 4):  # two slots: the third waits
        engine.submit(question("a", tokens=tokens), ends.append)
    while engine.num_running < 2:
        engine.step()
    assert engine.forget(["a"]) == 1
    assert "a" in engine.memory
    while engine.step():
        assert "a" in engine.memory
    assert "a" not in engine.memory
    assert sum(isinstance(event, Answer) for event in ends) == 3
    assert engine._decoder._hearing is None
    engine.answer([question("a")])
    assert "a" in engine.memory, "whoever asks anew has it kept anew"


def test_what_waits_at_the_time_is_not_kept_either(make: Callable[..., Engine]) -> None:
    engine = make()
    ticket = engine.submit(question("a"), lambda _: None)
    assert engine.forget(["a"]) == 0
    while engine.step():
        pass
    assert ticket.num_tokens == 2
    assert "a" not in engine.memory
    assert not engine.memory._forgotten


def test_audio_grows_old(make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 1000.0
    monkeypatch.setattr("af2_ray.engine.audio_memory.time", SimpleNamespace(monotonic=lambda: now_s))
    engine = make(keep_audio_s=60)
    engine.answer([question("a"), question("b")])
    now_s += 40
    assert engine.memory.next_old_s() == 20
    engine.answer([question("b")])
    engine.submit(question("c", tokens=50), lambda _: None)
    now_s += 30
    engine.step()
    assert engine.memory.next_old_s() == 30
    now_s += 300
    engine.step()
    assert [key in engine.memory for key in "abc"] == [False, False, True], "what is heard does not grow old"
    assert engine.memory.next_old_s() is None


def test_audio_is_not_kept_beyond_the_answer(make: Callable[..., Engine]) -> None:
    engine = make(keep_audio_s=0)
    first, second = engine.answer([question("a"), question("a")])
    assert first == second
    assert engine.encoder.num_encoded == 1
    assert len(engine.memory) == 0


def test_a_runner_forgets_when_nobody_asks(make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(keep_audio_s=0.2)
    runner = Runner(engine)
    ends: list[Event] = []
    runner.submit(question("a"), lambda event: None if isinstance(event, Piece) else ends.append(event))
    wait_for(lambda: len(ends) == 1)
    sleeps: list[float] = []
    sleep_s = runner._sleep_s
    monkeypatch.setattr(runner, "_sleep_s", lambda: sleeps.append(sleep_s()) or sleeps[-1])
    assert "a" in engine.memory
    wait_for(lambda: "a" not in engine.memory)
    time.sleep(0.1)
    assert len(sleeps) <= 3, "it sleeps until then, and then for good"
    runner.close()


def test_what_was_asked_before_is_forgotten_with_it(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A question that the runner has not looked at yet, then its recording's deletion."""
    engine = make()
    runner = Runner(engine)
    stopped, ends = threading.Event(), list[Event]()
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: stopped.wait(20) and step())
    submit = lambda key: runner.submit(  # noqa: E731
        question(key), lambda event: None if isinstance(event, Piece) else ends.append(event)
    )
    submit("a")
    wait_for(lambda: runner.stalled_s() > 0)
    submit("b")
    number = runner.forget(["b"])
    stopped.set()
    wait_for(lambda: len(ends) == 2)
    assert number.result(20) == 0
    assert ["a" in engine.memory, "b" in engine.memory] == [True, False]
    runner.close()


def test_what_makes_way_stays_forgotten(make: Callable[..., Engine]) -> None:
    engine = make()
    admission, memory = engine._admission, engine.memory
    tickets = [engine.submit(replace(question(key), owner="much"), lambda _: None) for key in "abc"]
    admission.admit(())
    engine.forget(["c"])
    assert tickets[2] in admission.admitted
    memory._limit = 0
    other = engine.submit(replace(question("d"), owner="little"), lambda _: None)
    admission.admit(())
    assert tickets[2] in admission.waiting or other in admission.admitted
    while engine.step():
        pass
    assert "c" not in engine.memory


def test_a_runner_forgets_from_any_thread(make: Callable[..., Engine]) -> None:
    engine = make(keep_audio_s=1e12)
    runner = Runner(engine)
    ends: list[Event] = []
    for key in "abcd":
        runner.submit(question(key), lambda event: None if isinstance(event, Piece) else ends.append(event))
    wait_for(lambda: len(ends) == 4)
    numbers: list[int] = []
    forget = [threading.Thread(target=lambda key=key: numbers.append(runner.forget([key]).result(20))) for key in "abb"]
    for thread in forget:
        thread.start()
    for thread in forget:
        thread.join()
    assert sorted(numbers) == [0, 1, 1]
    assert [key in engine.memory for key in "abcd"] == [False, False, True, True]
    assert runner.forget(["c"]).cancel() in (True, False)  # whoever waited for the number has gone
    wait_for(lambda: "c" not in engine.memory)
    assert runner.forget(["d"]).result(20) == 1
    runner.close()
    assert runner.forget(["d"]).result(20) == 0


def test_a_vanished_client_costs_one_step(make: Callable[..., Engine]) -> None:
    engine = make()
    runner = Runner(engine)
    kept: list[Event] = []
    gone: list[tuple[int, Event]] = []
    call = runner.submit(question("a", tokens=250), lambda event: gone.append((engine.counts.steps, event)))
    runner.submit(question("a", tokens=30), kept.append)
    wait_for(lambda: bool(gone))
    call.cancel()
    steps = engine.counts.steps
    wait_for(lambda: not isinstance(gone[-1][1], Piece))
    assert gone[-1][0] <= steps + 1, "the step at hand, and the one that frees the slot"
    wait_for(lambda: bool(kept) and not isinstance(kept[-1], Piece))
    assert isinstance(kept[-1], Answer)
    assert kept[-1].completion_tokens == 30
    runner.close()
