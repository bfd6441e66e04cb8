"""A run with data, steps, checkpoints and exports on S3: killed, gone on with, through an outage; nothing kept here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toy
from safetensors.torch import load, load_file
from test_train import ROOT, _environment, _overrides
from weed import Folder, Server

from af2_ray.remote import send

NUM_STEPS = 10
OUTAGE_S = 20.0
pytestmark = pytest.mark.slow


def start(corpus: str, storage: str, scratch: Path) -> subprocess.Popen[bytes]:
    """`jobs/train.py` in a folder of its own, all temporary files in `scratch`."""
    job = [sys.executable, str(ROOT / "jobs" / "train.py"), "tiny", *_overrides(storage, NUM_STEPS, corpus)]
    (scratch / "here").mkdir(parents=True)
    environment = _environment() | {"TMPDIR": str(scratch), "RAY_TMPDIR": "/tmp"}
    return subprocess.Popen(job, env=environment, cwd=scratch / "here", start_new_session=True)


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, "the job ended before that"
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_killed_run_goes_on_from_s3_through_an_outage(server: Server, tmp_path: Path) -> None:
    """SIGKILL in mid-stage, then the same command on another disk, with the server gone for 20 s in a save."""
    corpus = toy.make(tmp_path)
    whole = start(str(corpus), str(tmp_path / "runs"), tmp_path / "0")
    assert whole.wait(timeout=400) == 0
    names = [str(path.relative_to(corpus)) for path in corpus.rglob("*") if path.is_file()]
    send(names, corpus, "s3://audio/data/toy")

    store = Folder(server, "runs/tiny")
    killed = start("s3://audio/data/toy", "s3://audio/runs", tmp_path / "1")
    wait_for(lambda: store.steps("only"), killed)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    done = len(set(store.steps("only")))
    assert "stages/only/done.json" not in store.names()
    assert any("only/train/step_" in name for name in store.names())

    again = start("s3://audio/data/toy", "s3://audio/runs", tmp_path / "2")
    wait_for(lambda: len(set(store.steps("only"))) > done, again)  # a save has just ended, the next one comes
    server.kill()
    back = threading.Timer(OUTAGE_S, server.start)
    back.start()
    try:
        assert again.wait(timeout=400) == 0
    finally:
        back.join()
    assert sorted(set(store.steps("only"))) == list(range(1, NUM_STEPS + 1))
    wanted = load_file(tmp_path / "runs" / "tiny" / "stages" / "only" / "model" / "model.safetensors")
    got = load(store.read("stages/only/model/model.safetensors"))
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert tensor.equal(got[name]), name
    kept = {"recipe.yaml", "mlflow.json", "logs/train.log", "lm/done.json", "clap/done.json", "start/done.json"}
    assert kept | {"stages/only/done.json", "stages/only/model/README.md"} <= set(store.names())
    assert not any((tmp_path / "2" / "here").iterdir()), "nothing is kept where the job was started"
    assert not list((tmp_path / "2").glob("af2_ray_run_*")), "the scratch folder goes when the job ends"
