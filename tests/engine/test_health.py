"""A replica that fails at everything is found out, and a client whose requests fail cannot have it replaced."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import serve_toy
import torch

from af2_ray.audio.windows import to_windows
from af2_ray.config import Serve
from af2_ray.engine.engine import Engine
from af2_ray.engine.health import is_lost
from af2_ray.engine.request import Answer, Clip, Event, Piece, Request, RequestFailure
from af2_ray.engine.runner import Runner

SETTINGS = Serve(num_slots=2, max_failed_steps=3)
HEARD = Request("what?", (Clip.of(to_windows(np.sin(np.arange(16_000) / 9))),), max_new_tokens=3, min_new_tokens=3)
LOST = "CUDA error: an illegal memory access was encountered"
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB"


@pytest.fixture(scope="module")
def model(tiny_tokenizer: Any) -> Any:
    torch.set_num_threads(1)
    return serve_toy.build(tiny_tokenizer)


@pytest.fixture
def engine(model: Any, tiny_tokenizer: Any) -> Engine:
    return Engine(model, tiny_tokenizer, SETTINGS)


@pytest.fixture
def runner(engine: Engine) -> Iterator[Runner]:
    runner = Runner(engine)
    yield runner
    runner.close()


def ask(engine: Engine, *requests: Request) -> list[bool]:
    """Whether each request was answered."""
    return [isinstance(answer, Answer) for answer in engine.answer(requests or [HEARD])]


def broken(error: Exception) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail


PARTS: dict[str, Callable[[Engine], tuple[Any, str]]] = {
    "encoding": lambda engine: (engine.model.audio_tower, "forward"),
    "encoding, behind the tower": lambda engine: (engine.model.audio_transform, "forward"),
    "reading": lambda engine: (engine._decoder, "prefill"),
    "writing": lambda engine: (engine._decoder, "decode"),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_lost_device_is_found_at_once(engine: Engine, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    assert ask(engine) == [True]
    engine.memory.clear()
    with monkeypatch.context() as patch:
        patch.setattr(*PARTS[part](engine), broken(torch.AcceleratorError(LOST)))
        assert ask(engine) == [False]
    assert engine.health.fault.startswith(
        f"the device is lost, in {part.partition(',')[0]}: AcceleratorError: CUDA error"
    )
    ask(engine)
    assert engine.health.fault, "a device that is lost stays so, whatever seems to work"


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("error", [RuntimeError(FULL), RuntimeError("no kernel image")], ids=["memory", "kernels"])
def test_what_always_fails_is_found(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, part: str, error: Exception
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(*PARTS[part](engine), broken(error))
        for num in range(3):
            assert engine.health.fault == "", f"after {num} failures"
            assert ask(engine) == [False]
        name = part.partition(",")[0]
        assert engine.health.fault.startswith(f"{name} failed 3 times in a row, then a question of its own: Runtime")
    assert ask(engine) == [True]
    assert engine.health.fault == "", "it works again"


def test_answers_that_are_not_numbers_are_failures(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = engine.model.compute_logits
    monkeypatch.setattr(engine.model, "compute_logits", lambda hidden: compute(hidden) * torch.nan)
    for _ in range(3):
        assert ask(engine) == [False]
    assert "the logits are not numbers" in engine.health.fault


def test_a_hostile_request_does_not_make_a_replica_unhealthy(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model fails on one kind of prompt, which somebody sends on and on, among others' questions and alone."""
    forward, asked = engine._decoder._forward, 0

    def explode(embeds: torch.Tensor, *rest: Any) -> torch.Tensor:
        if embeds.shape[1] > 50:
            raise RuntimeError("no kernel for this shape")
        return forward(embeds, *rest)

    def count() -> None:
        nonlocal asked
        asked += 1
        ask_itself()

    ask_itself = engine.ask_itself
    monkeypatch.setattr(engine._decoder, "_forward", explode)
    monkeypatch.setattr(engine, "ask_itself", count)
    hostile = Request("x" * 200, max_new_tokens=3)
    for _ in range(4):
        assert ask(engine, HEARD, hostile) == [True, False]
    assert (engine.health.fault, asked) == ("", 0), "others' prompts were read in the same steps"
    for _ in range(9):
        assert ask(engine, hostile) == [False]
        assert engine.health.fault == ""
    assert asked == 3, "a question of its own after every third failure"
    assert ask(engine) == [True]


def test_an_own_question_leaves_running_answers_alone(engine: Engine) -> None:
    (expected,) = engine.answer([HEARD])
    events: list[Event] = []
    engine.submit(HEARD, events.append)
    while engine.step():
        engine.ask_itself()
        assert engine._decoder.num_rows == engine.num_running <= 1
    assert events[-1] == expected


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (torch.AcceleratorError("unspecified launch failure"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"), True),
        (torch.OutOfMemoryError(FULL), False),
        (torch.AcceleratorError("CUDA error: out of memory"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), False),
        (RuntimeError("CUDA error: invalid configuration argument"), False),
        (RuntimeError("shapes do not match"), False),
    ],
)
def test_errors_that_a_device_does_not_recover_from(error: Exception, lost: bool) -> None:
    assert is_lost(error) is lost


def last_of(runner: Runner, request: Request) -> Event:
    events: list[Event] = []
    runner.submit(request, events.append)
    end_s = time.monotonic() + 20
    while not events or isinstance(events[-1], Piece):
        assert time.monotonic() < end_s
        time.sleep(0.005)
    return events[-1]


def test_a_runner_tells_what_is_wrong(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors that no part of the step expects: the engine's own, here where tokens are chosen (a GPU's come late)."""
    assert isinstance(last_of(runner, HEARD), Answer)
    assert runner.fault() == ""
    monkeypatch.setattr("af2_ray.engine.engine.choose", broken(torch.AcceleratorError(LOST)))
    for _ in range(2):
        assert isinstance(last_of(runner, HEARD), RequestFailure)
    assert runner.fault().startswith("the device is lost, in the engine: AcceleratorError: CUDA error")
    assert runner.engine.num_running == 0


def test_a_runner_that_hangs(runner: Runner) -> None:
    runner._step_since = time.monotonic() - 61
    assert runner.fault() == "the engine has been in one step for 61 s"


def test_a_device_that_moves_nothing_any_more_ends_all_requests(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Giving a slot to another row is work for the device, too: it fails, and all get their failure nevertheless."""
    monkeypatch.setattr("af2_ray.engine.slots.SlotLayer.move", broken(torch.AcceleratorError(LOST)))
    ends: list[Event] = []
    for tokens in (3, 40):  # the first row ends first: the last one would take its place
        request = Request("go on", max_new_tokens=tokens, min_new_tokens=tokens)
        runner.submit(request, lambda event: None if isinstance(event, Piece) else ends.append(event))
    end_s = time.monotonic() + 20
    while len(ends) < 2:
        assert time.monotonic() < end_s
        time.sleep(0.005)
    assert any(isinstance(event, RequestFailure) for event in ends)
    assert "the device is lost" in runner.fault()
