"""Fine-tuning as users run it: a folder of sounds, an interruption, fewer workers, a submitted job with data on S3."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nodes
import numpy as np
import pytest
import soundfile
import toy
from exports import write_export
from job_runner import run_job
from safetensors.torch import load_file
from test_train import ROOT, _environment
from weed import Folder, Server

from af2_ray.config import load_recipe
from af2_ray.runs.run import Run, read_metrics
from af2_ray.storage.stores import send

pytestmark = pytest.mark.slow
STEPS = 12
SETTINGS = [f"stages.finetune.steps={STEPS}", "stages.finetune.checkpoint_every=3", "tracking.register_model=false"]


def write_sounds(folder: Path, *, each: int = 8, seed: int = 0) -> Path:
    """`folder/<label>/<number>.flac`, a second or two each."""
    rng = np.random.default_rng(seed)
    for label in toy.SOUNDS:
        (folder / label.replace(" ", "_")).mkdir(parents=True)
        for number in range(each):
            sound = toy.sound(label, int(toy.RATE * rng.uniform(1.0, 2.0)), rng) + rng.normal(0, 0.01, 1)
            soundfile.write(
                folder / label.replace(" ", "_") / f"{number}.flac", sound * rng.uniform(0.3, 0.9), toy.RATE
            )
    return folder


@pytest.fixture
def start(tmp_path: Path, tiny_tokenizer: Any) -> Path:
    return write_export(tmp_path / "base", tiny_tokenizer)


def command(start: Path | str, sounds: Path | str, run: Path | str, *more: str) -> list[str]:
    return [sys.executable, str(ROOT / "jobs/finetune.py"), *map(str, (start, sounds, *SETTINGS, *more, "--run", run))]


def steps(run: Path) -> list[int]:
    return [row["step"] for row in read_metrics(run / "stages" / "finetune")]


def test_a_folder_of_sounds_is_all_it_takes(
    ray_cluster: Any, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sounds, test = write_sounds(tmp_path / "sounds"), write_sounds(tmp_path / "test", each=3, seed=1)
    arguments = [start, sounds, *SETTINGS, "--test", test, "--run", tmp_path / "run"]
    assert run_job("finetune", *arguments) == 0
    said = capsys.readouterr().out
    for word in ("recipe finetune:", "held out", "scores before", "scores after", "jobs/ask.py", "serve run"):
        assert word in said
    facts = json.loads((tmp_path / "run" / "finetune.json").read_text())
    assert facts["test"]["all"]["questions"] == 12
    assert facts["kept_step"] in (3, 6, 9, 12)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "identification" in page
    assert steps(tmp_path / "run") == list(range(1, STEPS + 1))
    assert run_job("finetune", *arguments) == 0, "the same command finds everything done"
    assert json.loads((tmp_path / "run" / "finetune.json").read_text()) == facts
    capsys.readouterr()
    assert run_job("finetune", *arguments[:-4], "--run", tmp_path / "run") == 2, "other questions"
    assert "answers to other questions" in capsys.readouterr().err


def test_what_cannot_be_used_ends_it_at_once(start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sounds = write_sounds(tmp_path / "sounds", each=6)
    few = write_sounds(tmp_path / "few", each=1)
    run = tmp_path / "run"
    assert run_job("finetune", start, few, "--run", run) == 2
    assert "at least 20" in capsys.readouterr().err
    assert run_job("finetune", start, sounds, "--test", sounds, "--run", run) == 2
    assert "recordings are in both train and test" in capsys.readouterr().err
    assert run_job("finetune", tmp_path / "nothing", sounds, "--run", run) == 2
    assert "no such folder" in capsys.readouterr().err
    assert run_job("finetune", start, sounds, "model.lm.num_layers=7", "--run", run) == 2
    assert "and the start has 2" in capsys.readouterr().err
    assert not run.exists()


def test_a_run_of_another_start_keeps_its_data(
    start: Path, tmp_path: Path, tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    sounds, run = write_sounds(tmp_path / "sounds"), tmp_path / "run"
    Run.open(load_recipe("finetune", [f"model.start={start}"]), run)
    (run / "data").mkdir()
    (run / "data" / "train.jsonl").write_text("what it trained on")
    other = write_export(tmp_path / "other", tiny_tokenizer, seed=1)
    assert run_job("finetune", other, sounds, "--run", run) == 2
    assert "holds a run of another recipe" in capsys.readouterr().err
    assert (run / "data" / "train.jsonl").read_text() == "what it trained on"


def run_until_killed(arguments: list[str], run: Path) -> None:
    process = subprocess.Popen(arguments, env=_environment(), start_new_session=True)
    deadline = time.monotonic() + 300
    while not (run / "stages" / "finetune" / "metrics.jsonl").exists():
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (run / "stages" / "finetune" / "done.json").exists()


def test_killed_it_goes_on_to_the_same_weights_with_fewer_workers_too(start: Path, tmp_path: Path) -> None:
    sounds = write_sounds(tmp_path / "sounds")
    weights = {}
    for name in ("whole", "killed", "fewer"):
        run = tmp_path / name
        arguments = command(start, sounds, run)
        if name != "whole":
            run_until_killed(arguments, run)
        fewer = ["cluster.num_workers=1"] if name == "fewer" else []
        subprocess.run([*arguments, *fewer], env=_environment(), check=True, timeout=400)
        assert steps(run) == list(range(1, STEPS + 1))
        weights[name] = load_file(run / "stages/finetune/model/model.safetensors")
    for name, tensor in weights["whole"].items():
        assert tensor.equal(weights["killed"][name]), name
        assert tensor.allclose(weights["fewer"][name], atol=1e-3), name


def test_submitted_with_start_data_and_run_on_s3(
    server: Server, ray_head: nodes.Nodes, start: Path, tmp_path: Path
) -> None:
    for folder, name in ((start, "models/base"), (write_sounds(tmp_path / "sounds"), "data/sounds")):
        files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        send(files, folder, f"s3://audio/{name}")
    job = command("s3://audio/models/base", "s3://audio/data/sounds", "s3://audio/runs/mine")
    done = ray_head.submit(sys.executable, "jobs/finetune.py", *job[2:], environment=_environment())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "s3://audio/runs/mine/stages/finetune/model" in done.stdout
    store = Folder(server, "runs/mine")
    assert store.steps("finetune") == list(range(1, STEPS + 1))
    assert {"finetune.json", "report.html", "data/train.jsonl", "before/answers.jsonl"} <= set(store.names())
