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

ResultT = TypeVar("ResultT")


class Asking:
    """Asks replicas.

    A request whose replica died is asked once more: the replica may have died of anything. What ended two is not asked
    again for a while, by clients that try again on their own above all. Two replicas may also end at once for another
    reason; then the same question is answered again after `fatal_s`.

    Args:
        fatal_s: seconds for which a request that ended two replicas is refused.
        clock: seconds, monotonic.
    """

    def __init__(self, fatal_s: float = 600.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._fatal_s, self._clock = fatal_s, clock
        self._fatal: dict[str, float] = {}  # when it ended the second one, by fingerprint

    async def retried(self, ask: Callable[[], Awaitable[ResultT]], fingerprint: str) -> ResultT:
        """The result of `ask`, which calls replicas.

        Args:
            fingerprint: name of what is asked (`fingerprint_of`).

        Raises:
            ApiError: 429 all replicas are full, 503 none is there, 400 this request ends replicas.
        """
        if self._clock() - self._fatal.get(fingerprint, -self._fatal_s) < self._fatal_s:
            raise ApiError(
                400,
                f"this request ended two replicas; it is not tried again for {self._fatal_s / 60:g} minutes: change it",
                code="fatal_request",
            )
        try:
            try:
                return await ask()
            except RayActorError:
                logger.warning("a replica died, asking another")
                return await ask()
        except BackPressureError as error:
            message = f"too many questions at once: try again in {BUSY_RETRY_S} s"
            raise ApiError(429, message, code="busy", retry_after_s=BUSY_RETRY_S) from error
        except (RayActorError, DeploymentUnavailableError) as error:
            if isinstance(error, RayActorError):
                self._remember(fingerprint)
            raise ApiError(
                503, "the model is restarting: try again", code="unavailable", retry_after_s=BUSY_RETRY_S
            ) from error

    def _remember(self, fingerprint: str) -> None:
        now = self._clock()
        self._fatal = {key: since for key, since in self._fatal.items() if now - since < self._fatal_s}
        self._fatal[fingerprint] = now


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


def fingerprint_of(items: Sequence[str | Clip]) -> str:
    """A short name of what a model is asked: of its texts and recordings, in order."""
    text = json.dumps([item if isinstance(item, str) else {"clip": item.key} for item in items])
    return hashlib.sha256(text.encode()).hexdigest()
