"""The sounds that scenes are mixed from, in one memory-mapped file that all processes share.

Training clips lie there several times, augmented (pitch, EQ, noise): a variant costs disk once instead of time in
every scene. Held-out clips lie there once, untouched. int16 with a gain of its own each, so that soft tails survive.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import soxr
from numpy.typing import NDArray

from af2_ray.audio.augment import EQ_KNOTS_HZ, equalised
from af2_ray.audio.windows import SAMPLE_RATE
from af2_ray.synth.sounds.catalogue import SoundClass
from af2_ray.synth.sounds.curate import LEVEL, Clip, Wave, loudness

NUM_VARIANTS = 8  # augmented copies of a training clip
CLIPS_OF = {"seen": "train"}  # split of scenes whose clips are another split's: new scenes of training clips


@dataclass(frozen=True)
class Entry:
    """One stored sound: where it lies in the file and what to multiply it with."""

    id: str
    label: str  # of a bed: its kind
    split: str
    start: int
    length: int
    gain: float


def augmented(wave: Wave, rng: np.random.Generator) -> Wave:
    """A clip that could have been another recording: pitch (and length) +-3 semitones, EQ +-8 dB, a little noise."""
    factor = 2 ** (rng.uniform(-3, 3) / 12)
    shifted = soxr.resample(wave, SAMPLE_RATE, SAMPLE_RATE / factor, quality="LQ")
    shaped = equalised(shifted, rng.uniform(-8, 8, len(EQ_KNOTS_HZ)))
    noise = rng.standard_normal(len(shaped)) * loudness(shaped.astype(np.float32)) * 10 ** (rng.uniform(-50, -30) / 20)
    out = shaped + noise * np.minimum(1, np.arange(len(shaped), 0, -1) / (0.02 * SAMPLE_RATE))
    return np.asarray(out * (LEVEL / loudness(out.astype(np.float32))), np.float32)


class Bank:
    """Stored clips and beds by split; opens quickly, reads on demand."""

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / "bank.json").read_text())
        self.samples: NDArray[np.int16] = np.load(folder / "bank.npy", mmap_mode="r")
        self.musical: dict[str, bool] = index["musical"]
        self.phrases: dict[str, list[str]] = index["phrases"]
        self._clips: dict[tuple[str, str], dict[str, list[Entry]]] = {}
        self._beds: dict[tuple[str, str], list[Entry]] = {}
        for row in index["clips"]:
            entry = Entry(**row)
            self._clips.setdefault((entry.split, entry.label), {}).setdefault(entry.id, []).append(entry)
        for row in index["beds"]:
            entry = Entry(**row)
            self._beds.setdefault((entry.split, entry.label), []).append(entry)

    @property
    def labels(self) -> list[str]:
        """All classes."""
        return list(self.phrases)

    def askable(self, bed_kind: str) -> list[str]:
        """Classes that may be asked about over a bed: none that could be part of its music."""
        return [label for label in self.labels if not (bed_kind == "music" and self.musical[label])]

    def clip(self, split: str, label: str, rng: np.random.Generator) -> Entry:
        """A random clip of a class for the scenes of a split; for those of training, one of its variants."""
        clips = self._clips[CLIPS_OF.get(split, split), label]
        variants = clips[sorted(clips)[int(rng.integers(len(clips)))]]
        return variants[int(rng.integers(len(variants)))] if split == "train" else variants[0]

    def bed(self, split: str, kind: str, rng: np.random.Generator) -> Entry:
        """A random bed of a kind for the scenes of a split; noise where there is none of that kind."""
        split = CLIPS_OF.get(split, split)
        beds = self._beds.get((split, kind)) or self._beds[split, "noise"]
        return beds[int(rng.integers(len(beds)))]

    def read(self, entry: Entry, start: int, length: int) -> Wave:
        """Samples of an entry as float32; a bed is read around its end where `length` runs past it."""
        whole = self.samples[entry.start : entry.start + entry.length]
        part = np.take(whole, np.arange(start, start + length), mode="wrap")
        return part.astype(np.float32) * np.float32(entry.gain)


def write_bank(
    folder: Path, clips: Sequence[Clip], beds: Sequence[Clip], classes: Sequence[SoundClass], seed: int
) -> None:
    """Store clips (training clips with their variants) and beds as `bank.npy` and `bank.json`."""
    rows: list[dict[str, object]] = []
    parts: list[NDArray[np.int16]] = []
    start = 0
    variants = ((clip, wave) for clip in clips for wave in _variants(clip, seed))
    for clip, wave in chain(variants, ((bed, bed.wave) for bed in beds)):
        peak = max(float(np.abs(wave).max()), 1e-6)
        parts.append(np.round(wave * (32767 / peak)).astype(np.int16))
        rows.append(asdict(Entry(clip.id, clip.label, clip.split, start, len(wave), peak / 32767)))
        start += len(wave)
    # replaced, never overwritten: another process may have the old file mapped
    np.save(folder / "bank.part.npy", np.concatenate(parts))
    (folder / "bank.part.npy").replace(folder / "bank.npy")
    index = {
        "clips": rows[: -len(beds)],
        "beds": rows[-len(beds) :],
        "phrases": {each.label: each.phrases for each in classes},
        "musical": {each.label: each.musical for each in classes},
    }
    (folder / "bank.json").write_text(json.dumps(index))


def _variants(clip: Clip, seed: int) -> Iterator[Wave]:
    yield clip.wave
    if clip.split == "train":
        rng = np.random.default_rng([seed, 2, int(clip.id, 16)])
        for _ in range(NUM_VARIANTS):
            yield augmented(clip.wave, rng)
