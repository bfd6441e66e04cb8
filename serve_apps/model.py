"""One replica of the model: an engine in a thread of its own, and what Serve asks of a replica."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

from af2_ray.config import Serve
from af2_ray.serve.request import Answer, Event, Failure, Piece, Request

logger = logging.getLogger("ray.serve")  # the one whose lines carry Serve's replica and request id


class Model:
    """Answers requests, as many at a time as the engine has slots."""

    def __init__(self, folder: str, settings: Serve) -> None:
        from af2_ray.serve.engine import Engine  # loads torch, which the ingress does without
        from af2_ray.serve.runner import Runner
        from serve_apps.telemetry import Telemetry

        library = logging.getLogger("af2_ray")
        library.handlers, library.level = logger.handlers, logging.INFO
        self._runner = Runner(Engine.from_pretrained(folder, settings=settings))
        self._telemetry = Telemetry(settings.model_name, self._runner)
        self._stall_s = settings.stall_s

    async def stream(self, request: Request) -> AsyncIterator[Event]:
        """Pieces of the answer, at last the whole or a failure; the slot is free when the caller goes."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        since = self._telemetry.began()
        last: Event | None = None
        call = self._runner.submit(request, lambda event: loop.call_soon_threadsafe(events.put_nowait, event))
        try:
            while isinstance(event := await events.get(), Piece):
                yield event
            last = event
            yield event
        finally:
            call.cancel()
            self._telemetry.ended(since, request, last)

    async def answer(self, request: Request) -> Answer | Failure:
        """The whole answer at once."""
        async for event in self.stream(request):
            if not isinstance(event, Piece):
                return event
        raise AssertionError("a stream ends with an answer or a failure")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve: the load that replicas are added for (`scaling.ByWindows`)."""
        self._telemetry.look()
        return {"windows": float(self._runner.num_windows)}

    def check_health(self) -> None:
        """Called by Serve: an engine that hangs in a step, or whose thread is gone, is a replica to be replaced."""
        if (stalled_s := self._runner.stalled_s()) > self._stall_s:
            raise RuntimeError(f"the engine has been in one step for {stalled_s:.0f} s")
