"""Recordings and requests that mean no good.

For a server that takes a minute of audio or less, and fetches recordings from any public host.
"""

from __future__ import annotations

import base64
import io
import json
import zipfile
from collections.abc import Callable
from typing import Any

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


# How to make a recording, the status, words of the message.
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

LINKS = [
    "https://127.0.0.1/a.wav",
    "https://2130706433/a.wav",  # the same, written as one number
    "https://0x7f.1/a.wav",
    "https://[::ffff:10.0.0.1]/a.wav",
    "https://169.254.169.254/latest/meta-data",
    "https://localhost/a.wav",
    "https://user:word@127.0.0.1/a.wav",
    "https://example.org/a.wav\r\nHost: inside",
    "http://example.org/a.wav",
    "file:///etc/passwd",
    "s3://private/a.wav",
    "gopher://127.0.0.1:6379/_INFO",
]


def bodies(model: str) -> list[bytes]:
    """Requests each of which deserves a 4xx: the recordings above, addresses that lead inside, and broken bodies."""

    def asked(part: dict[str, Any]) -> dict[str, Any]:
        return {"model": model, "messages": [{"role": "user", "content": [part, {"type": "text", "text": "what?"}]}]}

    whole = base64.b64encode(serve_toy.wav()).decode()
    made = [serve_toy.chat(make(), model=model) for make, _, _ in RECORDINGS]
    made += [asked({"type": "audio_url", "audio_url": {"url": url}}) for url in LINKS]
    made += [
        asked({"type": "input_audio", "input_audio": {"data": data, "format": "wav"}})
        for data in (whole[:-3], "not base64!", "")
    ]
    made += [
        serve_toy.chat(text="x" * 10**6, model=model),
        serve_toy.chat(text="<audio><SEP>", model=model),
        serve_toy.chat(*[serve_toy.wav(0.1)] * 9, model=model),
        serve_toy.chat(b"x", model="../../etc/passwd"),
        serve_toy.chat(model=model, n=10**9),
        serve_toy.chat(model=model, max_tokens=10**9),
        serve_toy.chat(model=model, stop=["x"] * 10**4),
    ]
    broken = [b"", b"[" * 100_000, b"\xff\xfe", b'{"model": NaN}']
    return [json.dumps(each).encode() for each in made] + broken
