"""A cluster of several nodes: a node that dies in mid-stage, and one that joins while the job waits for it."""

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
from safetensors.torch import load_file
from test_train import ROOT, _environment, _overrides, _steps

NUM_STEPS = 16
NODE_CPUS = 1.25  # one training worker and its decoding: two workers need two nodes
pytestmark = pytest.mark.slow


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[nodes.Nodes]:
    """A head that only directs."""
    folder = tmp_path / "nodes"
    folder.mkdir()
    running = nodes.Nodes(folder)
    try:
        yield running
    finally:
        running.stop()


def test_a_node_dies_in_mid_stage_and_another_joins(cluster: nodes.Nodes, tmp_path: Path) -> None:
    """A submitted training on two nodes; one is killed, the job waits, a third joins: the weights of a whole run."""
    corpus = toy.make(tmp_path)
    settings = [*_overrides(tmp_path, NUM_STEPS, corpus), "cluster.cpus_per_worker=1", "cluster.decode_cpus=0.2"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    job = [sys.executable, str(ROOT / "jobs" / "train.py"), "tiny", *settings]
    subprocess.run([*job, "--run", str(whole)], env=_environment(), check=True, timeout=400)

    first, _ = cluster.add(num_cpus=NODE_CPUS), cluster.add(num_cpus=NODE_CPUS)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        command = (sys.executable, "jobs/train.py", "tiny", *settings, "--run", str(broken))
        submitted = pool.submit(cluster.submit, *command, environment=_environment())
        deadline = time.monotonic() + 300
        while not _steps(broken):  # the first report comes with the first checkpoint
            assert not submitted.done(), submitted.result().stdout[-3000:] + submitted.result().stderr[-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        cluster.kill(first)
        done = len(set(_steps(broken)))
        time.sleep(20)
        assert not submitted.done(), "the job waits for a node; it does not end"
        assert len(set(_steps(broken))) <= done + 4, "one worker alone does not go on"
        cluster.add(num_cpus=NODE_CPUS)
        result = submitted.result(timeout=400)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    assert sorted(set(_steps(broken))) == list(range(1, NUM_STEPS + 1))
    weights, wanted = (load_file(run / "stages" / "only" / "model" / "model.safetensors") for run in (broken, whole))
    assert weights.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert tensor.equal(weights[name]), name
