"""Which shipped recipe fits a model and the machines that there are, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from af2_ray.models.configuration_af2 import AudioFlamingo2Config
from af2_ray.train import costs

SMALL = 200e6  # parameters that a CPU trains in minutes
FULL_GROUPS = ("clap", "transform", "xattn", "tokens")  # what `finetune-full` trains
WORKING_GIB = 12.0  # activations of a row, CUDA's own, fragmentation


@dataclass(frozen=True)
class Choice:
    """A recipe's name, the sentence that says why, and what it is changed by for these machines."""

    recipe: str
    reason: str
    overrides: tuple[str, ...] = ()


def choose(config: AudioFlamingo2Config, resources: Mapping[str, float], gpu_gib: float | None) -> Choice:
    """The recipe for a model on a cluster or a machine.

    Args:
        config: the model's configuration.
        resources: numbers of `CPU` and `GPU` (`cluster.prospect`).
        gpu_gib: memory of one GPU; none: not known, then the smallest that is rented, 16 GiB.
    """
    counts = costs.parameters(costs.meta_model(config))
    total, trained = sum(counts.values()), sum(counts.get(group, 0) for group in FULL_GROUPS)
    size = f"{total / 1e9:.1f} B" if total >= 1e9 else f"{total / 1e6:.1f} M"
    num_gpus = int(resources.get("GPU", 0))
    if not num_gpus:
        if total <= SMALL:
            return Choice("finetune", f"{size} parameters and no GPU: a small model, trained on the CPU")
        return Choice("finetune-lora", f"{size} parameters and no GPU: adapters only, and many hours of CPU")
    memory = gpu_gib or 16.0
    full_gib = (2 * total + 16 * trained / num_gpus) / costs.GIB + WORKING_GIB
    known = f"{num_gpus} GPU{'s' if num_gpus > 1 else ''} of {memory:.0f} GiB"
    needs = f"training tower and fusion takes about {full_gib:.0f} GiB each"
    if full_gib <= memory:
        workers = math.gcd(48, num_gpus) if 48 % num_gpus else num_gpus
        return Choice("finetune-full", f"{size} parameters on {known}: {needs}", (f"cluster.num_workers={workers}",))
    return Choice("finetune-lora", f"{size} parameters on {known}: {needs}, so adapters and fusion alone")


def gpu_memory_gib(resources: Mapping[str, float]) -> float | None:
    """Memory of one GPU: by the type that Ray names, or of this machine's first; none where neither is known."""
    for name in resources:
        kind = name.removeprefix("accelerator_type:").lower() if name.startswith("accelerator_type:") else ""
        if kind in costs.MEMORY_GIB:
            return costs.MEMORY_GIB[kind]
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory) / costs.GIB
    return None
