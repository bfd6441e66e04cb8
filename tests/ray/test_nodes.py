"""A cluster of several nodes without a shared disk: it trains through the loss of a node, sweeps and serves."""

from __future__ import annotations

import concurrent.futures
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nodes
import openai
import pytest
import serve_toy
import toy
import yaml
from safetensors.torch import load, load_file
from test_train import ROOT, _environment, _overrides
from weed import Folder, Server

from af2_ray.storage.stores import send

NUM_STEPS = 16
NODE_CPUS = 1  # one training worker and its decoding: two workers need two nodes
SIZES = ("cluster.cpus_per_worker=0.8", "cluster.decode_cpus=0.2")
MODEL = "stages/only/model"
pytestmark = pytest.mark.slow


@pytest.fixture
def cluster(server: Server, tmp_path: Path) -> Iterator[nodes.Nodes]:
    """A head that only directs, in an environment that knows the store."""
    folder = tmp_path / "nodes"
    folder.mkdir()
    running = nodes.Nodes(folder)
    try:
        yield running
    finally:
        running.stop()


def test_three_nodes_train_through_a_loss_then_sweep_and_serve(
    cluster: nodes.Nodes, server: Server, tmp_path: Path
) -> None:
    corpus = toy.make(tmp_path)
    whole = [str(ROOT / "jobs" / "train.py"), "tiny", *_overrides(tmp_path, NUM_STEPS, corpus)]
    subprocess.run([sys.executable, *whole], env=_environment(), check=True, timeout=400)
    send([str(path.relative_to(corpus)) for path in corpus.rglob("*.*")], corpus, "s3://audio/data/toy")
    store = Folder(server, "runs/tiny")
    _train(cluster, store, tmp_path)
    assert sorted(set(store.steps("only"))) == list(range(1, NUM_STEPS + 1))
    wanted, weights = (
        load_file(tmp_path / "tiny" / MODEL / "model.safetensors"),
        load(store.read(f"{MODEL}/model.safetensors")),
    )
    assert weights.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert tensor.equal(weights[name]), name
    _sweep(cluster, tmp_path)
    _serve(cluster)


def _train(cluster: nodes.Nodes, store: Folder, folder: Path) -> None:
    """A submitted training on two nodes, all storage on S3; one is killed, the job waits, a third joins."""

    def add(name: str) -> subprocess.Popen[bytes]:
        (folder / name).mkdir()
        return cluster.add(num_cpus=NODE_CPUS, scratch=folder / name)

    first, _ = add("a"), add("b")
    overrides = _overrides("s3://audio/runs", NUM_STEPS, "s3://audio/data/toy")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        command = (sys.executable, str(ROOT / "jobs" / "train.py"), "tiny", *overrides, *SIZES)
        submitted = pool.submit(cluster.submit, *command, environment=_environment(), in_image=True)
        deadline = time.monotonic() + 300
        while not store.steps("only"):  # they come with the first checkpoint
            assert not submitted.done(), _said(submitted.result())
            assert time.monotonic() < deadline
            time.sleep(0.1)
        cluster.kill(first)
        done = len(set(store.steps("only")))
        time.sleep(20)
        assert not submitted.done(), "the job waits for a node; it does not end"
        assert len(set(store.steps("only"))) <= done + 4, "one worker alone does not go on"
        add("c")
        result = submitted.result(timeout=400)
    assert result.returncode == 0, _said(result)


def _sweep(cluster: nodes.Nodes, folder: Path) -> None:
    """A submitted sweep, a trial a node."""
    overrides = [*_overrides("s3://audio/runs", 2, "s3://audio/data/toy"), *SIZES, "cluster.num_workers=1"]
    keys = {"model.cross_attention.every": [1, 2]}
    sweep = {"name": "toy", "recipe": "tiny", "overrides": overrides, "keys": keys, "seeds": [0], "metric": "loss"}
    (folder / "toy.yaml").write_text(yaml.safe_dump(sweep))
    out = folder / "sweep"
    command = (sys.executable, str(ROOT / "jobs" / "sweep.py"), str(folder / "toy.yaml"), "--out", str(out))
    result = cluster.submit(*command, environment=_environment(), in_image=True)
    assert result.returncode == 0, _said(result)
    ended = [json.loads(path.read_text())["status"] for path in out.glob("trials/*/result.json")]
    assert ended == ["done", "done"]
    assert (out / "report.html").is_file()


def _serve(cluster: nodes.Nodes) -> None:
    """The trained model from S3, deployed as a RayService does it, answers over HTTP."""
    (port,) = nodes.free_ports(1)
    application = {
        "name": "af2",
        "import_path": "serve_apps.af2:app",
        "args": {
            "model": f"s3://audio/runs/tiny/{MODEL}",
            "recipe": "tiny",
            "overrides": "serve.cpus_per_replica=0.5",
        },
        "runtime_env": {"env_vars": {"PYTHONPATH": str(ROOT)}},  # an image has the code
    }
    told = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}
    _call(cluster, "PUT", told)
    deadline = time.monotonic() + 300
    while (found := _call(cluster, "GET")["applications"].get("af2", {})).get("status") != "RUNNING":
        assert found.get("status") != "DEPLOY_FAILED", found
        assert time.monotonic() < deadline, found
        time.sleep(1)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=60)
    answer = client.chat.completions.create(**serve_toy.chat(serve_toy.wav(3.0), model="af2-tiny"))
    assert answer.usage.completion_tokens > 0


def _call(cluster: nodes.Nodes, method: str, told: dict[str, Any] | None = None) -> Any:
    """Serve's REST interface."""
    body = None if told is None else json.dumps(told).encode()
    request = urllib.request.Request(
        f"{cluster.address}/api/serve/applications/", body, {"Content-Type": "application/json"}, method=method
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        content = reply.read()
    return json.loads(content) if content else None


def _said(result: Any) -> str:
    return str(result.stdout[-3000:] + result.stderr[-2000:])
