"""Figures of a run beside its loss: speed, MFU, memory, open gates, gradient norms by group.

Cheap figures are taken at every step; those that need collectives or a pass over the parameters, only with a report.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from af2_ray.models.groups import group_of
from af2_ray.train import costs
from af2_ray.train.costs import Work
from af2_ray.train.task import LmTask, Task


class Meter:
    """Operations of a step, from its counts: `tflops` achieved over all ranks, and `mfu` on a GPU whose peak is known.

    Args:
        model: the model of an `LmTask` before the engine shares out its weights; AF-CLAP has no figures yet.
    """

    def __init__(self, task: Task, model: nn.Module, world_size: int) -> None:
        self._task = task if isinstance(task, LmTask) else None
        self._model = costs.meta_model(model.config) if self._task is not None else None
        self._world_size = world_size
        name = torch.cuda.get_device_name().lower() if torch.cuda.is_available() else ""
        self._peak = next((peak for gpu, peak in costs.PEAK_FLOPS.items() if gpu in name), None)

    def __call__(self, metrics: dict[str, float], seconds: float, *, cached: bool) -> dict[str, float]:
        """Rates of a step that took so many seconds."""
        rates = {"windows_per_s": metrics["windows"] / seconds, "tokens_per_s": metrics["tokens"] / seconds}
        if self._task is None:
            return rates
        clips, questions = max(1.0, metrics["clips"]), max(1.0, metrics["questions"])
        work = Work(
            windows=metrics["windows"],
            text_tokens=metrics["tokens"],
            clip_windows=metrics["windows"] / clips,
            text_length=metrics["tokens"] / questions,
            answer_tokens=metrics["labels"],
        )
        flops = costs.step_flops(self._model, work, self._task.stage.trainable, cached=cached)  # type: ignore[arg-type]
        rates["tflops"] = flops / seconds / 1e12
        if self._peak is not None:
            rates["mfu"] = flops / seconds / (self._world_size * self._peak)
        return rates


def memory_gib() -> float:
    """Peak GiB of this rank's GPU since the last call; without a GPU the process' present memory."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        return float(peak)
    return float(psutil.Process().memory_info().rss / 2**30)


def gates(engine: Any) -> dict[str, float]:
    """tanh of every gate of cross-attention, `gate/<layer>/attn` and `gate/<layer>/ff`; 0 is shut. On every rank alike.

    ZeRO-3 keeps the gates whole (they are far below its threshold), but gathers them to be sure.
    """
    import deepspeed

    found: dict[str, float] = {}
    for name, parameter in engine.module.named_parameters():
        kind = name.rsplit(".", 1)[-1]
        if kind in ("attn_gate", "ff_gate"):
            layer = next(part for part in name.split(".") if part.isdigit())
            with deepspeed.zero.GatheredParameters(parameter):
                found[f"gate/{layer}/{kind.removesuffix('_gate')}"] = math.tanh(float(parameter.detach()))
    return found


def gradient_norms(engine: Any) -> dict[str, float]:
    """Norm of the averaged, unclipped gradient of each group, `grad_norm/<group>`; every rank must call it.

    To be called between the last backward of a step and its update. It gathers every gradient: not for each step.
    """
    from deepspeed.utils import safe_get_full_grad

    squares: defaultdict[str, float] = defaultdict(float)
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if (gradient := safe_get_full_grad(parameter)) is not None:
            squares[group_of(name)] += float(gradient.float().square().sum())
    return {f"grad_norm/{group}": math.sqrt(square) for group, square in squares.items()}


def whole_norm(engine: Any) -> Tensor:
    """Norm of the gradients that an engine without ZeRO keeps whole: DeepSpeed clips by it, but does not return it.

    To be called between the last backward of a step and its update; 0 where ZeRO has taken the gradients away.
    """
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)
