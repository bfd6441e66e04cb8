"""Ceilings of what a GPU is asked for at the paper's sizes (`benchmarks/launches.py`)."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import launches


@functools.cache
def figures(part: str) -> dict[str, float]:
    if part == "arrivals":
        return launches.churn(100)
    if part == "tower":
        return launches.tower()
    if part == "train":
        return launches.train()[0]
    recipe, num = part.split()
    kernels, waits = launches.decode(recipe, int(num))
    return {"kernels": kernels.total(), "waits": waits.total()}


@pytest.mark.parametrize(
    ("part", "key", "most"),
    [
        ("af2-0.5b 1", "kernels", 950),
        ("af2-3b 1", "kernels", 1400),
        ("af2-3b 16", "kernels", 1400),
        ("af2-3b 16", "waits", 1),
        ("tower", "tower_mb_per_window", 650),
        ("train", "train_syncs", 0),
        ("train", "train_stage1_kernels", 4_900),
        ("train", "train_stage1_saved_mb", 12_400),
    ],
)
def test_no_more_than_this(part: str, key: str, most: float) -> None:
    assert figures(part)[key] <= most


def test_every_block_of_the_tower_has_fused_attention() -> None:
    assert figures("tower")["tower_fused_blocks"] == 18


def test_steps_are_played_while_answers_come_and_go() -> None:
    assert figures("arrivals")["replayed"] >= 0.9
