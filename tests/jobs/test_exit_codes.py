"""How jobs end: the exit code and the one line that says why."""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
from pathlib import Path

import pytest
from botocore.exceptions import ClientError, NoCredentialsError

from af2_ray import cluster, console
from af2_ray.config import Cluster, load_recipe


def refused():
    raise ClientError({"Error": {"Code": "SignatureDoesNotMatch", "Message": "no"}}, "GetObject")


def fail(error):
    def job():
        raise error

    return job


@pytest.mark.parametrize(
    ("job", "code"),
    [
        (fail(ValueError("a key")), console.EXIT_BAD_INPUT),
        (refused, console.EXIT_BAD_INPUT),
        (fail(NoCredentialsError()), console.EXIT_BAD_INPUT),
        (fail(PermissionError("no right")), console.EXIT_BAD_INPUT),
        (fail(RuntimeError("a worker died")), console.EXIT_FAILED),
        (fail(ConnectionError("no server")), console.EXIT_FAILED),
        (fail(KeyboardInterrupt()), console.EXIT_INTERRUPTED),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), console.EXIT_INTERRUPTED),
    ],
)
def test_the_end_of_a_job_is_its_exit_code(job, code):
    with pytest.raises(SystemExit) as ended:
        console.main(job)
    assert ended.value.code == code


def test_a_job_that_ends_well_returns():
    console.main(lambda: None)


def test_an_unreachable_mlflow_is_named_with_its_key():
    recipe = load_recipe("tiny", ["tracking.uri=http://127.0.0.1:9"])
    with pytest.raises(ConnectionError, match=r"tracking\.uri=http://127\.0\.0\.1:9 does not answer"):
        console.check_tracking(recipe, timeout_s=1, tries=1)


def test_a_request_larger_than_the_cluster_is_bad_input_that_names_what_is_missing(monkeypatch):
    monkeypatch.setattr(cluster, "capacity", lambda: {"CPU": 4.0})
    with pytest.raises(ValueError, match=r"GPUs \(there: 0\)"):
        cluster.preflight(Cluster(num_workers=8, gpus="yes"), wait_s=0)
    with pytest.raises(ValueError, match=r"8\.25 CPUs \(there: 4\)"):
        cluster.preflight(Cluster(num_workers=8), wait_s=0)


def test_a_trial_of_a_sweep_needs_a_little_more_than_its_job(monkeypatch):
    """Without it as many trials would start as there are places for their workers, and none could decode."""
    monkeypatch.setattr(cluster, "capacity", lambda: {"CPU": 2.0})
    job = Cluster(num_workers=1, cpus_per_worker=0.8, decode_cpus=0.2)
    assert cluster.max_trials(job) == 1
    assert cluster.max_trials(job.model_copy(update={"cpus_per_worker": 0.7})) == 2
    with pytest.raises(ValueError, match=r"2\.1 CPUs \(there: 2\)"):
        cluster.preflight(job.model_copy(update={"cpus_per_worker": 1.8}), wait_s=0, in_sweep=True)


def test_workers_that_no_node_can_hold_are_bad_input(monkeypatch):
    """Ray would try to place them for ever: it counts what nodes have together, as the totals do."""
    monkeypatch.setattr(cluster, "capacity", lambda: {"CPU": 10.0})
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"CPU": 10.0})
    monkeypatch.setattr(cluster.ray, "available_resources", lambda: {"CPU": 10.0})
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}] * 5)
    cluster.preflight(Cluster(num_workers=5, cpus_per_worker=1.5), wait_s=0)
    with pytest.raises(ValueError, match="each has to fit on one node"):
        cluster.preflight(Cluster(num_workers=2, cpus_per_worker=4), wait_s=0)


def test_workers_without_a_gpu_do_not_see_those_of_their_node(monkeypatch):
    for have, settings, hidden in (
        ({"CPU": 16.0, "GPU": 1.0}, Cluster(num_workers=2), True),  # `auto`: too few for all
        ({"CPU": 16.0, "GPU": 2.0}, Cluster(num_workers=2, gpus="no"), True),
        ({"CPU": 16.0, "GPU": 2.0}, Cluster(num_workers=2), False),
        ({"CPU": 16.0}, Cluster(num_workers=2), False),
    ):
        monkeypatch.setattr(cluster, "capacity", lambda have=have: have)
        told = cluster.worker_env(settings)
        assert (told.get("env_vars") == {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}) is hidden


def test_what_other_jobs_hold_is_a_failure_not_bad_input(monkeypatch):
    monkeypatch.setattr(cluster, "capacity", lambda: {"CPU": 4.0})
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"CPU": 4.0})
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 4.0}}])
    monkeypatch.setattr(cluster.ray, "available_resources", lambda: {"CPU": 1.0})
    with pytest.raises(RuntimeError, match="other jobs hold the rest"):
        cluster.preflight(Cluster(num_workers=2), wait_s=0)


def test_yes_and_no_are_words_in_overrides():
    assert load_recipe("tiny", ["cluster.gpus=yes"]).cluster.gpus == "yes"
    assert load_recipe("tiny", ["cluster.gpus=no"]).cluster.gpus == "no"


def test_a_sweep_into_an_object_store_is_refused_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sweep.py", "frequency", "storage=s3://bucket/runs"])
    job = runpy.run_path(str(Path(__file__).parents[2] / "jobs" / "sweep.py"))["main"]
    with pytest.raises(ValueError, match="a sweep is written on a shared file system"):
        job()
    assert list(tmp_path.iterdir()) == []


def test_what_a_job_s_runtime_environment_sets_is_not_set_again(monkeypatch):
    """Ray refuses a variable that comes twice, with the same value too."""
    monkeypatch.setenv("AF2_SCHEMES", "abfs,memory")
    monkeypatch.setattr(cluster.ray, "init", lambda **options: options)
    assert cluster.connect()["runtime_env"]["env_vars"]["AF2_SCHEMES"] == "abfs,memory"
    job = {"runtime_env": {"env_vars": {"AF2_SCHEMES": "abfs,memory", "OTHER": "1"}}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    assert "AF2_SCHEMES" not in cluster.connect().get("runtime_env", {}).get("env_vars", {})
    job["runtime_env"]["env_vars"]["AF2_SCHEMES"] = "abfs"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    with pytest.raises(ValueError, match="has AF2_SCHEMES=abfs, and its recipe wants abfs,memory"):
        cluster.connect()
