"""Steps recorded by size, on a CPU: a recorder that launches the step again stands for the GPU's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import serve_toy
import torch
from engine_questions import clip, generated
from torch import Tensor

from af2_ray.config import Serve
from af2_ray.engine.engine import Engine
from af2_ray.engine.graph import Step, StepGraphs
from af2_ray.engine.request import Answer, Event, Request


class Relauncher:
    """Plays a recording by launching the step again, if all that it stands on is where it was."""

    def __init__(self) -> None:
        self.engine: Engine | None = None

    def record(self, step: Step) -> Step:
        """The step, after a look at its buffers."""
        addresses = self._addresses()

        def play() -> Tensor:
            assert self._addresses() == addresses, "a graph would have read what was there before"
            return step()

        return play

    def forget(self) -> None:
        """Nothing to do."""

    def _addresses(self) -> tuple[int, ...]:
        assert self.engine is not None
        decoder = self.engine._decoder
        buffers = [decoder._inputs, *(t for layer in decoder._cache.layers for t in (layer.keys, layer.values))]
        if decoder._pool._kv is not None:
            buffers.append(decoder._pool._kv)
        return tuple(buffer.data_ptr() for buffer in buffers)


def recording(model: Any, tokenizer: Any, **settings: Any) -> Engine:
    """An engine that records."""
    recorder = Relauncher()
    engine = recorder.engine = Engine(model, tokenizer, Serve(**settings), recorder=recorder)
    return engine


@pytest.fixture(scope="module")
def model(tiny_tokenizer: Any) -> Any:
    torch.set_num_threads(1)
    return serve_toy.build(tiny_tokenizer)


@pytest.mark.parametrize("num_slots", [3, 8])
def test_answers_under_load_equal_generate(model: Any, tiny_tokenizer: Any, num_slots: int) -> None:
    """Clips of unlike length, several, the same ones and none, in a rectangle that grows under running answers."""
    engine = recording(model, tiny_tokenizer, num_slots=num_slots, max_new_tokens=100)
    random = np.random.default_rng(num_slots)
    clips = [clip(2, 300), clip(12, 900), clip(7, 5000), clip(23, 1900), clip(31, 2500)]
    requests, results = [], {}
    for number in range(30):
        heard = tuple(clips[index] for index in random.integers(0, 2 + number // 8, random.integers(0, 3)))
        length = int(random.integers(1, 24)) if number else 90
        words = "word " * int(random.integers(1, 12))
        requests.append(Request(f"{words}{number}?", heard, max_new_tokens=length, min_new_tokens=length))

    def keep(number: int, event: Event) -> None:
        results[number] = event

    for number, request in enumerate(requests):
        engine.submit(request, lambda event, number=number: keep(number, event))  # type: ignore[misc]
        for _ in range(int(random.integers(0, 6))):
            engine.step()
    while engine.step():
        pass
    assert engine.graphs is not None
    assert engine.graphs.num_replayed > 0
    for number, request in enumerate(requests):
        answer = results[number]
        assert isinstance(answer, Answer)
        assert (answer.text, answer.completion_tokens) == generated(engine, request), f"request {number}"


@pytest.mark.parametrize(
    "settings", [{"fusion": "prefix"}, {"audio_features": "pooled"}, {"llama": True, "cross_attn_every": 2}]
)
def test_other_models_equal_generate(settings: dict[str, Any], tiny_tokenizer: Any) -> None:
    engine = recording(serve_toy.build(tiny_tokenizer, **settings), tiny_tokenizer, num_slots=3)
    heard = [(clip(2, 300),), (clip(23, 1900),), (), (clip(23, 1900), clip(2, 300))]
    asked = [
        Request(f"which sound, {number}?", clips, max_new_tokens=9 + number, min_new_tokens=9 + number)
        for number, clips in enumerate(heard)
    ]
    for request, answer in zip(asked, engine.answer(asked), strict=True):
        assert isinstance(answer, Answer)
        assert answer.text == generated(engine, request)[0]


def test_recordings_live_through_arrivals(model: Any, tiny_tokenizer: Any) -> None:
    """Sixteen slots kept full: an answer of 64 tokens begins every fourth step, about clips of 10 s to 5 min."""
    engine = recording(model, tiny_tokenizer, num_slots=16, max_new_tokens=64)
    random = np.random.default_rng(0)
    clips = [clip(seconds, 200.0 + seconds) for seconds in (5, 15, 40, 100, 290)]
    for _ in range(600):
        for _ in range(random.poisson(0.25)):
            heard = (clips[random.integers(len(clips))],)
            engine.submit(Request("which?", heard, max_new_tokens=64, min_new_tokens=64), lambda _: None)
        engine.step()
    graphs = engine.graphs
    assert graphs is not None
    steps = graphs.num_launched + graphs.num_recorded + graphs.num_replayed
    assert steps > 500
    assert engine.counts.rows > 10 * steps, "the slots were not full"
    assert graphs.num_replayed / steps >= 0.9


def test_an_answer_that_is_no_number_leaves_nothing_behind(model: Any, tiny_tokenizer: Any) -> None:
    """What a row heard was no number; the next one in its place hears less, and a weight of 0 is not enough there."""
    engine = recording(model, tiny_tokenizer, num_slots=2)
    long, short, other = clip(25, 800), clip(5, 300), clip(15, 700)
    project = engine.memory._project

    def broken(states: Tensor, num_windows: int) -> Tensor:
        kv = project(states, num_windows)
        return kv * torch.nan if num_windows == long.num_windows else kv

    engine.memory._project = broken
    assert not isinstance(engine.answer([Request("what?", (long,), max_new_tokens=4)])[0], Answer)
    asked = [Request("what?", (heard,), max_new_tokens=8, min_new_tokens=8) for heard in (short, other)]
    for request, answer in zip(asked, engine.answer(asked), strict=True):
        assert isinstance(answer, Answer)
        assert answer.text == generated(engine, request)[0]


def test_copies_count_as_audio_memory(model: Any, tiny_tokenizer: Any) -> None:
    """Kept keys and values make room for the rectangle; states, which cost the tower, stay."""
    engine = recording(model, tiny_tokenizer, num_slots=4, audio_memory_mb=1)
    clips = [clip(40, 200.0 + 90 * number) for number in range(4)]
    engine.answer([Request("which?", (each,), max_new_tokens=6) for each in clips])
    assert engine.memory.num_bytes >= engine._decoder.audio_bytes > 0
    engine.memory.reserve(2**20)  # as if longer clips had been heard
    assert all(kept.projected is None for kept in engine.memory._clips.values())
    assert all(each.key in engine.memory for each in clips)
    (again,) = engine.answer([Request("which?", (clips[0],), max_new_tokens=6)])
    assert isinstance(again, Answer)
    assert again.encoded_windows == 0


@pytest.mark.parametrize("settings", [{}, {"fusion": "prefix"}])
@pytest.mark.parametrize("audio_memory_mb", [1, 1024])
def test_a_warm_engine_has_its_recordings(settings: dict[str, Any], audio_memory_mb: int, tiny_tokenizer: Any) -> None:
    """Of 1, 2, 4 and 6 rows, alike and not; and nothing else is left of that."""
    model = serve_toy.build(tiny_tokenizer, max_windows=20, **settings)
    engine = recording(model, tiny_tokenizer, num_slots=6, encode_windows=6, audio_memory_mb=audio_memory_mb)
    engine.warm()
    graphs = engine.graphs
    assert graphs is not None
    sizes: Any = graphs.sizes
    assert {size.rows for size in sizes} == {1, 2, 4, 6}
    assert {size.reach.masked for size in sizes} == ({False} if settings else {False, True})
    assert (engine.num_running, len(engine.memory), engine._decoder.num_rows) == (0, 0, 0)
    before = graphs.num_launched
    heard = (clip(195 if audio_memory_mb > 1 else 15, 400),)
    (answer,) = engine.answer([Request("what?", heard, max_new_tokens=5, min_new_tokens=5)])
    assert isinstance(answer, Answer)
    assert graphs.num_launched == before


def test_the_recording_unused_longest_goes() -> None:
    class Recorder:
        def record(self, step: Step) -> Step:
            return step

        def forget(self) -> None:
            pass

    graphs = StepGraphs(Recorder(), max_recordings=2)
    for size in (1, 1, 2, 2, 1, 3, 3):  # launched, recorded ...
        graphs(size, lambda: torch.zeros(0))
    assert graphs.sizes == (1, 3)
    assert (graphs.num_launched, graphs.num_recorded, graphs.num_replayed) == (3, 3, 1)
    graphs(2, lambda: torch.zeros(0))
    assert graphs.num_recorded == 4, "a size that was met is recorded at once"
    graphs.forget()
    assert len(graphs.sizes) == 0


def test_a_model_that_cannot_be_recorded_is_launched(model: Any, tiny_tokenizer: Any) -> None:
    class Recorder:
        def record(self, step: Step) -> Step:
            raise RuntimeError("operation not permitted when stream is capturing")

        def forget(self) -> None:
            pass

    engine = Engine(model, tiny_tokenizer, Serve(num_slots=2), recorder=Recorder())
    request = Request("what?", (clip(3, 500),), max_new_tokens=9, min_new_tokens=9)
    (answer,) = engine.answer([request])
    assert isinstance(answer, Answer)
    assert answer.text == generated(engine, request)[0]
    assert engine.graphs is not None
    assert not engine.graphs.works
