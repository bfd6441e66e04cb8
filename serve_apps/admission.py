"""What requests hold at an ingress while they are here: memory, and the places of answers.

Both are bounded, so that no number of requests takes the server: who finds no memory is sent away with a time to come
again, and whoever holds the places of one key already waits behind that key's own requests, not before others'.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from fastapi import Request as HttpRequest
from starlette.requests import ClientDisconnect

from serve_apps.keys import ANYONE
from serve_apps.schemas import ApiError

logger = logging.getLogger("ray.serve")  # the one whose lines carry Serve's replica and request id

BUSY_RETRY_S = 5
COPIES = 4  # of a body's bytes at most: the body, its string, the recording, the message to a decoder
LEAST_RATE = 2**16  # bytes a second of a body
AskedT = TypeVar("AskedT")
Hold = Callable[[int], None]
"""Takes so many bytes more for a request; `ApiError` 429 if there are none."""


class Memory:
    """Bytes that the requests of this process hold.

    Args:
        per_owner: bytes of them that may be one API key's.
    """

    def __init__(self, limit_bytes: int, per_owner: int | None = None) -> None:
        self._limit, self._per_owner = limit_bytes, limit_bytes if per_owner is None else per_owner
        self._of: Counter[bytes] = Counter()

    @property
    def held(self) -> int:
        """Bytes of all."""
        return self._of.total()

    @contextmanager
    def holding(self, owner: bytes = ANYONE) -> Iterator[Hold]:
        """Within the block a request may take memory, in the event loop's thread; at its end that is free again."""
        mine, limit = 0, self._limit if owner == ANYONE else self._per_owner

        def take(num_bytes: int) -> None:
            nonlocal mine
            if self.held + num_bytes > self._limit or self._of[owner] + num_bytes > limit:
                raise ApiError(
                    429,
                    f"too many requests at once: try again in {BUSY_RETRY_S} s",
                    code="busy",
                    retry_after_s=BUSY_RETRY_S,
                )
            self._of[owner] += num_bytes
            mine += num_bytes

        try:
            yield take
        finally:
            self._of[owner] -= mine
            if not self._of[owner]:
                del self._of[owner]


class Places:
    """Answers under way, by who asked for them.

    Args:
        per_owner: number of answers of one owner at a time; a request for more has all of them to itself.
    """

    def __init__(self, per_owner: int) -> None:
        self._per_owner = per_owner
        self._taken: dict[str, int] = {}
        self._waiting: dict[str, deque[tuple[int, asyncio.Future[None]]]] = {}

    @asynccontextmanager
    async def taking(self, owner: str, num: int) -> AsyncIterator[None]:
        """Within the block an owner has `num` places; first come, first served. Nobody's are not bounded."""
        if not owner:
            yield
            return
        num = min(num, self._per_owner)
        queue = self._waiting.setdefault(owner, deque())
        mine = (num, asyncio.get_running_loop().create_future())
        queue.append(mine)
        try:
            self._let_in(owner)
            await mine[1]
            yield
        finally:
            if mine in queue:
                queue.remove(mine)
            else:
                self._taken[owner] -= num
            self._let_in(owner)
            if not queue and not self._taken.get(owner):
                self._waiting.pop(owner, None)
                self._taken.pop(owner, None)

    def _let_in(self, owner: str) -> None:
        queue = self._waiting.get(owner, deque())
        while queue and self._taken.get(owner, 0) + queue[0][0] <= self._per_owner:
            num, turn = queue.popleft()
            self._taken[owner] = self._taken.get(owner, 0) + num
            if not turn.cancelled():
                turn.set_result(None)


async def body_of(http: HttpRequest, check_size: Callable[[int], None], hold: Hold, limit_s: float) -> bytearray:
    """The body, given up as soon as it is seen to be too large or too slow.

    Args:
        check_size: function that raises `ApiError` 413 for so many bytes.
        hold: function that takes memory for them.
        limit_s: seconds for the body, and one more for each 64 KiB of it; between two pieces of it, too.

    Raises:
        ApiError: 408 too slow, 413 too large, 429 no memory for it now.
    """
    stated = http.headers.get("content-length", "0")
    check_size(int(stated) if stated.isdecimal() and len(stated) < 20 else 0)
    body, since = bytearray(), asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout_at(since + limit_s) as deadline:
            async for chunk in http.stream():
                check_size(len(body) + len(chunk))
                hold(COPIES * len(chunk))
                body += chunk
                now = asyncio.get_running_loop().time()
                deadline.reschedule(min(since + limit_s + len(body) / LEAST_RATE, now + limit_s))
    except TimeoutError as error:
        message = f"the body came too slowly: send it within {limit_s:g} s, and 64 KiB a second beyond"
        raise ApiError(408, message, code="body_timeout") from error
    return body


@asynccontextmanager
async def while_there(http: HttpRequest) -> AsyncIterator[None]:
    """Within the block, whose body is read, the task is cancelled when its caller goes.

    Serve does so too, unless a caller's header forbids it.
    """
    task = asyncio.current_task()

    async def watch() -> None:
        try:
            while (await http.receive())["type"] != "http.disconnect":
                pass
        except ClientDisconnect:
            pass
        if task is not None:
            task.cancel("the caller has gone")

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()


@dataclass
class Visit(Generic[AskedT]):
    """A request on its way.

    Attributes:
        asked: what it asks.
        owner: who asks.
        start: time of its coming, in the clock of `time.monotonic`.
        hold: function that takes memory for it.
        held: what it holds until its end, its memory first. A stream, whose end is later, takes it over (`pop_all`).
    """

    asked: AskedT
    id: str
    owner: bytes
    start: float
    hold: Hold
    held: AsyncExitStack


@asynccontextmanager
async def visiting(
    http: HttpRequest,
    parse: Callable[[bytearray], AskedT],
    take: Callable[[], bytes],
    memory: Memory,
    check_size: Callable[[int], None],
    *,
    body_s: float,
    limit_s: float,
) -> AsyncIterator[Visit[AskedT]]:
    """Know who asks, count it, read what is asked; bound time and memory of what is done within the block.

    Args:
        parse: function from a body to what is asked.
        take: function that says who asks, and counts it.
        memory: bytes of all requests here.
        check_size: function that raises `ApiError` 413 for so many bytes.
        body_s: seconds for the body.
        limit_s: seconds for the block.
    """
    start, request_id = time.monotonic(), request_id_of(http)
    try:
        owner = take()
        async with AsyncExitStack() as held:
            hold = held.enter_context(memory.holding(owner))
            body = await body_of(http, check_size, hold, body_s)
            asked = await asyncio.to_thread(parse, body)
            del body
            async with asyncio.timeout(limit_s), while_there(http):
                yield Visit(asked, request_id, owner, start, hold, held)
    except ApiError as error:
        logger.info("request %s refused: %d %s", request_id, error.status, error.code)
        raise
    except TimeoutError as error:
        message = f"no answer within {limit_s:g} s: send less audio or ask for fewer tokens"
        raise ApiError(408, message, code="timeout") from error


def request_id_of(http: HttpRequest) -> str:
    """`x-request-id` as the caller or Serve's proxy set it, if it is a plain word; else one of our own."""
    given = http.headers.get("x-request-id", "")
    return given if re.fullmatch(r"[\w-]{1,64}", given, re.ASCII) else uuid.uuid4().hex
