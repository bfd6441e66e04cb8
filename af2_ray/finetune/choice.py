"""Which shipped recipe fits a model and the machines that there are, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from af2_ray.config import load_recipe
from af2_ray.models.configuration_af2 import AudioFlamingo2Config
from af2_ray.train import costs
from af2_ray.train.memory_plan import StageMemory

SMALL = 200e6  # parameters that a CPU trains in minutes
UNKNOWN_GIB = 15.0  # memory of a GPU of which nothing is known: of 16 GB, the smallest that is rented
OFFLOAD = "deepspeed.offload_optimizer=true"
WAYS = (  # from the one that learns most to the one that takes least
    ("finetune-full", (), "tower and fusion"),
    ("finetune-lora", (), "adapters and fusion"),
    ("finetune-lora", (OFFLOAD,), "adapters and fusion, the optimiser on the host,"),
)


@dataclass(frozen=True)
class Choice:
    """A recipe's name, the sentence that says why, and what it is changed by for these machines."""

    recipe: str
    reason: str
    overrides: tuple[str, ...] = ()


def choose(config: AudioFlamingo2Config, resources: Mapping[str, float], gpu_gib: float | None) -> Choice:
    """The recipe for a model on a cluster or a machine: the first of `WAYS` that fits, by the plan's arithmetic.

    Args:
        config: the model's configuration.
        resources: numbers of `CPU` and `GPU` (`cluster.prospect`).
        gpu_gib: GiB of one GPU; none: not known, then the smallest that is rented.
    """
    total = sum(costs.parameters(costs.meta_model(config)).values())
    size = f"{total / 1e9:.1f} B parameters" if total >= 1e9 else f"{total / 1e6:.1f} M parameters"
    num_gpus = int(resources.get("GPU", 0))
    if not num_gpus:
        if total <= SMALL:
            return Choice("finetune", f"{size} and no GPU: a small model, trained on the CPU")
        return Choice("finetune-lora", f"{size} and no GPU: adapters and fusion alone, and many hours of CPU")
    memory = UNKNOWN_GIB if gpu_gib is None else gpu_gib
    known = f"{size} on {num_gpus} GPU{'s' if num_gpus > 1 else ''} of {memory:.0f} GiB"
    reason = ""
    for name, changes, what in WAYS:
        recipe = load_recipe(name, changes)
        (stage,) = recipe.stages
        most = stage.budget.step_batches
        workers = max(number for number in range(1, min(num_gpus, most) + 1) if most % number == 0)
        needed = StageMemory(recipe, stage, config, gpus=workers).parts()["total"]
        if needed <= memory:
            reason += f"{what} take {needed:.0f} GiB of each"
            return Choice(name, f"{known}: {reason}", (*changes, f"cluster.num_workers={workers}"))
        reason += f"{what} would take {needed:.0f} GiB of each, "
    reason += "and no recipe takes less: shorter rows (stages.finetune.budget.windows_per_row) may fit"
    return Choice(WAYS[-1][0], f"{known}: {reason}", WAYS[-1][1])


def gpu_memory_gib(resources: Mapping[str, float]) -> float | None:
    """GiB of one GPU: by the type that Ray names, or of this machine's first; none where neither is known."""
    for name in resources:
        kind = name.removeprefix("accelerator_type:").lower() if name.startswith("accelerator_type:") else ""
        if kind in costs.MEMORY_GIB:
            return costs.MEMORY_GIB[kind]
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory) / costs.GIB
    return None
