"""From a mono waveform to the model's input: 10 s windows of 16 kHz int16.

The reference rounds every window through int16 (clip, times 32767, truncate toward zero), so int16 is all the model
ever sees: we keep it, at half the bytes of float32, until the mel front end.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

SAMPLE_RATE = 16_000
WINDOW_S = 10
WINDOW_SAMPLES = SAMPLE_RATE * WINDOW_S
INT16_SCALE = 32_767

ShortClips = Literal["silence", "repeat"]


def num_windows(num_samples: int, max_windows: int | None = None) -> int:
    """How many 10 s windows hold `num_samples` samples (at least 1), at most `max_windows`."""
    wanted = max(1, math.ceil(num_samples / WINDOW_SAMPLES))
    return wanted if max_windows is None else min(wanted, max_windows)


def num_windows_for(duration_s: float, max_windows: int | None = None) -> int:
    """`num_windows` of `duration_s` seconds."""
    return num_windows(round(duration_s * SAMPLE_RATE), max_windows)


def peak_normalise(x: NDArray[np.floating]) -> NDArray[np.float64]:
    """Scale `x` [T] so that its largest magnitude is 1, in float64; silence stays silence.

    As in the reference, a waveform that never goes below 0 is stretched to [-1, 1] instead.
    """
    low, high = float(x.min()), float(x.max())
    peak = max(-low, high)
    if peak == 0.0:
        return x.astype(np.float64)
    if low >= 0:
        return 2 * x.astype(np.float64) / high - 1
    return np.divide(x, peak, dtype=np.float64)


def to_windows(
    mono: NDArray[np.floating], max_windows: int | None = None, *, short_clips: ShortClips = "silence"
) -> NDArray[np.int16]:
    """Cut `mono` [T] (16 kHz, any float type) into int16 windows [W, 160000], the last one zero-padded.

    What lies beyond `max_windows` is dropped first, so that it does not enter the peak. The arithmetic is float64, as
    in the reference: one rounding less than float32 before the truncation. A quotient by the peak is never above 1, so
    nothing needs clipping.

    Args:
        short_clips: what fills the window of a clip of less than 10 s: silence after it, or the clip itself, as often
            as it fits in whole.

    Raises:
        ValueError: no sample, more than one channel, NaN or infinite samples.
    """
    if short_clips == "repeat" and 0 < len(mono) < WINDOW_SAMPLES:
        mono = np.tile(mono, WINDOW_SAMPLES // len(mono))
    if mono.ndim != 1 or mono.size == 0:
        raise ValueError(f"need a mono waveform [T] with at least one sample, got shape {mono.shape}")
    count = num_windows(mono.size, max_windows)
    x = mono[: count * WINDOW_SAMPLES]
    if not np.isfinite([x.min(), x.max()]).all():
        raise ValueError("the waveform has NaN or infinite samples: set the file aside or repair it")
    windows = np.zeros((count, WINDOW_SAMPLES), np.int16)
    scaled = peak_normalise(x)
    scaled *= INT16_SCALE
    windows.reshape(-1)[: x.size] = scaled
    return windows
