"""A sweep from its first trial to its last: shared steps, Ray Tune, MLflow, results.

<sweep>/sweep.yaml            what was asked
<sweep>/shared/               steps done once for all trials (a run of the base recipe)
<sweep>/trials/<id>/          a run directory a trial, and result.json when it has ended
<sweep>/report.html, trials.csv, best.yaml
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from af2_ray.cluster import TRIAL_CPUS, max_trials, preflight
from af2_ray.config import Recipe, Sweep, Trial
from af2_ray.runs.mlflow_client import GuardedClient
from af2_ray.runs.run import Run, finished
from af2_ray.runs.tracking import Tracker
from af2_ray.storage.files import read_json, write_whole
from af2_ray.train.stage_clap import train_clap
from af2_ray.train.stages import cache_stages, prepare_language_model
from af2_ray.tune.trial import Result, link_shared, progress, read_result, run_trial, write_result

logger = logging.getLogger(__name__)


class SweepRun:
    """A sweep in its folder; made again with the same sweep it goes on where it was."""

    def __init__(self, sweep: Sweep, root: Path, overrides: Sequence[str] = ()) -> None:
        """`ValueError`: a combination is no valid recipe, or the folder holds another sweep, or a run."""
        self.sweep = sweep
        self.root = root.absolute()
        uri = f"tracking.uri=sqlite:///{self.root}/mlflow.db"
        overrides = [*overrides, "tracking.register_model=false"]  # a trial is to be compared, not to be served
        if "features" in sweep.share:
            overrides.append(f"feature_cache.dir={self.root}/shared/features")
        self.trials = sweep.trials(overrides)
        if self.trials[0].recipe.tracking.uri is None:
            self.trials = sweep.trials([*overrides, uri])
        text = yaml.safe_dump(
            {
                **sweep.model_dump(mode="json"),
                "trials": [trial.recipe.fingerprint() for trial in self.trials],
                "evaluations": [
                    hashlib.sha256(trial.recipe.evaluation.model_dump_json().encode()).hexdigest()[:16]
                    for trial in self.trials
                ],
            },
            sort_keys=False,
        )
        if (self.root / "recipe.yaml").exists():
            raise ValueError(f"{self.root} holds a run, not a sweep; give another --out")
        saved = self.root / "sweep.yaml"
        if saved.is_file() and saved.read_text() != text:
            raise ValueError(f"{self.root} holds another sweep; give another --out, or remove the folder")
        write_whole(saved, text)

    def folder(self, trial: Trial) -> Path:
        return self.root / "trials" / trial.id

    def results(self) -> list[Result]:
        """Of every trial that has ended, in order."""
        return [found for trial in self.trials if (found := read_result(self.folder(trial)))]

    def run(self, *, notify: Callable[[str], None] = lambda text: None) -> list[Result]:
        """Bring every trial to its end, or to where ASHA stops it; failed ones are returned, and run again later."""
        recipe = self.trials[0].recipe
        preflight(recipe.cluster, in_sweep=True)
        tracking = _Tracking(self, recipe)
        left = [trial for trial in self.trials if read_result(self.folder(trial)) is None]
        failed: list[Result] = []
        try:
            if self.sweep.share:
                notify(f"shared by all trials: {', '.join(self.sweep.share)}")
                self._share(recipe)
            for trial in left:
                folder = self.folder(trial)
                link_shared(folder, self.root / "shared", [step for step in self.sweep.share if step != "features"])
                Run.open(trial.recipe, folder)
                tracking.begin(trial)
            failed = self._tune(left, tracking, notify) if left else []
        finally:
            ended = {result.id for result in [*self.results(), *failed]}
            tracking.end([trial for trial in self.trials if trial.id not in ended], failed)
        return [*self.results(), *failed]

    def _share(self, recipe: Recipe) -> None:
        """Make what trials share, with as many workers as the trials would have together."""
        workers = recipe.cluster.num_workers * max_trials(recipe.cluster)
        cluster = recipe.cluster.model_copy(update={"num_workers": workers})
        try:
            recipe = Recipe.model_validate({**recipe.model_dump(exclude_unset=True), "cluster": cluster.model_dump()})
        except ValidationError as error:  # so many do not divide a batch, for instance
            logger.info("shared steps have %d workers: %s", recipe.cluster.num_workers, error)
        run = Run.open(recipe, self.root / "shared")
        tracker = Tracker(run)
        with run.lock(), tracker.closing():
            prepare_language_model(run, tracker)
            if "clap" in self.sweep.share and recipe.clap is not None:
                train_clap(run, tracker)
            tracker.finish("parent")
            if "features" in self.sweep.share:
                cache_stages(run)
        for step in self.sweep.share:
            if step != "features" and not finished(self.root / "shared" / step):
                raise ValueError(f"share: recipe {recipe.name!r} has no {step} step")

    def _tune(self, left: list[Trial], tracking: _Tracking, notify: Callable[[str], None]) -> list[Result]:
        asha = self.sweep.asha
        most = max(self.sweep.num_steps(trial.recipe) for trial in left)
        scheduler = (
            ASHAScheduler(
                time_attr="step",
                metric="loss",
                mode="min",
                max_t=most + 1,  # only rungs end a trial, never its own last step
                grace_period=min(asha.grace_steps, most),
                reduction_factor=asha.reduction_factor,
            )
            if asha
            else FIFOScheduler()
        )
        concurrent = self.sweep.max_concurrent_trials or max_trials(left[0].recipe.cluster)
        watcher = _Watcher(self, tracking, notify)
        tuner = tune.Tuner(
            tune.with_resources(run_trial, tune.PlacementGroupFactory([{"CPU": TRIAL_CPUS}])),
            param_space={
                "id": tune.grid_search([trial.id for trial in left]),
                "folder": tune.sample_from(lambda spec: str(self.root / "trials" / spec.config["id"])),
                "metric": self.sweep.metric,
                "cwd": os.getcwd(),
            },
            tune_config=tune.TuneConfig(max_concurrent_trials=concurrent, scheduler=scheduler),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(self.root),
                callbacks=[watcher],
                verbose=0,
                failure_config=tune.FailureConfig(),
            ),
        )
        tuner.fit()
        return watcher.failed


class _Watcher(tune.Callback):
    """Writes each trial's result and closes its MLflow run, whatever ended it; `failed` has the failed ones."""

    def __init__(self, run: SweepRun, tracking: _Tracking, notify: Callable[[str], None]) -> None:
        self.failed: list[Result] = []
        self._run, self._tracking, self._notify = run, tracking, notify

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._close(trial.config["id"], "")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        path = trial.error_file
        error = Path(path).read_text().strip().splitlines() if path and Path(path).is_file() else ["no message"]
        self._close(trial.config["id"], error[-1])

    def _close(self, trial_id: str, error: str) -> None:
        trial = next(each for each in self._run.trials if each.id == trial_id)
        folder, measure = self._run.folder(trial), self._run.sweep.metric
        steps, loss, seconds = progress(folder, trial.recipe, measure)
        metric = (read_json(folder / "metric.json") or {}).get("metric")
        status = "failed" if error else "done" if metric is not None else "stopped"
        result = Result(trial.id, trial.point, trial.values, trial.seed, status, metric, loss, steps, seconds, error)
        if error:
            self.failed.append(result)
        else:
            write_result(folder, result)
        self._tracking.close(trial, result)
        found = f"{measure} {metric:.4f}" if metric is not None else error or f"loss {loss or 0:.3f}"
        self._notify(f"{trial.id}  {status:8} {found}  {trial.values}")


class _Tracking:
    """MLflow of a sweep: its own run, and below it one run a trial. A server that fails costs a warning."""

    def __init__(self, run: SweepRun, recipe: Recipe) -> None:
        self._run = run
        uri, path = str(recipe.tracking.uri), run.root / "mlflow.json"
        artifacts = (run.root / "mlartifacts").as_uri() if uri.startswith("sqlite") else None
        self._client = GuardedClient(uri, recipe.tracking.experiment, artifacts)
        self._id = (read_json(path) or {}).get("sweep", "")
        if not self._id:
            self._id = self._client.create_run(f"sweep {run.sweep.name}")
            write_whole(path, json.dumps({"sweep": self._id}))
            self._client.log_artifact(self._id, run.root / "sweep.yaml")

    def begin(self, trial: Trial) -> None:
        """Make the trial's MLflow run below the sweep's; the trial itself then writes into it."""
        ids = self._run.folder(trial) / "mlflow.json"
        if ids.is_file() or not self._id:
            return
        if run_id := self._client.create_run(trial.id, parent=self._id):
            write_whole(ids, json.dumps({"parent": run_id}))
            self._client.log_params(run_id, {**trial.values, "seed": trial.seed})
            self._client.log_artifact(run_id, self._run.folder(trial) / "recipe.yaml")

    def close(self, trial: Trial, result: Result) -> None:
        """Close the trial's run and every step of it, with its last metrics."""
        ids = self._ids(trial)
        run_id = ids.get("parent", "")
        last = {"final/metric": result.metric, "final/loss": result.loss, "final/steps": result.steps}
        self._client.log_history(run_id, [{"step": result.steps, **last}])
        self._client.log(self._client.client.set_tag, run_id, "af2.status", result.status)
        for each in ids.values():
            self._client.terminate(each, "FAILED" if result.status == "failed" else "FINISHED")

    def end(self, interrupted: Sequence[Trial], failed: Sequence[Result]) -> None:
        """Close the sweep's own run, and those of trials that something cut short."""
        for trial in interrupted:
            for run_id in self._ids(trial).values():
                self._client.terminate(run_id, "KILLED")
        self._client.terminate(self._id, "FAILED" if interrupted or failed else "FINISHED")

    def _ids(self, trial: Trial) -> dict[str, str]:
        """The MLflow runs of a trial and its steps."""
        return read_json(self._run.folder(trial) / "mlflow.json") or {}
