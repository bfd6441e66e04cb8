"""The benchmark of a GPU, run on the CPU with a recipe cut down: its figures mean nothing, that they come does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(("part", "key"), [("a", "tiny/arrivals_tokens_per_s"), ("b", "tiny/pretrain/step_s")])
def test_a_part_ends_with_its_figures(part: str, key: str) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--recipes", "tiny", "--quick", "--part", part]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--tree", str(ROOT)], env=environment, capture_output=True, text=True, timeout=500, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1])[key] > 0
