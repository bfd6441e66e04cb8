"""Ceilings of what a GPU is asked for at the paper's sizes (`benchmarks/launches.py`)."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import launches

from af2_ray.config import Lora, load_recipe
from af2_ray.train import costs
from af2_ray.train.memory_plan import StageMemory


@functools.cache
def figures(part: str) -> dict[str, float]:
    if part == "arrivals":
        return launches.churn(100)
    if part == "tower":
        return launches.tower()
    if part == "train":
        return launches.train()[0]
    if part == "adapted":
        return launches.adapted()
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
        ("adapted", "lora_recomputed_mb", 1_310),
    ],
)
def test_no_more_than_this(part: str, key: str, most: float) -> None:
    assert figures(part)[key] <= most


def test_the_plan_foretells_no_less_than_a_row_keeps() -> None:
    """3B with adapters, fusion and transform: all that the layers keep, whether they are recomputed or not."""
    stage = load_recipe("af2-3b").stages[0].model_copy(update={"lora": Lora(rank=16), "features": "cached"})
    model = StageMemory(load_recipe("af2-3b"), stage, launches.recipe_config(load_recipe("af2-3b")), gpus=1).model
    row = costs.Work(63, 2037, 3, 97, 1029)
    for key, layers in (("lora_saved_mb", False), ("lora_recomputed_mb", True)):
        parts = costs.activation_gib(model, row, [*stage.trainable, "lora"], layers=layers, cached=True)
        planned_mb = (sum(parts.values()) - parts["recomputed"]) * 2**30 / 1e6
        assert 0.5 * planned_mb < figures("adapted")[key] <= planned_mb


def test_every_block_of_the_tower_has_fused_attention() -> None:
    assert figures("tower")["tower_fused_blocks"] == 18


def test_steps_are_played_while_answers_come_and_go() -> None:
    assert figures("arrivals")["replayed"] >= 0.9
