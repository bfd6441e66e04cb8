"""One optimiser step, exact however it was cut: the arithmetic that the loop repeats.

A step's labels are counted over all ranks and micro-batches before the first backward; each rank's loss is its sum
over that count, and what the engine divides by on its own (ranks and micro-batches) is multiplied back. So every answer
token weighs alike whatever the rank, the row or the accumulation, also where one rank's answers are ten times as long
as another's or a clip of its was set aside. `tests/train/test_step.py` shows it in float64, with and without DeepSpeed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from af2_ray.train.optim import batch_factor
from af2_ray.train.task import Task
from af2_ray.train.telemetry import gradient_norms, whole_norm


class Step:
    """One optimiser step over this rank's rows of a group.

    Args:
        engine: DeepSpeed's engine, or anything with its `backward`, `step`, `get_lr`, `get_global_grad_norm` and
            `device` that averages gradients over ranks and micro-batches. The default process group must exist.
        task: model call, loss and count of a batch.
    """

    def __init__(self, engine: Any, task: Task) -> None:
        self._engine = engine
        self._task = task

    def __call__(self, rows: list[Any], *, with_norms: bool = False) -> dict[str, float]:
        """Train on the rows; loss (a mean over the step's global count), rate, gradient norm and global counts.

        Args:
            with_norms: whether to add the gradient norm of each group (`telemetry.gradient_norms`).

        Raises:
            FloatingPointError: the loss is not finite. It is found before the update: the weights are still good.
        """
        engine, device = self._engine, self._engine.device
        mine = {
            "labels": sum(map(self._task.count, rows)),
            "tokens": sum(map(self._task.tokens, rows)),
            "questions": sum(len(row.sample_ids) for row in rows),
            "windows": sum(len(row.waveforms) for row in rows),
            "clips": sum(row.num_clips for row in rows),
            "set_aside": sum(len(row.failures) for row in rows),
        }
        counts = torch.tensor(list(mine.values()), device=device)
        dist.all_reduce(counts)
        totals = dict(zip(mine, counts.tolist(), strict=True))
        total = totals["labels"]
        norms: dict[str, float] = {}
        whole = 0.0
        undo = dist.get_world_size() * len(rows)  # the engine averages over both
        loss_sum = torch.zeros((), device=device)
        factor = batch_factor(self._task.optimizer, total)
        lr = engine.get_lr()[0] * factor
        for number, row in enumerate(rows, 1):
            loss = self._task.loss(engine, row.to(device), total)
            engine.backward(loss * undo)
            loss_sum += loss.detach().float()
            if number == len(rows):
                dist.all_reduce(loss_sum)
                if not torch.isfinite(loss_sum):
                    raise FloatingPointError(
                        f"the loss is {loss_sum.item()}: no update was made; lower optimizer.lr or use fp32"
                    )
                norms = gradient_norms(engine) if with_norms else {}
                whole = whole_norm(engine)
                if factor != 1.0:  # the schedule sets the rates anew after each update
                    for group in engine.optimizer.param_groups:
                        group["lr"] *= factor
            engine.step()
        norm = engine.get_global_grad_norm()
        return {
            "loss": float(loss_sum),
            "lr": float(lr),
            "grad_norm": whole if norm is None else float(norm),
            **norms,
            **totals,
        }
