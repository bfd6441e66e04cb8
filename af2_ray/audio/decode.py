"""Any uri to mono float32 at 16 kHz: soundfile reads, soxr resamples, nothing else is tried.

A file is recognised by its content, never by its name. Only the stretch asked for is read: local files and object-store
objects are seeked, and a small object is fetched in one request. Samples come in blocks of which the first channel is
kept (as in the reference), so eight channels at 192 kHz cost no more memory than one. Whatever is wrong with a file
becomes one `AudioError` with a short stable reason, which is what the run counts and lists.

The trade-off: libsndfile's formats (WAV, FLAC, OGG, Opus, MP3, AIFF ...) and no video containers, for one decoder
without child processes whose failures are all visible here.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, cast

import numpy as np
import soundfile as sf
import soxr
from numpy.typing import NDArray

from af2_ray.audio import shards
from af2_ray.audio.windows import SAMPLE_RATE
from af2_ray.storage.places import READ_S, NameRefused, is_remote, locate, open_local, shown
from af2_ray.storage.stores import Ranges, retried

MAX_BYTES = 4 * 2**30
MAX_DURATION_S = 3600.0

_BLOCK = 2**16  # frames read at a time: a header that claims a day costs nothing, and a block stays in the cache
_WHOLE_BYTES = 8 * 2**20  # a remote object up to this size comes in one request
_RANGE_BYTES = 2**20  # block of a ranged read of a larger one
_INDEX_S = 600.0  # to list a shard of many gigabytes, once
_INT16_STEP = 2.0**-15
_SILENCE = _INT16_STEP  # a smaller peak, or a smaller swing around a constant, carries no sound
_SHORT_SHARE, _SHORT_S = 0.05, 0.5  # a stretch may fall short of its stated length by this much (rounding, codec delay)
_UNKNOWN_FRAMES = 2**40  # libsndfile's frame count for a stream whose header names none is near 2**63


class AudioError(Exception):
    """A stretch of audio that cannot be used.

    Attributes:
        uri: address or path of the file.
        reason: short stable text, for counting: `missing`, `forbidden`, `timed out`, `empty file`, `unreadable`, `no
            samples`, `truncated`, `not finite`, `silent`, `constant`, `zero duration`, `starts past the end`, `too
            long`, `too large`, and those of `storage.NameRefused`.
        detail: the decoder's own message, for people.
    """

    def __init__(self, uri: str, reason: str, detail: str = "") -> None:
        super().__init__(uri, reason, detail)
        self.uri, self.reason, self.detail = uri, reason, detail

    def __str__(self) -> str:
        return f"{shown(self.uri)}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


def decode(
    uri: str,
    offset_s: float = 0.0,
    duration_s: float | None = None,
    *,
    max_bytes: int = MAX_BYTES,
    max_duration_s: float = MAX_DURATION_S,
    allow_silent: bool = True,
) -> NDArray[np.float32]:
    """Read a stretch of an audio file.

    Args:
        uri: local path, or an address of a scheme that is allowed (`storage`), or `shard.tar#member` of these;
            credentials come from the environment.
        offset_s: second at which the stretch begins.
        duration_s: length of the stretch; none: to the end of the file.
        max_bytes: size of the largest file that is read.
        max_duration_s: length of the longest stretch that is read.
        allow_silent: whether silence and a constant may be read; training makes them an `AudioError`.

    Returns:
        float32 [T] at 16 kHz, at most `round(duration_s * 16000)` samples; finite, not scaled.

    Raises:
        AudioError: the stretch cannot be used; see its reasons.
    """
    _check_stretch(uri, offset_s, duration_s)
    with _opened(uri, max_bytes) as file:
        return _read(uri, file, offset_s, duration_s, max_duration_s, allow_silent)


def decode_bytes(
    data: bytes,
    offset_s: float = 0.0,
    duration_s: float | None = None,
    *,
    name: str = "<bytes>",
    max_duration_s: float = MAX_DURATION_S,
    allow_silent: bool = True,
) -> NDArray[np.float32]:
    """Like `decode`, of a file already in memory; `name` stands for its uri in errors."""
    _check_stretch(name, offset_s, duration_s)
    with _sound_file(name, io.BytesIO(data), len(data)) as file:
        return _read(name, file, offset_s, duration_s, max_duration_s, allow_silent)


def probe(uri: str, *, max_bytes: int = MAX_BYTES) -> float:
    """Duration in seconds as the file's header gives it; `AudioError` if it gives none."""
    with _opened(uri, max_bytes) as file:
        if not 0 < file.frames < _UNKNOWN_FRAMES:
            raise AudioError(uri, "no samples", "the header gives no length")
        return float(file.frames / file.samplerate)


def file_size(uri: str) -> int:
    """Bytes of a recording's file, as the file system (or its shard) has it, not read; `AudioError` if it cannot."""
    path = uri.removeprefix("file://")
    with _reasons(uri):
        if split := shards.split_member(path):
            place = retried(lambda: shards.index_of(split[0]), limit_s=_INDEX_S).files.get(split[1])
            if place is None:
                raise FileNotFoundError(path)
            return place.size
        if not is_remote(path):
            with open_local(path) as stream:
                return os.fstat(stream.fileno()).st_size
        fs, where = locate(path)
        return _size_in(retried(lambda: fs.info(where), limit_s=READ_S))


def file_digest(uri: str) -> str:
    """SHA-256 of a recording's file; `AudioError` if it cannot be read."""
    stream, _ = _open(uri, MAX_BYTES)
    with stream:
        with _reasons(uri):
            found = hashlib.file_digest(cast(Any, stream), "sha256").hexdigest()
        if failed := _failed_read(uri, stream):
            raise failed
    return found


def _size_in(info: Mapping[str, Any]) -> int:
    """A file's size, of what its store says of it."""
    if info.get("size") is None:
        raise OSError("its store does not tell its size")
    return int(info["size"])


def _check_stretch(uri: str, offset_s: float, duration_s: float | None) -> None:
    if not (math.isfinite(offset_s) and offset_s >= 0):
        raise AudioError(uri, "starts past the end", f"offset {offset_s} s")
    if duration_s is not None and not (math.isfinite(duration_s) and duration_s > 0):
        raise AudioError(uri, "zero duration", f"duration {duration_s} s")


# --- Opening -----------------------------------------------------------------------------------------------------


@contextmanager
def _opened(uri: str, max_bytes: int) -> Iterator[sf.SoundFile]:
    """Open a uri as a sound file; every failure of the way there is an `AudioError`."""
    stream, size = _open(uri, max_bytes)
    with stream:
        if size > max_bytes:
            raise AudioError(uri, "too large", f"{size} bytes, the limit is {max_bytes}")
        try:
            with _sound_file(uri, stream, size) as file:
                yield file
        except AudioError as error:
            raise _failed_read(uri, stream) or error from error
        if failed := _failed_read(uri, stream):
            raise failed


def _open(uri: str, max_bytes: int) -> tuple[IO[bytes], int]:
    """A uri's file and its size."""
    path = uri.removeprefix("file://")
    with _reasons(uri):
        if is_remote(path) or shards.split_member(path):
            return _open_remote(path, max_bytes)
        stream = open_local(path)
        return stream, os.fstat(stream.fileno()).st_size


@contextmanager
def _reasons(uri: str) -> Iterator[None]:
    """Every failure of the way to a file as an `AudioError` with its reason."""
    try:
        yield
    except NameRefused as error:
        raise AudioError(uri, error.reason, error.detail) from error
    except FileNotFoundError as error:
        raise AudioError(uri, "missing") from error
    except PermissionError as error:
        raise AudioError(uri, "forbidden", str(error)) from error
    except TimeoutError as error:
        raise AudioError(uri, "timed out", str(error)) from error
    except (OSError, ValueError) as error:
        raise AudioError(uri, "unreadable", str(error)) from error
    except MemoryError:
        raise
    except Exception as error:  # a file system of somebody else may raise anything: one file must not end a run
        raise AudioError(uri, "unreadable", f"{type(error).__name__}: {error}") from error


def _failed_read(uri: str, stream: IO[bytes]) -> AudioError | None:
    """Why a remote read failed, which libsndfile does not tell: to it the file has ended."""
    failed = getattr(getattr(stream, "raw", None), "failed", None)
    if failed is None:
        return None
    return AudioError(uri, "timed out" if isinstance(failed, TimeoutError) else "unreadable", str(failed))


def _open_remote(uri: str, max_bytes: int) -> tuple[IO[bytes], int]:
    """Open an object or a shard's file: whole if it is small, else for ranged reads.

    A store's passing fault is tried again, and no request takes longer than `READ_S`.
    """
    whole_bytes = min(_WHOLE_BYTES, max_bytes)
    if split := shards.split_member(uri):
        if not is_remote(uri):
            return shards.open_member(*split, whole_bytes)
        retried(lambda: shards.index_of(split[0]), limit_s=_INDEX_S)
        return retried(lambda: shards.open_member(*split, whole_bytes, READ_S), limit_s=READ_S)
    fs, path = locate(uri)
    info = retried(lambda: fs.info(path), limit_s=READ_S)
    size = _size_in(info)
    if info.get("type") == "directory":
        raise IsADirectoryError(f"{uri} is a folder")
    if size <= whole_bytes:
        return io.BytesIO(retried(lambda: fs.cat_file(path), limit_s=READ_S)), size
    return cast(IO[bytes], io.BufferedReader(Ranges(fs, path, 0, size, READ_S), _RANGE_BYTES)), size


@contextmanager
def _sound_file(uri: str, stream: IO[bytes], size: int) -> Iterator[sf.SoundFile]:
    """Give the stream to libsndfile; a real file by its descriptor, which is faster and hides the file's name."""
    if size == 0:
        raise AudioError(uri, "empty file")
    source: int | IO[bytes]
    try:
        source = os.dup(stream.fileno())
    except OSError:  # not backed by a descriptor (io.UnsupportedOperation is an OSError)
        source = stream
    try:
        file = sf.SoundFile(source, closefd=True)
    except (sf.LibsndfileError, RuntimeError, OSError) as error:
        raise AudioError(uri, "unreadable", _message(error)) from error
    with file:
        yield file


def _message(error: Exception) -> str:
    return getattr(error, "error_string", "") or str(error) or type(error).__name__


# --- Reading -----------------------------------------------------------------------------------------------------


def _read(
    uri: str,
    file: sf.SoundFile,
    offset_s: float,
    duration_s: float | None,
    max_duration_s: float,
    allow_silent: bool,
) -> NDArray[np.float32]:
    """Seek, read block by block, check, resample."""
    rate = file.samplerate
    start = round(offset_s * rate)
    total = file.frames if file.frames < _UNKNOWN_FRAMES else None
    if total == 0:
        raise AudioError(uri, "no samples", "the header counts none")
    if total is not None and start >= total:
        raise AudioError(uri, "starts past the end", f"offset {offset_s} s of {total / rate:.3f} s")
    wanted = round(duration_s * rate) if duration_s is not None else None
    if wanted == 0:
        raise AudioError(uri, "zero duration", f"duration {duration_s} s")
    promised = total - start if total is not None else None
    target = min((n for n in (wanted, promised) if n is not None), default=None)
    limit = round(max_duration_s * rate)
    if target is not None and target > limit:
        raise AudioError(uri, "too long", f"{target / rate:.1f} s, the limit is {max_duration_s} s")

    sound = _blocks(file, start, target if target is not None else limit + 1)
    if sound.num_frames == 0:
        raise AudioError(uri, "no samples", sound.fault)
    if sound.num_frames > limit:
        raise AudioError(uri, "too long", f"the limit is {max_duration_s} s")
    expected = wanted if wanted is not None else target
    if sound.fault or (wanted is None and _is_cut(file)):
        raise AudioError(uri, "truncated", sound.fault or "the file ends before its header says")
    if expected is not None and sound.num_frames < expected - max(_SHORT_SHARE * expected, _SHORT_S * rate):
        raise AudioError(uri, "truncated", f"{sound.num_frames / rate:.3f} s of {expected / rate:.3f} s")
    _check_content(uri, sound, allow_silent)
    mono = sound.mono
    if rate != SAMPLE_RATE and not np.isfinite(mono).all():  # a filter overshoots: the largest floats leave it
        raise AudioError(uri, "not finite", "samples too large to resample")
    if duration_s is not None:
        mono = mono[: max(1, round(duration_s * SAMPLE_RATE))]
    return np.ascontiguousarray(mono, dtype=np.float32)


@dataclass(frozen=True)
class _Sound:
    """What was read of a file.

    Attributes:
        mono: float32 [T] at 16 kHz.
        num_frames: number of frames at the file's own rate.
        low, high: extremes of these.
        fault: the decoder's complaint, if it stopped over one.
    """

    mono: NDArray[np.float32]
    num_frames: int
    low: float
    high: float
    fault: str


def _blocks(file: sf.SoundFile, start: int, num_frames: int) -> _Sound:
    """Read up to `num_frames` of the first channel from `start`, resampled as they come.

    Nothing but one block is held at the file's own rate: five minutes at 192 kHz take 39 MB in place of 440. The
    samples are those of resampling all at once, to the bit.

    16-bit samples are read as they are, and only the channel that is kept is made float, to the same bits: where
    libsndfile converts all of them, a WAV file takes 7 times as long to read.
    """
    parts: list[NDArray[np.float32]] = []
    is_16_bit = file.subtype == "PCM_16"
    block = np.empty((_BLOCK, file.channels), np.int16 if is_16_bit else np.float32)
    filtered = soxr.ResampleStream(file.samplerate, SAMPLE_RATE, 1) if file.samplerate != SAMPLE_RATE else None
    count, low, high, fault = 0, math.inf, -math.inf, ""
    try:
        if start:
            file.seek(start)
        while count < num_frames:
            frames = file.read(out=block[: num_frames - count])
            if len(frames) == 0:
                break
            one = frames[:, 0].astype(np.float32)
            if is_16_bit:
                one *= np.float32(_INT16_STEP)
            count += len(one)
            low, high = np.minimum(low, one.min()), np.maximum(high, one.max())  # NaN stays NaN
            parts.append(filtered.resample_chunk(one) if filtered else one)
    except (sf.LibsndfileError, RuntimeError, OSError) as error:
        fault = _message(error)
        count = count or int(_has_samples(file, start))  # cut within the first block: tell it from a bare header
    if filtered:
        parts.append(filtered.resample_chunk(np.empty(0, np.float32), last=True))
    mono = np.concatenate(parts) if parts else np.empty(0, np.float32)
    return _Sound(mono, count, float(low), float(high), fault)


def _has_samples(file: sf.SoundFile, start: int) -> bool:
    """Whether anything at all can be read at `start`."""
    try:
        file.seek(start)
        return len(file.read(1)) > 0
    except (sf.LibsndfileError, RuntimeError, OSError):
        return False


def _is_cut(file: sf.SoundFile) -> bool:
    """Whether a WAV or AIFF claims more data than it holds: libsndfile reads what is there and tells only its log.

    A claim of all ones is a stream's way of saying that the length was not known.
    """
    return any(int(claim) < 0x7FFFF000 for claim in re.findall(r"(?:data|SSND) : (\d+) \(should be", file.extra_info))


def _check_content(uri: str, sound: _Sound, allow_silent: bool) -> None:
    low, high = sound.low, sound.high
    if not (math.isfinite(low) and math.isfinite(high)):
        raise AudioError(uri, "not finite", "NaN or infinite samples")
    if not allow_silent and max(-low, high) < _SILENCE:
        raise AudioError(uri, "silent")
    if not allow_silent and high - low < _SILENCE:
        raise AudioError(uri, "constant", f"every sample is about {high:.4f}")
