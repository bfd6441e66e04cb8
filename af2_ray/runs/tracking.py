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
from functools import cached_property
from pathlib import Path
from typing import Any

from ray.train import Checkpoint, UserCallback

from af2_ray.data.quarantine import Quarantine
from af2_ray.runs.mlflow_client import GuardedClient
from af2_ray.runs.run import Run
from af2_ray.storage.files import append_lines, read_json, read_rows, write_whole

logger = logging.getLogger(__name__)

MODEL_ARTIFACT = "model"  # the folder of the parent run that holds the export


class Tracker(GuardedClient):
    """The MLflow side of a run."""

    def __init__(self, run: Run) -> None:
        tracking = run.recipe.tracking
        artifacts = run.root / "mlartifacts"
        own = artifacts.as_uri() if run.uri is None else run.address(artifacts)
        self.uri = tracking.uri or f"sqlite:///{run.root}/mlflow.db"
        self._run = run
        super().__init__(self.uri, tracking.experiment, None if tracking.uri else own)
        self._ids_path = run.root / "mlflow.json"
        self._ids: dict[str, str] = read_json(self._ids_path) or {}

    def parent(self) -> str:
        """The parent run's id, made at first use with the recipe as parameters and artifact."""
        new = "parent" not in self._ids
        run_id = self._ensure("parent", self._run.recipe.name)
        if new and run_id:
            self.log_params(run_id, _flatten(self._run.recipe.model_dump(mode="json", exclude={"corpus", "stages"})))
            self.log_artifact(run_id, self._run.root / "recipe.yaml")
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
            self.log(self.client.update_run, self._ids[key], "RUNNING")  # it goes on
        elif run_id := self.create_run(name, parent):
            self._ids[key] = run_id
            write_whole(self._ids_path, json.dumps(self._ids, indent=1))
        return self._ids.get(key, "")

    def register(self, name: str, folder: Path) -> None:
        """Keep an export with the parent run and register it as the next version of `name`; once a run."""
        if run_id := self._ids.get("parent"):
            self.attempt(self._register, name, folder, run_id)

    def _register(self, name: str, folder: Path, run_id: str) -> None:
        client = self.client
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
        self.terminate(self._ids.get(name, ""), "FINISHED")

    @contextmanager
    def closing(self) -> Iterator[None]:
        """A context around all of a run's work: if that ends early, none of its MLflow runs is left as running."""
        try:
            yield
        except BaseException as error:
            status = "FAILED" if isinstance(error, Exception) else "KILLED"
            for run_id in self._ids.values():
                found = self.attempt(self.client.get_run, run_id)
                if found is None:
                    break  # the server is away: each further question would wait for it in vain
                if found.info.status == "RUNNING":
                    self.terminate(run_id, status)
            raise

    def num_runs(self) -> int:
        """How many MLflow runs this run has made."""
        return len(self._ids)


class ReportCallback(UserCallback):
    """Writes what workers report: `metrics.jsonl`, MLflow, `quarantine.jsonl`. Runs in the Ray Train controller.

    What it writes with is made at the first report: it would not travel there.
    """

    def __init__(self, run: Run, folder: Path, mlflow_id: str) -> None:
        self._run = run
        self._folder = folder
        self._mlflow_id = mlflow_id
        self._is_behind = False

    @cached_property
    def _tracker(self) -> Tracker:
        return Tracker(self._run)

    @cached_property
    def _quarantine(self) -> Quarantine:
        return self._run.quarantine()

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """Called when every rank has reported; rank 0 carries the history, each rank its own set-aside items."""
        first = metrics[0]
        self._write("metrics.jsonl", first["history"])
        if first.get("validation"):
            self._write("validation.jsonl", [_validation_row(first["step"], first)])
        failures = [failure for rank in metrics for failure in rank["failures"]]
        self._quarantine.add(failures, sum(row["clips"] for row in first["history"]))
        if checkpoint is not None or self._is_behind:
            self._keep()

    def catch_up(self, step: int, accounts: Mapping[str, Any]) -> None:
        """Write what a checkpoint reports and the files lack: the driver was killed between the two.

        Args:
            step: step of the checkpoint.
            accounts: `history`, `failures` and `validation` since the one before; empty: it is of an older version.
        """
        history = accounts.get("history", [])
        validated = [_validation_row(step, accounts)] if accounts.get("validation") else []
        for name, rows in (("metrics.jsonl", history), ("validation.jsonl", validated)):
            there = {row.get("step") for row in read_rows(self._folder / name)}
            self._write(name, [row for row in rows if row["step"] not in there])
        self._quarantine.add(accounts.get("failures", []), sum(row["clips"] for row in history))

    def _write(self, name: str, rows: list[dict[str, Any]]) -> None:
        append_lines(self._folder / name, map(json.dumps, rows))
        self._tracker.log_history(self._mlflow_id, rows)

    def _keep(self) -> None:
        """What a restart from this checkpoint goes on with; a store that is away gets it with the next report."""
        try:
            self._run.keep()
            self._is_behind = False
        except OSError as error:
            self._is_behind = True
            logger.warning("%s does not take what was reported, the next report brings it: %s", self._run.uri, error)


def _validation_row(step: int, accounts: Mapping[str, Any]) -> dict[str, Any]:
    return {"step": step, **accounts["validation"], "val/is_best": float(accounts["is_best"])}


def _flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
