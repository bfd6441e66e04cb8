"""One replica of the model: an engine in a thread of its own, and what Serve asks of a replica.

Further models (recipe key `serve.more_models`) share the replicas: each is loaded where it is first asked for and stays
there until another one needs its place; Serve sends its questions to the replicas that have it. One that is a small
part of the served model (`af2_ray.models.parts`) takes memory for what it has of its own alone.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

from ray import serve

from af2_ray.config import Serve
from af2_ray.engine.request import Answer, Event, Piece, Request, RequestFailure
from af2_ray.storage.parts import check_base, is_part, read_facts

logger = logging.getLogger("ray.serve")  # the one whose lines carry Serve's replica and request id

ModelT = TypeVar("ModelT")


class _Loaded:
    """A model that answers; its engine ends when nobody holds it any more, no answer under way either."""

    def __init__(self, name: str, folder: str, settings: Serve, base: _Loaded | None = None) -> None:
        from af2_ray.cluster import own_device
        from af2_ray.engine.engine import Engine  # loads torch, which the ingress does without
        from af2_ray.engine.runner import Runner
        from af2_ray.models.parts import Base
        from serve_apps.telemetry import Telemetry

        shared = Base(base.folder, base.runner.engine.model) if base is not None else None
        engine = Engine.from_pretrained(folder, own_device(), settings, base=shared)
        engine.warm()  # a model that cannot answer anything is found now, before it fails the questions of others
        self.name: str = name
        self.folder: str = folder
        self.runner: Runner = Runner(engine)
        self.telemetry = Telemetry(name, self.runner)
        weakref.finalize(self, self.runner.close).atexit = False


def check_parts(more_models: Mapping[str, str], base: str) -> None:
    """See that those of the further models that are small parts belong to the served model.

    Raises:
        ValueError: one is of another model, or what it says of itself is damaged; the message names its key.
    """
    for name, folder in more_models.items():
        try:
            if is_part(folder):
                check_base(folder, read_facts(folder), base)
        except ValueError as error:
            raise ValueError(f"serve.more_models.{name}: {error}") from error


class Places(Generic[ModelT]):
    """The places of further models in memory: as many live at one time as there are places, and one loads at a time.

    Whoever keeps the models drops one before it has the next one made. That one may have answers to end, which hold it,
    so the next one waits until it is really gone.

    Args:
        num: number of places.
        make: function that loads a model by its name, in a thread.
    """

    def __init__(self, num: int, make: Callable[[str], ModelT]) -> None:
        self._num, self._make = num, make
        self._live: weakref.WeakSet[ModelT] = weakref.WeakSet()
        self._num_live = 0
        self._loading = asyncio.Lock()
        self._left = asyncio.Event()

    def __iter__(self) -> Iterator[ModelT]:
        return iter(list(self._live))

    async def load(self, name: str) -> ModelT:
        """Make a model, once there is a place for it."""
        async with self._loading:
            while self._num_live >= self._num:
                self._left.clear()
                await self._left.wait()
            model = await asyncio.to_thread(self._make, name)
            self._live.add(model)
            self._num_live += 1
            weakref.finalize(model, self._tell, asyncio.get_running_loop()).atexit = False
            return model

    def _tell(self, loop: asyncio.AbstractEventLoop) -> None:
        """A model is gone, in whichever thread held it last; what waits for its place is in the loop's."""
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._free)

    def _free(self) -> None:
        self._num_live -= 1
        self._left.set()


class Model:
    """Answers requests, as many at a time as the engine has slots."""

    def __init__(self, folder: str, settings: Serve) -> None:
        library = logging.getLogger("af2_ray")
        library.handlers, library.level = logger.handlers, logging.INFO
        self._timeout_s = settings.request_timeout_s
        self._main = _Loaded(settings.model_name, folder, settings)
        check_parts(settings.more_models, folder)
        self._more = Places(
            settings.more_models_per_replica,
            lambda name: _Loaded(name, settings.more_models[name], settings, self._main),
        )
        self._coming: dict[str, asyncio.Task[_Loaded]] = {}

        @serve.multiplexed(max_num_models_per_replica=settings.more_models_per_replica)
        async def load(name: str) -> _Loaded:
            return await self._more.load(name)

        self._load: Callable[[str], Awaitable[_Loaded]] = load

    async def stream(self, request: Request) -> AsyncIterator[Event]:
        """Pieces of the answer, at last the whole or a failure; the slot is free when the caller goes."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        loaded = await self._named(serve.get_multiplexed_model_id())
        if isinstance(loaded, RequestFailure):
            yield loaded
            return
        since = loaded.telemetry.began()
        last: Event | None = None

        def emit(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        call = loaded.runner.submit(request, emit)
        try:
            while isinstance(event := await events.get(), Piece):
                yield event
            last = event
            yield event
        finally:
            call.cancel()
            loaded.telemetry.ended(since, request, last)

    async def answer(self, request: Request) -> Answer | RequestFailure:
        """The whole answer at once."""
        async for event in self.stream(request):
            if not isinstance(event, Piece):
                return event
        raise AssertionError("a stream ends with an answer or a failure")

    async def forget(self, keys: Sequence[str]) -> int:
        """Forget recordings by their keys, and their beginnings (`KEY:SECONDS`); how many clips all models kept.

        What an answer hears at the moment goes with the last answer that does.
        """
        numbers = [asyncio.wrap_future(loaded.runner.forget(keys)) for loaded in self._all()]
        return sum(await asyncio.gather(*numbers))

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve: the load that replicas are added for (`scaling.ByWindows`)."""
        for loaded in self._all():
            loaded.telemetry.look()
        return {"windows": float(sum(loaded.runner.num_windows for loaded in self._all()))}

    def check_health(self) -> None:
        """Called by Serve: an engine that hangs, or that works no more, makes its replica one to be replaced."""
        for loaded in self._all():
            if fault := loaded.runner.fault():
                raise RuntimeError(f"the model {loaded.name}: {fault}")

    async def _named(self, name: str) -> _Loaded | RequestFailure:
        """The model of a question, loaded if it has to be; or why it is not there."""
        if not name:
            return self._main
        # One task for all who ask for a model, so that it is loaded once for all of them, and goes on without them.
        task = self._coming.get(name)
        if task is None:
            self._coming[name] = task = asyncio.ensure_future(self._load(name))
            task.add_done_callback(lambda _: self._coming.pop(name, None))
        try:
            async with asyncio.timeout(self._timeout_s) as limit:
                return await asyncio.shield(task)
        except Exception:  # whatever is wrong with its folder concerns the questions to this model alone
            if limit.expired():
                logger.warning("the model %s is not there after %g s", name, self._timeout_s)
                return RequestFailure(
                    f"the model {name!r} is not there after {self._timeout_s:g} s: this replica is busy with other "
                    "models, or still loads it; ask again",
                    by_caller=False,
                )
            logger.exception("the model %s cannot be loaded", name)
            return RequestFailure(
                f"the model {name!r} cannot be loaded: the server's log has the reason", by_caller=False
            )

    def _all(self) -> list[_Loaded]:
        return [self._main, *self._more]
