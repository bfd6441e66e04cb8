"""Checkpoints: everything a worker group needs to go on as if nothing had happened.

Engine state (what trains, optimiser, schedule) through DeepSpeed without the frozen parameters, which come from the
stage's start; each rank's random state; step and cursor. A 3B model with a frozen LM so saves only what trains.
"""

from __future__ import annotations

import random
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import torch
from ray.train import Checkpoint, CheckpointUploadMode
from torch import nn


@dataclass
class State:
    """Where a stage stands: optimiser steps done and plan rows consumed by all ranks together."""

    step: int = 0
    cursor: int = 0


def save(engine: Any, state: State, report: dict[str, Any], *, last: bool) -> None:
    """Save on every rank and report to Ray Train (a barrier).

    The last save of a stage waits until it has reached storage; the others upload while training goes on.
    """
    rank = ray.train.get_context().get_world_rank()
    folder = Path(tempfile.mkdtemp(prefix="af2_ray_checkpoint_"))
    engine.save_checkpoint(str(folder), tag="engine", client_state=asdict(state), exclude_frozen_parameters=True)
    torch.save(_random_state(), folder / f"random_{rank}.pt")
    ray.train.report(
        report | asdict(state),
        checkpoint=Checkpoint.from_directory(folder),
        checkpoint_dir_name=f"step_{state.step:06d}",
        checkpoint_upload_mode=CheckpointUploadMode.SYNC if last else CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
    )


def restore(engine: Any) -> State:
    """Load the last checkpoint of this run into the engine, or start at zero.

    Raises:
        RuntimeError: the checkpoint does not hold exactly the parameters that train.
    """
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return State()
    rank = ray.train.get_context().get_world_rank()
    with checkpoint.as_directory() as folder:
        path, client = engine.load_checkpoint(folder, tag="engine", custom_load_fn=_load_trained)
        if path is None:
            raise RuntimeError(f"checkpoint {folder} holds no engine state; remove it to start from the one before")
        random_path = Path(folder) / f"random_{rank}.pt"
        if random_path.is_file():
            _set_random_state(torch.load(random_path, weights_only=True))
    return State(step=client["step"], cursor=client["cursor"])


def _load_trained(*, src: dict[str, torch.Tensor], dst: nn.Module) -> None:
    """Load what was saved; what is missing must be exactly what is frozen (it came with the stage's start)."""
    result = dst.load_state_dict(src, strict=False)
    trained = {name for name, parameter in dst.named_parameters() if parameter.requires_grad}
    lost = trained & set(result.missing_keys)
    if lost or result.unexpected_keys:
        raise RuntimeError(
            f"checkpoint and model disagree: missing {sorted(lost)[:5]}, unexpected {result.unexpected_keys[:5]}; "
            "was the recipe changed under a run directory?"
        )


def _random_state() -> dict[str, Any]:
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, words, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "python": [version, list(words), gauss_next],
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_random_state(state: dict[str, Any]) -> None:
    kind, keys, *rest = state["numpy"]
    version, words, gauss_next = state["python"]
    torch.set_rng_state(state["torch"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    random.setstate((version, tuple(words), gauss_next))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
