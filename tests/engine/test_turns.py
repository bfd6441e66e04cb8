"""Owners take turns: who floods a replica waits for the flood alone; who has no room in memory holds up few others."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import serve_toy
import torch

from af2_ray.config import Serve
from af2_ray.engine.engine import Engine
from af2_ray.engine.request import Answer, Clip, Event, Piece, Request, RequestFailure

SETTINGS = Serve(num_slots=3, encode_windows=2, max_new_tokens=300)


@pytest.fixture(scope="module")
def model(tiny_tokenizer: Any) -> Any:
    torch.set_num_threads(1)
    return serve_toy.build(tiny_tokenizer)


def engine_of(model: Any, tokenizer: Any, *, room: int = 0, **settings: Any) -> Engine:
    """An engine; `room` is the number of windows that its memory holds."""
    engine = Engine(model, tokenizer, SETTINGS.model_copy(update=settings))
    if room:
        engine.memory._limit = room * engine.memory._bytes(1, True)
    return engine


def clip(number: int, num_windows: int = 1) -> Clip:
    windows = np.random.default_rng(number).integers(-9999, 9999, (num_windows, 160_000))
    return Clip.of(windows.astype(np.int16))


class Listener:
    """Counts the steps until each named request writes and ends."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.first: dict[str, int] = {}
        self.last: dict[str, Event] = {}

    def ask(self, id: str, *clips: Clip, owner: str = "", tokens: int = 30) -> None:
        request = Request("what?", clips, max_new_tokens=tokens, min_new_tokens=tokens, id=id, owner=owner)
        self.engine.submit(request, lambda event: self.hear(id, event))

    def hear(self, id: str, event: Event) -> None:
        if isinstance(event, Piece):
            self.first.setdefault(id, self.engine.counts.steps)
        else:
            self.last[id] = event

    def admitted(self) -> list[str]:
        admission = self.engine._admission
        return [ticket.request.id for ticket in (*admission.admitted, *self.engine._running)]

    def finish(self) -> None:
        while self.engine.step():
            pass
        assert all(isinstance(event, Answer) for event in self.last.values())
        assert not self.engine.memory._pins
        assert self.engine.memory._pinned_bytes == 0


@pytest.mark.parametrize("room", [99, 6], ids=["room for all", "a flood that fills the memory"])
def test_a_flood_does_not_keep_another_owner_out(model: Any, tiny_tokenizer: Any, room: int) -> None:
    """13 requests of one owner; another's is admitted at the next step, whatever memory the flood has taken."""
    engine = engine_of(model, tiny_tokenizer, room=room)
    listener = Listener(engine)
    for number in range(13):
        listener.ask(f"flood {number}", clip(number), owner="a", tokens=9)
    for _ in range(2):
        engine.step()
    assert engine.memory.has_room({"other": 1}) is (room > 13)
    listener.ask("other", clip(99), owner="b", tokens=9)
    for _ in range(2):
        engine.step()
    assert "other" in listener.admitted()
    listener.finish()
    assert len(listener.last) == 14


def test_with_a_bound_a_slot_is_always_near(model: Any, tiny_tokenizer: Any) -> None:
    """Eight answers about one clip (n=8) may take two of three slots: the other owner's comes as its clip is there."""
    engine = engine_of(model, tiny_tokenizer, answers_per_key=2)
    listener = Listener(engine)
    for number in range(8):
        listener.ask(f"sibling {number}", clip(1), owner="a", tokens=30)
    for _ in range(5):
        engine.step()
        assert engine.num_running <= 2
    listener.ask("other", clip(2, 4), owner="b", tokens=5)
    heard = None
    while "other" not in listener.last:
        engine.step()
        if heard is None and clip(2, 4).key in engine.memory:
            heard = engine.counts.steps
    assert heard is not None
    assert listener.first["other"] <= heard + 2
    assert len(listener.first) == 3, "two siblings write, the others wait"
    listener.finish()
    assert len(listener.last) == 9


def test_slots_go_round(model: Any, tiny_tokenizer: Any) -> None:
    """Without a bound a flood takes all slots that nobody else wants; the next that is free is the other's."""
    engine = engine_of(model, tiny_tokenizer)
    listener = Listener(engine)
    for number in range(9):
        listener.ask(f"flood {number}", owner="a", tokens=10 + number)
    engine.step()
    assert engine.num_running == 3
    for owner in ("b", "c"):
        listener.ask(owner, owner=owner, tokens=3)
    listener.finish()
    order = sorted(listener.first, key=lambda id: listener.first[id])
    assert set(order[3:5]) == {"b", "c"}


def test_nobody_has_no_bound(model: Any, tiny_tokenizer: Any) -> None:
    """Requests without a key are many people's; they come in the order of their arrival, in all slots."""
    engine = engine_of(model, tiny_tokenizer, answers_per_key=1)
    listener = Listener(engine)
    for number in range(6):
        listener.ask(str(number), tokens=4)
    engine.step()
    assert engine.num_running == 3
    listener.finish()
    assert list(listener.first) == list("012345")


def test_encoding_goes_round(model: Any, tiny_tokenizer: Any) -> None:
    """Many short recordings of one owner do not keep the long one of another from the encoder."""
    engine = engine_of(model, tiny_tokenizer)
    listener = Listener(engine)
    for number in range(16):
        listener.ask(f"short {number}", clip(number), owner="a", tokens=1)
    listener.ask("long", clip(99, 4), owner="b", tokens=1)
    while "long" not in listener.last:
        engine.step()
    assert engine.counts.steps <= 5, "a window of each at every step"
    assert engine.encoder.num_encoded <= 10


def test_who_has_no_room_holds_up_nothing_that_needs_none(model: Any, tiny_tokenizer: Any) -> None:
    engine = engine_of(model, tiny_tokenizer, room=4)
    listener = Listener(engine)
    listener.ask("running", clip(1), tokens=30)
    while not engine.num_running:
        engine.step()
    listener.ask("too much", clip(2, 4), tokens=2)
    listener.ask("new audio", clip(3), tokens=2)
    listener.ask("text", tokens=2)
    listener.ask("the same audio", Clip(clip(1).key, 1), tokens=2)
    for _ in range(5):
        engine.step()
    assert sorted(listener.last) == ["text", "the same audio"]
    listener.finish()
    assert len(listener.last) == 5


def test_who_has_no_room_does_not_starve(model: Any, tiny_tokenizer: Any) -> None:
    """Somebody asks about a clip again and again, so that it is always held: as many as there are slots pass."""
    engine = engine_of(model, tiny_tokenizer, room=4)
    listener = Listener(engine)
    held = clip(1)
    listener.ask("first", held, tokens=20)
    while not engine.num_running:
        engine.step()
    listener.ask("too much", clip(2, 4), tokens=2)
    for number in range(200):
        if number % 5 == 0:
            listener.ask(f"again {number}", held, tokens=10)
        engine.step()
        if "too much" in listener.last:
            break
    assert "too much" in listener.last
    passed = [id for id in listener.first if listener.first[id] < listener.first["too much"]]
    assert len(passed) <= 1 + engine.settings.num_slots
    listener.finish()


def test_whose_place_is_taken_gets_it_back(model: Any, tiny_tokenizer: Any) -> None:
    """Four owners and little memory: all are answered, as they are alone, whoever had to wait again."""
    engine = engine_of(model, tiny_tokenizer, room=3)
    owners = np.random.default_rng(0).choice(["a", "a", "a", "b", "c", ""], 30)
    clips = [clip(number, 1 + number % 3) for number in range(5)]
    requests = [
        Request(f"{number}?", (clips[number % 5],), max_new_tokens=5, owner=str(owner))
        for number, owner in enumerate(owners)
    ]
    results: dict[int, Event] = {}
    for number, request in enumerate(requests):
        engine.submit(request, lambda event, number=number: results.__setitem__(number, event))  # type: ignore[misc]
        engine.step()
    while engine.step():
        pass
    alone = engine_of(model, tiny_tokenizer)
    for number, request in enumerate(requests):
        assert results[number] == alone.answer([request])[0]
    assert Counter(type(result) for result in results.values()) == {Answer: len(requests)}


def test_a_cancelled_sibling_ends_within_a_step_and_alone(model: Any, tiny_tokenizer: Any) -> None:
    engine = engine_of(model, tiny_tokenizer)
    ends: list[list[Event]] = [[], [], []]
    request = Request("what?", (clip(1),), max_new_tokens=40, min_new_tokens=40)
    tickets = [engine.submit(request, events.append) for events in ends]
    while not engine.num_running:
        engine.step()
    tickets[0].cancel()
    engine.step()
    assert isinstance(ends[0][-1], RequestFailure)
    assert engine.num_running == 2
    while engine.step():
        pass
    whole = engine.answer([request])[0]
    assert isinstance(whole, Answer)
    assert [events[-1] for events in ends[1:]] == [whole, whole]
