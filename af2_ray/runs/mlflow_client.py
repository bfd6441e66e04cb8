"""MLflow's client as runs and sweeps use it: what fails is a warning, and the work goes on.

A tracking server that cannot be reached costs a warning a call, not the run: `metrics.jsonl` has every step regardless.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME

logger = logging.getLogger(__name__)

_VALUE_CHARACTERS = 6000  # most that MLflow takes of a parameter
_PARAMS, _METRICS = 100, 1000  # most that MLflow takes in one call


class GuardedClient:
    """An experiment on a tracking server. An empty run id stands for a run that could not be made: nothing is logged.

    Args:
        uri: address of the server, or of a SQLite file.
        experiment: name of the experiment, made where there is none.
        artifacts: place of its artifacts where it is made; none: the server's own.
    """

    def __init__(self, uri: str, experiment: str, artifacts: str | None) -> None:
        self.client = MlflowClient(tracking_uri=uri)
        try:
            found = self.client.get_experiment_by_name(experiment)
            self._experiment = str(
                found.experiment_id if found else self.client.create_experiment(experiment, artifact_location=artifacts)
            )
        except MlflowException as error:
            logger.warning("MLflow at %s does not answer, going on without it: %s", uri, error)
            self._experiment = ""

    def create_run(self, name: str, parent: str = "") -> str:
        """A new run's id."""
        if not self._experiment:
            return ""
        tags = {MLFLOW_RUN_NAME: name} | ({MLFLOW_PARENT_RUN_ID: parent} if parent else {})
        created = self.attempt(self.client.create_run, self._experiment, tags=tags)
        return str(created.info.run_id) if created else ""

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Parameters of a run; long values are cut."""
        pairs = [Param(key, str(value)[:_VALUE_CHARACTERS]) for key, value in params.items()]
        for start in range(0, len(pairs), _PARAMS):
            self.log(self.client.log_batch, run_id, params=pairs[start : start + _PARAMS])

    def log_history(self, run_id: str, history: Sequence[Mapping[str, Any]]) -> None:
        """Metrics of many steps: rows with a `step` and numbers."""
        now = int(time.time() * 1000)
        batch = [
            Metric(key, float(value), now, int(row["step"]))
            for row in history
            for key, value in row.items()
            if key != "step" and isinstance(value, int | float)
        ]
        for start in range(0, len(batch), _METRICS):
            self.log(self.client.log_batch, run_id, metrics=batch[start : start + _METRICS])

    def log_artifact(self, run_id: str, path: Path) -> None:
        """A file as an artifact of a run."""
        self.log(self.client.log_artifact, run_id, str(path))

    def terminate(self, run_id: str, status: str) -> None:
        """Close a run as `FINISHED`, `FAILED` or `KILLED`."""
        self.log(self.client.set_terminated, run_id, status)

    def log(self, call: Any, run_id: str, *args: Any, **kwargs: Any) -> None:
        """`attempt` for a run, if there is one."""
        if run_id:
            self.attempt(call, run_id, *args, **kwargs)

    def attempt(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        """What `call` returns; none, and a warning, where it fails."""
        try:
            return call(*args, **kwargs)
        except (MlflowException, OSError, Boto3Error, BotoCoreError, ClientError) as error:  # the last: of artifacts
            logger.warning("MLflow %s failed: %s", getattr(call, "__name__", call), error)
            return None
