"""A fork takes over what the changed recipe leaves valid, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from af2_ray.config import load_recipe
from af2_ray.runs.fork import fork
from af2_ray.runs.run import Run, finished, mark_finished


@pytest.fixture
def done(tmp_path: Path) -> Run:
    """A run that has finished all but its last stage."""
    run = Run.open(load_recipe("tiny"), tmp_path / "old")
    for folder in ("lm", "clap", "start", "stages/pretrain", "stages/finetune"):
        (run.root / folder / "model").mkdir(parents=True)
        (run.root / folder / "model" / "weights").write_text(folder)
        (run.root / folder / "train").mkdir()
        mark_finished(run.root / folder, {"name": folder})
    return run


@pytest.mark.parametrize(
    ("override", "taken"),
    [
        ("stages.long.optimizer.lr=1e-3", ["lm", "clap", "start", "pretrain", "finetune"]),
        ("stages.finetune.trainable=[transform, xattn, tokens]", ["lm", "clap", "start", "pretrain"]),
        ("stages.pretrain.steps=7", ["lm", "clap", "start"]),
        ("model.cross_attention.every=3", ["lm", "clap"]),
        (
            "stages.finetune.data=[{manifest: data/demo/short/train.json, weight: 3}]",
            ["lm", "clap", "start", "pretrain"],
        ),
        ("stages.long.data=[{manifest: data/demo/short/train.json}]", []),  # less text for the LM
        ("clap.steps=901", ["lm"]),
        ("deepspeed.precision=fp32", []),
        ("seed=1", []),
        ("cluster.num_workers=1", ["lm", "clap", "start", "pretrain", "finetune"]),
    ],
)
def test_steps_before_the_first_change_are_taken_over(
    done: Run, tmp_path: Path, override: str, taken: list[str]
) -> None:
    run, names = fork(load_recipe("tiny", [override]), done.root, tmp_path / "new")
    assert names == taken
    folders = [run.lm_dir, run.clap_dir, run.start_dir, *(run.stage_dir(s.name) for s in run.recipe.stages)]
    assert [finished(folder) is not None for folder in folders] == [True] * len(taken) + [False] * (6 - len(taken))
    assert not any((folder / "train").exists() for folder in folders), "checkpoints stay behind"
    assert finished(done.stage_dir("finetune")) is not None
    assert Run.load(run.root).recipe == run.recipe


def test_an_lm_that_is_given_stays_when_a_stage_s_data_change(tmp_path: Path) -> None:
    """It has read what it has read; only a small LM that the run itself trains depends on the stages' text."""
    settings = ["model.lm={path: models/qwen, pretrain: null}", "corpus=null"]
    run = Run.open(load_recipe("tiny", settings), tmp_path / "old")
    for folder in ("lm", "clap", "start", "stages/pretrain", "stages/finetune"):
        (run.root / folder).mkdir(parents=True)
        mark_finished(run.root / folder, {"name": folder})
    changed = load_recipe("tiny", [*settings, "stages.long.data=[{manifest: data/other.json}]"])
    assert fork(changed, run.root, tmp_path / "new")[1] == ["lm", "clap", "start", "pretrain", "finetune"]


def test_a_fork_does_not_go_into_a_run(done: Run) -> None:
    with pytest.raises(ValueError, match="give a new --run"):
        fork(load_recipe("tiny"), done.root, done.root)
