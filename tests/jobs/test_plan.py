"""What the shipped recipes foretell of their memory."""

from __future__ import annotations

import pytest

from af2_ray.config import load_recipe
from jobs.plan import Machines, plan


@pytest.mark.parametrize("name", ["af2-3b", "af2-0.5b"])
def test_every_stage_fits_the_gpu_on_the_workers_that_its_recipe_names(name: str) -> None:
    recipe = load_recipe(name)
    machines = Machines(recipe.cluster.num_workers, "h100", mfu=0.1, price=2.0, fill=0.8)
    for stage in plan(recipe, machines)["stages"]:
        memory = stage["memory_gib"][recipe.deepspeed.zero_stage]
        assert memory["total"] < stage["gpu_gib"], stage["name"]
