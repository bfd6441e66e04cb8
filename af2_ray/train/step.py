"""One optimiser step, exact however it was cut: the arithmetic that the loop repeats.

A step's labels are counted over all ranks and micro-batches before the first backward; each rank's loss is its sum
over that count, and what the engine divides by on its own (ranks and micro-batches) is multiplied back. So every answer
token weighs alike whatever the rank, the row or the accumulation, also where one rank's answers are ten times as long
as another's or a clip of its was set aside. `tests/train/test_step.py` shows it in float64, with and without DeepSpeed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from af2_ray.train.optim import batch_factor
from af2_ray.train.task import Task
from af2_ray.train.telemetry import gradient_norms, whole_norm


class Step:
    """One optimiser step over this rank's rows of a group.

    A GPU is asked for numbers once, just before the update; until then the host only hands it work.

    Args:
        engine: DeepSpeed's engine, or anything with its `backward`, `step`, `get_lr`, `get_global_grad_norm`,
            `global_steps` and `device` that averages gradients over ranks and micro-batches. The default process group
            must exist.
        task: model call, loss and count of a batch.
    """

    def __init__(self, engine: Any, task: Task) -> None:
        self._engine = engine
        self._task = task
        self._rows: list[Any] = []
        self._losses: list[Tensor] = []  # of the step over all ranks, and of each of this rank's rows
        self._loss = 0.0
        self._sees_norm = _watch_norm(engine, self._check)

    def __call__(self, rows: list[Any], *, with_norms: bool = False) -> dict[str, float]:
        """Train on the rows; loss (a mean over the step's global count), rate, gradient norm and global counts.

        Args:
            with_norms: whether to add the gradient norm of each group (`telemetry.gradient_norms`).

        Raises:
            FloatingPointError: the loss or the gradient is not finite. It is found before the update: the weights are
                still good.
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
        sums = _sum_over_ranks(list(mine.values()), device)
        totals: dict[str, int] = {}
        norms: dict[str, float] = {}
        whole = 0.0
        undo = dist.get_world_size() * len(rows)  # the engine averages over both
        loss_sum = torch.zeros((), device=device)
        losses = []
        factor, lr = 1.0, 0.0
        for number, row in enumerate(_moved(rows, device), 1):
            loss = self._task.loss(engine, row, 1)
            if number == 1:  # the counts have travelled while the first row went forward
                totals = dict(zip(mine, sums(), strict=True))
                factor = batch_factor(self._task.optimizer, totals["labels"])
                lr = engine.get_lr()[0] * factor
            loss = loss / max(totals["labels"], 1)
            engine.backward(loss * undo)
            losses.append(loss.detach().float())
            loss_sum += losses[-1]
            if number == len(rows):
                self._rows, self._losses = rows, [loss_sum, *losses]
                dist.all_reduce(loss_sum)
                norms = gradient_norms(engine) if with_norms else {}
                if not self._sees_norm:
                    whole = self._check(whole_norm(engine))
                if factor != 1.0:  # the schedule sets the rates anew after each update
                    for group in engine.optimizer.param_groups:
                        group["lr"] *= factor
            engine.step()
        norm = engine.get_global_grad_norm()
        norm = whole if norm is None else float(norm)
        if not math.isfinite(norm):  # ZeRO 3 has then left out the update
            raise self._refusal(f"the gradient's norm is {norm}", done=1)
        return {"loss": self._loss, "lr": float(lr), "grad_norm": norm, **norms, **totals}

    def _check(self, norm: Tensor) -> float:
        """The gradient's norm, if it and the losses are finite: all that the host reads of a step, at once."""
        losses = torch.stack(self._losses).to(norm.device, torch.float64)
        self._loss, *mine, found = torch.cat([losses, norm.reshape(1).double()]).tolist()
        if not math.isfinite(self._loss):
            bad = [(row.row, loss) for row, loss in zip(self._rows, mine, strict=True) if not math.isfinite(loss)]
            where, loss = (f"row {bad[0][0]}", bad[0][1]) if bad else ("another rank's row", self._loss)
            raise self._refusal(f"the loss of {where} is {loss}")
        if not math.isfinite(found):
            raise self._refusal(f"the gradient's norm is {found}")
        return float(found)

    def _refusal(self, what: str, *, done: int = 0) -> FloatingPointError:
        step = self._engine.global_steps + 1 - done
        return FloatingPointError(f"step {step}: {what}: no update was made; lower optimizer.lr or use fp32")


def _watch_norm(engine: Any, check: Callable[[Tensor], float]) -> bool:
    """Let `check` see the norm that ZeRO 1 and 2 clip by, between taking it and the update; whether it will.

    DeepSpeed goes on with the norm on the host, and need not wait for the GPU again in each parameter group.
    """
    optimizer = getattr(engine, "optimizer", None)
    norm_of = getattr(type(optimizer), "scaled_global_norm", None)
    if norm_of is None:
        return False

    def checked(*args: Any, **kwargs: Any) -> Tensor:
        norm: Tensor = norm_of(optimizer, *args, **kwargs)
        return torch.tensor(check(norm), dtype=norm.dtype)

    optimizer.scaled_global_norm = checked  # type: ignore[union-attr]
    return True


def _sum_over_ranks(numbers: list[int], device: torch.device) -> Callable[[], list[int]]:
    """The sums over all ranks, under way: a call waits for them, and for nothing that was handed to the GPU since."""
    if dist.get_world_size() == 1:
        return lambda: numbers
    on_gpu = device.type == "cuda"
    sums = torch.tensor(numbers, pin_memory=on_gpu).to(device, non_blocking=True)
    dist.all_reduce(sums)
    if not on_gpu:
        return sums.tolist
    here = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True).copy_(sums, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def read() -> list[int]:
        arrived.synchronize()
        return here.tolist()

    return read


def _moved(rows: list[Any], device: torch.device) -> Iterator[Any]:
    """The rows on the device. A GPU copies each from pinned memory, beside its work on the row before."""
    if device.type != "cuda":
        yield from (row.to(device) for row in rows)
        return
    copies = torch.cuda.Stream(device)
    for row in rows:
        with torch.cuda.stream(copies):
            moved = row.pinned().to(device)
        work = torch.cuda.current_stream(device)
        work.wait_stream(copies)
        for tensor in moved.arrays():
            if tensor.is_cuda:
                tensor.record_stream(work)
        yield moved
