"""Checkpoints: everything a worker group needs to go on as if nothing had happened.

Engine state (what trains, optimiser, schedule) through DeepSpeed without the frozen parameters, which come from the
stage's start; each rank's random state; the step; in `checkpoint.json` how many workers and which recipe made it and
what was reported since the checkpoint before; and in `part_RANK.json` a digest of every file of that rank, written by
the thread that uploads them. So a 3B model with a frozen LM saves only what trains. Ray Train registers a checkpoint
once all of it has reached storage, so a half-written one is never gone on from; one that was damaged since is found by
its digests (`mend`). DeepSpeed unpickles what it loads, which can run any code: digests show damage, not who wrote a
file (docs/security.md).

Another number of workers takes the same checkpoint through DeepSpeed's universal form, converted once a node.
The feed goes on at the same place, for a step takes the same rows however many workers share them. Random states of
the ranks do not carry over then.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import torch
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointUploadMode
from torch import nn

from af2_ray.storage.files import Damaged, digest, sealed_json
from af2_ray.storage.places import locate
from af2_ray.storage.stores import scratch
from af2_ray.train.mend import CHECKPOINT, check_files, part_name, read_facts
from af2_ray.train.optim import set_fused

TAG = "engine"
BEST = 10**12  # added to the step that a checkpoint is kept by: any that was best outlasts any that was not


@dataclass
class State:
    """Where a stage stands: optimiser steps done (where its feed goes on, too), best validation loss so far."""

    step: int = 0
    best: float | None = None


@dataclass(frozen=True)
class Saved:
    """A checkpoint on this node's disk, and how many workers made it."""

    folder: Path
    world_size: int

    @property
    def is_resized(self) -> bool:
        """Whether another number of workers goes on from it."""
        return self.world_size != ray.train.get_context().get_world_size()


def save(
    engine: Any,
    state: State,
    report: dict[str, Any],
    *,
    accounts: dict[str, Any],
    recipe: str,
    last: bool,
    is_best: bool = False,
) -> None:
    """Save on every rank and report to Ray Train (a barrier).

    Args:
        report: metrics that travel along.
        accounts: reports of this rank since the checkpoint before: `history`, `failures`, `validation`.
        recipe: fingerprint of the recipe.
        last: whether to wait until it has reached storage; others upload while training goes on.
        is_best: whether validation was never better; such checkpoints are kept before others.
    """
    context = ray.train.get_context()
    folder = Path(tempfile.mkdtemp(prefix="af2_ray_checkpoint_"))
    with _frozen_left_out(engine.module):
        engine.save_checkpoint(str(folder), tag=TAG, client_state=asdict(state), exclude_frozen_parameters=True)
    torch.save(_random_state(), folder / f"random_{context.get_world_rank()}.pt")
    keep = state.step + (BEST if is_best else 0)
    if context.get_world_rank() == 0:
        facts = {
            "recipe": recipe,
            "world_size": context.get_world_size(),
            "parts": context.get_world_size(),
            **asdict(state),
            "keep": keep,
            "accounts": accounts | {"failures": []},  # each rank's are in its part
        }
        (folder / CHECKPOINT).write_text(sealed_json(facts))
    ray.train.report(
        report | asdict(state) | {"keep": keep},
        checkpoint=Checkpoint.from_directory(folder),
        checkpoint_dir_name=f"step_{state.step:06d}",
        checkpoint_upload_mode=CheckpointUploadMode.SYNC if last else CheckpointUploadMode.ASYNC,
        checkpoint_upload_fn=partial(_upload, rank=context.get_world_rank(), failures=accounts["failures"]),
        delete_local_checkpoint_after_upload=True,
    )


def _upload(checkpoint: Checkpoint, name: str, *, rank: int, failures: list[Any]) -> Checkpoint:
    """Write this rank's part, then copy its folder into storage, where the ranks' folders become one.

    Training goes on meanwhile: a gigabyte takes about a second to digest.
    """
    folder = Path(checkpoint.path)
    files = {str(path.relative_to(folder)): digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    files.pop(CHECKPOINT, None)  # it has its own
    (folder / part_name(rank)).write_text(sealed_json({"failures": failures, "files": files}))
    persisted: Checkpoint = ray.train.get_context().get_storage().persist_current_checkpoint(checkpoint, name)
    return persisted


@contextmanager
def _frozen_left_out(module: nn.Module) -> Iterator[None]:
    """Within the block a state dict has no frozen parameter under any name.

    DeepSpeed leaves each out under one name; a tied head (622 MB of a 3B LM) would be saved under its other.
    """
    frozen = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}

    def drop(_: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in frozen:
            state.pop(prefix + name, None)

    handle = module.register_state_dict_post_hook(drop)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def latest(recipe: str) -> Iterator[Saved | None]:
    """The last checkpoint of this run, on this node's disk for as long as the block lasts; none at the first start.

    Raises:
        RuntimeError: it is damaged, or not of this recipe.
    """
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as name:
        yield read_saved(Path(name), recipe, checked=ray.train.get_context().get_local_rank() != 0)


def read_saved(folder: Path, recipe: str, *, checked: bool = False) -> Saved:
    """Check the files of a checkpoint folder, and return what it says of itself.

    Args:
        checked: whether another process of this node has checked the files.

    Raises:
        RuntimeError: it is damaged, or not of this recipe.
    """
    fs, path = locate(folder)
    try:
        facts = read_facts(fs, path) if checked else check_files(fs, path)
    except Damaged as error:
        raise RuntimeError(f"{error}; the same command goes on from the newest checkpoint that is whole") from error
    if facts["recipe"] != recipe:
        raise RuntimeError(
            f"{folder} was saved by recipe {facts['recipe']}, not {recipe}: go on with that one, or fork the run "
            "(jobs/train.py --fork)"
        )
    return Saved(folder, int(facts["world_size"]))


def restore(engine: Any, saved: Saved | None) -> State:
    """Load a checkpoint into the engine, or start at zero.

    Raises:
        RuntimeError: the checkpoint does not hold exactly the parameters that train.
    """
    if saved is None:
        return State()
    converts = saved.is_resized and engine.zero_optimization()
    with _universal(saved) if converts else nullcontext(saved.folder) as folder:
        path, client = engine.load_checkpoint(str(folder), tag=TAG, custom_load_fn=_load_trained)
    if path is None:
        raise RuntimeError(f"checkpoint {saved.folder} holds no engine state; remove it to start from the one before")
    set_fused(engine.basic_optimizer, torch.cuda.is_available())
    random_path = saved.folder / f"random_{ray.train.get_context().get_world_rank()}.pt"
    if random_path.is_file() and not saved.is_resized:
        _set_random_state(torch.load(random_path, weights_only=True))
    return State(step=client["step"], best=client["best"])


@contextmanager
def _universal(saved: Saved) -> Iterator[Path]:
    """The folder of the checkpoint's universal form, made by this node's first worker and removed afterwards."""
    mark = hashlib.sha256(f"{saved.folder} {ray.train.get_context().get_world_size()}".encode()).hexdigest()[:12]
    target = scratch("universal") / mark
    is_first = ray.train.get_context().get_local_rank() == 0
    if is_first:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        folders = ("--input_folder", str(saved.folder / TAG), "--output_folder", str(target / TAG))
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *folders, "--inject_missing_state"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(
                f"{saved.folder} could not be converted for another number of workers: {done.stderr[-2000:]}"
            )
    dist.barrier()
    yield target
    dist.barrier()
    if is_first:
        shutil.rmtree(target, ignore_errors=True)


def _load_trained(*, src: dict[str, torch.Tensor], dst: nn.Module) -> None:
    """Load what trains; frozen parameters stay as the stage's start has them, and only they may be missing."""
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
