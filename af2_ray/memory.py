"""Peak memory of a process and all it started: what a job really needs.

PSS counts shared pages (libraries, Ray's object store) once, divided among those that map them; summing RSS would
count them once a process and report several times the truth.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

SAMPLE_S = 20.0  # reading the page tables of a Ray cluster takes a second of CPU
_PSS = re.compile(r"^Pss:\s+(\d+) kB", re.MULTILINE)


def tree_pss_gib() -> float:
    """Sum of PSS over this process and its descendants, in GiB (Linux)."""
    me = psutil.Process()
    total_kib = 0
    for process in [me, *me.children(recursive=True)]:
        with suppress(OSError, psutil.Error):  # it may have ended meanwhile
            found = _PSS.search(Path(f"/proc/{process.pid}/smaps_rollup").read_text())
            total_kib += int(found[1]) if found else 0
    return total_kib / 2**20


class PeakMemory:
    """The highest sample so far, in GiB."""

    gib = 0.0


@contextmanager
def watch_memory() -> Iterator[PeakMemory]:
    """Sample the process tree every few seconds; the yielded object has the peak."""
    peak, stop = PeakMemory(), threading.Event()

    def sample() -> None:
        while True:
            peak.gib = max(peak.gib, tree_pss_gib())
            if stop.wait(SAMPLE_S):
                return

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
