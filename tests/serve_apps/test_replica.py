"""A replica without Ray: its further models are bounded in number, it knows whether it is well, and it forgets."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import serve_toy
import torch
from ray import serve

from af2_ray.config import Serve
from af2_ray.engine.request import Answer, Clip, Event, Piece, Request, RequestFailure
from serve_apps.embedding import Clap
from serve_apps.replica import Model, Places

GOES_ON = Request("go on", max_new_tokens=200, min_new_tokens=200)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> dict[str, str]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")
    made = {
        name: serve_toy.export(root / name, tiny_tokenizer, seed=seed) for seed, name in enumerate(("a", "b", "c", "d"))
    }
    (made["d"] / "model.safetensors").write_bytes(b"no weights")
    return {name: str(folder) for name, folder in made.items()}


class Replica:
    """A model's replica as Serve calls it, with Serve's own cache of further models beside it (newest last)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folders: dict[str, str], **settings: Any) -> None:
        more = {name: folders[name] for name in ("b", "c", "d")}
        library = logging.getLogger("af2_ray")  # a replica sets it, in a process of its own
        for name in ("handlers", "level"):
            monkeypatch.setattr(library, name, getattr(library, name))
        self.model = Model(folders["a"], Serve(model_name="a", more_models=more, num_slots=4, **settings))
        self.cache: dict[str, Any] = {}
        self.loads: list[str] = []
        self.most = 0
        self._name = ""
        self._lock = asyncio.Lock()
        monkeypatch.setattr(serve, "get_multiplexed_model_id", lambda: self._name)
        monkeypatch.setattr(self.model, "_load", self.load)

    async def load(self, name: str) -> Any:
        async with self._lock:
            if name not in self.cache:
                self.cache.clear()
                self.loads.append(name)
                self.cache[name] = await self.model._more.load(name)
                self.most = max(self.most, len(list(self.model._more)))
            return self.cache[name]

    def ask(self, name: str, request: Request) -> Any:
        """The stream of a question to a model, begun."""

        async def stream() -> Any:
            self._name = name
            async for event in self.model.stream(request):
                yield event

        return stream()

    async def answer(self, name: str, request: Request) -> Event:
        self._name = name
        return await self.model.answer(request)


MakeReplica = Callable[..., Replica]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, folders: dict[str, str]) -> MakeReplica:
    return lambda **settings: Replica(monkeypatch, folders, **settings)


class Toy:
    """What `Places` makes in place of a model."""

    def __init__(self, name: str) -> None:
        self.name = name


def test_places_are_bounded_by_what_lives() -> None:
    """Two places: the third waits until one that was given out is really gone; one is made at a time."""
    making = threading.Lock()

    def make(name: str) -> Toy:
        assert making.acquire(blocking=False), "two at one time"
        time.sleep(0.01)
        making.release()
        return Toy(name)

    async def use() -> None:
        places = Places(2, make)
        held = list(await asyncio.gather(places.load("a"), places.load("b")))
        coming = asyncio.ensure_future(places.load("c"))
        await asyncio.sleep(0.05)
        assert not coming.done()
        assert {toy.name for toy in places} == {"a", "b"}
        held.pop(0)
        held.append(await asyncio.wait_for(coming, 5))
        assert {toy.name for toy in places} == {"b", "c"}

    asyncio.run(use())


def test_a_place_is_free_again_where_a_model_did_not_load() -> None:
    def make(name: str) -> Toy:
        if name == "broken":
            raise OSError("no such folder")
        return Toy(name)

    async def use() -> None:
        places = Places(1, make)
        for _ in range(2):
            with pytest.raises(OSError, match="no such folder"):
                await places.load("broken")
        assert (await asyncio.wait_for(places.load("a"), 5)).name == "a"

    asyncio.run(use())


def test_further_models_wait_for_those_that_still_answer(make: MakeReplica) -> None:
    """While b writes, c is asked for six times: it is loaded once, when b's answer is over, for all of them."""

    async def use() -> None:
        replica = make()
        first = replica.ask("b", GOES_ON)
        assert isinstance(await anext(first), Piece)
        others = [asyncio.ensure_future(replica.answer("c", Request("what?", max_new_tokens=3))) for _ in range(6)]
        await asyncio.sleep(0.1)
        assert not any(other.done() for other in others)
        assert isinstance(await replica.answer("", Request("what?", max_new_tokens=3)), Answer), "the main one is free"
        *_, last = [event async for event in first]
        assert isinstance(last, Answer)
        del first
        answers = await asyncio.wait_for(asyncio.gather(*others), 20)
        assert all(isinstance(answer, Answer) for answer in answers)
        assert (replica.loads, replica.most) == (["b", "c"], 1)

    asyncio.run(use())


def test_a_caller_who_leaves_frees_the_place(make: MakeReplica) -> None:
    async def use() -> None:
        replica = make()
        first = replica.ask("b", GOES_ON)
        await anext(first)
        other = asyncio.ensure_future(replica.answer("c", Request("what?", max_new_tokens=3)))
        await asyncio.sleep(0.05)
        await first.aclose()
        del first
        assert isinstance(await asyncio.wait_for(other, 20), Answer)

    asyncio.run(use())


def test_a_replica_that_is_busy_with_other_models_says_so(make: MakeReplica) -> None:
    async def use() -> None:
        replica = make()
        await replica.answer("b", Request("what?", max_new_tokens=1))
        held = replica.cache["b"]  # as an answer that does not end
        replica.model._timeout_s = 0.2
        failure = await replica.answer("c", Request("what?", max_new_tokens=1))
        assert isinstance(failure, RequestFailure)
        assert not failure.by_caller
        assert "busy with other models" in failure.message
        del held
        replica.model._timeout_s = 60
        assert isinstance(await replica.answer("c", Request("what?", max_new_tokens=1)), Answer)

    asyncio.run(use())


def test_a_model_that_is_gone_leaves_no_memory(make: MakeReplica) -> None:
    """Neither weights nor keys and values wait for the garbage collector: the next model needs their room."""

    async def use() -> None:
        replica = make()
        await replica.answer("b", Request("what?", max_new_tokens=1))
        engine = replica.cache["b"].runner.engine
        keys = engine._decoder._cache.layers[0].keys
        tensors = [weakref.ref(tensor) for tensor in (*engine.model.parameters(), keys)]
        del engine, keys
        gc.disable()
        try:
            assert isinstance(await replica.answer("c", Request("what?", max_new_tokens=1)), Answer)
            assert all(tensor() is None for tensor in tensors)
        finally:
            gc.enable()

    asyncio.run(use())


def test_a_model_that_does_not_load_fails_alone(make: MakeReplica) -> None:
    async def use() -> None:
        replica = make()
        failure = await replica.answer("d", Request("what?", max_new_tokens=1))
        assert isinstance(failure, RequestFailure)
        assert "'d' cannot be loaded" in failure.message
        assert isinstance(await replica.answer("b", Request("what?", max_new_tokens=1)), Answer)

    asyncio.run(use())


def test_a_model_that_answers_nothing_is_found_when_it_loads(
    make: MakeReplica, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    """Weights that are no numbers concern the questions to this model alone: the replica stays healthy."""
    broken = serve_toy.build(tiny_tokenizer)
    torch.nn.init.constant_(broken.language_model.model.norm.weight, torch.nan)
    broken.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)

    async def use() -> None:
        replica = make()
        replica.model._more._make = lambda _: type(replica.model._main)("b", str(tmp_path), Serve())
        failure = await replica.answer("b", Request("what?", max_new_tokens=1))
        assert isinstance(failure, RequestFailure)
        assert "'b' cannot be loaded" in failure.message
        replica.model.check_health()

    asyncio.run(use())


def test_health_names_the_model_and_the_fault(make: MakeReplica, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    async def use() -> None:
        replica = make()
        replica.model.check_health()
        await replica.answer("b", Request("what?", max_new_tokens=1))
        monkeypatch.setattr(replica.cache["b"].runner.engine._decoder, "prefill", fail)
        assert isinstance(await replica.answer("b", Request("what?", max_new_tokens=1)), RequestFailure)
        with pytest.raises(RuntimeError, match="the model b: the device is lost, in reading: AcceleratorError"):
            replica.model.check_health()

    asyncio.run(use())


def test_all_models_forget(make: MakeReplica) -> None:
    heard = Request("what?", (Clip.of(np.ones((1, 160_000), np.int16), "sound"),), max_new_tokens=2)

    async def use() -> None:
        replica = make()
        for name in ("", "b"):
            assert isinstance(await replica.answer(name, heard), Answer)
        assert await replica.model.forget(["other"]) == 0
        assert await replica.model.forget(["sound"]) == 2
        assert await replica.model.forget(["sound"]) == 0

    asyncio.run(use())


def test_long_texts_do_not_stop_the_event_loop(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """A heartbeat goes on while texts of 32 768 characters are read; a few show that they are too long."""

    async def use() -> float:
        clap = Clap(str(serve_toy.export_clap(tmp_path, tiny_tokenizer)))
        beats = [time.monotonic()]
        reading = asyncio.ensure_future(clap.embed(["word " * 6553] * 256))
        while not reading.done():
            await asyncio.sleep(0.005)
            beats.append(time.monotonic())
        result = reading.result()
        assert isinstance(result, RequestFailure)
        assert result.message.startswith("input 0: ")
        return max(b - a for a, b in itertools.pairwise(beats))

    assert asyncio.run(use()) < 0.5
