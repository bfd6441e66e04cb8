"""A process that decodes recordings, apart from the server that holds everybody's requests.

    python -m serve_apps.decode_process MIB

It reads recordings from standard input and writes windows or errors to standard output until its input ends. libsndfile
parses what strangers send: should a file bring it down, or make it take all memory, one request fails and no other is
touched. The price is a copy of each recording and of its windows through a pipe: 6 ms for five minutes.

A message is the length of its JSON header (4 bytes), the header, and the `size` bytes that the header names.
"""

from __future__ import annotations

import io
import json
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import soundfile as sf
from numpy.typing import NDArray

from af2_ray.audio.decode import AudioError, decode_bytes
from af2_ray.audio.windows import SAMPLE_RATE, to_windows
from serve_apps.schemas import ApiError, bad_audio

FORMATS = {"WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3"}  # libsndfile reads twenty more, seldom used and seldom tested
SUBTYPES = {
    *("PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW", "IMA_ADPCM", "MS_ADPCM"),
    *("VORBIS", "OPUS", "MPEG_LAYER_I", "MPEG_LAYER_II", "MPEG_LAYER_III"),
}  # WAV has others, whose decoders take ten times as long
RATES_HZ = (1_000, 192_000)
MAX_CHANNELS = 8
NOT_AUDIO = "not an audio file this server reads (wav, flac, ogg, mp3)"
_CPU_S = 60  # for one recording; the server ends it before
MAX_HEADER_BYTES = 2**16


@dataclass(frozen=True)
class Recording:
    """A recording as the model hears it.

    Attributes:
        windows: int16 [W, 160000] (`audio.windows.to_windows`).
        duration_s: length in seconds.
        is_cut: whether only its beginning is here.
    """

    windows: NDArray[np.int16]
    duration_s: float
    is_cut: bool


def read_recording(data: bytes, name: str, left_s: float, *, truncate: bool = False, limit_s: float = 0.0) -> Recording:
    """Check and decode a recording, or its beginning where that is asked for.

    Args:
        data: bytes of a whole WAV, FLAC, OGG or MP3 file; its content decides which.
        name: what the recording is called in errors.
        left_s: seconds that the request may still bring.
        truncate: whether a longer one is cut there.
        limit_s: seconds that a request may bring in all, for the error.

    Raises:
        ApiError: 400 a file that cannot be used, 413 a recording that is too long.
    """
    _check_header(data, name)
    try:
        mono, is_cut = decode_bytes(data, name=name, max_duration_s=left_s), False
    except AudioError as error:
        if error.reason != "too long":
            raise bad_audio(str(error)) from error
        if not truncate or left_s < 1:
            raise ApiError(
                413,
                f"{name}: the request has more than {limit_s:g} s of audio: send a shorter stretch, or "
                "truncate_audio: true to have its beginning heard",
                code="audio_too_long",
                param="messages",
            ) from error
        mono, is_cut = _beginning(data, name, left_s), True
    return Recording(to_windows(mono), len(mono) / SAMPLE_RATE, is_cut)


def _check_header(data: bytes, name: str) -> None:
    """Refuse a file whose header alone shows that it is none, or absurd."""
    try:
        header = sf.info(io.BytesIO(data))
    except (sf.LibsndfileError, RuntimeError) as error:
        raise bad_audio(f"{name}: {NOT_AUDIO}") from error
    if header.format not in FORMATS or header.subtype not in SUBTYPES:
        raise bad_audio(f"{name}: {NOT_AUDIO}")
    if not RATES_HZ[0] <= header.samplerate <= RATES_HZ[1]:
        raise bad_audio(f"{name}: sample rate {header.samplerate} Hz; send {RATES_HZ[0]} to {RATES_HZ[1]} Hz")
    if header.channels > MAX_CHANNELS:
        raise bad_audio(f"{name}: {header.channels} channels; send at most {MAX_CHANNELS}")


def _beginning(data: bytes, name: str, duration_s: float) -> NDArray[np.float32]:
    try:
        return decode_bytes(data, 0.0, duration_s, name=name)
    except AudioError as error:
        raise bad_audio(str(error)) from error


# --- Messages ----------------------------------------------------------------------------------------------------


def send(stream: IO[bytes], header: dict[str, Any], payload: bytes = b"") -> None:
    """Write one message."""
    text = json.dumps(header | {"size": len(payload)}).encode()
    stream.write(len(text).to_bytes(4, "big") + text)
    stream.write(payload)
    stream.flush()


def receive(stream: IO[bytes], max_bytes: int) -> tuple[dict[str, Any], bytes]:
    """Read one message.

    Raises:
        EOFError: the other side has ended.
        ValueError: no message, or one of more than `max_bytes`.
    """
    size = int.from_bytes(_exactly(stream, 4), "big")
    if size > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {size} bytes")
    header = json.loads(_exactly(stream, size))
    if not isinstance(header, dict) or not isinstance(header.get("size"), int) or not 0 <= header["size"] <= max_bytes:
        raise ValueError("a header without a size, or with one that is too large")
    return header, _exactly(stream, header["size"])


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError("the other side has ended")
    return data


def _limit_cpu() -> None:
    """End this process if it goes on for long after whoever would have ended it has gone."""
    used, (_, most) = resource.getrusage(resource.RUSAGE_SELF), resource.getrlimit(resource.RLIMIT_CPU)
    limit_s = int(used.ru_utime + used.ru_stime) + _CPU_S
    if most == resource.RLIM_INFINITY or limit_s < most:  # else it is bounded already
        resource.setrlimit(resource.RLIMIT_CPU, (limit_s, most))


def main(memory_mib: int) -> None:
    """Answer until the input ends; beyond `memory_mib` of further memory a recording is refused."""
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    there = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (there + memory_mib * 2**20,) * 2)
    while True:
        try:
            asked, data = receive(source, sys.maxsize)
        except EOFError:
            return
        _limit_cpu()
        try:
            found = read_recording(
                data, asked["name"], asked["left_s"], truncate=asked["truncate"], limit_s=asked["limit_s"]
            )
        except ApiError as error:
            send(sink, {"status": error.status, "message": error.message, "code": error.code})
        except MemoryError:
            message = f"{asked['name']}: needs more than {memory_mib} MiB to be decoded: send it at a lower rate"
            send(sink, {"status": 413, "message": message, "code": "audio_too_large"})
        else:
            send(sink, {"duration_s": found.duration_s, "is_cut": found.is_cut}, found.windows.tobytes())
        del data


if __name__ == "__main__":
    main(int(sys.argv[1]))
