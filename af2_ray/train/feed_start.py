"""The step at which a job goes on, and the feed from there.

Ray Train's controller needs no more of a job than this module: it loads neither models nor the training loop, which
took three of its nine seconds at the start of every stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray.data
from ray.train import Result

from af2_ray.data.batching import Plan
from af2_ray.data.feed import Collator, make_dataset
from af2_ray.storage.places import locate
from af2_ray.train.mend import SNAPSHOT


def last_step(storage: str) -> int:
    """Steps that the last checkpoint in a job's storage had done; 0 before the first one."""
    fs, path = locate(storage)
    fs.invalidate_cache()
    if not fs.exists(f"{path}/train/{SNAPSHOT}"):
        return 0
    metrics = Result.from_path(f"{storage}/train").metrics
    return int(metrics["step"]) if metrics else 0


@dataclass(frozen=True)
class Feed:
    """Makes the dataset from the last checkpoint's step on; Ray calls it anew at every start of a worker group."""

    plan: Plan[Any]
    collator: Collator
    storage: str
    decode_cpus: float

    def __call__(self) -> ray.data.Dataset:
        size = self.plan.step_batches
        start = min(last_step(self.storage) * size, len(self.plan) - size)  # all trained: the feed is not read
        return make_dataset(self.plan, self.collator, start=start, decode_cpus=self.decode_cpus)
