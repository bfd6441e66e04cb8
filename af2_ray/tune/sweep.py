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
from mlflow import MlflowClient
from mlflow.entities import Param
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME
from pydantic import ValidationError

from af2_ray.cluster import TRIAL_CPUS, max_trials, preflight
from af2_ray.config import Evaluation, Recipe, Sweep, Trial
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
                "evaluations": [_digest(trial.recipe.evaluation) for trial in self.trials],
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
        """Bring every trial to its end, or to where ASHA stops it; failed ones are told, and run again next time."""
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
            told = {result.id for result in [*self.results(), *failed]}
            tracking.end([trial for trial in self.trials if trial.id not in told], failed)
        return [*self.results(), *failed]

    def _share(self, recipe: Recipe) -> None:
        """Make what trials share, with as many workers as the trials would have together."""
        workers = recipe.cluster.num_workers * max_trials(recipe.cluster)
        cluster = recipe.cluster.model_copy(update={"num_workers": workers})
        try:
            recipe = Recipe.model_validate({**recipe.model_dump(), "cluster": cluster.model_dump()})
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
        from ray import tune
        from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

        asha, by_id = self.sweep.asha, {trial.id: trial for trial in left}
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
        watcher = _watcher(self, by_id, tracking, notify)
        tuner = tune.Tuner(
            tune.with_resources(run_trial, tune.PlacementGroupFactory([{"CPU": TRIAL_CPUS}])),
            param_space={
                "id": tune.grid_search(list(by_id)),
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
        return list(watcher.failed)


def _digest(evaluation: Evaluation) -> str:
    return hashlib.sha256(evaluation.model_dump_json().encode()).hexdigest()[:16]


def _watcher(run: SweepRun, by_id: dict[str, Trial], tracking: _Tracking, notify: Callable[[str], None]) -> Any:
    """Ray Tune's callback that writes each trial's result and closes its MLflow run, whatever ended it."""
    from ray.tune import Callback

    class Watcher(Callback):
        def __init__(self) -> None:
            self.failed: list[Result] = []

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._close(by_id[trial.config["id"]], "")

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            path = trial.error_file
            error = Path(path).read_text().strip().splitlines() if path and Path(path).is_file() else ["no message"]
            self._close(by_id[trial.config["id"]], error[-1])

        def _close(self, trial: Trial, error: str) -> None:
            folder = run.folder(trial)
            steps, loss, seconds = progress(folder, trial.recipe, run.sweep.metric)
            metric = (read_json(folder / "metric.json") or {}).get("metric")
            status = "failed" if error else "done" if metric is not None else "stopped"
            result = Result(
                trial.id, trial.point, trial.values, trial.seed, status, metric, loss, steps, seconds, error
            )
            if error:
                self.failed.append(result)
            else:
                write_result(folder, result)
            tracking.close(trial, result)
            found = f"{run.sweep.metric} {metric:.4f}" if metric is not None else error or f"loss {loss or 0:.3f}"
            notify(f"{trial.id}  {status:8} {found}  {trial.values}")

    return Watcher()


class _Tracking:
    """MLflow of a sweep: its own run, and below it one run a trial. A server that fails costs a warning."""

    def __init__(self, run: SweepRun, recipe: Recipe) -> None:
        self._run = run
        self._client = MlflowClient(tracking_uri=recipe.tracking.uri)
        self._path = run.root / "mlflow.json"
        self._experiment = self._experiment_id(recipe)
        self._id = (read_json(self._path) or {}).get("sweep", "")
        if not self._id and self._experiment:
            created = self._try(
                self._client.create_run, self._experiment, tags={MLFLOW_RUN_NAME: f"sweep {run.sweep.name}"}
            )
            self._id = created.info.run_id if created else ""
            write_whole(self._path, json.dumps({"sweep": self._id}))
            self._try(self._client.log_artifact, self._id, str(run.root / "sweep.yaml"))

    def _experiment_id(self, recipe: Recipe) -> str:
        try:
            if found := self._client.get_experiment_by_name(recipe.tracking.experiment):
                return str(found.experiment_id)
            local = (self._run.root / "mlartifacts").as_uri() if str(recipe.tracking.uri).startswith("sqlite") else None
            return str(self._client.create_experiment(recipe.tracking.experiment, artifact_location=local))
        except MlflowException as error:
            logger.warning("MLflow at %s does not answer, going on without it: %s", recipe.tracking.uri, error)
            return ""

    def begin(self, trial: Trial) -> None:
        """Make the trial's MLflow run below the sweep's; the trial itself then writes into it."""
        ids = self._run.folder(trial) / "mlflow.json"
        if ids.is_file() or not self._id:
            return
        tags = {MLFLOW_RUN_NAME: trial.id, MLFLOW_PARENT_RUN_ID: self._id}
        if created := self._try(self._client.create_run, self._experiment, tags=tags):
            run_id = created.info.run_id
            write_whole(ids, json.dumps({"parent": run_id}))
            params = [Param(key, str(value)) for key, value in {**trial.values, "seed": trial.seed}.items()]
            self._try(self._client.log_batch, run_id, params=params)
            self._try(self._client.log_artifact, run_id, str(self._run.folder(trial) / "recipe.yaml"))

    def close(self, trial: Trial, result: Result) -> None:
        """Close the trial's run and every step of it, with its last metrics."""
        ids = self._ids(trial)
        if run_id := ids.get("parent"):
            last = {"metric": result.metric, "loss": result.loss, "steps": result.steps}
            for key, value in last.items():
                if value is not None:
                    self._try(self._client.log_metric, run_id, f"final/{key}", float(value), step=result.steps)
            self._try(self._client.set_tag, run_id, "af2.status", result.status)
        status = "FAILED" if result.status == "failed" else "FINISHED"
        for run_id in ids.values():
            self._try(self._client.set_terminated, run_id, status)

    def end(self, interrupted: Sequence[Trial], failed: Sequence[Result]) -> None:
        """Close the sweep's own run, and those of trials that something cut short."""
        for trial in interrupted:
            for run_id in self._ids(trial).values():
                self._try(self._client.set_terminated, run_id, "KILLED")
        if self._id:
            self._try(self._client.set_terminated, self._id, "FAILED" if interrupted or failed else "FINISHED")

    def _ids(self, trial: Trial) -> dict[str, str]:
        """The MLflow runs of a trial and its steps."""
        return read_json(self._run.folder(trial) / "mlflow.json") or {}

    def _try(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except (MlflowException, OSError) as error:
            logger.warning("MLflow %s failed: %s", getattr(call, "__name__", call), error)
            return None
