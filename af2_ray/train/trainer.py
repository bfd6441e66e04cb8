"""One TorchTrainer run of a task over a plan: how every stage and AF-CLAP reach Ray.

It takes a plan and a start folder, gives `<folder>/model`, `<folder>/metrics.jsonl` and `<folder>/done.json`, and needs
`cluster.num_workers` workers of `cluster.cpus_per_worker` CPUs (and a GPU each where Ray has them) plus
`cluster.decode_cpus` a decode task.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from af2_ray.cluster import capacity, needed, shortage, uses_gpu, worker_env
from af2_ray.config import Cluster
from af2_ray.data.batching import Plan
from af2_ray.data.feed import Collator, Cursor, check_cursor, data_config
from af2_ray.runs.run import Run, read_metrics
from af2_ray.runs.tracking import ReportCallback, Tracker
from af2_ray.storage.files import read_json, sealed_json, write_whole
from af2_ray.storage.places import is_remote
from af2_ray.storage.stores import local_model
from af2_ray.train.feed_start import Feed
from af2_ray.train.loop import LoopConfig, train_loop
from af2_ray.train.mend import mend
from af2_ray.train.task import Task
from af2_ray.train.validation import Band

logger = logging.getLogger(__name__)

LOSS_WINDOW = 10  # steps over which the first and the last loss are averaged


@dataclass(frozen=True)
class Job:
    """One training run: what, on what, for how long."""

    name: str  # of the MLflow child run
    folder: Path
    task: Task
    plan: Plan[Any]
    collator: Collator
    num_steps: int
    checkpoint_every: int
    bands: tuple[Band, ...] = ()
    export: Literal["last", "best"] = "last"  # weights that are exported; best: with the least loss on the own band
    facts: Mapping[str, float] = field(default_factory=dict)  # of its preparation, reported with the others


def fit(run: Run, job: Job, tracker: Tracker) -> dict[str, Any]:
    """Train to the job's last step, from its last checkpoint if there is one, and mark its folder finished.

    Returns:
        `name`, `steps`, `loss_first` and `loss_last` (means over 10 steps), `padding_share`,
        `padding_share_unplanned`, `windows_per_s`, `seconds` (of this call), `plan` (its fingerprint).

    Raises:
        RuntimeError: the cluster cannot ever hold the workers.
        ValueError: the job was begun with another plan; the message says what changed. Or the model that it starts
            from is damaged.
        ray.train.TrainingFailedError: a worker failed more often than `faults.max_failures`.
    """
    recipe = run.recipe
    started = time.perf_counter()
    job.folder.mkdir(parents=True, exist_ok=True)
    _check_plan(job)
    if not is_remote(job.task.start):
        local_model(job.task.start)  # damage ends the job here, before workers are waited for
    mlflow_id = tracker.child(job.name, {"steps": job.num_steps, "plan": job.plan.fingerprint})
    loop = LoopConfig(
        task=job.task,
        recipe=recipe,
        export=run.address(job.folder / "model"),
        num_steps=job.num_steps,
        step_batches=job.plan.step_batches,
        checkpoint_every=job.checkpoint_every,
        bands=job.bands,
        best=run.address(job.folder / "best") if job.export == "best" else None,
    )
    storage = checkpoint_storage(run, job.folder)
    if saved := mend(storage):
        ReportCallback(run, job.folder, mlflow_id).catch_up(saved.step, saved.accounts)
    run.keep()
    trainer = _Trainer(
        partial(train_loop, loop),  # not as its configuration, which the controller would load with all it refers to
        scaling_config=scaling(recipe.cluster),
        datasets={"train": Feed(job.plan, job.collator, storage, recipe.cluster.decode_cpus)},
        dataset_config=data_config(),
        run_config=RunConfig(
            name="train",
            storage_path=storage,
            failure_config=FailureConfig(max_failures=recipe.faults.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=recipe.checkpoints.keep, checkpoint_score_attribute="keep"),
            callbacks=[ReportCallback(run, job.folder, mlflow_id)],
            worker_runtime_env=worker_env(recipe.cluster),
        ),
    )
    trainer.fit()
    facts = {"name": job.name, **job.facts, **summary(job), "seconds": round(time.perf_counter() - started, 1)}
    tracker.log_history(mlflow_id, [{"step": 0} | {f"final/{key}": value for key, value in facts.items()}])
    tracker.finish(job.name)
    return run.finish(job.folder, facts)


class _Trainer(TorchTrainer):
    """Ray's trainer, which Ctrl-C interrupts as it does any program.

    Its own handler would abort the workers, end the process with success, and stay in place for all that comes after.
    """

    def _register_sigint_handler(self, controller: Any) -> None:
        pass


def scaling(cluster: Cluster) -> ScalingConfig:
    """The workers of a job; `RuntimeError` if the cluster can never hold them (it would wait for ever)."""
    use_gpu = uses_gpu(cluster)
    if missing := shortage(needed(cluster, use_gpu=use_gpu), capacity()):
        raise RuntimeError(
            f"{cluster.num_workers} workers and a decode task need {missing} more than the Ray cluster can give; lower "
            "cluster.num_workers or cluster.cpus_per_worker"
        )
    return ScalingConfig(
        num_workers=cluster.num_workers, use_gpu=use_gpu, resources_per_worker={"CPU": cluster.cpus_per_worker}
    )


def checkpoint_storage(run: Run, folder: Path) -> str:
    """Where the checkpoints of a job in `folder` go: into the run, or to the same place below `checkpoints.storage`."""
    storage = run.recipe.checkpoints.storage
    if storage is None:
        return run.address(folder)
    base = storage if is_remote(storage) else str(Path(storage).absolute())
    mark = hashlib.sha256(run.address(run.root).encode()).hexdigest()[:8]  # sweeps have trials of the same names
    return f"{base.rstrip('/')}/{run.root.name}-{mark}/{folder.relative_to(run.root)}"


def summary(job: Job) -> dict[str, Any]:
    """Facts of a finished job from its metrics and its plan."""
    history = read_metrics(job.folder)
    losses = [row["loss"] for row in history]
    steady = history[len(history) // 10 :]
    seconds = sum(row["step_s"] for row in steady)
    return {
        "steps": len(history),
        "loss_first": float(np.mean(losses[:LOSS_WINDOW])),
        "loss_last": float(np.mean(losses[-LOSS_WINDOW:])),
        "windows_per_s": round(sum(row["windows"] for row in steady) / seconds, 2) if seconds else 0.0,
        "wait_share": round(sum(row["wait_s"] for row in steady) / seconds, 4) if seconds else 0.0,
        "report_share": round(sum(row["report_s"] for row in steady) / seconds, 4) if seconds else 0.0,
        "set_aside": int(sum(row["set_aside"] for row in history)),
        "plan": job.plan.fingerprint,
        **asdict(job.plan.stats),
    }


def _check_plan(job: Job) -> None:
    """Keep the cursor's plan in `plan.json` at the first start, and refuse to go on with another one."""
    path = job.folder / "plan.json"
    known = read_json(path)
    if known is None:
        write_whole(path, sealed_json(asdict(Cursor.of(job.plan))))
        return
    try:
        check_cursor(job.plan, Cursor(**known))
    except ValueError as error:
        raise ValueError(f"{job.folder}: {error}") from error
