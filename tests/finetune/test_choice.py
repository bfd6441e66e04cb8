"""A recipe is chosen by the model and the machines, and says why."""

from __future__ import annotations

import pytest

from af2_ray.config import load_recipe
from af2_ray.finetune.choice import OFFLOAD, choose
from af2_ray.models.from_recipe import recipe_config


@pytest.mark.parametrize(
    ("model", "resources", "memory", "recipe", "change"),
    [
        ("tiny", {"CPU": 2.0, "GPU": 0.0}, None, "finetune", ""),
        ("af2-3b", {"CPU": 16.0}, None, "finetune-lora", ""),
        ("af2-3b", {"GPU": 1.0}, 22.0, "finetune-lora", OFFLOAD),
        ("af2-3b", {"GPU": 1.0}, 39.4, "finetune-lora", "cluster.num_workers=1"),
        ("af2-3b", {"GPU": 8.0}, 79.1, "finetune-full", "cluster.num_workers=8"),
        ("af2-3b", {"GPU": 7.0}, 79.1, "finetune-full", "cluster.num_workers=6"),
        ("af2-0.5b", {"GPU": 1.0}, 79.1, "finetune-full", ""),
    ],
)
def test_the_recipe_fits(
    model: str, resources: dict[str, float], memory: float | None, recipe: str, change: str
) -> None:
    choice = choose(recipe_config(load_recipe(model)), resources, memory)
    assert choice.recipe == recipe, choice.reason
    assert not change or change in choice.overrides, choice
    assert "parameters" in choice.reason
    load_recipe(choice.recipe, choice.overrides)


def test_what_fits_nowhere_says_so() -> None:
    choice = choose(recipe_config(load_recipe("af2-3b")), {"GPU": 1.0}, None)
    assert "no recipe takes less" in choice.reason
