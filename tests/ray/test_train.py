"""Training on Ray for real: a submitted job, and a run that is killed and goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toy
from safetensors.torch import load_file

from af2_ray.runs.run import read_metrics

ROOT = Path(__file__).parents[2]
STAGE = (
    "stages=[{{name: only, max_windows: 2, trainable: [clap, transform, xattn, tokens], "
    "data: [{{manifest: {manifest}}}], "
    "steps: {steps}, checkpoint_every: 2, optimizer: {{lr: 1e-3, warmup_steps: 0}}, "
    "budget: {{windows_per_row: 6, text_tokens_per_row: 512, questions_per_clip: 2, step_batches: 2}}}}]"
)


def _environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return kept | {
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "disabled",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    }


def _overrides(folder: Path | str, steps: int, corpus: Path | str) -> list[str]:
    kept = [item for item in toy.overrides(corpus, folder) if not item.startswith("stages.")]
    return [*kept, STAGE.format(manifest=f"{corpus}/train.json", steps=steps)]


def _steps(run: Path) -> list[int]:
    path = run / "stages" / "only" / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def test_a_submitted_job_trains_every_step_of_a_recipe(ray_head, tmp_path):
    """`ray job submit --working-dir . -- python jobs/train.py tiny` against a local `ray start --head`."""
    corpus = toy.make(tmp_path)
    settings = _overrides(tmp_path / "runs", 4, corpus)
    done = ray_head.submit(sys.executable, "jobs/train.py", "tiny", *settings, environment=_environment())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    run = tmp_path / "runs" / "tiny"
    assert _steps(run) == [1, 2, 3, 4]
    facts = json.loads((run / "stages" / "only" / "done.json").read_text())
    assert facts["steps"] == 4
    assert facts["loss_last"] < 7
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (run / "stages" / "only" / "model").iterdir()
    }
    assert set(json.loads((run / "mlflow.json").read_text())) == {"parent", "lm", "afclap", "only"}


def _run_until_killed(arguments: list[str], run: Path) -> None:
    """Start a run and end all of it by SIGKILL once its stage has a checkpoint."""
    process = subprocess.Popen(arguments, env=_environment(), start_new_session=True)
    deadline = time.monotonic() + 300
    while not _steps(run):  # the first report comes with the first checkpoint
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (run / "stages" / "only" / "done.json").exists()


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(tmp_path):
    """SIGKILL of the job in mid-stage; the same command ends with the weights of an uninterrupted run, bit for bit."""
    corpus = toy.make(tmp_path)
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), "tiny", *_overrides(tmp_path, 14, corpus)]
    weights = {}
    for name in ("whole", "killed"):
        run = tmp_path / name
        arguments = [*command, "--run", str(run)]
        if name == "killed":
            _run_until_killed(arguments, run)
        subprocess.run(arguments, env=_environment(), check=True, timeout=400)
        weights[name] = load_file(run / "stages" / "only" / "model" / "model.safetensors")
        assert sorted(set(_steps(run))) == list(range(1, 15))
    assert weights["whole"].keys() == weights["killed"].keys()
    for name, tensor in weights["whole"].items():
        assert tensor.equal(weights["killed"][name]), name


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_workers(tmp_path):
    """Two workers, killed in mid-stage, then one: the same rows in the same steps, the same loss curve."""
    corpus = toy.make(tmp_path)
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), "tiny", *_overrides(tmp_path, 14, corpus)]
    whole, resized = tmp_path / "whole", tmp_path / "resized"
    subprocess.run([*command, "--run", str(whole)], env=_environment(), check=True, timeout=400)
    _run_until_killed([*command, "--run", str(resized)], resized)
    done = len(set(_steps(resized)))
    arguments = [*command, "cluster.num_workers=1", "--run", str(resized)]
    subprocess.run(arguments, env=_environment(), check=True, timeout=400)
    assert done < 14
    histories = [read_metrics(run / "stages" / "only") for run in (whole, resized)]
    for one, two in zip(*histories, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-3), one["step"]
        assert (two["labels"], two["windows"]) == (one["labels"], one["windows"])
