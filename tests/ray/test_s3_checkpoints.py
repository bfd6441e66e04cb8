"""Checkpoints on S3: a killed run goes on from them, and a server that is gone for a while costs nothing."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import toy
from safetensors.torch import load_file
from test_train import ROOT, _environment, _overrides, _run_until_killed, _steps
from weed import Server

NUM_STEPS = 10
OUTAGE_S = 20.0
pytestmark = pytest.mark.slow


def command_of(folder: Path, corpus: Path, name: str, *, on_s3: bool) -> list[str]:
    overrides = _overrides(folder, NUM_STEPS, corpus)
    storage = ["checkpoints.storage=s3://audio/checkpoints"] if on_s3 else []
    job = str(ROOT / "jobs" / "train.py")
    return [sys.executable, job, "tiny", *overrides, *storage, "--run", str(folder / name)]


def weights_of(run: Path) -> dict[str, object]:
    assert sorted(set(_steps(run))) == list(range(1, NUM_STEPS + 1))
    return load_file(run / "stages" / "only" / "model" / "model.safetensors")


def assert_same(got: dict[str, object], wanted: dict[str, object]) -> None:
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert tensor.equal(got[name]), name  # type: ignore[attr-defined]


def keys(server: Server) -> list[str]:
    found = server.client().list_objects_v2(Bucket="audio", Prefix="checkpoints/").get("Contents", [])
    return [item["Key"] for item in found]


def test_a_killed_run_goes_on_from_s3_through_an_outage(server: Server, tmp_path: Path) -> None:
    """SIGKILL in mid-stage, then the same command, with the server gone for 20 s from the next save on."""
    corpus = toy.make(tmp_path)
    whole = command_of(tmp_path, corpus, "whole", on_s3=False)
    subprocess.run(whole, env=_environment(), check=True, timeout=400)
    run, killed = tmp_path / "killed", command_of(tmp_path, corpus, "killed", on_s3=True)
    _run_until_killed(killed, run)
    before = keys(server)
    assert any("checkpoint_" in key for key in before), before
    assert not list((run / "stages" / "only").rglob("checkpoint_*")), "checkpoints are on S3 alone"

    done = len(set(_steps(run)))
    process = subprocess.Popen(killed, env=_environment())
    deadline = time.monotonic() + 300
    while len(set(_steps(run))) == done:  # the first new report: a save has just ended, the next one comes
        assert process.poll() is None, "ended before the outage"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    server.kill()
    back = threading.Timer(OUTAGE_S, server.start)
    back.start()
    try:
        assert process.wait(timeout=400) == 0
    finally:
        back.join()
    assert_same(weights_of(run), weights_of(tmp_path / "whole"))
