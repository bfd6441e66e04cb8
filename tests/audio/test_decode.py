"""Decoding: right where a file can be read, one short reason where it cannot."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import soxr

from af2_ray.audio.decode import SAMPLE_RATE, AudioError, decode, decode_bytes, probe


def reason_of(uri: str, *args: float, **options: object) -> str:
    with pytest.raises(AudioError) as caught:
        decode(uri, *args, **options)  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"{uri}: {caught.value.reason}")
    return caught.value.reason


@pytest.mark.parametrize("suffix", ["flac", "wav", "ogg", "mp3", "aiff"])
def test_formats(make_sound: Callable[..., str], suffix: str) -> None:
    mono = decode(make_sound(f"clip.{suffix}", 2.0))
    assert mono.dtype == np.float32
    assert mono.shape == (2 * SAMPLE_RATE,)
    assert 0.4 < np.abs(mono).max() < 0.6


@pytest.mark.parametrize(("rate", "channels"), [(8_000, 1), (44_100, 2), (48_000, 8), (192_000, 1)])
def test_rates_and_channels(make_sound: Callable[..., str], rate: int, channels: int) -> None:
    path = make_sound("clip.wav", 1.5, rate=rate, channels=channels)
    first = decode(path)
    assert abs(len(first) - 1.5 * SAMPLE_RATE) <= 1
    spectrum = np.abs(np.fft.rfft(first))
    assert abs(spectrum.argmax() / 1.5 - 440) < 1
    assert 0.4 < np.abs(first).max() < 0.6


@pytest.mark.parametrize(
    ("suffix", "subtype"), [("wav", "PCM_16"), ("flac", "PCM_16"), ("wav", "PCM_24"), ("ogg", None)]
)
def test_samples_are_libsndfile_s_to_the_bit(make_sound: Callable[..., str], suffix: str, subtype: str | None) -> None:
    """In any format, over the borders of blocks: what one whole read as floats, resampled at once, would be."""
    path = make_sound(f"clip.{suffix}", 4.0, rate=44_100, channels=2, peak=0.9, subtype=subtype)
    whole, rate = sf.read(path, dtype="float32")
    np.testing.assert_array_equal(decode(path), soxr.resample(whole[:, 0], rate, SAMPLE_RATE))


def test_a_stretch_is_the_same_as_a_slice(make_sound: Callable[..., str]) -> None:
    path = make_sound("clip.flac", 5.0)
    whole = decode(path)
    part = decode(path, 1.25, 2.0)
    np.testing.assert_array_equal(part, whole[20_000:52_000])
    assert len(decode(path, 4.0, 1.3)) == SAMPLE_RATE  # a little short of what was stated: rounding, codec delay


def test_never_longer_than_asked(make_sound: Callable[..., str]) -> None:
    assert len(decode(make_sound("clip.wav", 10.2, rate=44_100), 0.0, 10.00001)) == 160_000


def test_bytes_uris_and_wrong_suffix(make_sound: Callable[..., str], tmp_path: Path) -> None:
    path = make_sound("clip.flac")
    np.testing.assert_array_equal(decode_bytes(Path(path).read_bytes()), decode(f"file://{path}"))
    renamed = tmp_path / "clip.raw"
    renamed.write_bytes(Path(path).read_bytes())
    np.testing.assert_array_equal(decode(str(renamed)), decode(path))
    assert probe(path) == 1.0


def test_remote_small_and_large(make_sound: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    path = make_sound("clip.flac", 30.0)
    fsspec.filesystem("memory").pipe_file("/bucket/clip.flac", Path(path).read_bytes())
    expected = decode(path, 20.0, 3.0)
    np.testing.assert_array_equal(decode("memory://bucket/clip.flac", 20.0, 3.0), expected)
    monkeypatch.setattr("af2_ray.audio.decode._WHOLE_BYTES", 1000)  # by ranged reads
    np.testing.assert_array_equal(decode("memory://bucket/clip.flac", 20.0, 3.0), expected)
    assert reason_of("memory://bucket/other.flac") == "missing"


def test_unusable_files(make_sound: Callable[..., str], tmp_path: Path) -> None:
    good = Path(make_sound("good.flac", 5.0)).read_bytes()
    wav = Path(make_sound("good.wav", 5.0)).read_bytes()

    def write(name: str, data: bytes) -> str:
        (tmp_path / name).write_bytes(data)
        return str(tmp_path / name)

    assert reason_of(str(tmp_path / "none.flac")) == "missing"
    assert reason_of(str(tmp_path)) == "unreadable"
    assert reason_of(write("empty.flac", b"")) == "empty file"
    assert reason_of(write("text.wav", b"these are words, not samples\n" * 100)) == "unreadable"
    assert reason_of(write("head.flac", good[:86])) == "no samples"
    assert reason_of(write("head.wav", wav[:44])) == "no samples"
    assert reason_of(write("cut.flac", good[: len(good) // 2])) == "truncated"
    assert reason_of(write("cut.wav", wav[: len(wav) // 2])) == "truncated"
    assert reason_of(write("0hz.wav", wav[:24] + bytes(4) + wav[28:])) == "unreadable"
    huge = wav[:4] + (2**31 - 5000).to_bytes(4, "little") + wav[8:40] + (2**31 - 5044).to_bytes(4, "little") + wav[44:]
    assert reason_of(write("huge.wav", huge)) == "truncated"


def test_a_cut_file_serves_what_it_still_has(make_sound: Callable[..., str], tmp_path: Path) -> None:
    path = make_sound("good.wav", 5.0)
    data = Path(path).read_bytes()
    (tmp_path / "cut.wav").write_bytes(data[: len(data) // 2])
    np.testing.assert_array_equal(decode(str(tmp_path / "cut.wav"), 0.0, 2.0), decode(path, 0.0, 2.0))
    assert reason_of(str(tmp_path / "cut.wav"), 0.0, 5.0) == "truncated"


def test_unusable_samples(make_sound: Callable[..., str], tmp_path: Path) -> None:
    for name, value in (("nan", np.nan), ("inf", np.inf)):
        x = np.full(SAMPLE_RATE, 0.1, np.float32)
        x[500] = value
        sf.write(tmp_path / f"{name}.wav", x, SAMPLE_RATE, subtype="FLOAT")
        assert reason_of(str(tmp_path / f"{name}.wav")) == "not finite"
    silent, constant = make_sound("silent.flac", peak=0.0), str(tmp_path / "dc.flac")
    sf.write(constant, np.full(SAMPLE_RATE, 0.25), SAMPLE_RATE)
    assert reason_of(silent, allow_silent=False) == "silent"
    assert reason_of(constant, allow_silent=False) == "constant"
    assert not decode(silent).any()
    assert decode(constant).std() < 1e-6


def test_stretches_and_limits(make_sound: Callable[..., str]) -> None:
    path = make_sound("clip.flac", 2.0)
    assert reason_of(path, 0.0, 0.0) == "zero duration"
    assert reason_of(path, 0.0, float("nan")) == "zero duration"
    assert reason_of(path, 2.0) == "starts past the end"
    assert reason_of(path, -1.0) == "starts past the end"
    assert reason_of(path, 0.0, 4.0) == "truncated"
    assert reason_of(path, max_duration_s=1.0) == "too long"
    assert reason_of(path, max_bytes=100) == "too large"


def test_errors_travel(tmp_path: Path) -> None:
    error = copy.copy(AudioError("a.flac", "truncated", "1 s of 2 s"))  # by pickle's protocol, as Ray does
    assert (error.uri, error.reason, error.detail) == ("a.flac", "truncated", "1 s of 2 s")
