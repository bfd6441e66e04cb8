"""One optimiser step's samples, cut into rows in several ways, and what every rank and row then makes of them.

Eight questions about six clips of one to three windows; answers of 1 to 30 tokens, the long ones all on one side, so
that two ranks' counts differ tenfold. Optionally one clip is set aside, with its two questions, from one rank alone.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import torch
import torch.distributed as dist
import toy
from torch import Tensor

from af2_ray.config import DeepSpeedSettings, Optimizer
from af2_ray.data.collate import LmBatch
from af2_ray.data.quarantine import Failure
from af2_ray.text import IGNORE
from af2_ray.train.optim import freeze_except
from af2_ray.train.step import Step
from af2_ray.train.task import LmTask

WINDOWS = [1, 2, 1, 3, 1, 2]  # of each clip
QUESTIONS = [(0, 1), (0, 2), (1, 1), (2, 3), (3, 30), (4, 26), (5, 20), (5, 28)]  # clip, answer tokens
BAD_CLIP = 5
GROUPS = ("clap", "transform", "xattn", "tokens")
CUTS = {  # (ranks, micro-batches): which clips each row has, rows in the feed's order (row k to rank k mod ranks)
    (1, 1): [range(6)],
    (2, 1): [range(3), range(3, 6)],
    (1, 4): [[0, 1], [2], [3], [4, 5]],
    (2, 2): [[0], [3, 4], [1, 2], [5]],
}


def task(lr: float) -> LmTask:
    optimizer = Optimizer(lr=lr, warmup_steps=0, grad_clip=1e9)
    return LmTask("", toy.stage(trainable=list(GROUPS), optimizer=optimizer))


TASK = task(1e-3)
GENTLE = task(3e-4)  # rounding does not grow


def make_model(dtype: torch.dtype) -> torch.nn.Module:
    model = small.make_model().to(dtype)
    freeze_except(model, GROUPS)
    return model.train()


def row_of(number: int, clips: list[int], *, with_fault: bool) -> LmBatch:
    """A collated row; the same clip and question are the same numbers in whatever row they stand."""
    heard = [clip for clip in clips if not (with_fault and clip == BAD_CLIP)]
    asked = [(clip, length, q) for q, (clip, length) in enumerate(QUESTIONS) if clip in heard]
    longest = max((length for _, length, _ in asked), default=0)
    ids = torch.full((max(1, len(asked)), 8 + longest), small.PAD)
    labels = torch.full_like(ids, IGNORE)
    for place, (_, length, question) in enumerate(asked):
        ids[place, :8] = small.make_ids(1, 8, seed=question)[0]
        generator = torch.Generator().manual_seed(100 + question)
        answer = torch.randint(1, small.AUDIO, (length,), generator=generator)
        ids[place, 8 : 8 + length] = labels[place, 8 : 8 + length] = answer
    if not asked:
        ids[0, 0], ids[0, 7] = small.AUDIO, small.SEP
    waveforms = [small.make_windows(WINDOWS[clip], seed=clip) for clip in heard]
    lost = tuple(Failure(f"{clip}.wav", "missing") for clip in clips if clip not in heard)
    return LmBatch(
        row=number,
        num_clips=len(clips),
        failures=lost,
        sample_ids=(),
        num_truncated=0,
        waveforms=torch.cat(waveforms) if waveforms else torch.zeros(1, 160_000, dtype=torch.int16),
        windows_per_clip=torch.tensor([WINDOWS[clip] for clip in heard] or [1]),
        audio_index=torch.tensor([heard.index(clip) for clip, _, _ in asked] or [0])[:, None],
        input_ids=ids,
        attention_mask=(ids != small.PAD).long() if asked else torch.ones_like(ids),
        labels=labels,
    )


def my_rows(cut: tuple[int, int], rank: int, *, with_fault: bool) -> list[LmBatch]:
    """The rows that a rank takes of the step."""
    rows = [row_of(k, list(clips), with_fault=with_fault) for k, clips in enumerate(CUTS[cut])]
    return rows[rank :: cut[0]]


class AveragingEngine:
    """What `Step` asks of an engine, in plain PyTorch: averages over micro-batches and ranks, as DeepSpeed does."""

    def __init__(self, module: torch.nn.Module, accumulation: int) -> None:
        self.module, self.device, self._accumulation = module, torch.device("cpu"), accumulation
        self._calls = self.global_steps = 0

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    def backward(self, loss: Tensor) -> None:
        (loss / self._accumulation).backward()

    def step(self) -> None:
        self._calls += 1
        if self._calls % self._accumulation == 0:
            for parameter in self.module.parameters():
                if parameter.requires_grad:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= dist.get_world_size()

    def get_lr(self) -> list[float]:
        return [1.0]

    def get_global_grad_norm(self) -> None:
        return None


class DeepSpeedGradients:
    """A DeepSpeed engine that keeps the gradients of each update before it makes it."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.gradients: dict[str, Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __call__(self, **inputs: Any) -> Any:
        return self._engine(**inputs)

    def step(self) -> None:
        from deepspeed.utils import safe_get_full_grad

        if self._engine.is_gradient_accumulation_boundary():
            for name, parameter in self._engine.module.named_parameters():
                if parameter.requires_grad:
                    grad = safe_get_full_grad(parameter)
                    self.gradients[name] = torch.zeros(0) if grad is None else grad.detach().clone().float()
        self._engine.step()


def run_rank(rank: int, cut: tuple[int, int], folder: str, with_fault: bool, zero_stage: int | None) -> None:
    """One rank of a step: rank 0 saves `metrics` and gradients by name. `zero_stage` none: plain float64."""
    torch.set_num_threads(1)
    num_ranks, accumulation = cut
    store = dist.FileStore(f"{folder}/store", num_ranks)
    dist.init_process_group("gloo", rank=rank, world_size=num_ranks, store=store)
    rows = my_rows(cut, rank, with_fault=with_fault)
    if zero_stage is None:
        engine: Any = AveragingEngine(make_model(torch.float64), accumulation)
        metrics = Step(engine, TASK)(rows)
        gradients = {n: p.grad for n, p in engine.module.named_parameters() if p.requires_grad}
    else:
        gradients, metrics = _deepspeed_step(rank, num_ranks, rows, zero_stage)
    if rank == 0:
        torch.save({"metrics": metrics, "gradients": gradients}, f"{folder}/step.pt")
    dist.barrier()
    dist.destroy_process_group()


def _deepspeed_step(
    rank: int, num_ranks: int, rows: list[LmBatch], zero_stage: int
) -> tuple[dict[str, Tensor], dict[str, float]]:
    settings = DeepSpeedSettings(zero_stage=zero_stage, precision="fp32")  # type: ignore[arg-type]
    watched = DeepSpeedGradients(_start(rank, num_ranks, settings, num_steps=1, accumulation=len(rows)))
    metrics = Step(watched, TASK)(rows)
    return watched.gradients, metrics


def _start(
    rank: int, num_ranks: int, settings: DeepSpeedSettings, *, num_steps: int, accumulation: int, task: LmTask = TASK
) -> Any:
    """A DeepSpeed engine of the model, as `torchrun` would start it."""
    from af2_ray.train.deepspeed import start_engine

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    model = make_model(torch.float32)
    return start_engine(model, settings, task.optimizer, num_steps=num_steps, accumulation=accumulation)


def run_curve(rank: int, folder: str, settings: DeepSpeedSettings, num_steps: int) -> None:
    """One of two ranks of `num_steps` steps on the samples of (2, 2): rank 0 saves the losses."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, store=dist.FileStore(f"{folder}/store", 2))
    rows = my_rows((2, 2), rank, with_fault=False)
    step = Step(_start(rank, 2, settings, num_steps=num_steps, accumulation=len(rows), task=GENTLE), GENTLE)
    losses = [step(rows)["loss"] for _ in range(num_steps)]
    if rank == 0:
        Path(folder, "losses.json").write_text(json.dumps(losses))
    dist.barrier()
    dist.destroy_process_group()


def run_planted(rank: int, folder: str, settings: DeepSpeedSettings, value: float) -> None:
    """A good step; a second whose second row's gradient has an inf or NaN raises, and leaves the weights alone."""
    from deepspeed.utils import safe_get_full_fp32_param

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=1, store=dist.FileStore(f"{folder}/store", 1))
    rows = my_rows((1, 4), 0, with_fault=False)[:2]
    engine = _start(0, 1, settings, num_steps=3, accumulation=2)
    trained = [p for p in engine.module.parameters() if p.requires_grad]

    def weights() -> list[Tensor]:
        if not settings.zero_stage:
            return [p.detach().clone() for p in trained]
        return [safe_get_full_fp32_param(p).clone() for p in trained]

    step = Step(engine, TASK)
    start = weights()
    step(rows)
    before = weights()
    assert any(not torch.equal(one, two) for one, two in zip(start, before, strict=True))
    calls = iter([1.0, value])
    engine.module.added_embeddings.register_hook(lambda gradient: gradient * next(calls))
    with pytest.raises(FloatingPointError, match=r"^step 2: the gradient's norm is (inf|nan): no update was made"):
        step(rows)
    assert all(torch.equal(one, two) for one, two in zip(before, weights(), strict=True))
    dist.destroy_process_group()


def relative_l2(one: Tensor, two: Tensor) -> float:
    """Distance of two tensors over the length of the second; 0 where both are zero."""
    scale = float(np.linalg.norm(two.double().numpy()))
    distance = float(np.linalg.norm((one.double() - two.double()).numpy()))
    return distance / scale if scale else distance
