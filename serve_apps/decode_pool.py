"""Processes that decode recordings for an ingress, each with bounds on its memory and its time.

A process that dies, or takes too long, is replaced by a new one; the recording it had is refused. What it answers is
checked as what a stranger sends, and its environment holds no secrets. It is no prison: it runs as the server's user,
and whoever takes it over can read what that user can, other callers' recordings among them.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, cast

import numpy as np

from af2_ray.audio.windows import WINDOW_SAMPLES, num_windows_for
from serve_apps.admission import Places
from serve_apps.decode_process import NOT_AUDIO, Recording, receive, send
from serve_apps.keys import ANYONE
from serve_apps.schemas import ApiError, bad_audio

logger = logging.getLogger("ray.serve")

DECODE_S = 20.0  # five minutes of FLAC at 192 kHz take one
_KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
_MAGIC = (b"RIFF", b"RF64", b"RIFX", b"fLaC", b"OggS")
_TAGS = 4  # ID3 tags, one after the other
Read = Callable[[bytes, str, float, bool, bytes], Awaitable[Recording]]
"""From bytes, name in errors, seconds left, whether to cut, and owner to a recording; `ApiError` if it is of no use."""


class DecodePool:
    """Decodes recordings, as many at a time as there are processes; these start when they are first needed.

    One owner's take all processes but one at most, so that others' are not behind what takes long.

    Args:
        num: number of processes.
        memory_mib: memory that a process may take beyond what it starts with.
        max_audio_s: seconds of audio that a request may bring.
        limit_s: seconds that a recording may take.
    """

    def __init__(self, num: int, memory_mib: int, max_audio_s: float, limit_s: float = DECODE_S) -> None:
        self._memory_mib, self._max_audio_s, self._limit_s = memory_mib, max_audio_s, limit_s
        self._places = Places(max(1, num - 1))
        self._threads = ThreadPoolExecutor(num, "decode")
        self._own = threading.local()  # each thread has a process

    async def read(
        self, data: bytes, name: str, left_s: float, truncate: bool = False, owner: bytes = ANYONE
    ) -> Recording:
        """A recording, decoded (`decode_process.read_recording`).

        Args:
            owner: who sent it.

        Raises:
            ApiError: 400 a file that cannot be used, 413 one that is too long or takes too much memory or time.
        """
        if not is_audio(data):
            raise bad_audio(f"{name}: {NOT_AUDIO}")
        loop, has_begun = asyncio.get_running_loop(), False

        async def decode() -> Recording:
            nonlocal has_begun
            async with self._places.taking(owner.hex(), 1):
                has_begun = True
                return await loop.run_in_executor(self._threads, self._read, data, name, left_s, truncate)

        # A task of its own: who leaves keeps the place while the process is still at it.
        task = asyncio.create_task(decode())
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not has_begun:
                task.cancel()
            raise

    def close(self) -> None:
        """End the threads; their processes end when their input does."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _read(self, data: bytes, name: str, left_s: float, truncate: bool) -> Recording:
        try:
            process = self._process()
        except OSError as error:
            logger.exception("no decoder can be started")
            raise ApiError(503, "no recording can be decoded now: try again", code="unavailable") from error
        is_late = threading.Event()

        def end() -> None:
            is_late.set()
            process.kill()

        timer = threading.Timer(self._limit_s, end)
        timer.start()
        asked = {"name": name, "left_s": left_s, "truncate": truncate, "limit_s": self._max_audio_s}
        max_bytes = 2 * WINDOW_SAMPLES * num_windows_for(self._max_audio_s)
        try:
            send(cast(IO[bytes], process.stdin), asked, data)
            header, payload = receive(cast(IO[bytes], process.stdout), max_bytes)
            return _recording(header, payload)
        except ApiError:
            raise
        except Exception as error:  # whatever it answered that is no answer
            process.kill()
            process.wait()
            logger.warning("a decoder ended over a recording of %d bytes: %r", len(data), error)
            if is_late.is_set():
                message = f"{name}: takes more than {self._limit_s:g} s to decode: send it at a lower rate or shorter"
                raise ApiError(413, message, code="audio_too_large", param="messages") from error
            raise bad_audio(f"{name}: the decoder broke down over this file: send it as plain 16-bit WAV") from error
        finally:
            timer.cancel()

    def _process(self) -> subprocess.Popen[bytes]:
        """This thread's process, a new one if it has none that lives."""
        process: subprocess.Popen[bytes] | None = getattr(self._own, "process", None)
        if process is None or process.poll() is not None:
            self._own.process = process = subprocess.Popen(
                [sys.executable, "-m", "serve_apps.decode_process", str(self._memory_mib)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=_environment(),
            )
        return process


def is_audio(data: bytes) -> bool:
    """Whether a file begins as one of the formats that are decoded, behind ID3 tags if there are any."""
    start = 0
    for _ in range(_TAGS):
        if data[start : start + 3] != b"ID3" or len(data) < start + 10:
            break
        start += 10 + sum((byte & 0x7F) << (7 * place) for place, byte in enumerate(data[start + 9 : start + 5 : -1]))
    begin = data[start : start + 4]
    is_mp3 = len(begin) == 4 and ((begin[0] == 0xFF and begin[1] >= 0xE0) or (start > 0 and not any(begin)))
    return begin in _MAGIC or is_mp3


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    return kept | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}


def _recording(header: dict[str, Any], payload: bytes) -> Recording:
    """What a process answered, if it is an answer; the error it found."""
    if "status" in header:
        status = 413 if header["status"] == 413 else 400
        raise ApiError(status, str(header["message"])[:500], code=str(header["code"])[:40], param="messages")
    duration_s = float(header["duration_s"])
    windows = np.frombuffer(payload, np.int16).reshape(-1, WINDOW_SAMPLES)
    if not math.isfinite(duration_s) or duration_s <= 0 or len(windows) != num_windows_for(duration_s):
        raise ValueError("windows that do not fit their length")
    return Recording(windows, duration_s, bool(header["is_cut"]))
