"""Checkpoints damaged under a killed run: the same command goes on from the newest whole one, to the same weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toy
from safetensors.torch import load_file
from test_train import ROOT, _environment, _overrides, _steps

from af2_ray.train.mend import SNAPSHOT

pytestmark = pytest.mark.slow

STEPS, EVERY, KEEP = 12, 2, 3


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(folder: Path) -> None:
    path = largest(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(folder: Path, num_bytes: int, mask: int) -> None:
    path = largest(folder)
    data = bytearray(path.read_bytes())
    start = len(data) // 2
    data[start : start + num_bytes] = bytes(byte ^ mask for byte in data[start : start + num_bytes])
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "truncated": truncate,
    "4 KiB flipped": lambda folder: flip(folder, 4096, 255),
    "one bit flipped": lambda folder: flip(folder, 1, 1),
    "no checkpoint.json": lambda folder: (folder / "checkpoint.json").unlink(),
    "removed": shutil.rmtree,
    "snapshot empty": lambda folder: (folder.parent / SNAPSHOT).write_text(""),
}


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    corpus = toy.make(tmp_path_factory.mktemp("corpus"))
    settings = [*_overrides(corpus.parent, STEPS, corpus), "cluster.num_workers=1", f"checkpoints.keep={KEEP}"]
    return [sys.executable, str(ROOT / "jobs" / "train.py"), "tiny", *settings]


@pytest.fixture(scope="module")
def whole(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The weights of a run that nothing happens to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    subprocess.run([*command, "--run", str(run)], env=_environment(), check=True, timeout=400)
    return load_file(run / "stages" / "only" / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def killed(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed when it had its third checkpoint."""
    run = tmp_path_factory.mktemp("killed") / "run"
    train = run / "stages" / "only" / "train"
    process = subprocess.Popen([*command, "--run", str(run)], env=_environment(), start_new_session=True)
    deadline = time.monotonic() + 400
    snapshot = train / SNAPSHOT
    while not (snapshot.is_file() and snapshot.read_text().count('"checkpoint_dir_name"') >= KEEP + 1):
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    subprocess.run(["pkill", "-9", "-g", str(process.pid)], check=False)
    process.wait()
    time.sleep(5)  # Ray's own processes end when their driver is gone
    listed = {result["checkpoint_dir_name"] for result in json.loads(snapshot.read_text())["checkpoint_results"]}
    for folder in train.glob("step_*"):
        if folder.name not in listed:
            shutil.rmtree(folder)  # the next one was under way
    assert len(list(train.glob("step_*"))) == KEEP
    return run


@pytest.mark.parametrize("num", [1, 2])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_goes_on(
    command: list[str], whole: dict[str, Any], killed: Path, tmp_path: Path, damage: str, num: int
) -> None:
    run = tmp_path / "run"
    shutil.copytree(killed, run, symlinks=True)
    train = run / "stages" / "only" / "train"
    checkpoints = sorted(train.glob("step_*"))
    for folder in checkpoints[-num:]:
        DAMAGES[damage](folder)
    left = checkpoints[-1 if damage == "snapshot empty" else -1 - num]
    done = subprocess.run(
        [*command, "--run", str(run)], env=_environment(), capture_output=True, text=True, check=False, timeout=400
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    first = int(left.name.removeprefix("step_")) + 1
    again = _steps(run)[len(_steps(killed)) :]  # what this start added: from the checkpoint that was left on
    assert again[0] <= first
    assert again[-STEPS:][-1] == STEPS
    assert sorted(set(_steps(run))) == list(range(1, STEPS + 1))
    aside = {path.name for path in (train / "damaged").glob("*")}
    assert aside == (set() if damage in ("removed", "snapshot empty") else {path.name for path in checkpoints[-num:]})
    for name in aside:
        assert name in done.stdout.replace("\n", ""), "the damaged checkpoint is named on the console"
    weights = load_file(run / "stages" / "only" / "model" / "model.safetensors")
    assert weights.keys() == whole.keys()
    for name, tensor in whole.items():
        assert tensor.equal(weights[name]), name
