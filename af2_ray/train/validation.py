"""Validation within a stage: the loss on held-out bands of this stage and of those before it, so that forgetting shows.

At each checkpoint every rank takes its rows of each band, decodes them itself (one ahead of the model) and sums its
losses; a band's figure is its mean over all answer tokens. The mean over the stage's own bands says which checkpoint is
best. Test manifests have no part in it.

The trade-off: no second Ray dataset beside the training feed, whose start would take longer than a small band does; in
return the GPU waits for decoding here, so a band is some hundred clips, not thousands.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from af2_ray.data.batching import Plan
from af2_ray.data.collate import LmCollator
from af2_ray.data.samples import Sample
from af2_ray.train.task import Task


@dataclass(frozen=True)
class Band:
    """The validation samples of one stage, planned for the workers there are.

    Attributes:
        name: name of the stage whose band it is.
        is_own: whether it is the present stage's, and so decides which checkpoint is best.
    """

    name: str
    plan: Plan[Sample]
    collator: LmCollator
    is_own: bool


def validate(engine: Any, task: Task, bands: Sequence[Band]) -> dict[str, float]:
    """Mean loss of each band over all ranks, as `val/<name>`, and of the stage's own, as `val/own`.

    Every rank takes equally many rows; the mode of the model is as before afterwards.
    """
    module = engine.module
    modes = {part: part.training for part in module.modules()}
    module.eval()
    found: dict[str, float] = {}
    try:
        with torch.no_grad():
            for band in bands:
                found[f"val/{band.name}"] = _mean_loss(engine, task, band)
                if band.is_own:
                    found["val/own"] = found[f"val/{band.name}"]
    finally:
        for part, mode in modes.items():
            part.training = mode
    return found


def _mean_loss(engine: Any, task: Task, band: Band) -> float:
    loss = torch.zeros((), dtype=torch.float64, device=engine.device)
    count = 0
    for batch in _rows(band, dist.get_rank(), dist.get_world_size()):
        count += task.count(batch)
        loss += task.loss(engine, batch.to(engine.device), 1)  # read once, at the end
    total = torch.stack([loss, torch.tensor(count, dtype=torch.float64, device=engine.device)])
    dist.all_reduce(total)
    return float(total[0] / total[1]) if total[1] else float("nan")


def _rows(band: Band, rank: int, num_ranks: int) -> Iterator[Any]:
    """A rank's batches; the next one is decoded while the model has this one."""
    if len(band.plan) % num_ranks:
        raise ValueError(f"band {band.name}: {len(band.plan)} rows cannot be shared by {num_ranks} ranks alike")
    numbers = range(rank, len(band.plan), num_ranks)
    with ThreadPoolExecutor(1) as pool:
        ahead = None
        for number in numbers:
            coming = pool.submit(band.collator, band.plan.row(number))
            if ahead is not None:
                yield ahead.result().tensors()
            ahead = coming
        if ahead is not None:
            yield ahead.result().tensors()
