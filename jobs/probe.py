"""Find the largest budget of a row for each stage on this machine's device, by trial steps, and write it to a recipe.

The windows of a step stay about as they are: where rows grow, a step has fewer of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from rich.table import Table

from af2_ray import console
from af2_ray.config import Recipe, Stage, load_recipe
from af2_ray.storage.places import allow

if TYPE_CHECKING:
    from af2_ray.train.memory_probe import LargestBudget


def main(argv: Sequence[str] | None = None) -> None:
    """Search, show the trials, write the recipe."""
    parser = console.parser(
        __doc__,
        epilog="example:\n  python jobs/probe.py af2-3b --out af2-3b-h100.yaml\n"
        "  python jobs/train.py af2-3b-h100.yaml",
    )
    parser.add_argument("--out", metavar="FILE.yaml", help="recipe to write; default: <name>-probed.yaml")
    parser.add_argument("--memory-gib", type=float, help="of the device (default: what it has)")
    parser.add_argument("--margin", type=float, default=0.1, help="share left free (default: %(default)s)")
    arguments = parser.parse_args(argv)
    from af2_ray.train.memory_probe import largest_budget, try_row  # heavy imports after the arguments are checked

    if not 0 <= arguments.margin < 1:
        raise ValueError("--margin is a share from 0 to 1")
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    allow(recipe.access.schemes, parents=recipe.access.parents)
    memory_gib = arguments.memory_gib or device_gib(recipe)
    limit = memory_gib * (1 - arguments.margin)
    console.console.print(f"{memory_gib:.1f} GiB a worker, of which {limit:.1f} are used")
    found = []
    for stage in recipe.stages:
        console.heading(f"stage {stage.name}")
        found.append(largest_budget(stage, limit, partial(try_row, recipe, stage)))
        console.console.print(table_of(found[-1]))
    out = Path(arguments.out or f"{recipe.name}-probed.yaml")
    out.write_text(with_budgets(recipe, found).to_yaml())
    console.console.print(f"recipe: {out}")


def device_gib(recipe: Recipe) -> float:
    """Memory of a worker: its GPU's, or its share of this machine's."""
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory / 2**30)
    return float(psutil.virtual_memory().total / 2**30 / recipe.cluster.num_workers)


def with_budgets(recipe: Recipe, found: list[LargestBudget]) -> Recipe:
    """The recipe with the budgets found, and as many rows a step as keep its windows about as they are."""
    workers = recipe.cluster.num_workers
    stages = [_with_budget(stage, best, workers) for stage, best in zip(recipe.stages, found, strict=True)]
    return recipe.model_copy(update={"stages": stages})


def _with_budget(stage: Stage, best: LargestBudget, num_workers: int) -> Stage:
    budget = stage.budget
    rows = budget.step_batches * budget.windows_per_row / best.windows_per_row
    update = {
        "windows_per_row": best.windows_per_row,
        "text_tokens_per_row": best.text_tokens_per_row,
        "step_batches": max(1, round(rows / num_workers)) * num_workers,
        "balanced_rows": None,
    }
    return stage.model_copy(update={"budget": budget.model_copy(update=update)})


def table_of(found: LargestBudget) -> Table:
    """The trials of a stage."""
    title = f"{found.windows_per_row} windows x {found.text_tokens_per_row} text tokens a row"
    table = console.table("row", "windows", "text tokens", "GiB", "s", title=title)
    for trial in found.trials:
        peak = "does not fit" if trial.peak_gib == float("inf") else f"{trial.peak_gib:.2f}"
        table.add_row(trial.shape, str(trial.windows), str(trial.text_tokens), peak, f"{trial.seconds:.2f}")
    return table


if __name__ == "__main__":
    console.main(main)
