"""A training job killed, or out of disk, at any of its file operations: the same command comes to the same weights."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import toy
from safetensors.torch import load_file
from test_train import ROOT, _environment, _overrides, _steps

from af2_ray.storage.files import LEFTOVER, check_digests, read_rows

pytestmark = pytest.mark.slow

STEPS = 8
NUM_FAILURES = 2  # of each seed, then the job is left alone
MISSING = 2  # files that the manifest names and that are not there


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    corpus = toy.make(tmp_path_factory.mktemp("corpus"))
    path = corpus / "train.json"
    manifest = json.loads(path.read_text())
    for number in range(MISSING):
        manifest["data"][f"bad{number}"] = {**manifest["data"]["0"], "name": f"gone{number}.flac"}
    manifest["total_num"] = len(manifest["data"])
    path.write_text(json.dumps(manifest))
    settings = [*_overrides(corpus.parent, STEPS, corpus), "cluster.num_workers=1", "faults.max_bad_share=0.5"]
    return [sys.executable, str(ROOT / "jobs" / "train.py"), "tiny", *settings]


def start(command: list[str], run: Path, failure: dict[str, str]) -> int:
    environment = _environment() | failure
    environment["PYTHONPATH"] = f"{Path(__file__).parent / 'failing'}:{environment['PYTHONPATH']}"
    arguments = [*command, "--run", str(run)]
    process = subprocess.Popen(arguments, env=environment, start_new_session=True)
    code = process.wait(timeout=400)
    subprocess.run(["pkill", "-9", "-g", str(process.pid)], check=False)
    return code


@pytest.fixture(scope="module")
def whole(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Counter[str]]:
    """Weights and quarantine of a run that nothing happens to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert start(command, run, {}) == 0
    bad = Counter(row["uri"] for row in read_rows(run / "quarantine.jsonl"))
    assert len(bad) == MISSING
    return load_file(run / "stages" / "only" / "model" / "model.safetensors"), bad


@pytest.mark.parametrize("seed", range(10))
def test_a_job_survives_failures_at_any_file_operation(
    command: list[str], whole: tuple[dict[str, Any], Counter[str]], tmp_path: Path, seed: int
) -> None:
    draw, run = random.Random(seed), tmp_path / "run"
    codes = []
    for number in range(NUM_FAILURES):
        place, kind = draw.randint(1, 60), draw.choice(["kill", "kill", "full"])
        once = tmp_path / f"failed{number}"
        codes.append(start(command, run, {"AF2_FAIL_AT": f"{place} {kind}", "AF2_FAIL_ONCE": str(once)}))
        assert codes[-1] in (0, 1, -signal.SIGKILL), f"operation {place} ({kind})"
        assert (codes[-1] == 0) == (not once.exists()) or kind == "full", f"operation {place} ({kind})"
    assert start(command, run, {}) == 0
    weights, bad = whole
    stage = run / "stages" / "only"
    assert set(_steps(run)) == set(range(1, STEPS + 1))
    assert set(Counter(row["uri"] for row in read_rows(run / "quarantine.jsonl"))) == set(bad)
    check_digests(stage / "model")
    found = load_file(stage / "model" / "model.safetensors")
    for name, tensor in weights.items():
        assert tensor.equal(found[name]), name
    assert [path for path in run.rglob(".*") if LEFTOVER.fullmatch(path.name)] == []
