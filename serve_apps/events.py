"""Answers as server-sent events, in OpenAI's chunks."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack
from typing import Protocol

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from af2_ray.engine.request import Answer, Event, Piece, RequestFailure
from serve_apps.limits import failure_error
from serve_apps.replies import ChatChunk, ChunkChoice, Delta, Logprobs, Usage
from serve_apps.schemas import ApiError, ChatRequest

logger = logging.getLogger("ray.serve")


class Stream(Protocol):
    """The events of an answer that a replica is writing."""

    def __aiter__(self) -> AsyncIterator[Event]: ...

    async def __anext__(self) -> Event: ...

    def cancel(self) -> None:
        """Give the answer up."""


Begun = tuple[Stream, Event]
"""A stream and the event that was taken from it already."""


class EventStream(StreamingResponse):
    """A response of server-sent events.

    Args:
        events: the events.
        held: what the answer holds until its end, whether its caller hears it or not.
    """

    def __init__(self, events: AsyncIterator[str], held: AsyncExitStack) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        async with self._held:
            await super().__call__(scope, receive, send)


class Chunks:
    """The events of one streamed completion."""

    def __init__(self, id_: str, chat: ChatRequest) -> None:
        self._id, self._chat, self._created = id_, chat, int(time.time())
        self.error: Exception | RequestFailure | None = None
        """What an answer broke off with."""

    async def of(self, begun: Sequence[Begun], answers: list[Answer]) -> AsyncIterator[str]:
        """Role, pieces and reason of each answer as they come; whole answers go to `answers`.

        An answer that breaks off ends everything with an error event.
        """
        events: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue()
        tasks = [asyncio.create_task(_pass_on(index, *each, events)) for index, each in enumerate(begun)]
        try:
            for index in range(len(begun)):
                yield self._chunk([ChunkChoice(index=index, delta=Delta(role="assistant", content=""))])
            while len(answers) < len(begun):
                index, event = await events.get()
                if isinstance(event, Piece):
                    delta, logprobs = Delta(content=event.text), Logprobs.of(event.logprobs)
                    yield self._chunk([ChunkChoice(index=index, delta=delta, logprobs=logprobs)])
                elif isinstance(event, Answer):
                    answers.append(event)
                    yield self._chunk([ChunkChoice(index=index, delta=Delta(), finish_reason=event.finish_reason)])
                else:
                    self.error = event
                    logger.warning("%s ended in the middle: %r", self._id, event)
                    broken = ApiError(500, "the answer broke off: ask again", code="generation_failed")
                    yield f"data: {json.dumps(broken.body())}\n\n"
                    return
        finally:
            for task in tasks:
                task.cancel()

    def end(self, usage: Usage) -> Iterator[str]:
        """The usage if asked for, and `[DONE]`."""
        if self._chat.stream_options and self._chat.stream_options.include_usage:
            yield self._chunk([], usage)
        yield "data: [DONE]\n\n"

    def _chunk(self, choices: list[ChunkChoice], usage: Usage | None = None) -> str:
        model = self._chat.model
        return ChatChunk(id=self._id, created=self._created, model=model, choices=choices, usage=usage).event()


async def _pass_on(
    index: int, stream: Stream, first: Event, events: asyncio.Queue[tuple[int, Event | Exception]]
) -> None:
    """Every event of one answer, with its index; what goes wrong on the way is the last."""
    event = first
    try:
        while isinstance(event, Piece):
            events.put_nowait((index, event))
            event = await anext(stream)
        if isinstance(event, RequestFailure):
            raise failure_error(event)
        events.put_nowait((index, event))
    except Exception as error:  # whatever it is: the client waits for it
        events.put_nowait((index, error))
