"""From a stretch of a recording to the windows that a model gets: the one place that says how much of a file is heard.

Training, its feature cache, evaluation and batch answers all hear a clip through `hear`: its first `max_windows`
windows of 10 s, a short clip filled up as the model wants it, silence refused where nothing could be learned from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from af2_ray.audio.augment import random_eq, random_noise
from af2_ray.audio.decode import AudioError, decode
from af2_ray.audio.windows import WINDOW_S, ShortClips, num_windows_for, to_windows
from af2_ray.config import Augment

_AS_IT_IS = Augment()


@dataclass(frozen=True, slots=True, order=True)
class Stretch:
    """A part of an audio file, in seconds."""

    uri: str
    offset_s: float
    duration_s: float

    @property
    def id(self) -> str:
        """The stretch, as failures and batches name it."""
        return f"{self.uri}@{self.offset_s:g}" if self.offset_s else self.uri

    def first(self, max_windows: int) -> Stretch:
        """The part that `max_windows` windows hold."""
        return replace(self, duration_s=min(self.duration_s, float(max_windows * WINDOW_S)))

    def num_windows(self, max_windows: int | None = None) -> int:
        """Windows of 10 s that hold it, at most `max_windows`."""
        return num_windows_for(self.duration_s, max_windows)


def hear(
    stretch: Stretch,
    max_windows: int,
    *,
    short_clips: ShortClips = "silence",
    allow_silent: bool = False,
    augment: Augment = _AS_IT_IS,
    seed: Sequence[int] = (0,),
) -> NDArray[np.int16]:
    """Windows int16 [W, 160000] of a stretch; no more of the file is read than they hold.

    Args:
        max_windows: most windows that are read; the rest is not heard, unless `augment` crops elsewhere.
        short_clips: what fills the window of a clip of less than 10 s (`to_windows`).
        allow_silent: whether silence and a constant may be heard.
        augment: changes of the sound, drawn by `seed`; the default: the sound as it is.

    Raises:
        AudioError: the stretch cannot be used; see its reasons.
    """
    rng = np.random.default_rng(seed)
    mono = _cropped(stretch, max_windows, allow_silent, rng) if augment.crop else None
    if mono is None:
        first = stretch.first(max_windows)
        mono = decode(first.uri, first.offset_s, first.duration_s, allow_silent=allow_silent)
    if augment.eq_db:
        mono = random_eq(mono, augment.eq_db, rng)
    if augment.noise_snr_db:
        mono = random_noise(mono, augment.noise_snr_db, rng)
    return to_windows(mono, max_windows, short_clips=short_clips)


def _cropped(
    stretch: Stretch, max_windows: int, allow_silent: bool, rng: np.random.Generator
) -> NDArray[np.float32] | None:
    """A random part as long as the windows; none where there is no choice, or where that part cannot be used."""
    heard_s = float(max_windows * WINDOW_S)
    spare_s = stretch.duration_s - heard_s
    if spare_s <= 0:
        return None
    try:
        return decode(stretch.uri, stretch.offset_s + rng.uniform(0, spare_s), heard_s, allow_silent=allow_silent)
    except AudioError:
        return None  # a part that is silent, or not there, says nothing of the file: its beginning decides
