"""Windows: how many, and what is in them."""

import numpy as np
import pytest

from af2_ray.audio.windows import WINDOW_SAMPLES, num_windows, num_windows_for, peak_normalise, to_windows


@pytest.mark.parametrize(
    ("num_samples", "expected"),
    [(1, 1), (WINDOW_SAMPLES, 1), (WINDOW_SAMPLES + 1, 2), (2 * WINDOW_SAMPLES, 2), (2 * WINDOW_SAMPLES + 1, 3)],
)
def test_number_of_windows(num_samples: int, expected: int) -> None:
    assert num_windows(num_samples) == expected
    assert to_windows(np.ones(num_samples, np.float32)).shape == (expected, WINDOW_SAMPLES)


def test_number_of_windows_is_capped_and_counts_seconds() -> None:
    assert num_windows(10 * WINDOW_SAMPLES, 3) == 3
    assert num_windows_for(20.0, 30) == 2
    assert num_windows_for(20.1, 30) == 3
    assert num_windows_for(300.0, 9) == 9


def test_tail_is_zero_padded_and_peak_is_full_scale() -> None:
    x = np.random.default_rng(0).uniform(-0.1, 0.1, WINDOW_SAMPLES + 5)
    windows = to_windows(x)
    assert windows.dtype == np.int16
    assert np.abs(windows).max() == 32767
    assert not windows[1, 5:].any()


def test_a_short_clip_is_repeated_where_it_is_asked_for() -> None:
    x = np.random.default_rng(0).uniform(-0.1, 0.1, 70_000)
    repeated = to_windows(x, short_clips="repeat")
    np.testing.assert_array_equal(repeated[0, :70_000], to_windows(x)[0, :70_000])
    np.testing.assert_array_equal(repeated[0, :70_000], repeated[0, 70_000:140_000])
    assert not repeated[0, 140_000:].any()
    long = np.tile(x, 3)
    np.testing.assert_array_equal(to_windows(long, short_clips="repeat"), to_windows(long))


def test_silence_stays_silence() -> None:
    assert not to_windows(np.zeros(100)).any()


def test_one_sided_audio_is_stretched_as_in_the_reference() -> None:
    assert peak_normalise(np.array([0.0, 0.25, 0.5])).tolist() == [-1.0, 0.0, 1.0]


def test_samples_beyond_the_cap_do_not_enter_the_peak() -> None:
    x = np.full(2 * WINDOW_SAMPLES, 0.25)
    x[::2] = -0.25
    louder = x.copy()
    louder[WINDOW_SAMPLES:] *= 4
    np.testing.assert_array_equal(to_windows(louder, 1), to_windows(x, 1))


def test_truncates_toward_zero_and_a_second_round_trip_changes_nothing() -> None:
    x = np.random.default_rng(0).standard_normal(1000)
    once = to_windows(x)
    np.testing.assert_array_equal(once[0, :1000], np.trunc(x / np.abs(x).max() * 32767))
    np.testing.assert_array_equal(to_windows(once[0] / 32767), once)


@pytest.mark.parametrize("bad", [np.zeros(0), np.zeros((2, 5)), np.array([0.0, np.nan]), np.array([np.inf])])
def test_bad_audio_is_an_error(bad: np.ndarray) -> None:
    with pytest.raises(ValueError):
        to_windows(bad)
