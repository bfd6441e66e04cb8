"""What the environment holds in confidence is nowhere in what a run leaves behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import toy
from test_train import ROOT, STAGE, _environment

SECRET = "planted-9f3c7a51e2d84b06"
NAMES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN", "OPENAI_API_KEY")


def files_under(folder: Path) -> Iterator[Path]:
    """All files, Ray's session logs among them: `logs/ray` of a run is a link to them."""
    for path in folder.rglob("*"):
        if path.is_symlink() and path.is_dir():
            yield from files_under(path.resolve())
        elif path.is_file():
            yield path


@pytest.mark.slow
def test_a_planted_key_is_found_nowhere(tmp_path: Path) -> None:
    """Recipes, logs (Ray's too), MLflow's database and artifacts, metrics, checkpoints and exports of a whole run."""
    corpus, run = toy.make(tmp_path), tmp_path / "run"
    kept = [item for item in toy.overrides(corpus, tmp_path) if not item.startswith("stages.")]
    stage = STAGE.format(manifest=corpus / "train.json", steps=4)
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), "tiny", *kept, stage, "--run", str(run)]
    environment = _environment() | {name: f"{SECRET}-{name}" for name in NAMES} | {"AWS_ACCESS_KEY_ID": "reader"}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=400, check=True)
    seen = list(files_under(run))
    names = {path.name for path in seen}
    assert {"recipe.yaml", "mlflow.db", "metrics.jsonl", "model.safetensors", "raylet.out"} <= names, sorted(names)
    leaks = [str(path) for path in seen if SECRET.encode() in path.read_bytes()]
    assert leaks == []
    assert SECRET.encode() not in done.stdout + done.stderr
