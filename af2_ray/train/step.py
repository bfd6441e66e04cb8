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

from af2_ray.train.task import Task


class Step:
    """One optimiser step over this rank's rows of a group.

    Args:
        engine: DeepSpeed's, or anything with its `backward`, `step`, `get_lr`, `get_global_grad_norm` and `device` that
            averages gradients over ranks and micro-batches. The default process group must exist.
        task: model call, loss and count of a batch.
    """

    def __init__(self, engine: Any, task: Task) -> None:
        self._engine = engine
        self._task = task

    def __call__(self, rows: list[Any]) -> dict[str, float]:
        """Train on the rows; loss (a mean over the step's global count), rate, gradient norm and global counts.

        Raises:
            FloatingPointError: the loss is not finite. It is found before the update: the weights are still good.
        """
        engine, device = self._engine, self._engine.device
        num_failed = sum(len(row.failures) for row in rows)
        num_windows = sum(len(row.waveforms) for row in rows)
        num_clips = sum(row.num_clips for row in rows)
        counts = torch.tensor([sum(map(self._task.count, rows)), num_windows, num_clips, num_failed], device=device)
        dist.all_reduce(counts)
        total, windows, clips, failed = counts.tolist()
        undo = dist.get_world_size() * len(rows)  # the engine averages over both
        loss_sum = torch.zeros((), device=device)
        lr = engine.get_lr()[0]
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
            engine.step()
        norm = engine.get_global_grad_norm()
        return {
            "loss": float(loss_sum),
            "lr": float(lr),
            "grad_norm": float(norm) if norm is not None else float("nan"),
            "labels": total,
            "windows": windows,
            "clips": clips,
            "set_aside": failed,
        }
