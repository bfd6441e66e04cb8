"""What requests hold while they are here, and what happens to those that hold it too long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from fastapi import Request
from ray.exceptions import RayActorError

from af2_ray.engine.request import Clip
from serve_apps.admission import COPIES, Memory, Places, body_of, visiting
from serve_apps.asking import Asking, fingerprint_of, together
from serve_apps.events import EventStream
from serve_apps.fetch import Fetcher
from serve_apps.schemas import ApiError, AudioUrl


def request(*chunks: bytes, wait_s: float = 0.0, goes_after_s: float | None = None) -> Request:
    """A request whose body comes in chunks, each after a while, and whose caller may go."""
    left = list(chunks)

    async def receive() -> dict[str, Any]:
        if left:
            await asyncio.sleep(wait_s)
            return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}
        await asyncio.sleep(3600 if goes_after_s is None else goes_after_s)
        return {"type": "http.disconnect"}

    return Request({"type": "http", "method": "POST", "path": "/", "headers": []}, receive)


def any_size(num_bytes: int) -> None:
    pass


def refused(work: Awaitable[Any]) -> ApiError:
    async def run() -> None:
        await work

    with pytest.raises(ApiError) as caught:
        asyncio.run(run())
    return caught.value


def test_a_body_has_a_deadline_that_grows_with_it() -> None:
    assert asyncio.run(body_of(request(b"a", b"b"), any_size, any_size, 1.0)) == b"ab"
    slow = refused(body_of(request(*[b"x"] * 50, wait_s=0.05), any_size, any_size, 0.2))
    assert (slow.status, slow.code) == (408, "body_timeout")
    fast = body_of(request(*[bytes(2**15)] * 8, wait_s=0.05), any_size, any_size, 0.2)  # 640 KiB a second
    assert len(asyncio.run(fast)) == 2**18


def test_memory_is_taken_as_it_comes_and_given_back() -> None:
    memory = Memory(COPIES * 100)
    with memory.holding() as first:
        assert asyncio.run(body_of(request(bytes(60), bytes(30)), any_size, first, 1.0)) == bytes(90)
        with memory.holding() as second:
            full = refused(body_of(request(bytes(11)), any_size, second, 1.0))
            assert (full.status, full.retry_after_s) == (429, 5)
    assert memory.held == 0


def test_one_key_takes_no_more_than_its_memory() -> None:
    memory = Memory(100, 50)
    with memory.holding(b"a") as one, memory.holding(b"a") as two, memory.holding(b"b") as other:
        one(40)
        with pytest.raises(ApiError, match="too many requests"):
            two(11)
        other(50)
        two(10)
    assert memory.held == 0


def test_an_answer_holds_what_it_took_until_its_last_piece() -> None:
    """A stream is written when its handler has long returned; its caller may even be gone before it begins."""
    memory, ended = Memory(2**20), []

    async def handler() -> EventStream:
        http = request(b"what?")
        async with visiting(http, bytes, lambda: b"a", memory, any_size, body_s=1.0, limit_s=1.0) as its:
            its.hold(1000)
            held = its.held.pop_all()
        held.callback(ended.append, "over")

        async def events() -> AsyncIterator[str]:
            assert memory.held
            yield "data"

        return EventStream(events(), held)

    async def gone(_: Any) -> None:
        raise OSError("gone")

    async def run() -> None:
        response = await handler()
        assert memory.held >= 1000
        with pytest.raises(BaseException, match=r"gone|ClientDisconnect|") as caught:
            await response({"type": "http", "asgi": {"spec_version": "2.4"}}, request().receive, gone)
        assert not isinstance(caught.value, AssertionError)

    asyncio.run(run())
    assert (memory.held, ended) == (0, ["over"])


def visit(http: Request, inner: Callable[[], Awaitable[None]], limit_s: float = 5.0) -> Awaitable[None]:
    async def run() -> None:
        async with visiting(http, bytes, lambda: b"", Memory(2**20), any_size, body_s=1.0, limit_s=limit_s) as its:
            assert its.asked == b"what?"
            await inner()

    return run()


def test_all_that_is_done_for_a_request_shares_one_deadline() -> None:
    late = refused(visit(request(b"what?"), lambda: asyncio.sleep(5), limit_s=0.05))
    assert (late.status, late.code) == (408, "timeout")


def test_work_for_a_caller_who_has_gone_ends() -> None:
    """Whatever its headers say: Serve has one by which a caller turns that off."""
    done = []

    async def work() -> None:
        try:
            await asyncio.sleep(5)
        except asyncio.CancelledError:
            done.append("cancelled")
            raise

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(asyncio.wait_for(visit(request(b"what?", goes_after_s=0.05), work), 3))
    assert done == ["cancelled"]


def test_one_key_takes_no_more_than_its_places() -> None:
    async def run() -> list[str]:
        places, order = Places(8), []
        over = asyncio.Event()

        async def ask(owner: str, num: int, name: str) -> None:
            async with places.taking(owner, num):
                order.append(name)
                await over.wait()

        flood = [asyncio.create_task(ask("a", 8, f"a{number}")) for number in range(3)]
        await asyncio.sleep(0)
        others = [asyncio.create_task(ask(owner, 8, owner)) for owner in ("b", "", "")]
        await asyncio.sleep(0.01)
        assert order == ["a0", "b", "", ""], "the flood waits behind itself; anybody is not bounded"
        flood[1].cancel()  # who waits may go
        await asyncio.sleep(0.01)
        over.set()
        await asyncio.gather(*flood, *others, return_exceptions=True)
        assert places._taken == places._waiting == {}
        return order

    assert asyncio.run(run())[4:] == ["a2"]


def test_recordings_are_fetched_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, most, ended = 0, 0, []

    async def slow(self: Fetcher, audio: AudioUrl, name: str, hold: Any) -> bytes:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        try:
            await asyncio.sleep(0.02 if audio.url != "bad" else 0.01)
            if audio.url == "bad":
                raise ApiError(400, "bad", code="bad")
        except asyncio.CancelledError:
            ended.append(name)
            raise
        finally:
            at_once -= 1
        return audio.url.encode()

    monkeypatch.setattr(Fetcher, "read", slow)
    fetcher = Fetcher([], [], 100)
    urls = [AudioUrl(url=str(number)) for number in range(8)]
    assert asyncio.run(fetcher.read_all(urls)) == [str(number).encode() for number in range(8)]
    assert most == 8
    assert refused(fetcher.read_all([*urls, AudioUrl(url="bad")])).code == "bad"
    assert len(ended) == 8, "the first error ends the others"


def test_what_ends_replicas_is_not_asked_again() -> None:
    now, asked = [0.0], []
    asking = Asking(clock=lambda: now[0])
    bad, good = (fingerprint_of(["why?", Clip(key, 1)], b"ann") for key in "ab")
    assert bad != fingerprint_of(["why?", Clip("a", 1)], b"bob"), "others ask for themselves"

    async def end() -> str:
        asked.append(1)
        raise RayActorError

    async def answer() -> str:
        return "because"

    assert refused(asking.retried(end, bad)).status == 503
    assert asyncio.run(asking.retried(answer, bad)) == "because", "another one may have been at fault"
    assert refused(asking.retried(end, bad)).status == 503
    assert (refused(asking.retried(end, bad)).status, len(asked)) == (400, 5)
    assert (refused(asking.retried(end, bad)).status, len(asked)) == (400, 5)
    assert asyncio.run(asking.retried(answer, good)) == "because"
    now[0] = 601.0
    assert asyncio.run(asking.retried(answer, bad)) == "because"


def test_answers_that_lost_a_sibling_end() -> None:
    class Response:
        """A call of a replica."""

        def __init__(self, error: Exception | None = None) -> None:
            self.error, self.is_cancelled = error, False

        async def wait(self) -> str:
            await asyncio.sleep(0.01 if self.error else 5)
            raise self.error or AssertionError

        def cancel(self) -> None:
            self.is_cancelled = True

    responses = [Response(), Response(RayActorError()), Response()]
    with pytest.raises(RayActorError):
        asyncio.run(together(responses, Response.wait))
    assert [response.is_cancelled for response in responses] == [True, True, True]
