"""What a plan costs: padding, totals, and how even the rows of a step are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from af2_ray.audio.windows import WINDOW_SAMPLES
from af2_ray.data.packing import Index, max_by

_WAVE_BYTES = 2  # int16
_TOKEN_BYTES = 3 * 8  # ids, mask and labels, int64


@dataclass(frozen=True, slots=True)
class PlanStats:
    """Measures of a plan; shares from 0 to 1.

    Attributes:
        padding_share: padding of the windows x clips rectangle between encoder and cross-attention.
        padding_share_unplanned: that of random batches of the same mean number of clips.
        text_padding_share: padding of the clips x text tokens rectangle.
        num_samples, num_clips, num_windows, num_text_tokens: totals over the rows, without padding.
        object_store_gb: size of the rows on their way through Ray's object store, failed clips included (1e9 bytes).
        cost_spread: mean over steps of (largest - smallest) / largest predicted row cost.
    """

    padding_share: float
    padding_share_unplanned: float
    text_padding_share: float
    num_samples: int
    num_clips: int
    num_windows: int
    num_text_tokens: int
    object_store_gb: float
    cost_spread: float


def measure(
    windows: NDArray[Any],
    texts: NDArray[Any],
    row_starts: Index,
    num_samples: int,
    cost: NDArray[np.float64],
    step_batches: int,
) -> PlanStats:
    """Measure rows.

    Args:
        windows, texts: windows and text tokens of the clips, row by row [C]; row r's begin at row_starts[r], [R+1].
        num_samples: number of questions about them.
        cost: predicted cost of each row, [R].
        step_batches: number of rows of a step.
    """
    shuffled = np.random.default_rng(0).permutation(windows)
    size = max(1, round(len(windows) / max(1, int(np.count_nonzero(np.diff(row_starts))))))
    unplanned = np.minimum(np.arange(0, len(windows) + size, size), len(windows))
    num_windows = int(windows.sum())
    held = float(np.dot(np.diff(row_starts), max_by(texts, row_starts)))
    num_bytes = num_windows * WINDOW_SAMPLES * _WAVE_BYTES + held * _TOKEN_BYTES
    return PlanStats(
        padding_share=padding_share(windows, row_starts),
        padding_share_unplanned=padding_share(shuffled, unplanned),
        text_padding_share=padding_share(texts, row_starts),
        num_samples=num_samples,
        num_clips=len(windows),
        num_windows=num_windows,
        num_text_tokens=int(texts.sum()),
        object_store_gb=num_bytes / 1e9,
        cost_spread=cost_spread(cost, step_batches),
    )


def padding_share(lengths: NDArray[Any], starts: Index) -> float:
    """Padded share of the rectangles that hold each run of lengths."""
    held = float(np.dot(np.diff(starts), max_by(lengths, starts)))
    return float(1 - np.sum(lengths) / held) if held else 0.0


def cost_spread(cost: NDArray[np.float64], num_ranks: int) -> float:
    """Mean of (largest - smallest) / largest cost over the rows that `num_ranks` ranks take at one time."""
    groups = cost.reshape(-1, num_ranks)
    highest = groups.max(1)
    return float(((highest - groups.min(1)) / np.maximum(highest, 1e-9)).mean())
