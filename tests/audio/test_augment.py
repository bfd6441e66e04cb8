"""What augmentation changes in a clip, and what it leaves."""

from __future__ import annotations

import numpy as np

from af2_ray.audio.augment import EQ_KNOTS_HZ, equalised, random_eq, random_noise


def tone(hz: float) -> np.ndarray:
    return np.sin(2 * np.pi * hz * np.arange(16_000) / 16_000).astype(np.float32)


def test_a_tone_gets_the_gain_of_its_frequency() -> None:
    gains = np.array([0.0, 6.0, -6.0, 0.0, 12.0, 0.0])
    for hz, gain_db in ((200, 6.0), (600, -6.0), (4000, 12.0), (6000, 6.0)):
        peak = np.abs(equalised(tone(hz), gains)).max()
        assert abs(20 * np.log10(peak) - gain_db) < 0.1
    assert len(EQ_KNOTS_HZ) == len(gains)


def test_random_eq_stays_within_its_bound() -> None:
    rng = np.random.default_rng(0)
    peaks = [20 * np.log10(np.abs(random_eq(tone(1500), 6.0, rng)).max()) for _ in range(50)]
    assert -6.1 < min(peaks) < -3
    assert 3 < max(peaks) < 6.1


def test_noise_lies_as_far_below_the_clip_as_asked_for() -> None:
    sound = tone(440)
    noise = random_noise(sound, (20.0, 20.0), np.random.default_rng(0)) - sound
    assert abs(20 * np.log10(sound.std() / noise.std()) - 20) < 0.2
    assert noise.dtype == np.float32
    assert not random_noise(np.zeros(100, np.float32), (20.0, 30.0), np.random.default_rng(0)).any()
