"""The engine alone, on a tiny random model: what shares a batch must not matter."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import serve_toy
import torch

from af2_ray.audio.windows import to_windows
from af2_ray.serve.engine import Engine, _StopCutter
from af2_ray.serve.request import Answer, Failure, Request


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Engine:
    torch.set_num_threads(1)
    return Engine.from_pretrained(str(serve_toy.export(tmp_path_factory.mktemp("model"), tiny_tokenizer)), "cpu")


def clip(duration_s: float, hz: float) -> np.ndarray:
    time = np.arange(round(duration_s * 16_000)) / 16_000
    return to_windows(np.sin(2 * np.pi * hz * time) * np.exp(-time))


def mixed_requests() -> list[Request]:
    short, long = clip(2, 300), clip(23, 1900)
    return [
        Request("a dog?", (short,), max_new_tokens=9),
        Request("which sound is heard? (a) bell (b) drum", (long,), max_new_tokens=17),
        Request("no sound at all", (), max_new_tokens=5),
        Request("which of the two?", (long, short), max_new_tokens=12),
        Request("by chance", (short,), max_new_tokens=14, temperature=1.3, top_p=0.9, seed=7),
        Request("by another chance", (long,), max_new_tokens=14, temperature=0.7, seed=8),
    ]


def test_batched_answers_equal_single_ones(engine: Engine) -> None:
    requests = mixed_requests()
    together = engine.answer(requests)
    assert together == [engine.answer([request])[0] for request in requests]
    assert together == list(reversed(engine.answer(requests[::-1])))
    assert len({answer.text for answer in together if isinstance(answer, Answer)}) > 3, "the model says one thing only"


def test_greedy_answer_equals_generate(engine: Engine) -> None:
    request = mixed_requests()[1]
    ids = engine.model.generate(
        torch.tensor(engine.tokenizer(["<audio>" + request.prompt + "<SEP>"])["input_ids"]),
        waveforms=torch.from_numpy(request.clips[0]),
        windows_per_clip=[len(request.clips[0])],
        max_new_tokens=request.max_new_tokens,
        do_sample=False,
    )
    (answer,) = engine.answer([request])
    prompt = answer.prompt_tokens
    assert answer.text == engine.tokenizer.decode(ids[0, prompt:], skip_special_tokens=True)
    assert answer.completion_tokens == ids.shape[1] - prompt


def test_the_audio_is_heard(engine: Engine) -> None:
    texts = [engine.answer([Request("what?", (clip(3, hz),), max_new_tokens=24)])[0] for hz in (100, 3000)]
    assert texts[0] != texts[1]


def test_sampling_repeats_with_its_seed_only(engine: Engine) -> None:
    def ask(seed: int | None) -> Answer | Failure:
        return engine.answer([Request("say", max_new_tokens=24, temperature=2.0, seed=seed)])[0]

    assert ask(1) == ask(1)
    assert len({ask(seed).text for seed in (1, 2, None, None)}) == 4  # type: ignore[union-attr]


def test_stream_adds_up_to_the_answer(engine: Engine) -> None:
    for request in mixed_requests():
        *pieces, last = engine.stream(request)
        assert last == engine.answer([request])[0]
        assert "".join(str(piece) for piece in pieces) == last.text  # type: ignore[union-attr]


def test_stop_strings_end_answers(engine: Engine) -> None:
    plain = Request("tell me more", (clip(1, 500),), max_new_tokens=40)
    (whole,) = engine.answer([plain])
    assert isinstance(whole, Answer)
    stop = whole.text[len(whole.text) // 2 :][:2]
    request = Request(plain.prompt, plain.clips, max_new_tokens=40, stop=("never this", stop))
    cut, other = engine.answer([request, plain])
    assert isinstance(cut, Answer)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.completion_tokens < whole.completion_tokens
    assert other == whole
    *pieces, last = engine.stream(request)
    assert "".join(str(piece) for piece in pieces) == cut.text
    assert last == cut


def test_a_bad_request_does_not_take_its_batch_along(engine: Engine) -> None:
    good = mixed_requests()
    bad = [
        Request("<audio> marker without audio"),
        Request("long " * 2000),
        Request("shape", (np.zeros((1, 5), np.int16),)),
        Request("31 windows", (np.zeros((31, 160_000), np.int16),)),
    ]
    results = engine.answer([bad[0], good[0], bad[1], good[1], *bad[2:]])
    assert [isinstance(result, Failure) for result in results] == [True, False, True, False, True, True]
    assert [results[1], results[3]] == engine.answer(good[:2])
    assert all(result.by_caller for result in results if isinstance(result, Failure))
    assert [*engine.stream(bad[1])] == [results[2]]


def test_a_failing_model_fails_one_request_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = engine.model.generate

    def explode(**inputs: Any) -> Any:
        if inputs["input_ids"].shape[1] > 100:
            raise RuntimeError("out of memory")
        return generate(**inputs)

    monkeypatch.setattr(engine.model, "generate", explode)
    heavy = Request("x" * 200, max_new_tokens=3)
    first, second, third = engine.answer([Request("a", max_new_tokens=3), heavy, Request("b", max_new_tokens=3)])
    assert isinstance(first, Answer)
    assert isinstance(second, Failure)
    assert not second.by_caller
    assert isinstance(third, Answer)
    assert [*engine.stream(heavy)] == [second]
    assert engine.busy_s() == 0.0


def test_cancelling_ends_a_stream(engine: Engine) -> None:
    cancelled = threading.Event()
    pieces = engine.stream(Request("go on", max_new_tokens=5000, temperature=1.0, seed=3), cancelled)
    next(pieces)
    cancelled.set()
    *_, last = pieces
    assert isinstance(last, Answer)
    assert last.completion_tokens < 1000


def test_a_model_in_an_object_store(engine: Engine, tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    engine.model.save_pretrained(tmp_path)
    engine.tokenizer.save_pretrained(tmp_path)
    for file in tmp_path.iterdir():
        store.pipe_file(f"/bucket/model/{file.name}", file.read_bytes())
    requests = mixed_requests()[:2]
    assert Engine.from_pretrained("memory://bucket/model/", "cpu").answer(requests) == engine.answer(requests)


def test_no_model_in_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model in"):
        Engine.from_pretrained(str(tmp_path))


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
    cutter = _StopCutter(stops)
    assert "".join([*map(cutter.feed, pieces), cutter.rest()]) == text
    assert cutter.found is found
