"""Fourteen kinds of odd file in one row: read where it can be, else left out with its own reason; the rest complete."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf

from af2_ray.audio.decode import AudioError
from af2_ray.audio.hear import Stretch, hear
from af2_ray.audio.windows import WINDOW_SAMPLES
from af2_ray.data.batching import Row
from af2_ray.data.collate import LmCollator
from af2_ray.data.quarantine import Quarantine
from af2_ray.data.samples import Sample

READ = {"wrong extension", "8 channels", "192 kHz"}
REASONS = {
    "empty": "empty file",
    "truncated": "truncated",
    "header only": "no samples",
    "0 Hz": "unreadable",
    "NaN": "not finite",
    "infinite": "not finite",
    "DC only": "constant",
    "silent": "silent",
    "text renamed": "unreadable",
    "huge claim": "truncated",
    "missing": "missing",
}


@pytest.fixture
def files(make_sound: Callable[..., str], tmp_path: Path) -> dict[str, str]:
    flac, wav = Path(make_sound("a.flac", 5.0)).read_bytes(), Path(make_sound("a.wav", 5.0)).read_bytes()
    claim = (2**31 - 5000).to_bytes(4, "little")

    def write(name: str, data: bytes) -> str:
        (tmp_path / name).write_bytes(data)
        return str(tmp_path / name)

    def samples(name: str, value: float, every: int = 1) -> str:
        x = np.full(80_000, 0.1, np.float32)
        x[::every] = value
        sf.write(tmp_path / name, x, 16_000, subtype="FLOAT")
        return str(tmp_path / name)

    return {
        "empty": write("empty.flac", b""),
        "truncated": write("cut.flac", flac[: len(flac) // 2]),
        "header only": write("head.wav", wav[:44]),
        "wrong extension": write("a.txt", flac),
        "0 Hz": write("0hz.wav", wav[:24] + bytes(4) + wav[28:]),
        "8 channels": make_sound("8.wav", 5.0, channels=8),
        "192 kHz": make_sound("192.wav", 5.0, rate=192_000),
        "NaN": samples("nan.wav", np.nan, 500),
        "infinite": samples("inf.wav", np.inf, 500),
        "DC only": samples("dc.wav", 0.25),
        "silent": make_sound("silent.flac", 5.0, peak=0.0),
        "text renamed": write("words.wav", b"these are words, not samples\n" * 100),
        "huge claim": write("huge.wav", wav[:4] + claim + wav[8:40] + claim + wav[44 : len(wav) // 2]),
        "missing": str(tmp_path / "none.flac"),
    }


def test_each_is_read_or_named(
    files: dict[str, str], make_sound: Callable[..., str], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    assert len(files) == 14
    files |= {"good": make_sound("good.flac", 5.0)}
    clips = tuple((Sample(kind, uri, 0.0, 5.0, "which?", "bell", "AQA", "d"),) for kind, uri in files.items())
    batch = LmCollator(tiny_tokenizer, max_windows=1)(Row(3, clips))
    assert set(batch.sample_ids) == READ | {"good"}
    kinds = {uri: kind for kind, uri in files.items()}
    assert {kinds[failure.uri]: failure.reason for failure in batch.failures} == REASONS
    good = batch.waveforms[batch.sample_ids.index("good")]
    for kind in ("wrong extension", "8 channels"):
        np.testing.assert_allclose(batch.waveforms[batch.sample_ids.index(kind)], good, atol=8)  # the peak is 16 bits
    assert len(batch.input_ids) == len(batch.waveforms) == 4
    quarantine = Quarantine(str(tmp_path / "run" / "quarantine.jsonl"), 1.0)
    quarantine.add(batch.failures, batch.num_clips)
    assert sum(quarantine.reasons.values()) == 11


def test_silence_is_heard_where_it_is_allowed(files: dict[str, str]) -> None:
    for kind in ("silent", "DC only"):
        stretch = Stretch(files[kind], 0.0, 5.0)
        with pytest.raises(AudioError):
            hear(stretch, 1)
        assert hear(stretch, 1, allow_silent=True).shape == (1, WINDOW_SAMPLES)
    assert not hear(Stretch(files["silent"], 0.0, 5.0), 1, allow_silent=True).any()
