"""MLflow runs end with the work, however it ends."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from af2_ray.config import load_recipe
from af2_ray.runs.run import Run
from af2_ray.runs.tracking import Tracker


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("a worker died"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_what_ends_a_run_early_closes_its_mlflow_runs_and_the_next_call_opens_them(
    tmp_path: Path, error: BaseException, status: str
) -> None:
    run = Run.open(load_recipe("tiny"), tmp_path / "run")
    tracker = Tracker(run)
    client = MlflowClient(tracking_uri=tracker.uri)
    ids: list[str] = []

    def work() -> None:
        with tracker.closing():
            ids.extend([tracker.parent(), tracker.child("lm", {})])
            tracker.finish("lm")
            ids.append(tracker.child("afclap", {}))
            raise error

    with pytest.raises(type(error)):
        work()
    told = [client.get_run(run_id).info.status for run_id in ids]
    assert told == [status, "FINISHED", status]
    again = Tracker(run)
    assert (again.parent(), again.child("afclap", {})) == (ids[0], ids[2])
    told = [client.get_run(run_id).info.status for run_id in ids]
    assert told == ["RUNNING", "FINISHED", "RUNNING"]
