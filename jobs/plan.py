"""What a recipe would take on a cluster, on paper: memory by part for each ZeRO stage, hours and cost of each stage.

Hours follow from operations (af2_ray/train/costs.py), the GPU's peak and a stated MFU; rows are taken as `--fill` full
of their budget. Nothing is started and no weights are read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from af2_ray import console
from af2_ray.config import Recipe, Stage, load_recipe
from af2_ray.storage.places import allow

PAPER_HOURS = {"pretrain": 96.0, "finetune": 120.0, "long": 12.0}
"""The paper's stages on 128 A100 (arXiv 2503.03983)."""
PAPER_GPUS = 128
GPUS = ("a100", "h100", "h200")


@dataclass(frozen=True)
class Machines:
    """What the plan assumes of the machines."""

    gpus: int
    gpu: str
    mfu: float
    price: float  # of a GPU hour
    fill: float  # share of a row's budget that its clips and questions take


def main(argv: Sequence[str] | None = None) -> None:
    """Reckon, and show tables or JSON."""
    parser = console.parser(__doc__, epilog="example:\n  python jobs/plan.py af2-3b --gpus 128 --gpu a100")
    parser.add_argument("--gpus", type=int, default=128, help="GPUs in all (default: %(default)s)")
    parser.add_argument("--gpu", choices=GPUS, default="a100")
    parser.add_argument(
        "--mfu",
        type=float,
        default=0.1,
        help="share of the peak reached; 0.08 to 0.11 by benchmarks/gpu.py on one H100 (default: %(default)s)",
    )
    parser.add_argument("--price", type=float, default=2.0, help="of a GPU hour (default: %(default)s)")
    parser.add_argument("--fill", type=float, default=0.8, help="of a row's budget (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="all figures as one JSON object, and nothing else")
    arguments = parser.parse_args(argv)
    if arguments.gpus < 1 or not 0 < arguments.mfu <= 1 or not 0 < arguments.fill <= 1 or arguments.price < 0:
        raise ValueError("--gpus must be 1 or more, --mfu and --fill in (0, 1], --price 0 or more")
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    allow(recipe.access.schemes, parents=recipe.access.parents)
    cluster = Machines(arguments.gpus, arguments.gpu, arguments.mfu, arguments.price, arguments.fill)
    result = plan(recipe, cluster)
    if arguments.json:
        console.console.print_json(data=result, default=float, indent=None)
    else:
        _show(result, cluster)


def plan(recipe: Recipe, cluster: Machines) -> dict[str, Any]:
    """Parameters, and for each stage steps, hours, cost, the paper's hours and memory by ZeRO stage."""
    from af2_ray.models.from_recipe import recipe_config  # heavy imports after the arguments are checked
    from af2_ray.train import costs
    from af2_ray.train.disk import forecast

    config = recipe_config(recipe)
    notes = []
    stages = []
    for stage in recipe.stages:
        if stage.budget.step_batches % cluster.gpus:
            rows = math.ceil(stage.budget.step_batches / cluster.gpus) * cluster.gpus
            notes.append(
                f"stage {stage.name}: step_batches={stage.budget.step_batches} is no multiple of {cluster.gpus} GPUs, "
                f"the nearest above is {rows} (stages.{stage.name}.budget.step_batches={rows})"
            )
        stages.append(_plan_stage(recipe, stage, config, cluster))
    total = {key: sum(stage[key] for stage in stages) for key in ("hours", "cost")}
    disk = {need.what: need.size for need in forecast(recipe, recipe.storage)}
    counts = costs.parameters(costs.meta_model(config))
    return {"recipe": recipe.name, "parameters": counts, "stages": stages, "total": total, "disk": disk, "notes": notes}


def _plan_stage(recipe: Recipe, stage: Stage, config: Any, cluster: Machines) -> dict[str, Any]:
    from af2_ray.train import costs, memory_plan

    found = memory_plan.StageMemory(recipe, stage, config, gpus=cluster.gpus)
    row, cached = memory_plan.row_of(stage, cluster.fill), stage.features == "cached"
    flops = costs.step_flops(found.model, row, stage.trainable, cached=cached) * stage.budget.step_batches
    seconds = flops / (cluster.gpus * costs.PEAK_FLOPS[cluster.gpu] * cluster.mfu)
    hours = stage.steps * seconds / 3600
    memory = {
        zero_stage: found.parts(memory_plan.with_deepspeed(recipe, zero_stage=zero_stage)) for zero_stage in range(4)
    }
    paper = PAPER_HOURS.get(stage.name)
    return {
        "name": stage.name,
        "steps": stage.steps,
        "trained": sum(number for group, number in found.counts.items() if group in stage.trainable),
        "windows_per_step": row.windows * stage.budget.step_batches,
        "step_pflop": flops / 1e15,
        "step_s": seconds,
        "windows_per_s": row.windows * stage.budget.step_batches / seconds,
        "hours": hours,
        "cost": hours * cluster.gpus * cluster.price,
        "paper_hours_here": None if paper is None else paper * PAPER_GPUS / cluster.gpus,
        "memory_gib": memory,
        "activations_gib": found.activations(),
        "gpu_gib": costs.MEMORY_GIB[cluster.gpu],
        "fits": found.fitting(),
    }


def _show(result: dict[str, Any], cluster: Machines) -> None:
    """The plan as tables."""
    from af2_ray.train.disk import amount

    write = console.console.print
    write(f"{result['recipe']} on {cluster.gpus} x {cluster.gpu} at MFU {cluster.mfu:.0%}")
    millions = (f"{group} {number / 1e6:,.0f}" for group, number in result["parameters"].items() if number >= 5e5)
    write(f"millions of parameters: {', '.join(millions)}\n")
    write(_stage_table(result))
    for stage in result["stages"]:
        write()
        write(_memory_table(stage))
    for table in (_activations_table(result), _fits_table(result, cluster)):
        write()
        write(table)
    parts = ", ".join(f"{what} {amount(size)}" for what, size in result["disk"].items())
    write(f"\ndisk: about {amount(sum(result['disk'].values()))} ({parts})")
    for note in result["notes"]:
        write(f"\nnote: {note}")


def _stage_table(result: dict[str, Any]) -> Table:
    table = console.table(
        *("stage", "millions\ntrained", "steps", "PFLOP\na step", "seconds\na step", "windows\na second"),
        *("hours", "cost", "paper's\nhours"),
    )
    for stage in result["stages"]:
        paper = stage["paper_hours_here"]
        table.add_row(
            stage["name"],
            f"{stage['trained'] / 1e6:,.0f}",
            f"{stage['steps']:,}",
            f"{stage['step_pflop']:.1f}",
            f"{stage['step_s']:.2f}",
            f"{stage['windows_per_s']:,.0f}",
            f"{stage['hours']:,.1f}",
            f"{stage['cost']:,.0f}",
            "" if paper is None else f"{paper:,.1f}",
        )
    total = result["total"]
    table.add_row("all", "", "", "", "", "", f"{total['hours']:,.1f}", f"{total['cost']:,.0f}", "")
    return table


def _memory_table(stage: dict[str, Any]) -> Table:
    parts = list(next(iter(stage["memory_gib"].values())))
    table = console.table("ZeRO", *parts, "", title=f"{stage['name']}: GiB a GPU")
    for zero_stage, memory in stage["memory_gib"].items():
        fits = "fits" if memory["total"] <= stage["gpu_gib"] else f"over {stage['gpu_gib']:.0f}"
        table.add_row(str(zero_stage), *(f"{memory[part]:.1f}" for part in parts), fits)
    return table


def _activations_table(result: dict[str, Any]) -> Table:
    """What a full row keeps for its backward pass, by stage and part."""
    parts = list(result["stages"][0]["activations_gib"])
    table = console.table("stage", *parts, title="activations of a full row, GiB")
    for stage in result["stages"]:
        table.add_row(stage["name"], *(f"{gib:.2f}" for gib in stage["activations_gib"].values()))
    return table


def _fits_table(result: dict[str, Any], cluster: Machines) -> Table:
    """The largest rows that fit cards of each size, by stage and way."""
    ways = [(stage["name"], way, rows) for stage in result["stages"] for way, rows in stage["fits"].items()]
    title = f"largest budget.windows_per_row, GPUs: {cluster.gpus} of ... each (-: not even one clip fits)"
    table = console.table("stage", "", *(f"{size} GB" for size in ways[0][2]), title=title, num_left=2)
    for name, way, rows in ways:
        table.add_row(name, way, *("-" if most is None else str(most) for most in rows.values()))
    return table


if __name__ == "__main__":
    console.main(main)
