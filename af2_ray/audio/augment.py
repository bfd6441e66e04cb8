"""A recording as another microphone in another room could have made it; its captions stay true."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from af2_ray.audio.windows import SAMPLE_RATE

EQ_KNOTS_HZ = np.array([0, 200, 600, 1500, 4000, 8000])


def equalised(mono: NDArray[np.float32], gains_db: NDArray[np.float64]) -> NDArray[np.floating]:
    """`mono` [T] (16 kHz) with a gain at each of `EQ_KNOTS_HZ`, straight lines between them."""
    spectrum = np.fft.rfft(mono)
    gain_db = np.interp(np.linspace(0, SAMPLE_RATE / 2, len(spectrum)), EQ_KNOTS_HZ, gains_db)
    return np.fft.irfft(spectrum * 10 ** (gain_db / 20), len(mono))


def random_eq(mono: NDArray[np.float32], max_db: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """`equalised` by up to `max_db` up or down at each knot."""
    return equalised(mono, rng.uniform(-max_db, max_db, len(EQ_KNOTS_HZ))).astype(np.float32)


def random_noise(
    mono: NDArray[np.float32], snr_db: tuple[float, float], rng: np.random.Generator
) -> NDArray[np.float32]:
    """White noise so many dB below the clip's RMS, drawn from a range; silence stays silence."""
    below = 10 ** (-rng.uniform(*snr_db) / 20)
    rms = float(np.sqrt(np.mean(np.square(mono, dtype=np.float64))))
    return mono + np.float32(rms * below) * rng.standard_normal(len(mono), dtype=np.float32)
