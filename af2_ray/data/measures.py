"""What a plan costs: padding, totals, and how even the rows of a step are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from af2_ray.data.packing import Index, max_by


@dataclass(frozen=True, slots=True)
class PlanStats:
    """Measures of a plan; shares from 0 to 1.

    Attributes:
        padding_share: padding of the windows x clips rectangle between encoder and cross-attention.
        padding_share_unplanned: the same for random batches of the same mean number of clips.
        text_padding_share: padding of the questions x tokens rectangle.
        num_samples, num_clips, num_windows, num_text_tokens: totals over the rows, without padding.
        cost_spread: mean over steps of (largest - smallest) / largest predicted row cost.
    """

    padding_share: float
    padding_share_unplanned: float
    text_padding_share: float
    num_samples: int
    num_clips: int
    num_windows: int
    num_text_tokens: int
    cost_spread: float


def measure(
    windows: NDArray[Any],
    row_starts: Index,
    texts: NDArray[Any],
    question_starts: Index,
    cost: NDArray[np.float64],
    step_batches: int,
) -> PlanStats:
    """Measure rows.

    Args:
        windows: of the clips, row by row [C]; row r's begin at row_starts[r], [R+1].
        texts: tokens of the questions, row by row [Q]; row r's begin at question_starts[r], [R+1].
        cost: predicted, of each row [R].
        step_batches: rows of a step.
    """
    shuffled = np.random.default_rng(0).permutation(windows)
    size = max(1, round(len(windows) / max(1, int(np.count_nonzero(np.diff(row_starts))))))
    unplanned = np.minimum(np.arange(0, len(windows) + size, size), len(windows))
    return PlanStats(
        padding_share=padding_share(windows, row_starts),
        padding_share_unplanned=padding_share(shuffled, unplanned),
        text_padding_share=padding_share(texts, question_starts),
        num_samples=len(texts),
        num_clips=len(windows),
        num_windows=int(windows.sum()),
        num_text_tokens=int(texts.sum()),
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
