"""Source clips: short labelled recordings, curated, grouped with their near-duplicates, split into train, val, test.

What a model is tested on it must never have heard, so the unit of the split is the GROUP: everything cut from one file,
every rendering of one sound-font program, one speaker's words, and whatever the spectral fingerprint finds to be the
same recording re-encoded, trimmed or pitch-shifted. A recording found in two classes is kept in one.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from af2_ray.audio.windows import SAMPLE_RATE

log = logging.getLogger(__name__)

Wave = NDArray[np.float32]
MIN_S, MAX_S = 0.05, 1.8
MAX_PIECES = 4  # pieces cut from one file
LEVEL = 0.1  # RMS of a clip's loudest 0.1 s
FRAME = SAMPLE_RATE // 100
MIN_CLASSES = 6
MAX_CLIPS = 60  # of one class


@dataclass(frozen=True)
class Clip:
    """One source clip: an atomic sound (no silence longer than 0.2 s inside), RMS `LEVEL` in its loudest 0.1 s.

    Or a bed that scenes lie over, RMS `LEVEL`: its label (noise, ambience, music) decides how loud and under what.
    """

    id: str
    label: str
    package: str
    file: str
    licence: str
    wave: Wave = field(repr=False, compare=False)
    split: str = ""
    group: str = ""
    rms_db: float | None = None  # not of beds
    centroid_hz: float | None = None

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return len(self.wave) / SAMPLE_RATE


# --- Cutting and measuring ---------------------------------------------------------------------------------------


def frame_rms(wave: Wave) -> NDArray[np.float64]:
    """RMS of each 10 ms."""
    num = max(1, len(wave) // FRAME)
    padded = np.zeros(num * FRAME)
    padded[: min(len(wave), num * FRAME)] = wave[: num * FRAME]
    return np.sqrt((padded.reshape(num, FRAME) ** 2).mean(1))


def loudness(wave: Wave) -> float:
    """RMS of the loudest 0.1 s: how loud a short sound seems, whatever silence follows it."""
    power = frame_rms(wave) ** 2
    return float(np.sqrt(np.convolve(power, np.full(10, 0.1))[: len(power)].max()))


def pieces(wave: Wave, *, max_pieces: int = MAX_PIECES) -> list[Wave]:
    """Cut a recording at its silences (32 dB under its peak, 0.2 s or longer) into atomic sounds.

    A piece is at most `MAX_S` long; a long steady recording gives several excerpts. Silent or broken input gives none.
    """
    if not len(wave) or not np.isfinite(wave).all():
        return []
    levels = frame_rms(wave)
    if levels.max() < 10 ** (-55 / 20):
        return []
    active = np.flatnonzero(levels > levels.max() * 10 ** (-32 / 20))
    runs = np.split(active, np.flatnonzero(np.diff(active) > 20) + 1)
    out: list[Wave] = []
    for run in runs:
        first, last = run[0], run[-1] + 1
        if levels[first:last].max() < levels.max() * 10 ** (-18 / 20):
            continue
        step = int(MAX_S * 100)
        for start in range(first, last, step):
            stop = min(start + step, last)
            if start > first and stop - start < step // 2:
                break
            piece = wave[max(0, start - 1) * FRAME : (stop + 2) * FRAME].copy()
            if len(piece) >= MIN_S * SAMPLE_RATE:
                out.append(_faded(piece, cut=start > first, cut_end=stop < last))
    keep = np.linspace(0, len(out) - 1, min(max_pieces, len(out))).round().astype(int)
    return [out[index] for index in keep]


def _faded(piece: Wave, *, cut: bool, cut_end: bool) -> Wave:
    """Fade the ends: a few milliseconds at an end of its own, longer where the recording goes on."""
    ramp_in, ramp_out = (
        min(len(piece) // 4, int(s * SAMPLE_RATE)) for s in (0.03 if cut else 0.002, 0.12 if cut_end else 0.01)
    )
    piece[:ramp_in] *= np.linspace(0, 1, ramp_in, dtype=np.float32)
    piece[len(piece) - ramp_out :] *= np.linspace(1, 0, ramp_out, dtype=np.float32)
    return piece


def make_clip(label: str, package: str, file: str, licence: str, wave: Wave, group: str) -> Clip:
    """Measure a piece and bring it to level."""
    level = loudness(wave)
    power = np.abs(np.fft.rfft(wave)) ** 2
    centroid = float((power * np.fft.rfftfreq(len(wave), 1 / SAMPLE_RATE)).sum() / power.sum())
    rms_db = 20 * float(np.log10(np.sqrt((wave.astype(np.float64) ** 2).mean())))
    scaled = np.asarray(wave * (LEVEL / level), np.float32)
    digest = hashlib.sha256(scaled.tobytes()).hexdigest()[:12]
    return Clip(digest, label, package, file, licence, scaled, "", group, round(rms_db, 2), round(centroid, 1))


# --- Near-duplicates ---------------------------------------------------------------------------------------------

BANDS_PER_OCTAVE, NUM_BANDS, NUM_FRAMES = 12, 84, 16
MAX_SHIFT = 4  # semitones
DUPLICATE = 0.985
_FFT, _HOP = 2048, int(0.04 * SAMPLE_RATE)


def _bands() -> NDArray[np.float64]:
    """Matrix [bins, NUM_BANDS] from a power spectrum to its semitones above 60 Hz, narrower than a bin where low."""
    edges = 60 * 2 ** (np.arange(NUM_BANDS + 1) / BANDS_PER_OCTAVE) * _FFT / SAMPLE_RATE
    steps = np.vstack([np.zeros(_FFT // 2 + 1), np.tril(np.ones((_FFT // 2 + 1, _FFT // 2 + 1)))])  # running sums
    low = np.minimum(edges.astype(int), _FFT // 2)
    at_edge = steps[low] + (edges - low)[:, None] * (steps[low + 1] - steps[low])
    return np.asarray(np.diff(at_edge, axis=0).T)


_BANDS = _bands()


def fingerprint(wave: Wave, speed: float = 1.0) -> NDArray[np.float32]:
    """Log-frequency picture [NUM_FRAMES, NUM_BANDS] of the first 0.64 s.

    A pitch shift moves it sideways; `speed` takes frames that much farther apart, as a pitch-shifted copy has them.
    """
    starts = np.round(np.arange(NUM_FRAMES) * _HOP * speed).astype(int)
    num = int(starts[-1]) + 1024
    padded = np.pad(wave[:num], (0, max(0, num - len(wave))))
    frames = padded[starts[:, None] + np.arange(1024)] * np.hanning(1024)
    banded = np.abs(np.fft.rfft(frames, _FFT)) ** 2 @ _BANDS
    picture = 10 * np.log10(banded + banded.max() * 1e-5 + 1e-20)
    return np.asarray(picture - picture.max() + 50, np.float32)


def near_duplicates(clips: Sequence[Clip], threshold: float = DUPLICATE) -> list[tuple[int, int]]:
    """Index pairs of clips that are the same recording (re-encoded, trimmed at the end, or pitch-shifted)."""
    best = np.full((len(clips), len(clips)), -1.0, np.float32)
    plain = np.stack([fingerprint(clip.wave) for clip in clips])
    for shift in range(MAX_SHIFT + 1):
        speed = 2 ** (shift / BANDS_PER_OCTAVE)
        lower = plain if shift == 0 else np.stack([fingerprint(clip.wave, speed) for clip in clips])
        likeness = _unit(lower[:, :, : NUM_BANDS - shift]) @ _unit(plain[:, :, shift:]).T
        best = np.maximum(best, np.maximum(likeness, likeness.T))
    return [(int(i), int(j)) for i, j in zip(*np.nonzero(np.triu(best > threshold, 1)), strict=True)]


def _unit(pictures: NDArray[np.float32]) -> NDArray[np.float32]:
    """Flatten each picture to a vector of mean 0 and length 1."""
    flat = pictures.reshape(len(pictures), -1)
    flat = flat - flat.mean(1, keepdims=True)
    return np.asarray(flat / (np.linalg.norm(flat, axis=1, keepdims=True) + 1e-9), np.float32)


def grouped(clips: Sequence[Clip]) -> list[Clip]:
    """Merge the groups of near-duplicates, and drop clips that are equal to the sample.

    A recording found in two classes stays in the class that comes first.
    """
    unique: dict[str, Clip] = {}
    for clip in clips:
        unique.setdefault(clip.id, clip)
    kept = list(unique.values())
    parent = {clip.group: clip.group for clip in kept}

    def root(group: str) -> str:
        while parent[group] != group:
            group = parent[group]
        return group

    drop: set[int] = set()
    for i, j in near_duplicates(kept):
        if kept[i].package == kept[j].package == "rendered":
            continue  # of one formula, so alike by nature; their parameters differ
        if kept[i].label != kept[j].label:
            drop.add(j)
        else:
            parent[max(root(kept[i].group), root(kept[j].group))] = min(root(kept[i].group), root(kept[j].group))
    return [replace(clip, group=root(clip.group)) for index, clip in enumerate(kept) if index not in drop]


# --- Splitting ---------------------------------------------------------------------------------------------------

SHARES = {"train": 0.6, "val": 0.1, "test": 0.3}


def assign_splits(sizes: dict[str, int], rng: np.random.Generator) -> dict[str, str]:
    """Group -> split: about 60 / 10 / 30 by size, every split with at least one group; there are 3 groups or more."""
    order = sorted(sizes)
    rng.shuffle(order)
    splits = dict(zip(order, ("train", "test", "val"), strict=False))
    total = sum(sizes.values())
    for group in order[3:]:
        filled = {split: sum(sizes[g] for g, s in splits.items() if s == split) / total for split in SHARES}
        splits[group] = max(SHARES, key=lambda split: SHARES[split] - filled[split])
    return splits


def split_clips(clips: Sequence[Clip], num_classes: int, min_clips: int, seed: int) -> list[Clip]:
    """Take the first `num_classes` classes with `min_clips` groups or more, thin them out, split them by group.

    Raises:
        ValueError: too few classes are left to ask questions with.
    """
    by_label: dict[str, list[Clip]] = defaultdict(list)
    for clip in clips:
        by_label[clip.label].append(clip)
    out: list[Clip] = []
    taken = 0
    for label, members in by_label.items():
        num_groups = len({clip.group for clip in members})
        if num_groups < max(3, min_clips):
            log.info("class %r left out: %d distinct recordings, %d are needed", label, num_groups, min_clips)
            continue
        if taken == num_classes:
            break
        taken += 1
        rng = np.random.default_rng([seed, *label.encode()])
        members = _thinned(members, rng)
        splits = assign_splits(Counter(clip.group for clip in members), rng)
        out += [replace(clip, split=splits[clip.group]) for clip in members]
    if taken < MIN_CLASSES:
        raise ValueError(
            f"only {taken} classes have {min_clips} distinct recordings (needed: {MIN_CLASSES}, so that a question has "
            "options that are not heard); lower corpus.min_clips or add recordings"
        )
    return out


def _thinned(members: Sequence[Clip], rng: np.random.Generator) -> list[Clip]:
    """At most `MAX_CLIPS` of a class, taken from its groups in turn."""
    by_group: dict[str, list[Clip]] = defaultdict(list)
    for clip in sorted(members, key=lambda clip: clip.id):
        by_group[clip.group].append(clip)
    queues = [by_group[group] for group in sorted(by_group)]
    rng.shuffle(queues)
    for queue in queues:
        rng.shuffle(queue)
    out: list[Clip] = []
    while len(out) < min(MAX_CLIPS, len(members)):
        out += [queue.pop() for queue in queues if queue][: MAX_CLIPS - len(out)]
    return out
