"""The run directory: what is continued, what is refused, what a kill leaves behind."""

from __future__ import annotations

import pytest

from af2_ray.config import load_recipe
from af2_ray.runs.run import Run, finished, mark_finished, read_metrics
from af2_ray.storage.stores import replacing


def test_the_same_recipe_continues_and_another_is_refused_with_the_difference(tmp_path):
    Run.open(load_recipe("tiny"), tmp_path)
    assert Run.open(load_recipe("tiny", ["serve.model_name=other"]), tmp_path).recipe.serve.model_name == "other"
    with pytest.raises(ValueError, match=r"(?s)holds a run of another recipe.*-seed: 0.*\+seed: 1"):
        Run.open(load_recipe("tiny", ["seed=1"]), tmp_path)


def test_load_finds_a_run_again_and_says_when_there_is_none(tmp_path):
    run = Run.open(load_recipe("tiny"), tmp_path / "run")
    assert Run.load(tmp_path / "run") == run
    with pytest.raises(ValueError, match=r"no recipe\.yaml"):
        Run.load(tmp_path)


def test_two_processes_cannot_work_in_one_run(tmp_path):
    run = Run.open(load_recipe("tiny"), tmp_path)
    with run.lock(), pytest.raises(RuntimeError, match="another process"), run.lock():
        pass
    with run.lock():
        pass


def test_a_step_is_finished_only_once_it_is_marked(tmp_path):
    assert finished(tmp_path) is None
    assert mark_finished(tmp_path, {"steps": 3}) == {"steps": 3}
    assert finished(tmp_path) == {"steps": 3}


def test_an_export_that_fails_leaves_the_old_one(tmp_path):
    with replacing(tmp_path / "model") as folder:
        (folder / "weights").write_text("old")
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "model") as folder:
        (folder / "no such folder" / "weights").write_text("half")
    assert (tmp_path / "model" / "weights").read_text() == "old"


def test_metrics_of_repeated_steps_count_once_and_a_torn_line_not_at_all(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 2, "loss": 2.5}\n{"st'
    )
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(1, 3), (2, 2.5)]
