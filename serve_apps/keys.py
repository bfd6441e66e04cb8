"""API keys and how often each may ask.

Keys come from `AF2_API_KEYS` (separated by commas or line breaks) or from the file that `AF2_API_KEYS_FILE` names, as a
mounted secret gives them; both where the application is deployed from and where it runs. A file that is there where the
server runs is looked at again every second, so that a key is added or revoked without a redeployment. Without any keys,
everyone may ask, and the server starts only where none but this machine can reach it (`serve.open`). Keys are kept and
compared as SHA-256, in constant time, against all of them. Rates are counted in each ingress replica for itself: with N
of them a key may ask up to N times as often, the price of no common store to ask at every request.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ray import serve
from ray.serve.exceptions import RayServeException

from serve_apps.schemas import ApiError

logger = logging.getLogger("ray.serve")

ANYONE = b""
_VARIABLE, _FILE_VARIABLE = "AF2_API_KEYS", "AF2_API_KEYS_FILE"
_LOOK_S = 1.0
_OWN_HOSTS = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class KeySource:
    """Where keys come from, and what they are there; picklable, without the keys themselves.

    Attributes:
        digests: SHA-256 of the keys of `AF2_API_KEYS`.
        file: the file that `AF2_API_KEYS_FILE` names; empty: none.
        file_digests: SHA-256 of the keys in it.
    """

    digests: tuple[bytes, ...] = ()
    file: str = ""
    file_digests: tuple[bytes, ...] = ()

    @classmethod
    def of_environment(cls) -> KeySource:
        """The keys of this process' environment.

        Raises:
            ValueError: the file that it names cannot be read, or holds no key: better no server than one that is open
                by mistake; or a key is not ASCII.
        """
        file = os.environ.get(_FILE_VARIABLE, "")
        digests = _digests(os.environ.get(_VARIABLE, ""), _VARIABLE)
        return cls(digests, file, _digests_of_file(Path(file)) if file else ())


class Keys:
    """Who may ask.

    Args:
        sources: where keys come from; without a single key: everyone may.
        per_minute: answers a minute and key, in a burst of as many at most; 0 for any number.
        clock: seconds, monotonic.
    """

    def __init__(
        self, sources: Sequence[KeySource], per_minute: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._digests = {digest for source in sources for digest in source.digests}
        self._files = {source.file: source.file_digests for source in sources if source.file}
        self._seen: dict[str, tuple[int, ...]] = {}  # state of each file when it was read
        self._looked = -math.inf
        self._per_minute, self._clock = per_minute, clock
        self._left: dict[bytes, tuple[float, float]] = {}  # answers left, and when that was

    @property
    def is_open(self) -> bool:
        """Whether everyone may ask."""
        return not self._digests and not self._files

    def check(self, authorization: str | None) -> bytes:
        """Who asks, by an `Authorization: Bearer KEY` header; `ApiError` 401 without a right one."""
        if self.is_open:
            return ANYONE
        self._look()
        kind, _, key = (authorization or "").partition(" ")
        if kind.lower() != "bearer" or not key.strip():
            raise ApiError(401, "no API key: send it as the header `Authorization: Bearer KEY`", code="missing_api_key")
        given, found = _digest(key.strip()), False
        for digest in self._digests.union(*self._files.values()):  # all of them, whichever it is
            found |= hmac.compare_digest(given, digest)
        if not found:
            raise ApiError(401, "this API key is not known here: check it", code="invalid_api_key")
        return given

    def take(self, authorization: str | None) -> bytes:
        """`check`, and count an answer; `ApiError` 429 if the key asks too often."""
        who = self.check(authorization)
        self.count(who, 1)
        return who

    def count(self, who: bytes, num: int) -> None:
        """Count `num` answers; `ApiError` 429 if the key has not so many left, or never will."""
        if not self._per_minute or not num:
            return
        now = self._clock()
        left, since = self._left.get(who, (float(self._per_minute), now))
        left = min(float(self._per_minute), left + (now - since) * self._per_minute / 60)
        if left < num:
            self._left[who] = left, now
            wait_s = max(1, math.ceil((num - left) * 60 / self._per_minute))
            raise ApiError(
                429,
                f"more than {self._per_minute} answers a minute: try again in {wait_s} s",
                code="rate_limit_exceeded",
                retry_after_s=wait_s,
            )
        self._left[who] = left - num, now

    def _look(self) -> None:
        """Read the files that have changed; one that cannot be read leaves the keys as they were."""
        now = self._clock()
        if now - self._looked < _LOOK_S:
            return
        self._looked = now
        for file in self._files:
            try:
                state = os.stat(file)
                seen = (state.st_mtime_ns, state.st_size, state.st_ino)
                if self._seen.get(file) != seen:
                    self._files[file] = _digests_of_file(Path(file))
                    self._seen[file] = seen
            except FileNotFoundError:  # else it is of the machine that deployed the server
                if self._seen.pop(file, None):
                    logger.error("the API keys stay as they were: the file %s is gone", file)
            except (OSError, ValueError) as error:
                logger.error("the API keys stay as they were: %s", error)


def check_open(keys: Keys, *, is_meant: bool) -> None:
    """`ValueError` if everybody could ask a served application, from other machines too, and that is not meant."""
    try:
        serve.get_replica_context()
    except RayServeException:
        return  # not served
    host = str(serve.context._get_global_client().http_config.host)
    if keys.is_open and not is_meant and host not in _OWN_HOSTS:
        raise ValueError(
            f"the server would listen on {host} without API keys: set {_VARIABLE} or {_FILE_VARIABLE}, or say "
            "serve.open=true"
        )


def _digests_of_file(path: Path) -> tuple[bytes, ...]:
    try:
        digests = _digests(path.read_text(), _FILE_VARIABLE)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ValueError(f"{_FILE_VARIABLE} names a file that cannot be read: {reason}") from error
    if not digests:
        raise ValueError(f"{_FILE_VARIABLE} names a file without keys: write one a line")
    return digests


def _digests(text: str, variable: str) -> tuple[bytes, ...]:
    keys = [key for part in text.replace(",", "\n").splitlines() if (key := part.strip())]
    if not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise ValueError(f"{variable}: a key has letters that no header carries: use ASCII letters, digits and signs")
    return tuple(_digest(key) for key in keys)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
