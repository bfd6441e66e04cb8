"""Trial steps: the memory of a row, measured on the recipe's own model, in a process that may run out of it.

A trial builds the model with random weights, sets what trains, and does forward and backward of one made-up row, twice
(the second with the gradients' place taken). Two rows bound a budget: the longest (few clips of as many windows as the
stage takes, few questions) and the most crowded (clips of one window, each with all its questions, texts filling their
side of the budget). Optimiser state is not made but computed, for the ZeRO stage and the number of workers at hand,
and so is what the sums of gradients take beyond the gradients of one row.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Literal

import torch

from af2_ray.audio.windows import WINDOW_SAMPLES
from af2_ray.config import Recipe, Stage
from af2_ray.data.collate import LmBatch
from af2_ray.models.from_recipe import recipe_config
from af2_ray.models.lora import add_lora
from af2_ray.models.modeling_af2 import AudioFlamingo2ForConditionalGeneration
from af2_ray.text import IGNORE
from af2_ray.train import costs
from af2_ray.train.deepspeed import checkpoint_activations
from af2_ray.train.optim import freeze_except
from af2_ray.train.precision import autocast, resolve
from af2_ray.train.task import LmTask

Shape = Literal["longest", "crowded"]
SHAPES: tuple[Shape, ...] = ("longest", "crowded")


@dataclass(frozen=True)
class RowCost:
    """What a row of a shape took: peak GiB on the device, optimiser share included, and seconds of the second step.

    `peak_gib` is infinite where it did not fit.
    """

    shape: Shape
    windows: int
    text_tokens: int
    peak_gib: float
    seconds: float


@dataclass(frozen=True)
class LargestBudget:
    """The largest budget of a stage within a limit, and the trials that say so."""

    stage: str
    windows_per_row: int
    text_tokens_per_row: int
    trials: tuple[RowCost, ...]


def largest_budget(
    stage: Stage, limit_gib: float, trial: Callable[[Shape, int, int], RowCost], *, max_windows: int = 4096
) -> LargestBudget:
    """Search the largest budget whose two worst rows stay within `limit_gib`.

    The two sides grow together, in the stage's own proportion: doubled while it fits, then halved in to an eighth.

    Raises:
        ValueError: not even one clip of the stage's longest fits.
    """
    ratio = stage.budget.text_tokens_per_row / stage.budget.windows_per_row
    trials: list[RowCost] = []

    def fits(windows: int) -> bool:
        for shape in SHAPES:
            done = trial(shape, windows, max(16, round(ratio * windows)))
            trials.append(done)
            if done.peak_gib > limit_gib:
                return False
        return True

    good = stage.max_windows
    if not fits(good):
        raise ValueError(
            f"stage {stage.name}: one clip of {good} windows takes over {limit_gib:.1f} GiB: checkpoint activations "
            "(model.audio.gradient_checkpointing, deepspeed.activation_checkpointing) or use a higher ZeRO stage"
        )
    bad = good * 2
    while bad <= max_windows and fits(bad):
        good, bad = bad, bad * 2
    while bad <= max_windows and bad - good > max(1, good // 8):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return LargestBudget(stage.name, good, max(16, round(ratio * good)), tuple(trials))


def try_row(recipe: Recipe, stage: Stage, shape: Shape, windows: int, text_tokens: int) -> RowCost:
    """One trial in a process of its own: running out of memory ends that process, not this one."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            peak_gib, seconds = pool.submit(_measure, recipe, stage, shape, windows, text_tokens).result()
        except BrokenProcessPool:
            peak_gib, seconds = float("inf"), float("nan")
    return RowCost(shape, windows, text_tokens, peak_gib, seconds)


def made_up_row(stage: Stage, shape: Shape, windows: int, text_tokens: int, max_text_tokens: int, ids: int) -> LmBatch:
    """A row of noise that fills a budget.

    Args:
        ids: number of the LM's own ids, and id of `<audio>`, the first after them.
    """
    if shape == "longest":
        per_clip, num_clips = stage.max_windows, windows // stage.max_windows
        num_questions = num_clips
    else:
        per_clip, num_clips = 1, windows
        num_questions = num_clips * stage.budget.questions_per_clip
    length = max(8, min(max_text_tokens, text_tokens // num_questions))
    num_questions = max(1, min(num_questions, text_tokens // length))
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(1, ids, (num_questions, length), generator=generator)
    input_ids[:, 0] = ids
    labels = input_ids.clone()
    labels[:, : length // 2] = IGNORE
    waveforms = torch.randint(-9999, 9999, (per_clip * num_clips, WINDOW_SAMPLES), generator=generator)
    return LmBatch(
        row=0,
        num_clips=num_clips,
        failures=(),
        sample_ids=(),
        num_truncated=0,
        waveforms=waveforms.to(torch.int16),
        windows_per_clip=torch.full((num_clips,), per_clip),
        audio_index=(torch.arange(num_questions) % num_clips)[:, None],
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        labels=labels,
    )


def _measure(recipe: Recipe, stage: Stage, shape: Shape, windows: int, text_tokens: int) -> tuple[float, float]:
    """Peak GiB and seconds of a row, in this process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(recipe.cluster.threads_per_worker)
    config = recipe_config(recipe)
    model = AudioFlamingo2ForConditionalGeneration(config)
    if stage.lora is not None:
        add_lora(model.language_model, stage.lora)
    freeze_except(model, stage.trainable)
    checkpoint_activations(
        model, layers=recipe.deepspeed.activation_checkpointing, tower=recipe.model.audio.gradient_checkpointing
    )
    precision = resolve(recipe.deepspeed.precision)
    model.to(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    max_text = recipe.model.max_text_tokens
    row = made_up_row(stage, shape, windows, text_tokens, max_text, config.audio_token_id)
    if stage.features == "cached":
        features = torch.randn(len(row.waveforms), costs.TOKENS_PER_WINDOW, model.audio_tower.output_size)
        row = replace(row, waveforms=features)
    task = LmTask("", stage)
    seconds = 0.0
    try:
        for _ in range(2):
            started = time.perf_counter()
            batch = row.to(device)
            with autocast(device, precision):
                loss = task.loss(model, batch, task.count(batch))
            loss.backward()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
    except torch.cuda.OutOfMemoryError:
        return float("inf"), float("nan")
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / costs.GIB
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / costs.GIB
    state = costs.state_gib(
        costs.parameters(model),
        stage.trainable,
        zero_stage=recipe.deepspeed.zero_stage,
        gpus=recipe.cluster.num_workers,
        offload=recipe.deepspeed.offload_optimizer,
    )
    measured = costs.state_gib(costs.parameters(model), stage.trainable, zero_stage=0, gpus=1)["gradients"]
    sums = max(0.0, state["gradients"] - measured) if precision == "bf16" else 0.0
    return peak + state["optimizer"] + sums, seconds
