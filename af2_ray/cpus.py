"""How many CPUs this process may use: those it is bound to, or the quota of its container where that is less."""

from __future__ import annotations

import os
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # `QUOTA PERIOD` in microseconds, or `max PERIOD`


def usable_cpus() -> int:
    """Whole CPUs, at least 1."""
    bound = len(os.sched_getaffinity(0))
    try:
        quota, period = _QUOTA.read_text().split()
    except (OSError, ValueError):
        return bound  # no such file: no container, or an older kernel's
    return bound if quota == "max" else max(1, min(bound, int(quota) // int(period)))
