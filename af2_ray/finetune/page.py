"""The page of a fine-tuning, from what its run keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from af2_ray.data.data_check import shorten
from af2_ray.evaluate.report.finetune import write_finetune_report
from af2_ray.finetune.finetune import Outcome
from af2_ray.runs.run import Run, read_metrics
from af2_ray.storage.files import read_rows

PAGE = "report.html"


def write_page(run: Run, outcome: Outcome) -> Path:
    """Write `report.html` into the run, and return its place on this machine."""
    facts, (stage,) = outcome.facts, run.recipe.stages
    folder = run.stage_dir(stage.name)
    path = run.root / PAGE
    write_finetune_report(
        path,
        title=f"Fine-tuning of {facts['model']}",
        facts=_facts(facts),
        comparisons=outcome.comparisons,
        losses=[(row["step"], row["loss"]) for row in read_metrics(folder)],
        validation=outcome.validation,
        kept_step=outcome.kept_step,
        counts=[{key: value for key, value in row.items() if key != "set_aside"} for row in facts["data"]],
        set_aside=[*_set_aside(facts["data"]), *_quarantined(run), *facts["remarks"]],
    )
    run.keep()
    return path


def _facts(facts: dict[str, Any]) -> dict[str, Any]:
    training = facts["training"]
    return {
        "model": facts["model"],
        "recipe": f"{facts['recipe']['name']} ({facts['recipe']['reason']})",
        "steps": training["steps"],
        "seconds of training": training["seconds"],
        "weights kept": f"those of step {facts['kept_step']}" if facts["kept_step"] else "the last",
    }


def _set_aside(rows: list[dict[str, Any]]) -> list[str]:
    return [f"{row['part']}: {reason} {count}" for row in rows for reason, count in row["set_aside"].items()]


def _quarantined(run: Run) -> list[str]:
    """Recordings that could not be read in training."""
    rows = read_rows(run.root / "quarantine.jsonl")
    return shorten([f"{row['uri']}: {row['reason']}" for row in rows])
