"""A request costs what its bytes cost, whatever its shape."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = Path(__file__).with_name("costs_child.py")


@pytest.mark.parametrize("mib", [4, pytest.param(64, marks=pytest.mark.slow)])
def test_no_shape_of_request_takes_much_memory_or_stops_the_event_loop(mib: int) -> None:
    """Each of sixty is a 4xx with a sentence; peak below 4 x body + 100 MiB, lag of the event loop below 0.5 s."""
    path = os.pathsep.join([str(CHILD.parents[2]), str(CHILD.parents[1])])
    done = subprocess.run(
        [sys.executable, str(CHILD), str(mib)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) >= 60
    print({what: max((cost[what], name) for name, cost in found.items()) for what in ("peak_mib", "lag_s")})
    for name, cost in found.items():
        assert 400 <= cost["status"] < 500, (name, cost)
        assert 20 < len(cost["message"]) < 300, (name, cost)
        assert cost["peak_mib"] < 4 * mib + 100, (name, cost)
        assert cost["lag_s"] < 0.5, (name, cost)
