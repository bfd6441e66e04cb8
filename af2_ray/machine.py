"""This machine: CPUs that a process may use, memory that it and its children take, a look every few seconds."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

SAMPLE_S = 20.0  # reading the page tables of a Ray cluster takes a second of CPU
_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # `QUOTA PERIOD` in microseconds, or `max PERIOD`


def usable_cpus() -> int:
    """Whole CPUs of this process, at least 1: those it is bound to, or its container's quota where that is less."""
    bound = len(os.sched_getaffinity(0))
    try:
        quota, period = _QUOTA.read_text().split()
    except (OSError, ValueError):
        return bound  # no such file: no container, or an older kernel's
    return bound if quota == "max" else max(1, min(bound, int(quota) // int(period)))


@contextmanager
def every(seconds: float, look: Callable[[], None]) -> Iterator[None]:
    """Call `look` in a thread every few seconds until the block ends; then the thread has ended, too."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(seconds):
            look()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def tree_pss_gib() -> float:
    """Sum of PSS over this process and its descendants, in GiB (Linux): what a job really needs.

    PSS counts shared pages (libraries, Ray's object store) once, divided among those that map them; summing RSS would
    count them once a process and report several times the truth.
    """
    me = psutil.Process()
    total = 0
    for process in [me, *me.children(recursive=True)]:
        with suppress(psutil.Error):  # it may have ended meanwhile
            total += process.memory_full_info().pss
    return total / 2**30


class PeakMemory:
    """The highest sample so far, in GiB."""

    gib = 0.0

    def sample(self) -> None:
        self.gib = max(self.gib, tree_pss_gib())


@contextmanager
def watch_memory() -> Iterator[PeakMemory]:
    """Sample the process tree at once and every few seconds; the yielded object has the peak."""
    peak = PeakMemory()
    peak.sample()
    with every(SAMPLE_S, peak.sample):
        yield peak
