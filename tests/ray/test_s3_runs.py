"""A run with data, steps, checkpoints, exports and MLflow's files on S3: killed, gone on with, through an outage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nodes
import pytest
import toy
from mlflow import MlflowClient
from safetensors.torch import load, load_file
from test_train import ROOT, _environment, _overrides
from weed import Folder, Server

from af2_ray.storage.stores import send

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


def sent_corpus(folder: Path) -> Path:
    """A toy corpus here, and the same at s3://audio/data/toy."""
    corpus = toy.make(folder)
    send([str(path.relative_to(corpus)) for path in corpus.rglob("*") if path.is_file()], corpus, "s3://audio/data/toy")
    return corpus


@pytest.fixture
def mlflow_uri(server: Server, tmp_path: Path) -> Iterator[str]:
    """The server of `make mlflow artifacts=s3://audio/mlflow`."""
    (port,) = nodes.free_ports(1)
    command = [
        *(str(Path(sys.executable).parent / "mlflow"), "server", "--host", "127.0.0.1", "--port", str(port)),
        *("--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db", "--artifacts-destination", "s3://audio/mlflow"),
    ]
    with (tmp_path / "mlflow.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    uri = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: _answers(f"{uri}/health"), process)
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def _answers(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(url, timeout=2).status == 200)
    except OSError:
        return False


def test_a_submitted_training_leaves_everything_on_s3(
    server: Server, mlflow_uri: str, ray_head: nodes.Nodes, tmp_path: Path
) -> None:
    """`ray job submit` with data, run and MLflow's files on S3; MLflow has every step, and the model by its name."""
    sent_corpus(tmp_path)
    settings = [*_overrides("s3://audio/runs", 4, "s3://audio/data/toy"), f"tracking.uri={mlflow_uri}"]
    done = ray_head.submit(sys.executable, "jobs/train.py", "tiny", *settings, environment=_environment())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "model: s3://audio/runs/tiny/stages/only/model" in done.stdout
    store = Folder(server, "runs/tiny")
    assert store.steps("only") == [1, 2, 3, 4]
    client = MlflowClient(tracking_uri=mlflow_uri)
    ids = json.loads(store.read("mlflow.json"))
    assert {client.get_run(run_id).info.status for run_id in ids.values()} == {"FINISHED"}
    assert [row.step for row in client.get_metric_history(ids["only"], "loss")] == [1, 2, 3, 4]
    (version,) = client.search_model_versions(f"run_id = '{ids['parent']}'")
    assert version.name == "af2-tiny"
    files = Folder(server, "mlflow").names()
    for name in ("recipe.yaml", "model/model.safetensors", "model/README.md", "model/tokenizer.json"):
        assert any(file.endswith(f"{ids['parent']}/artifacts/{name}") for file in files), (name, files)


def test_a_killed_run_goes_on_from_s3_through_an_outage(server: Server, tmp_path: Path) -> None:
    """SIGKILL in mid-stage, then the same command on another disk, with the server gone for 20 s in a save."""
    corpus = sent_corpus(tmp_path)
    whole = start(str(corpus), str(tmp_path / "runs"), tmp_path / "0")
    assert whole.wait(timeout=400) == 0

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
