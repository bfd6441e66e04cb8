"""Recordings that mean no good, and what is said of each: how to make it, the status, words of the message.

For a server that takes a minute of audio or less.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable

import numpy as np
import serve_toy
import soundfile as sf


def zip_file() -> bytes:
    """A zip named wav."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("clip.wav", serve_toy.wav())
    return file.getvalue()


def hours_of_silence() -> bytes:
    """Eight hours in less than 100 KB."""
    file = io.BytesIO()
    with sf.SoundFile(file, "w", 1_000, 1, format="FLAC", subtype="PCM_16") as sound:
        for _ in range(8 * 60):
            sound.write(np.zeros(60_000, np.int16))
    assert len(file.getvalue()) < 100_000
    return file.getvalue()


def with_nan() -> bytes:
    """One sample of a second is not a number."""
    samples = np.zeros(16_000, np.float32)
    samples[777] = np.nan
    return serve_toy.encoded(samples, subtype="FLOAT")


RECORDINGS: list[tuple[Callable[[], bytes], int, str]] = [
    (zip_file, 400, "not an audio file"),
    (with_nan, 400, "NaN"),
    (hours_of_silence, 413, "s of audio: send a shorter"),
    (lambda: serve_toy.wav(61, hz=100, rate=1_000), 413, "send a shorter stretch"),
    (lambda: serve_toy.wav()[:20_000], 400, "truncated"),
    (lambda: serve_toy.wav(0.0), 400, "no samples"),
    (lambda: b"", 400, "empty file"),
    (lambda: b"\0" * 1000, 400, "not an audio file"),
    (lambda: serve_toy.wav(100, hz=0.1, rate=1), 400, "sample rate 1 Hz"),
    (lambda: serve_toy.wav(0.01, rate=10_000_000), 400, "sample rate 10000000 Hz"),
    (lambda: serve_toy.encoded(np.zeros((50, 1000))), 400, "1000 channels"),
]
