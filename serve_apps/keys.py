"""API keys and how often each may ask.

Keys come from `AF2_API_KEYS` (separated by commas or line breaks) or from the file that `AF2_API_KEYS_FILE` names, as a
mounted secret gives them; both where the application is deployed from and where it runs. Without any, everyone may ask.
Keys are kept and compared as SHA-256, in constant time, against all of them. Rates are counted in each ingress replica
for itself: with N of them a key may ask up to N times as often, the price of no common store to ask at every request.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from serve_apps.schemas import ApiError

_VARIABLE, _FILE_VARIABLE = "AF2_API_KEYS", "AF2_API_KEYS_FILE"
_ANYONE = b""


class Keys:
    """Who may ask.

    Args:
        keys: none at all (nor digests): everyone may.
        digests: SHA-256 of each key.
        per_minute: requests a minute and key, in a burst of as many at most; 0 for any number.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        keys: Iterable[str],
        per_minute: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        digests: Iterable[bytes] = (),
    ) -> None:
        self._digests = [*(_digest(key) for key in keys), *digests]
        self._per_minute, self._clock = per_minute, clock
        self._left: dict[bytes, tuple[float, float]] = {}  # requests left, and when that was

    @classmethod
    def from_environment(cls, per_minute: int, digests: Iterable[bytes] = ()) -> Keys:
        """The keys of this process' environment and those of `digests`; errors as of `digests_of_environment`."""
        return cls((), per_minute, digests={*digests, *cls.digests_of_environment()})

    @staticmethod
    def digests_of_environment() -> list[bytes]:
        """SHA-256 of the keys of the environment.

        Raises:
            ValueError: the file that the environment names cannot be read, or holds no key: better no server than one
                that is open by mistake.
        """
        text = os.environ.get(_VARIABLE, "")
        if path := os.environ.get(_FILE_VARIABLE):
            try:
                text += "\n" + Path(path).read_text()
            except OSError as error:
                raise ValueError(f"{_FILE_VARIABLE} names a file that cannot be read: {error.strerror}") from error
        keys = [key for part in text.replace(",", "\n").splitlines() if (key := part.strip())]
        if path and not keys:
            raise ValueError(f"{_FILE_VARIABLE} names a file without keys: write one a line")
        return [_digest(key) for key in keys]

    def check(self, authorization: str | None) -> bytes:
        """Who asks, by an `Authorization: Bearer KEY` header; `ApiError` 401 without a right one."""
        if not self._digests:
            return _ANYONE
        kind, _, key = (authorization or "").partition(" ")
        if kind.lower() != "bearer" or not key.strip():
            raise ApiError(401, "no API key: send it as the header `Authorization: Bearer KEY`", code="missing_api_key")
        given, found = _digest(key.strip()), False
        for digest in self._digests:  # all of them, whichever it is
            found |= hmac.compare_digest(given, digest)
        if not found:
            raise ApiError(401, "this API key is not known here: check it", code="invalid_api_key")
        return given

    def take(self, authorization: str | None) -> None:
        """`check`, and count a request; `ApiError` 429 if the key asks too often."""
        who = self.check(authorization)
        if not self._per_minute:
            return
        now = self._clock()
        left, since = self._left.get(who, (float(self._per_minute), now))
        left = min(float(self._per_minute), left + (now - since) * self._per_minute / 60)
        if left < 1:
            self._left[who] = left, now
            wait_s = max(1, math.ceil((1 - left) * 60 / self._per_minute))
            raise ApiError(
                429,
                f"more than {self._per_minute} requests a minute: try again in {wait_s} s",
                code="rate_limit_exceeded",
                retry_after_s=wait_s,
            )
        self._left[who] = left - 1, now


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
