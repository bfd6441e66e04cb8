"""Several ranks in processes of their own, forked from one that has loaded torch and the models already.

A process that is started anew loads them for eight seconds; the server of this session does it once.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

PRELOADED = ["torch.distributed", "af2_ray.train.losses", "af2_ray.train.step", "af2_ray.models"]


def run(function: Callable[..., None], num_ranks: int, *arguments: Any) -> None:
    """`function(rank, *arguments)` in `num_ranks` processes; what fails in one is raised here."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    mp.start_processes(function, args=arguments, nprocs=num_ranks, start_method="forkserver")
