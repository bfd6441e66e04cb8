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
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import ray.train
import torch
import torch.distributed as dist

from af2_ray.config import Recipe
from af2_ray.data.feed import iter_batches
from af2_ray.data.quarantine import Failure
from af2_ray.storage.stores import model_folder, replacing
from af2_ray.train import checkpoint
from af2_ray.train.best import keep_best, take_best
from af2_ray.train.checkpoint import State
from af2_ray.train.deepspeed import checkpoint_activations, start_engine
from af2_ray.train.lora import merge_lora
from af2_ray.train.step import Step
from af2_ray.train.task import Task, plain
from af2_ray.train.telemetry import Meter, gates, memory_gib
from af2_ray.train.validation import Band, validate

logger = logging.getLogger(__name__)

REPORT_EVERY = 10  # steps whose metrics travel together: a report is a barrier of some milliseconds
PREEMPTION_EVERY = 5  # steps between looks for a notice that a node will be taken away (a barrier as well)
_WEIGHTS = ("model.", "model-")  # how the names of a model's weights and of their index begin
NORMS_EVERY = 50  # steps between gradient norms by group, for which all gradients are gathered


@dataclass(frozen=True)
class LoopConfig:
    """What a worker needs to know; it travels to the workers by value."""

    task: Task
    recipe: Recipe
    export: str  # where the trained model goes: a folder, or an address in object storage
    num_steps: int
    step_batches: int  # plan rows of one optimiser step, over all ranks
    checkpoint_every: int
    bands: tuple[Band, ...] = ()
    best: str | None = None  # where the best checkpoint's weights go, to be exported; none: the last ones are


def train_loop(loop: LoopConfig) -> None:
    """Ray Train's entry point on every worker: restore, train to the last step, export."""
    context, recipe = ray.train.get_context(), loop.recipe
    _quiet(loop, context.get_world_rank())
    torch.manual_seed(recipe.seed)
    accumulation = loop.step_batches // context.get_world_size()
    model = loop.task.build()
    checkpoint_activations(
        model, layers=recipe.deepspeed.activation_checkpointing, tower=recipe.model.audio.gradient_checkpointing
    )
    meter = Meter(loop.task, model, context.get_world_size())
    with checkpoint.latest(recipe.fingerprint()) as saved:
        engine = start_engine(
            model,
            recipe.deepspeed,
            loop.task.optimizer,
            num_steps=loop.num_steps,
            accumulation=accumulation,
            universal=saved is not None and saved.is_resized,
        )
        state = checkpoint.restore(engine, saved)
    batches = iter_batches(ray.train.get_dataset_shard("train"), loop.task.batch_type)
    _Stage(engine, loop, state, meter).train(batches, accumulation)
    if loop.best is not None and state.best is not None:
        step = take_best(engine.module, loop.best)
        logger.info("of %d steps, those to %d are exported: validation was best there", loop.num_steps, step)
    _export(engine, loop, is_first=context.get_world_rank() == 0)


class _Stage:
    """A stage under way: its steps, and the reports of them."""

    def __init__(self, engine: Any, loop: LoopConfig, state: State, meter: Meter) -> None:
        self._engine, self._loop, self._state, self._meter = engine, loop, state, meter
        self._history: list[dict[str, float]] = []  # since the report before
        self._failures: list[Failure] = []
        self._accounts: dict[str, list[Any]] = {"history": [], "failures": []}  # since the checkpoint before
        self._knows_of_preemption = False

    def train(self, batches: Iterator[Any], accumulation: int) -> None:
        """All steps from the state's on."""
        loop, state = self._loop, self._state
        step = Step(self._engine, loop.task)
        reported = 0.0
        started = time.perf_counter()
        while state.step < loop.num_steps:
            rows = list(islice(batches, accumulation))
            if len(rows) < accumulation:
                raise RuntimeError(f"the feed ended at step {state.step} of {loop.num_steps}; the plan is too short")
            waited = time.perf_counter() - started
            metrics = step(rows, with_norms=(state.step + 1) % NORMS_EVERY == 0)
            state.step += 1
            self._account(
                rows, metrics, wait_s=waited, report_s=reported, work_s=time.perf_counter() - started - waited
            )
            started = time.perf_counter()
            self._report()
            reported = time.perf_counter() - started
            started = time.perf_counter()

    def _account(
        self, rows: list[Any], metrics: dict[str, float], *, wait_s: float, report_s: float, work_s: float
    ) -> None:
        """A line of the history; `step_s` is all the time since the line before."""
        seconds = {"wait_s": wait_s, "report_s": report_s, "step_s": wait_s + report_s + work_s}
        cached = rows[0].waveforms.ndim == 3
        rates = self._meter(metrics, seconds["step_s"], cached=cached)
        self._history.append({"step": self._state.step, **metrics, **seconds, **rates})
        self._failures.extend(failure for row in rows for failure in row.failures)

    def _report(self) -> None:
        """Report where it is due, with a checkpoint where that is due or the node is about to go."""
        loop, state = self._loop, self._state
        is_last = state.step == loop.num_steps
        leaving = state.step % PREEMPTION_EVERY == 0 and self._is_preempted()
        if is_last or leaving or state.step % loop.checkpoint_every == 0:
            self._checkpoint(last=is_last or leaving, validates=not leaving)
        elif state.step % REPORT_EVERY == 0:
            ray.train.report(self._report_of_steps())
        else:
            return
        self._history, self._failures = [], []

    def _checkpoint(self, *, last: bool, validates: bool) -> None:
        loop, state = self._loop, self._state
        found = validate(self._engine, plain(loop.task), loop.bands) if validates and loop.bands else {}
        loss = found.get("val/own")
        is_best = loss is not None and (state.best is None or loss < state.best)
        if is_best:
            state.best = loss
            if loop.best is not None:
                keep_best(self._engine.module, loop.best, state.step)
        report = self._report_of_steps() | {"validation": found, "is_best": is_best}
        accounts = {**self._accounts, "validation": found, "is_best": is_best}
        checkpoint.save(
            self._engine, state, report, accounts=accounts, recipe=loop.recipe.fingerprint(), last=last, is_best=is_best
        )
        self._accounts = {"history": [], "failures": []}

    def _report_of_steps(self) -> dict[str, Any]:
        self._history[-1] |= {"memory_gib": memory_gib(), **gates(self._engine)}
        self._accounts["history"] += self._history
        self._accounts["failures"] += [asdict(failure) for failure in self._failures]
        return {"history": self._history, "failures": self._failures}

    def _is_preempted(self) -> bool:
        """Whether a node has just been given notice; said once, on all ranks alike (a barrier)."""
        if self._knows_of_preemption or ray.train.get_preemption_info() is None:
            return False
        self._knows_of_preemption = True
        logger.warning("a node is about to be preempted: saving a checkpoint at step %d", self._state.step)
        return True


def _export(engine: Any, loop: LoopConfig, *, is_first: bool) -> None:
    """Write the trained model as a Hugging Face folder; with ZeRO-3 every rank takes part in gathering it."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(engine.module.parameters()):
        if is_first:
            _write(engine.module, loop)
    dist.barrier()


def _write(module: Any, loop: LoopConfig) -> None:
    """The model, and beside it the processor (or tokenizer) that its start had: the folder is complete in itself."""
    merge_lora(module)
    with replacing(loop.export) as temporary:
        module.save_pretrained(temporary)
        for path in model_folder(loop.task.start).iterdir():
            if path.is_file() and not (temporary / path.name).exists() and not path.name.startswith(_WEIGHTS):
                shutil.copy2(path, temporary)


def _quiet(loop: LoopConfig, rank: int) -> None:
    """Threads of this worker; DeepSpeed's chatter off all ranks (warnings stay)."""
    torch.set_num_threads(loop.recipe.cluster.threads_per_worker)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logger.info("rank %d: %d threads, %s", rank, torch.get_num_threads(), loop.task)
