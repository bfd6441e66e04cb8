"""One replica of the model: an engine in a thread of its own, and what Serve asks of a replica.

Further models (recipe key `serve.more_models`) share the replicas: each is loaded where it is first asked for and stays
there until another one needs its place; Serve sends its questions to the replicas that have it.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import AsyncIterator

from ray import serve

from af2_ray.config import Serve
from af2_ray.engine.request import Answer, Event, Piece, Request, RequestFailure

logger = logging.getLogger("ray.serve")  # the one whose lines carry Serve's replica and request id


class _Loaded:
    """A model that answers; its engine ends when nobody holds it any more, no answer under way either."""

    def __init__(self, name: str, folder: str, settings: Serve) -> None:
        from af2_ray.cluster import own_device
        from af2_ray.engine.engine import Engine  # loads torch, which the ingress does without
        from af2_ray.engine.runner import Runner
        from serve_apps.telemetry import Telemetry

        self.runner = Runner(Engine.from_pretrained(folder, own_device(), settings))
        self.telemetry = Telemetry(name, self.runner)
        weakref.finalize(self, self.runner.close).atexit = False


class Model:
    """Answers requests, as many at a time as the engine has slots."""

    def __init__(self, folder: str, settings: Serve) -> None:
        library = logging.getLogger("af2_ray")
        library.handlers, library.level = logger.handlers, logging.INFO
        self._stall_s = settings.stall_s
        self._main = _Loaded(settings.model_name, folder, settings)
        self._more: weakref.WeakSet[_Loaded] = weakref.WeakSet()

        @serve.multiplexed(max_num_models_per_replica=settings.more_models_per_replica)
        async def load(name: str) -> _Loaded:
            loaded = await asyncio.to_thread(_Loaded, name, settings.more_models[name], settings)
            self._more.add(loaded)
            return loaded

        self._load = load

    async def stream(self, request: Request) -> AsyncIterator[Event]:
        """Pieces of the answer, at last the whole or a failure; the slot is free when the caller goes."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        name = serve.get_multiplexed_model_id()
        try:
            loaded = await self._load(name) if name else self._main
        except Exception:  # whatever is wrong with its folder concerns the questions to this model alone
            logger.exception("the model %s cannot be loaded", name)
            yield RequestFailure(
                f"the model {name!r} cannot be loaded: the server's log has the reason", by_caller=False
            )
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

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve: the load that replicas are added for (`scaling.ByWindows`)."""
        for loaded in self._all():
            loaded.telemetry.look()
        return {"windows": float(sum(loaded.runner.num_windows for loaded in self._all()))}

    def check_health(self) -> None:
        """Called by Serve: an engine that hangs in a step, or whose thread is gone, is a replica to be replaced."""
        if (stalled_s := max(loaded.runner.stalled_s() for loaded in self._all())) > self._stall_s:
            raise RuntimeError(f"the engine has been in one step for {stalled_s:.0f} s")

    def _all(self) -> list[_Loaded]:
        return [self._main, *self._more]
