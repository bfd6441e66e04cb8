"""One trial: a run like any other in a folder of the sweep, whose progress Ray Tune sees.

Ray Tune only decides what runs when, and what is stopped early. What a trial is worth is in its folder (`result.json`,
written last), so a sweep that was killed is simply started again: finished trials are skipped, and one that was
interrupted goes on from its own checkpoint. The price: ASHA forgets which trials passed which rung before the kill.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from af2_ray.cluster import uses_gpu
from af2_ray.config import Recipe, load_recipe
from af2_ray.evaluate.items import ItemResult, answer_results, read_items, share_right, write_items
from af2_ray.machine import every
from af2_ray.runs.run import Run, finished, mark_finished, read_metrics
from af2_ray.storage.files import read_json, write_whole

POLL_S = 1.0
LOSS_WINDOW = 10


@dataclass(frozen=True)
class Result:
    """What became of a trial: `done`, `stopped` early, or `failed` (and then run again by the next call)."""

    id: str
    point: int
    values: dict[str, Any]
    seed: int
    status: str
    metric: float | None = None
    loss: float | None = None
    steps: int = 0
    seconds: float = 0.0
    error: str = ""


def read_result(folder: Path) -> Result | None:
    """The result of a trial that has ended; none if it has not."""
    found = read_json(folder / "result.json")
    return Result(**found) if found else None


def write_result(folder: Path, result: Result) -> None:
    write_whole(folder / "result.json", json.dumps(asdict(result), indent=1))


def progress(folder: Path, recipe: Recipe, metric: str) -> tuple[int, float | None, float]:
    """Optimiser steps over what the trial trains so far, mean of the last losses, seconds in steps."""
    parts = ["clap"] if metric == "composition" else [f"stages/{stage.name}" for stage in recipe.stages]
    history = [row for part in parts for row in read_metrics(folder / part)]
    losses = [row["loss"] for row in history[-LOSS_WINDOW:]]
    return len(history), float(np.mean(losses)) if losses else None, sum(row["step_s"] for row in history)


def link_shared(folder: Path, shared: Path, steps: list[str]) -> None:
    """Let a trial's run begin with steps that were done once: its folders are links to those."""
    folder.mkdir(parents=True, exist_ok=True)
    for step in steps:
        if not (folder / step).exists():
            (folder / step).symlink_to(shared / step, target_is_directory=True)


def run_trial(config: dict[str, Any]) -> None:
    """Ray Tune's entry point: train, evaluate, write the result.

    Args:
        config: `folder` (with recipe.yaml), `metric`, `cwd`.
    """
    from ray import tune

    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # its workers and its evaluation reserve GPUs, a trial itself has none

    from af2_ray.runs.tracking import Tracker
    from af2_ray.train.stage_clap import train_clap
    from af2_ray.train.stages import train_run

    os.chdir(config["cwd"])  # a recipe's paths mean the same as in the sweep's own process
    folder, metric = Path(config["folder"]), config["metric"]
    run = Run.open(load_recipe(folder / "recipe.yaml"), folder)
    with run.lock(), _reporting(run, metric, tune.report):
        if metric == "composition":
            train_clap(run, Tracker(run))
        else:
            train_run(run)
    steps, loss, _ = progress(folder, run.recipe, metric)
    found = loss if metric == "loss" else share_right(evaluate(run, metric), metric)
    write_whole(folder / "metric.json", json.dumps({"metric": found}))
    tune.report({"step": steps, "loss": loss})


def items_path(folder: Path) -> Path:
    return folder / "evaluation" / "marks.jsonl"


def evaluate(run: Run, metric: str) -> list[ItemResult]:
    """What the trial got right, item by item; kept in `<run>/evaluation`. Takes a GPU where training takes some."""
    path, cluster = items_path(run.root), run.recipe.cluster
    if finished(path.parent):
        return read_items(path)
    if uses_gpu(cluster):
        import ray

        items = ray.get(ray.remote(num_cpus=cluster.cpus_per_worker, num_gpus=1)(_items).remote(run, metric))
    else:
        items = _items(run, metric)
    write_items(path, items)
    mark_finished(path.parent, {metric: share_right(items, metric)})
    return items


def _items(run: Run, metric: str) -> list[ItemResult]:
    from af2_ray.evaluate.clap_embed import ClapModel, ClapSettings
    from af2_ray.evaluate.evaluate import evaluate_clap, evaluate_run

    evaluation = run.recipe.evaluation
    if metric == "composition":
        assert run.recipe.clap is not None, "checked with the sweep"
        assert evaluation.captions is not None, "checked with the sweep"
        settings = ClapSettings(run.recipe.clap.max_windows, evaluation.batch_windows, evaluation.gallery)
        return evaluate_clap(ClapModel.load(run.clap_dir / "model", settings), evaluation.captions).items
    out = items_path(run.root).parent
    evaluation = evaluation.model_copy(update={"seen_manifests": [], "captions": None})
    return answer_results(evaluate_run(run.model_dir, evaluation, out_dir=out, deaf=False).predictions)


@contextmanager
def _reporting(run: Run, metric: str, report: Any) -> Iterator[None]:
    """Report steps and loss while the block trains: the loop runs elsewhere, its metrics.jsonl is what grows here."""
    last = 0

    def follow() -> None:
        nonlocal last
        steps, loss, _ = progress(run.root, run.recipe, metric)
        if steps > last and loss is not None:
            report({"step": steps, "loss": loss})
            last = steps

    with every(POLL_S, follow):
        yield
