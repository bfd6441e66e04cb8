"""Cutting, measuring, grouping and splitting of source clips."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile
import soxr
from numpy.typing import NDArray

from af2_ray.synth.sounds.curate import (
    LEVEL,
    Clip,
    assign_splits,
    grouped,
    loudness,
    make_clip,
    near_duplicates,
    pieces,
)
from af2_ray.synth.sounds.packages import read_mono
from af2_ray.synth.sounds.render import render

RATE = 16000


def sound(label: str, seed: int = 0) -> NDArray[np.float32]:
    return render(label, np.random.default_rng(seed))


def clip(wave: NDArray[np.float32], group: str, label: str = "bell", package: str = "test") -> Clip:
    return make_clip(label, package, group, "CC0", np.asarray(wave, np.float32), group)


def encoded(wave: NDArray[np.float32]) -> NDArray[np.float32]:
    """The wave after a trip through Ogg Vorbis."""
    file = io.BytesIO()
    soundfile.write(file, wave, RATE, format="OGG", subtype="VORBIS")
    return read_mono(file.getvalue())


def test_pieces_are_cut_at_silences() -> None:
    hit = sound("xylophone")
    recording = np.concatenate([np.zeros(8000), hit, np.zeros(8000), hit, np.zeros(8000)]).astype(np.float32)
    found = pieces(recording)
    assert len(found) == 2
    assert all(abs(len(piece) - len(hit)) < 3200 for piece in found)


@pytest.mark.parametrize(
    "wave",
    [
        np.zeros(0),
        np.zeros(16000),
        np.full(16000, 1e-5),
        np.full(16000, np.nan),
        np.concatenate([np.ones(200), np.zeros(16000)]),
    ],
    ids=["empty", "silent", "nearly silent", "nan", "too short"],
)
def test_bad_recordings_give_no_piece(wave: NDArray[np.float64]) -> None:
    assert pieces(wave.astype(np.float32)) == []


def test_long_steady_sounds_give_several_excerpts() -> None:
    steady = np.random.default_rng(0).standard_normal(8 * RATE).astype(np.float32) * 0.1
    found = pieces(steady)
    assert len(found) == 4
    assert all(len(piece) <= 1.85 * RATE for piece in found)


def test_clips_are_brought_to_level() -> None:
    for label in ("drum", "organ", "cymbal"):
        assert loudness(clip(0.03 * sound(label), "x").wave) == pytest.approx(LEVEL, rel=1e-3)


@pytest.mark.parametrize("label", ["bell", "trumpet", "snare", "siren", "piano"])
def test_near_duplicates_are_found(label: str) -> None:
    original = sound(label)
    trimmed = original[: int(len(original) * 0.9)]
    shifted = soxr.resample(original, RATE, int(RATE / 2 ** (2 / 12)))
    for changed in (0.5 * original, encoded(original), trimmed, shifted):
        assert near_duplicates([clip(original, "a"), clip(changed, "b")]) == [(0, 1)]


def test_different_sounds_are_no_duplicates() -> None:
    labels = ["bell", "trumpet", "snare", "bird", "piano", "organ", "drum", "violin"]
    assert near_duplicates([clip(sound(label), label) for label in labels]) == []


def test_duplicates_share_a_group_and_have_one_class() -> None:
    bell, copy, other = clip(sound("bell"), "a"), clip(encoded(sound("bell")), "b"), clip(sound("snare"), "c", "snare")
    kept = grouped([bell, copy, other])
    assert [c.group for c in kept] == ["a", "a", "c"]
    stray = clip(encoded(sound("bell")), "d", label="snare")
    assert [c.label for c in grouped([bell, other, stray])] == ["bell", "snare"]
    assert len(grouped([bell, bell])) == 1


@pytest.mark.parametrize("sizes", [[1] * 4, [1] * 30, [50, 1, 1, 1, 1], [6] * 11])
def test_splits_are_filled_by_group(sizes: list[int]) -> None:
    groups = {f"g{index}": size for index, size in enumerate(sizes)}
    splits = assign_splits(groups, np.random.default_rng(0))
    assert set(splits) == set(groups)
    assert set(splits.values()) == {"train", "val", "test"}
    if len(sizes) == 30:
        assert [list(splits.values()).count(split) for split in ("train", "val", "test")] == [18, 3, 9]
