"""Asking replicas: once more if one died, together with others, and never again what ended two of them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from af2_ray.engine.request import Clip
from serve_apps.admission import BUSY_RETRY_S
from serve_apps.schemas import ApiError

logger = logging.getLogger("ray.serve")

FATAL_DEATHS = 3
ResultT = TypeVar("ResultT")


class Asking:
    """Asks replicas.

    A request whose replica died is asked once more: the replica may have died of anything. Which of the requests that
    it had was at fault nobody knows, so their callers may ask again; but what was there each time that `FATAL_DEATHS`
    replicas died, and was not answered in between, is not asked for a while.

    Args:
        fatal_s: seconds for which such a request is refused.
        clock: seconds, monotonic.
    """

    def __init__(self, fatal_s: float = 600.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._fatal_s, self._clock = fatal_s, clock
        self._deaths: dict[str, tuple[int, float]] = {}  # of replicas with a request, by fingerprint; the last one

    async def retried(self, ask: Callable[[], Awaitable[ResultT]], fingerprint: str) -> ResultT:
        """The result of `ask`, which calls replicas.

        Args:
            fingerprint: name of what is asked (`fingerprint_of`).

        Raises:
            ApiError: 429 all replicas are full, 503 none is there, 400 this request ends replicas.
        """
        self._check(fingerprint)
        try:
            try:
                result = await ask()
            except RayActorError:
                self.note_death(fingerprint)
                self._check(fingerprint)
                logger.warning("a replica died, asking another")
                result = await ask()
        except BackPressureError as error:
            message = f"too many questions at once: try again in {BUSY_RETRY_S} s"
            raise ApiError(429, message, code="busy", retry_after_s=BUSY_RETRY_S) from error
        except (RayActorError, DeploymentUnavailableError) as error:
            if isinstance(error, RayActorError):
                self.note_death(fingerprint)
            raise ApiError(
                503, "the model is restarting: try again", code="unavailable", retry_after_s=BUSY_RETRY_S
            ) from error
        self._deaths.pop(fingerprint, None)
        return result

    def note_death(self, fingerprint: str) -> None:
        """A replica died that had this request."""
        now = self._clock()
        self._deaths = {key: each for key, each in self._deaths.items() if now - each[1] < self._fatal_s}
        self._deaths[fingerprint] = self._deaths.get(fingerprint, (0, now))[0] + 1, now

    def _check(self, fingerprint: str) -> None:
        num, last = self._deaths.get(fingerprint, (0, 0.0))
        if num >= FATAL_DEATHS and self._clock() - last < self._fatal_s:
            raise ApiError(
                400,
                f"{num} replicas ended while they had this request; it is not tried again for "
                f"{self._fatal_s / 60:g} minutes: change it",
                code="fatal_request",
            )


async def together(
    responses: Sequence[Any], result: Callable[[Any], Awaitable[Any]] = asyncio.ensure_future
) -> list[Any]:
    """The results of several calls of replicas; if one fails, the others are cancelled.

    Args:
        responses: what the calls of a handle gave.
        result: function that waits for one of them.
    """
    try:
        return list(await asyncio.gather(*map(result, responses)))
    except BaseException:
        for response in responses:
            response.cancel()
        raise


def fingerprint_of(items: Sequence[str | Clip], owner: bytes) -> str:
    """A short name of what a model is asked: of its texts and recordings, in order, and of who asks."""
    text = owner.hex() + json.dumps([item if isinstance(item, str) else {"clip": item.key} for item in items])
    return hashlib.sha256(text.encode()).hexdigest()
