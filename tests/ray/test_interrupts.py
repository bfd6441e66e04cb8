"""Ctrl-C: a job says that it was interrupted, MLflow has no run that seems to go on, and the same command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import toy
import yaml
from mlflow import MlflowClient
from test_s3_runs import wait_for
from test_train import ROOT, _environment, _overrides

from af2_ray.runs.run import read_metrics
from af2_ray.tune.trial import read_result

pytestmark = pytest.mark.slow


def test_a_sweep_that_is_cut_short_goes_on_where_it_was(tmp_path: Path) -> None:
    overrides = [*_overrides(tmp_path, 6, toy.make(tmp_path)), "cluster.num_workers=1"]
    sweep = {
        **{"name": "toy", "recipe": "tiny", "overrides": overrides, "metric": "loss", "share": ["lm", "clap"]},
        **{"keys": {"model.cross_attention.every": [1, 2]}, "seeds": [0], "max_concurrent_trials": 1},
    }
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(sweep))
    out = tmp_path / "sweep"
    one, two = (out / "trials" / f"{point:03d}-seed0" for point in range(2))

    arguments = ["sweep.py", str(tmp_path / "toy.yaml"), "--out", str(out)]
    running = start(*arguments)
    wait_for((two / "stages" / "only" / "train").exists, running)
    os.kill(running.pid, signal.SIGINT)
    assert running.wait(timeout=120) == 130
    done = read_result(one)
    assert done is not None
    assert read_result(two) is None
    told = statuses(out)
    assert told["RUNNING"] == 0
    assert told["KILLED"] >= 2, "the trial and its stage"

    written = (one / "result.json").stat().st_mtime_ns
    assert start(*arguments).wait(timeout=300) == 0
    assert (one / "result.json").stat().st_mtime_ns == written, "it did not run again"
    result = read_result(two)
    assert result is not None
    assert result.status == "done"
    assert set(statuses(out)) == {"FINISHED"}
    assert (out / "report.html").is_file()


def test_a_training_that_is_cut_short_goes_on_where_it_was(tmp_path: Path) -> None:
    arguments = ["train.py", "tiny", *_overrides(tmp_path, 12, toy.make(tmp_path))]
    run = tmp_path / "tiny"
    running = start(*arguments)
    wait_for((run / "stages" / "only" / "metrics.jsonl").exists, running)
    os.kill(running.pid, signal.SIGINT)
    assert running.wait(timeout=120) == 130
    assert not (run / "stages" / "only" / "done.json").exists()
    assert statuses(run) == {"FINISHED": 2, "KILLED": 2}, "LM and AF-CLAP had ended, the stage and the whole had not"
    assert start(*arguments).wait(timeout=300) == 0
    assert [row["step"] for row in read_metrics(run / "stages" / "only")] == list(range(1, 13))
    assert set(statuses(run)) == {"FINISHED"}


def start(job: str, *arguments: str) -> subprocess.Popen[bytes]:
    """A job that SIGINT reaches even where these tests run in the background."""
    listens = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    command = [sys.executable, str(ROOT / "jobs" / job), *arguments]
    return subprocess.Popen(command, env=_environment(), preexec_fn=listens, start_new_session=True)


def statuses(out: Path) -> Counter[str]:
    """How many MLflow runs of a run or a sweep are in which state."""
    client = MlflowClient(tracking_uri=f"sqlite:///{out}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return Counter(run.info.status for run in client.search_runs(experiments))
