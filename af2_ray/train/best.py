"""The weights of a stage's best checkpoint, kept beside its export: what trains, and nothing else.

A checkpoint has them too, in the form of the optimiser's partitions; written out once more they are a hundredth of it
where adapters train, and need no second engine to be read. They are written before the checkpoint of the same step, so
that whoever goes on from a checkpoint finds the best of all before it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from af2_ray.storage.places import is_remote
from af2_ray.storage.stores import fetch, replacing

_FILE = "trained.safetensors"


def keep_best(module: Any, place: str, step: int) -> None:
    """Write what trains to the folder or address `place`; every rank calls it (a barrier).

    Args:
        step: optimiser steps that the weights have behind them.
    """
    import deepspeed

    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    with deepspeed.zero.GatheredParameters(list(trained.values())):
        if dist.get_rank() == 0:
            weights = {name: parameter.detach().cpu().contiguous() for name, parameter in trained.items()}
            with replacing(place) as folder:
                save_file(weights, folder / _FILE, metadata={"step": str(step)})
    dist.barrier()


def take_best(module: Any, place: str) -> int:
    """Put the weights that `keep_best` wrote into the module, on every rank; returns their step."""
    import deepspeed

    with _here(place) as folder:
        with safe_open(folder / _FILE, "pt") as file:
            step = int(file.metadata()["step"])
        weights = load_file(folder / _FILE)
    named = dict(module.named_parameters())
    with deepspeed.zero.GatheredParameters([named[name] for name in weights], modifier_rank=0), torch.no_grad():
        for name, values in weights.items():
            if named[name].numel():  # with ZeRO-3, ranks other than the first hand nothing in
                named[name].copy_(values)
    return step


@contextmanager
def _here(place: str) -> Iterator[Path]:
    """The folder `place` on this machine's disk."""
    if not is_remote(place):
        yield Path(place)
        return
    with tempfile.TemporaryDirectory(prefix="af2_ray_") as name:
        fetch(place, Path(name))
        yield Path(name)
