"""MLflow: one parent run for a recipe, a child for each step of it.

The run ids live in the run directory, so a restarted job goes on in the same MLflow runs. Metrics are written by the
Ray Train controller (`ReportCallback`), never by a worker: a worker's death loses nothing and no rank writes twice.
A tracking server that cannot be reached costs a warning, not the run: `metrics.jsonl` has every step regardless.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.train import Checkpoint, UserCallback

from af2_ray.data.quarantine import Quarantine
from af2_ray.runs.mlflow_client import GuardedClient
from af2_ray.runs.run import Run
from af2_ray.storage.files import append_lines, read_json, read_rows, write_whole

logger = logging.getLogger(__name__)

MODEL_ARTIFACT = "model"  # the folder of the parent run that holds the export


class Tracker:
    """The MLflow side of a run. Every method is a no-op with a warning where the server does not answer."""

    def __init__(self, run: Run) -> None:
        tracking = run.recipe.tracking
        artifacts = run.root / "mlartifacts"
        own = artifacts.as_uri() if run.uri is None else run.address(artifacts)
        self.uri = tracking.uri or f"sqlite:///{run.root}/mlflow.db"
        self._run = run
        self._client = GuardedClient(self.uri, tracking.experiment, None if tracking.uri else own)
        self._ids_path = run.root / "mlflow.json"
        self._ids: dict[str, str] = read_json(self._ids_path) or {}

    def parent(self) -> str:
        """The parent run's id, made at first use with the recipe as parameters and artifact."""
        new = "parent" not in self._ids
        run_id = self._ensure("parent", self._run.recipe.name)
        if new and run_id:
            self.log_params(run_id, _flatten(self._run.recipe.model_dump(mode="json", exclude={"corpus", "stages"})))
            self._client.log_artifact(run_id, self._run.root / "recipe.yaml")
        return run_id

    def child(self, name: str, params: dict[str, Any]) -> str:
        """The child run's id of one step of the recipe, made at first use."""
        parent = self.parent()
        new = name not in self._ids
        run_id = self._ensure(name, name, parent)
        if new:
            self.log_params(run_id, _flatten(params))
        return run_id

    def _ensure(self, key: str, name: str, parent: str = "") -> str:
        if key in self._ids:
            self._client.log(self._client.client.update_run, self._ids[key], "RUNNING")  # it goes on
        elif run_id := self._client.create_run(name, parent):
            self._ids[key] = run_id
            write_whole(self._ids_path, json.dumps(self._ids, indent=1))
        return self._ids.get(key, "")

    def log_params(self, run_id: str, params: dict[str, Any]) -> None:
        """Parameters of a run."""
        self._client.log_params(run_id, params)

    def log_metrics(self, run_id: str, metrics: dict[str, float], step: int = 0) -> None:
        """Metrics of one step."""
        self.log_history(run_id, [{"step": step, **metrics}])

    def log_history(self, run_id: str, history: list[dict[str, Any]]) -> None:
        """Metrics of many steps: rows with a `step` and numbers."""
        self._client.log_history(run_id, history)

    def log_artifact(self, run_id: str, path: Path) -> None:
        """A file of the run directory as an artifact."""
        self._client.log_artifact(run_id, path)

    def register(self, name: str, folder: Path) -> None:
        """Keep an export with the parent run and register it as the next version of `name`; once a run."""
        if run_id := self._ids.get("parent"):
            self._client.attempt(self._register, name, folder, run_id)

    def _register(self, name: str, folder: Path, run_id: str) -> None:
        client = self._client.client
        if client.search_model_versions(f"run_id = '{run_id}'"):
            return
        client.log_artifacts(run_id, str(folder), MODEL_ARTIFACT)
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name)
        source = f"{client.get_run(run_id).info.artifact_uri}/{MODEL_ARTIFACT}"
        version = client.create_model_version(name, source, run_id)
        logger.info("registered %s as version %s of %s", folder, version.version, name)

    def finish(self, name: str) -> None:
        """Close the run called `name` (`parent` or a child)."""
        self._client.terminate(self._ids.get(name, ""), "FINISHED")

    @contextmanager
    def closing(self) -> Iterator[None]:
        """A context around all of a run's work: if that ends early, none of its MLflow runs is left as running."""
        try:
            yield
        except BaseException as error:
            status = "FAILED" if isinstance(error, Exception) else "KILLED"
            for run_id in self._ids.values():
                found = self._client.attempt(self._client.client.get_run, run_id)
                if found is None:
                    break  # the server is away: each further question would wait for it in vain
                if found.info.status == "RUNNING":
                    self._client.terminate(run_id, status)
            raise

    def num_runs(self) -> int:
        """How many MLflow runs this run has made."""
        return len(self._ids)


class ReportCallback(UserCallback):
    """Writes what workers report: `metrics.jsonl`, MLflow, `quarantine.jsonl`. Runs in the Ray Train controller."""

    def __init__(self, run: Run, folder: Path, mlflow_id: str) -> None:
        self._run = run
        self._folder = folder
        self._mlflow_id = mlflow_id
        self._tracker: Tracker | None = None
        self._quarantine: Quarantine | None = None
        self._is_behind = False

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """Called when every rank has reported; rank 0 carries the history, each rank its own set-aside items."""
        history = metrics[0]["history"]
        append_lines(self._folder / "metrics.jsonl", map(json.dumps, history))
        if self._tracker is None or self._quarantine is None:
            self._tracker = Tracker(self._run)
            self._quarantine = self._run.quarantine()
        self._tracker.log_history(self._mlflow_id, history)
        if validation := metrics[0].get("validation"):
            row = _validation_row(metrics[0]["step"], validation, metrics[0]["is_best"])
            append_lines(self._folder / "validation.jsonl", [json.dumps(row)])
            self._tracker.log_history(self._mlflow_id, [row])
        failures = [failure for rank in metrics for failure in rank["failures"]]
        self._quarantine.add(failures, sum(row["clips"] for row in history))
        if checkpoint is not None or self._is_behind:
            self._keep()

    def catch_up(self, step: int, accounts: Mapping[str, Any]) -> None:
        """Write what a checkpoint reports and the files lack: the driver was killed between the two.

        Args:
            step: step of the checkpoint.
            accounts: `history`, `failures` and `validation` since the one before; empty: it is of an older version.
        """
        tracker = Tracker(self._run)
        there = {row.get("step") for row in read_rows(self._folder / "metrics.jsonl")}
        lacking = [row for row in accounts.get("history", []) if row["step"] not in there]
        append_lines(self._folder / "metrics.jsonl", map(json.dumps, lacking))
        tracker.log_history(self._mlflow_id, lacking)
        validated = {row.get("step") for row in read_rows(self._folder / "validation.jsonl")}
        if accounts.get("validation") and step not in validated:
            row = _validation_row(step, accounts["validation"], accounts["is_best"])
            append_lines(self._folder / "validation.jsonl", [json.dumps(row)])
            tracker.log_history(self._mlflow_id, [row])
        num_clips = sum(row["clips"] for row in accounts.get("history", []))
        self._run.quarantine().add(accounts.get("failures", []), num_clips)

    def _keep(self) -> None:
        """What a restart from this checkpoint goes on with; a store that is away gets it with the next report."""
        try:
            self._run.keep()
            self._is_behind = False
        except OSError as error:
            self._is_behind = True
            logger.warning("%s does not take what was reported, the next report brings it: %s", self._run.uri, error)


def _validation_row(step: int, validation: Mapping[str, float], is_best: bool) -> dict[str, Any]:
    return {"step": step, **validation, "val/is_best": float(is_best)}


def _flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
