"""Recordings decoded apart: what is wrong with one, or what it does to its decoder, is one error and no more."""

from __future__ import annotations

import asyncio
import contextlib
import io
import random
import struct
import threading
import time
from collections.abc import Iterator

import numpy as np
import psutil
import pytest
import serve_toy
import soundfile as sf

from serve_apps.decode_pool import DecodePool, is_audio
from serve_apps.decode_process import read_recording
from serve_apps.schemas import ApiError


@pytest.fixture(scope="module")
def pool() -> Iterator[DecodePool]:
    pool = DecodePool(2, 256, 300.0)
    yield pool
    pool.close()


def refused(pool: DecodePool, data: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        asyncio.run(pool.read(data, "audio 1", 300.0))
    return caught.value


def in_format(name: str, samples: np.ndarray, rate: int = 16_000, subtype: str = "PCM_16") -> bytes:
    file = io.BytesIO()
    sf.write(file, samples, rate, format=name, subtype=subtype)
    return file.getvalue()


def decoders() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if "serve_apps.decode_process" in child.cmdline():
                found.append(child)
    return found


def test_a_recording_is_what_it_is_in_this_process(pool: DecodePool) -> None:
    data = serve_toy.wav(12.5, rate=44_100)
    found, here = asyncio.run(pool.read(data, "audio 1", 300.0)), read_recording(data, "audio 1", 300.0)
    assert np.array_equal(found.windows, here.windows)
    assert (found.duration_s, found.is_cut) == (here.duration_s, False)
    cut = asyncio.run(pool.read(data, "audio 1", 10.0, truncate=True))
    assert (cut.duration_s, cut.is_cut, len(cut.windows)) == (10.0, True, 1)
    assert "more than 300 s of audio" in refused(pool, serve_toy.wav(301, rate=8_000)).message


TONE = 0.5 * np.sin(np.arange(16_000) / 20)


@pytest.mark.parametrize("name", ["WAV", "FLAC", "OGG", "MP3", "RF64", "WAVEX"])
def test_formats_that_are_read(pool: DecodePool, name: str) -> None:
    subtype = {"OGG": "VORBIS", "MP3": "MPEG_LAYER_III"}.get(name, "PCM_16")
    assert asyncio.run(pool.read(in_format(name, TONE, subtype=subtype), "audio 1", 300.0)).duration_s == pytest.approx(
        1.0, abs=0.1
    )


@pytest.mark.parametrize(
    "name", ["AIFF", "AU", "CAF", "W64", "VOC", "IRCAM", "NIST", "PAF", "SVX", "MAT5", "HTK", "AVR"]
)
def test_formats_that_are_not_promised_are_not_parsed(pool: DecodePool, name: str) -> None:
    data = in_format(name, TONE)
    assert "not an audio file this server reads" in refused(pool, data).message
    tagged = b"ID3\x04\0\0\0\0\0\0" + data  # libsndfile looks behind a tag for any of its formats
    assert refused(pool, tagged).status == 400


def test_one_that_needs_too_much_memory_costs_one_request() -> None:
    pool = DecodePool(1, 64, 3600.0)
    long = in_format("FLAC", np.zeros(3500 * 8_000, np.int16), 8_000)
    with pytest.raises(ApiError) as caught:
        asyncio.run(pool.read(long, "audio 1", 3600.0))
    error = caught.value
    assert (error.status, error.code) == (413, "audio_too_large")
    assert "needs more than 64 MiB" in error.message
    assert asyncio.run(pool.read(serve_toy.wav(), "audio 1", 300.0)).duration_s == 1.0
    pool.close()


def test_one_that_takes_too_long_costs_one_request() -> None:
    pool = DecodePool(1, 256, 300.0)
    asyncio.run(pool.read(serve_toy.wav(), "audio 1", 300.0))
    pool._limit_s = 0.001
    error = refused(pool, in_format("FLAC", np.zeros(299 * 192_000, np.int16), 192_000))
    assert (error.status, error.code) == (413, "audio_too_large")
    pool._limit_s = 20.0
    assert asyncio.run(pool.read(serve_toy.wav(), "audio 1", 300.0)).duration_s == 1.0
    pool.close()


def test_a_decoder_that_dies_costs_one_request() -> None:
    pool = DecodePool(1, 256, 300.0)
    before = set(decoders())
    asyncio.run(pool.read(serve_toy.wav(), "audio 1", 300.0))
    (process,) = set(decoders()) - before
    slow = in_format("FLAC", np.zeros(299 * 192_000, np.int16), 192_000)
    killer = threading.Timer(0.1, process.kill)
    killer.start()
    error = refused(pool, slow)
    assert (error.status, "broke down" in error.message) == (400, True)
    assert asyncio.run(pool.read(serve_toy.wav(), "audio 1", 300.0)).duration_s == 1.0
    pool.close()


def test_one_key_s_long_recordings_do_not_hold_up_another(pool: DecodePool) -> None:
    long = in_format("FLAC", np.zeros((30 * 192_000, 8), np.int16), 192_000)

    async def run() -> float:
        flood = [asyncio.create_task(pool.read(long, "audio 1", 300.0, owner=b"a")) for _ in range(4)]
        await asyncio.sleep(0.05)
        flood[0].cancel()  # its process is still at it, so it keeps its place
        since = time.monotonic()
        await pool.read(serve_toy.wav(), "audio 1", 300.0, owner=b"b")
        took_s = time.monotonic() - since
        await asyncio.gather(*flood, return_exceptions=True)
        return took_s / (time.monotonic() - since)

    async def start() -> None:
        await asyncio.gather(*(pool.read(serve_toy.wav(), "audio 1", 300.0, owner=owner) for owner in (b"a", b"b")))

    asyncio.run(start())
    assert asyncio.run(run()) < 0.3
    assert pool._places._taken == {}


def test_decoders_that_are_slow_or_behind_a_tag_are_not_reached(pool: DecodePool) -> None:
    assert refused(pool, in_format("WAV", TONE, 8_000, "G721_32")).code == "invalid_audio"
    tag = b"ID3\x04\x00\x00\x00\x00\x00\x05tagged"[:15]
    assert not is_audio(tag + in_format("AIFF", TONE))
    assert is_audio(tag + tag + in_format("MP3", TONE, subtype="MPEG_LAYER_III"))
    assert is_audio(tag + in_format("FLAC", TONE))


def test_a_decoder_knows_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted")
    monkeypatch.setenv("AF2_API_KEYS", "planted")
    pool, before = DecodePool(1, 256, 300.0), set(decoders())
    asyncio.run(pool.read(serve_toy.wav(), "audio 1", 300.0))
    (process,) = set(decoders()) - before
    assert "planted" not in str(process.environ())
    pool.close()


def mutated(rng: random.Random, seeds: list[bytes]) -> bytes:
    """A file with a few bytes, a length or a stretch changed."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place = rng.randrange(min(len(data), rng.choice((48, 256, len(data)))))
        kind = rng.randrange(5)
        if kind == 0:
            data[place] = rng.randrange(256)
        elif kind == 1:
            data[place : place + 4] = struct.pack("<I", rng.choice((0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)))
        elif kind == 2:
            del data[place : place + rng.randrange(1, 64)]
        elif kind == 3:
            data[place:place] = rng.randbytes(rng.randrange(1, 64))
        else:
            data[place] ^= 1 << rng.randrange(8)
        if not data:
            return b"RIFF"
    return bytes(data)


@pytest.mark.parametrize("count", [2_000, pytest.param(200_000, marks=pytest.mark.slow)])
def test_each_damaged_file_ends_in_an_answer(pool: DecodePool, count: int) -> None:
    """Seeded mutations of all formats: a recording or a 4xx each, in bounded time; memory is back at the end."""
    noise = np.random.default_rng(0).standard_normal(4_000) * 0.1
    names = (("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "IMA_ADPCM"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"))
    seeds = [in_format(name, noise, subtype=subtype) for name, subtype in (*names, ("MP3", "MPEG_LAYER_III"))]
    seeds.append(in_format("OGG", noise, subtype="OPUS"))
    rng, statuses, slowest = random.Random(7), dict.fromkeys((200, 400, 413), 0), 0.0

    async def send_all() -> None:
        nonlocal slowest
        places = asyncio.Semaphore(2)

        async def one(data: bytes) -> None:
            nonlocal slowest
            async with places:
                since, status = time.monotonic(), 200
                try:
                    await pool.read(data, "audio 1", 300.0)
                except ApiError as error:
                    status = error.status
                slowest = max(slowest, time.monotonic() - since)
                statuses[status] += 1

        for _ in range(count // 500):
            await asyncio.gather(*(one(mutated(rng, seeds)) for _ in range(500)))

    asyncio.run(pool.read(serve_toy.wav(), "audio 1", 300.0))
    before = psutil.Process().memory_info().rss
    asyncio.run(send_all())
    assert sum(statuses.values()) == count
    assert statuses[200] > count / 100
    assert statuses[400] > count / 10
    assert slowest < 10, "the time limit of a recording is 20 s"
    assert psutil.Process().memory_info().rss - before < 64 * 2**20
