"""A cluster of several nodes without a shared disk: one dies in mid-stage, one joins while the job waits for it."""

from __future__ import annotations

import concurrent.futures
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nodes
import pytest
import toy
from safetensors.torch import load, load_file
from test_train import ROOT, _environment, _overrides
from weed import Folder, Server

from af2_ray.remote import send

NUM_STEPS = 16
NODE_CPUS = 1  # one training worker and its decoding: two workers need two nodes
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


def test_a_node_dies_in_mid_stage_and_another_joins(cluster: nodes.Nodes, server: Server, tmp_path: Path) -> None:
    """A submitted training on two nodes, all storage on S3; one is killed, a third joins: a whole run's weights."""

    def add(name: str) -> subprocess.Popen[bytes]:
        (tmp_path / name).mkdir()
        return cluster.add(num_cpus=NODE_CPUS, scratch=tmp_path / name)

    corpus = toy.make(tmp_path)
    whole = [str(ROOT / "jobs" / "train.py"), "tiny", *_overrides(tmp_path, NUM_STEPS, corpus)]
    subprocess.run([sys.executable, *whole], env=_environment(), check=True, timeout=400)
    send([str(path.relative_to(corpus)) for path in corpus.rglob("*.*")], corpus, "s3://audio/data/toy")

    first, _ = add("a"), add("b")
    store = Folder(server, "runs/tiny")
    overrides = _overrides("s3://audio/runs", NUM_STEPS, "s3://audio/data/toy")
    sizes = ("cluster.cpus_per_worker=0.8", "cluster.decode_cpus=0.2")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        command = (sys.executable, "jobs/train.py", "tiny", *overrides, *sizes)
        submitted = pool.submit(cluster.submit, *command, environment=_environment())
        deadline = time.monotonic() + 300
        while not store.steps("only"):  # they come with the first checkpoint
            assert not submitted.done(), submitted.result().stdout[-3000:] + submitted.result().stderr[-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        cluster.kill(first)
        done = len(set(store.steps("only")))
        time.sleep(20)
        assert not submitted.done(), "the job waits for a node; it does not end"
        assert len(set(store.steps("only"))) <= done + 4, "one worker alone does not go on"
        add("c")
        result = submitted.result(timeout=400)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    assert sorted(set(store.steps("only"))) == list(range(1, NUM_STEPS + 1))
    wanted = load_file(tmp_path / "tiny" / "stages" / "only" / "model" / "model.safetensors")
    weights = load(store.read("stages/only/model/model.safetensors"))
    assert weights.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert tensor.equal(weights[name]), name
