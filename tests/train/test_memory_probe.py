"""The search for a budget, and the rows it is tried with."""

from __future__ import annotations

import pytest

from af2_ray.config import load_recipe
from af2_ray.text import IGNORE
from af2_ray.train.memory_probe import RowCost, Shape, largest_budget, made_up_row

STAGE = load_recipe("tiny").stages[1]
RATIO = STAGE.budget.text_tokens_per_row / STAGE.budget.windows_per_row


@pytest.mark.parametrize("capacity", [9, 30, 100, 333])
def test_the_largest_that_fits_is_found_to_an_eighth(capacity: int) -> None:
    def trial(shape: Shape, windows: int, text_tokens: int) -> RowCost:
        assert text_tokens == pytest.approx(RATIO * windows, rel=0.01), "the stage's own proportion"
        return RowCost(shape, windows, text_tokens, windows if shape == "longest" else windows / 2, 1.0)

    found = largest_budget(STAGE, capacity, trial)
    assert capacity * 8 / 9 - 1 <= found.windows_per_row <= capacity
    assert found.windows_per_row >= STAGE.max_windows
    assert max(t.windows for t in found.trials if t.peak_gib <= capacity) == found.windows_per_row


def test_a_stage_that_does_not_fit_at_all_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="gradient_checkpointing"):
        largest_budget(STAGE, 1.0, lambda shape, w, t: RowCost(shape, w, t, float("inf"), 0.0))


def test_both_rows_fill_the_budget() -> None:
    longest = made_up_row(STAGE, "longest", 18, 1280, 96, ids=300)
    assert longest.windows_per_clip.tolist() == [9, 9]
    crowded = made_up_row(STAGE, "crowded", 18, 1280, 96, ids=300)
    assert crowded.windows_per_clip.tolist() == [1] * 18
    assert len(longest.waveforms) == len(crowded.waveforms) == 18
    assert 0.9 * 1280 < crowded.input_ids.numel() <= 1280
    for row in (longest, crowded):
        assert (row.input_ids[:, 0] == 300).all()
        assert (row.labels != IGNORE).any()
        assert int(row.audio_index.max()) < len(row.windows_per_clip)
