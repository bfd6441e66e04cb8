"""The training loop of one worker: the same for every task, stage and device.

One optimiser step (`step.Step`) takes one group of plan rows, `accumulation` of them on each rank. Nothing waits for a
rank that ran dry: all ranks get equally many rows.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from torch import nn

from af2_ray.config import DeepSpeedSettings
from af2_ray.data.feed import iter_batches
from af2_ray.data.quarantine import Failure
from af2_ray.train import checkpoint
from af2_ray.train.checkpoint import State
from af2_ray.train.engine import start_engine
from af2_ray.train.lora import merge_lora
from af2_ray.train.run import replacing
from af2_ray.train.step import Step
from af2_ray.train.task import Task

logger = logging.getLogger(__name__)

REPORT_EVERY = 10  # steps whose metrics travel together: a report is a barrier of some milliseconds


@dataclass(frozen=True)
class LoopConfig:
    """What a worker needs to know; it travels to the workers by value."""

    task: Task
    deepspeed: DeepSpeedSettings
    folder: Path  # of the stage: the export goes to folder/model
    num_steps: int
    step_batches: int  # plan rows of one optimiser step, over all ranks
    checkpoint_every: int
    threads: int
    seed: int


def train_loop(config: dict[str, LoopConfig]) -> None:
    """Ray Train's entry point on every worker: restore, train to the last step, export."""
    loop = config["loop"]
    context = ray.train.get_context()
    _quiet(loop, context.get_world_rank())
    torch.manual_seed(loop.seed)
    accumulation = loop.step_batches // context.get_world_size()
    engine = start_engine(
        loop.task.build(), loop.deepspeed, loop.task.optimizer, num_steps=loop.num_steps, accumulation=accumulation
    )
    state = checkpoint.restore(engine)
    batches = iter_batches(ray.train.get_dataset_shard("train"), loop.task.batch_type)
    _train(engine, loop, state, batches, accumulation)
    _export(engine, loop, is_first=context.get_world_rank() == 0)


def _train(engine: Any, loop: LoopConfig, state: State, batches: Iterator[Any], accumulation: int) -> None:
    step = Step(engine, loop.task)
    history: list[dict[str, float]] = []
    failures: list[Failure] = []
    started = time.perf_counter()
    while state.step < loop.num_steps:
        rows = list(islice(batches, accumulation))
        if len(rows) < accumulation:
            raise RuntimeError(f"the feed ended at step {state.step} of {loop.num_steps}; the plan is too short")
        waited = time.perf_counter() - started
        metrics = step(rows)
        state.step += 1
        state.cursor += loop.step_batches
        now = time.perf_counter()
        history.append({"step": state.step, **metrics, "wait_s": waited, "step_s": now - started})
        failures.extend(failure for row in rows for failure in row.failures)
        started = now
        is_last = state.step == loop.num_steps
        if is_last or state.step % loop.checkpoint_every == 0:
            checkpoint.save(engine, state, {"history": history, "failures": failures}, last=is_last)
        elif state.step % REPORT_EVERY == 0:
            ray.train.report({"history": history, "failures": failures})
        else:
            continue
        history, failures = [], []


def _export(engine: Any, loop: LoopConfig, *, is_first: bool) -> None:
    """Write the trained model as a Hugging Face folder; with ZeRO-3 every rank takes part in gathering it."""
    module: nn.Module = engine.module
    if loop.deepspeed.zero_stage == 3:
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(module.parameters())):
            _write(module, loop) if is_first else None
    elif is_first:
        _write(module, loop)
    dist.barrier()


def _write(module: Any, loop: LoopConfig) -> None:
    """The model, and beside it the processor (or tokenizer) that its start had: the folder is complete in itself."""
    merge_lora(module)
    with replacing(loop.folder / "model") as temporary:
        module.save_pretrained(temporary)
        for path in loop.task.start.iterdir():
            if path.is_file() and not (temporary / path.name).exists() and path.suffix != ".safetensors":
                shutil.copy2(path, temporary)


def _quiet(loop: LoopConfig, rank: int) -> None:
    """Threads of this worker; DeepSpeed's chatter off all ranks (warnings stay)."""
    torch.set_num_threads(loop.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logger.info("rank %d: %d threads, %s", rank, loop.threads, loop.task)
