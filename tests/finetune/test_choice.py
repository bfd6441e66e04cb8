"""A recipe is chosen by the model and the machines, and says why."""

from __future__ import annotations

import pytest

from af2_ray.config import load_recipe
from af2_ray.finetune.choice import choose
from af2_ray.models.from_recipe import recipe_config


@pytest.mark.parametrize(
    ("model", "resources", "memory", "recipe"),
    [
        ("tiny", {"CPU": 2.0, "GPU": 0.0}, None, "finetune"),
        ("af2-3b", {"CPU": 16.0}, None, "finetune-lora"),
        ("af2-3b", {"GPU": 1.0}, 24.0, "finetune-lora"),
        ("af2-3b", {"GPU": 8.0}, 80.0, "finetune-full"),
        ("af2-0.5b", {"GPU": 1.0}, 80.0, "finetune-full"),
    ],
)
def test_the_recipe_fits(model: str, resources: dict[str, float], memory: float | None, recipe: str) -> None:
    choice = choose(recipe_config(load_recipe(model)), resources, memory)
    assert choice.recipe == recipe, choice.reason
    assert "parameters" in choice.reason
    load_recipe(choice.recipe, choice.overrides)
