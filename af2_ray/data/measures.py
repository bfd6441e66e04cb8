"""What a plan costs: padding, totals, and how even the rows of a step are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


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
    windows: list[NDArray[np.int64]],
    texts: list[NDArray[np.int64]],
    step_batches: int,
    costs: Sequence[float] | None = None,
) -> PlanStats:
    """Measure rows: windows of their clips, text lengths of their questions, their costs (none: the windows)."""
    all_windows = np.concatenate(windows)
    heard = [w for w in windows if len(w)]
    cost = np.array(costs if costs is not None else [w.sum() for w in windows], float).reshape(-1, step_batches)
    shuffled = np.random.default_rng(0).permutation(all_windows)
    size = max(1, round(len(all_windows) / max(1, len(heard))))
    return PlanStats(
        padding_share=padding_share(windows),
        padding_share_unplanned=padding_share([shuffled[i : i + size] for i in range(0, len(shuffled), size)]),
        text_padding_share=padding_share(texts),
        num_samples=sum(map(len, texts)),
        num_clips=len(all_windows),
        num_windows=int(all_windows.sum()),
        num_text_tokens=sum(int(t.sum()) for t in texts),
        cost_spread=float(((cost.max(1) - cost.min(1)) / np.maximum(cost.max(1), 1e-9)).mean()),
    )


def padding_share(rows: list[NDArray[np.int64]]) -> float:
    """Padded share of the rectangles that hold each row's lengths."""
    held = sum(len(row) * int(row.max()) for row in rows if len(row))
    return 1 - sum(int(row.sum()) for row in rows) / held if held else 0.0
