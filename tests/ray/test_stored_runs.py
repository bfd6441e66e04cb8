"""A run of version 0.1.0's first days, in the middle of a stage, goes on with today's code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import toy
from transformers import AutoModelForCausalLM

import af2_ray.models  # noqa: F401 - makes the model known to transformers
from af2_ray.runs.run import read_metrics

ROOT = Path(__file__).parents[2]
STORED = ROOT / "tests" / "fixtures" / "run_8aa4614.tar.xz"
"""What commit 8aa4614 left of `jobs/train.py tiny` with the overrides in it, killed after step 4 of 30: checkpoints
have no digests, marks no seals. Of finished steps those weights are there that are read again."""


def test_a_stored_run_goes_on(tmp_path: Path) -> None:
    toy.make(tmp_path)
    with tarfile.open(STORED) as tar:
        tar.extractall(tmp_path, filter="data")
    overrides = json.loads((tmp_path / "overrides.json").read_text())
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment = kept | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), "tiny", *overrides]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folder = tmp_path / "runs/old/stages/only"
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == list(range(1, 31))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["step"] == 1 for line in lines) == 1, "it did not begin anew"
    assert json.loads((folder / "done.json").read_text())["steps"] == 30
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert model.config.max_text_tokens is None, "its start is of a version that did not tell"
