"""Jobs and the server, given names that nobody should open: a clear refusal, or a row set aside; no contact."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import hostile_names
import pytest
import serve_toy
import toy
from job_runner import run_job

from af2_ray.storage.files import read_rows
from serve_apps.fetch import Fetcher
from serve_apps.schemas import ApiError, AudioUrl

ROOT = Path(__file__).parents[2]
LIMIT_S = 5.0  # for one name


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    return serve_toy.export(tmp_path_factory.mktemp("model"), tiny_tokenizer)


def _manifest(
    folder: Path, hostile: list[tuple[str, str]], num_good: int, make_sound: Any, duration: float | None = 2.0
) -> str:
    """Hostile names spread among good rows about four clips."""
    goods = [make_sound(f"good{number}.flac", 2.0, hz=300 + 100 * number) for number in range(4)]
    rows = [goods[number % 4] for number in range(num_good)]
    step = max(1, num_good // len(hostile))
    for place, (name, _) in enumerate(hostile):
        rows.insert(place * (step + 1), name)
    question = {"prompt": "Which? (A) dog (B) bell", "output": "dog", "options": ["dog", "bell"], "duration": duration}
    path = folder / "train.json"
    path.write_text(json.dumps({"data": {str(place): {"name": name, **question} for place, name in enumerate(rows)}}))
    return str(path)


@pytest.mark.parametrize("duration", [2.0, None])
def test_check_data_counts_them_with_their_reasons(
    hostile: list[tuple[str, str]], tmp_path: Path, make_sound: Any, capsys: Any, duration: float | None
) -> None:
    manifest = _manifest(tmp_path, hostile, 400, make_sound, duration)
    assert run_job("check_data", manifest, "--out", tmp_path / "page.html") == 1
    told = capsys.readouterr().out + (tmp_path / "page.html").read_text()
    assert hostile_names.SECRET not in told
    for reason in {reason for _, reason in hostile}:
        assert reason in told


def test_ask_refuses_each(hostile: list[tuple[str, str]], model_dir: Path, capsys: Any) -> None:
    for name, reason in hostile:
        if name.startswith("-") or (reason == "name leads outside" and not name.startswith("s3://")):
            continue  # an option; a path like others on a command line
        started = time.perf_counter()
        assert run_job("ask", model_dir, name, "What is heard?") == 2
        assert time.perf_counter() - started < LIMIT_S
        told = capsys.readouterr()
        assert reason in told.err
        assert hostile_names.SECRET not in told.out + told.err


@pytest.mark.parametrize("job", ["ask", "evaluate", "convert", "convert --lm", "convert --back", "check_data"])
def test_a_model_or_manifest_of_such_a_name_is_refused(
    hostile: list[tuple[str, str]], job: str, model_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    for name, _ in hostile:
        if name.startswith("-") or not name or "\0" in name:
            continue
        arguments = {
            "ask": [name, "clip.wav", "What?"],
            "evaluate": [model_dir, name, "--out", out],
            "convert": [name, out],
            "convert --lm": [model_dir / "model.safetensors", out, "--lm", name],
            "convert --back": [name, out / "x.safetensors", "--back"],
            "check_data": [name, "--out", tmp_path / "page.html"],
        }[job]
        started = time.perf_counter()
        assert run_job(job.split()[0], *arguments) == 2, name
        assert time.perf_counter() - started < LIMIT_S
        told = capsys.readouterr()
        assert hostile_names.SECRET not in told.out + told.err
    assert not (out / "config.json").exists()


@pytest.mark.parametrize("duration", [2.0, None])
def test_evaluation_goes_on_without_them(
    hostile: list[tuple[str, str]], model_dir: Path, tmp_path: Path, make_sound: Any, duration: float | None
) -> None:
    manifest = _manifest(tmp_path, hostile, 40, make_sound, duration)
    assert run_job("evaluate", model_dir, manifest, "--out", tmp_path / "out", "--max-new-tokens", "2") == 0
    assert len(read_rows(tmp_path / "out" / "predictions.jsonl")) == 40
    aside = json.loads((tmp_path / "out" / "metrics.json").read_text())["set_aside"]
    assert {reason for _, reason in hostile} <= {failure["reason"] for failure in aside}


def test_the_server_fetches_none(hostile: list[tuple[str, str]]) -> None:
    fetcher = Fetcher(["*"], ["s3://bucket"], 2**20)
    for name, _ in hostile:
        if name.startswith("data:"):
            continue  # how a request carries a recording in itself
        started = time.perf_counter()
        with pytest.raises(ApiError) as caught:
            asyncio.run(fetcher.read(AudioUrl(url=name), "recording 1"))
        assert caught.value.status == 400
        assert time.perf_counter() - started < LIMIT_S
        assert hostile_names.SECRET not in str(caught.value)


@pytest.mark.slow
def test_training_labelling_and_evaluation_of_4000_good_rows(
    hostile: list[tuple[str, str]], tmp_path: Path, make_sound: Any
) -> None:
    """By the commands themselves, on Ray: nothing is contacted, nothing hangs, every good row counts."""
    manifest = _manifest(tmp_path, hostile, 4000, make_sound)
    corpus = toy.make(tmp_path)
    before = set(tmp_path.rglob("*"))
    kept = [item for item in toy.overrides(corpus, tmp_path / "runs") if not item.startswith("stages.")]
    stage = (
        f"stages=[{{name: only, max_windows: 2, trainable: [xattn], data: [{{manifest: {manifest}}}], steps: 60, "
        "checkpoint_every: 30, optimizer: {lr: 1e-3}, budget: {windows_per_row: 16, text_tokens_per_row: 2048, "
        "questions_per_clip: 4, step_batches: 2}}]"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "RAY_AUTH_MODE": "disabled"}

    def run(job: str, *arguments: str) -> str:
        command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *arguments]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=900
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    run("train", "tiny", *kept, stage, "faults.max_bad_share=0.2")  # the good rows are about four clips
    root = tmp_path / "runs" / "tiny"
    listed = read_rows(root / "quarantine.jsonl")
    by_text = {reason for _, reason in hostile} - {"missing", "unreadable", "empty file", "not a regular file"}
    assert by_text <= {row["reason"] for row in listed}
    assert {row["uri"] for row in listed}.isdisjoint({str(tmp_path / f"good{number}.flac") for number in range(4)})
    model = str(root / "stages" / "only" / "model")
    run("infer", model, manifest, "--out", str(tmp_path / "answers.jsonl"), "--max-new-tokens", "2")
    answers = read_rows(tmp_path / "answers.jsonl")
    assert len(answers) == 4000 + len(hostile)
    assert sum("answer" in row for row in answers) == 4000
    assert {reason for _, reason in hostile} <= {row["error"].split(":")[0] for row in answers if "error" in row}
    run("evaluate", model, manifest, "--out", str(tmp_path / "scores"), "--max-new-tokens", "2")
    assert len(read_rows(tmp_path / "scores" / "predictions.jsonl")) == 4000
    made = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*") if path not in before}
    assert made <= {"runs", "answers.jsonl", "answers.jsonl.parts", "scores", "train.json.durations.json"}
    logs = [path for path in root.rglob("*") if path.is_file() and path.stat().st_size < 2**22]
    assert all(hostile_names.SECRET.encode() not in path.read_bytes() for path in logs)
