"""A run: one directory that holds everything of it, and the marks by which it is continued.

    <run>/recipe.yaml         the resolved recipe
    <run>/lm/                 language model and tokenizer (Hugging Face folder)
    <run>/clap/model/         AF-CLAP export
    <run>/start/model/        tower + LM + fresh fusion: where stage 1 begins
    <run>/stages/<name>/model/  a stage's export; the last one is the run's model
    <run>/**/train/           Ray Train's own storage (checkpoints)
    <run>/**/metrics.jsonl    one line an optimiser step
    <run>/quarantine.jsonl    what was set aside, and why

A step is finished when its folder has `done.json`; it is written last, so a kill never leaves half a step that looks
whole. The price of plain files instead of a database: one writer at a time, which `lock` enforces.
"""

from __future__ import annotations

import difflib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from af2_ray.config import Recipe, load_recipe


@dataclass(frozen=True)
class Run:
    """One run directory and its recipe. Make it with `Run.open`, find it again with `Run.load`."""

    root: Path
    recipe: Recipe

    @classmethod
    def open(cls, recipe: Recipe, root: str | Path | None = None) -> Run:
        """Create the run directory, or continue in it.

        Args:
            recipe: the resolved recipe.
            root: the directory; none: `<recipe.storage>/<recipe.name>`.

        Raises:
            ValueError: the directory holds a run whose recipe differs in something that decides the weights; the
                message shows the difference.
        """
        if root is None and "://" in recipe.storage:
            raise ValueError(f"storage={recipe.storage!r}: run directories are on a shared file system; give its path")
        path = Path(root or Path(recipe.storage) / recipe.name).absolute()
        saved = path / "recipe.yaml"
        if saved.exists():
            before = load_recipe(saved)
            if before.fingerprint() != recipe.fingerprint():
                difference = _difference(before.to_yaml(), recipe.to_yaml())
                raise ValueError(
                    f"{path} holds a run of another recipe; give its own recipe, or another --run (and --fork {path}, "
                    f"to start from what this one has finished). It differs in:\n{difference}"
                )
        path.mkdir(parents=True, exist_ok=True)
        write_atomic(saved, recipe.to_yaml())
        return cls(path, recipe)

    @classmethod
    def load(cls, root: str | Path) -> Run:
        """The run in an existing directory; `ValueError` if there is none."""
        path = Path(root).absolute()
        if not (path / "recipe.yaml").is_file():
            raise ValueError(f"{path} is not a run directory (it has no recipe.yaml)")
        return cls(path, load_recipe(path / "recipe.yaml"))

    @property
    def lm_dir(self) -> Path:
        return self.root / "lm"

    @property
    def clap_dir(self) -> Path:
        return self.root / "clap"

    @property
    def start_dir(self) -> Path:
        return self.root / "start"

    def stage_dir(self, name: str) -> Path:
        return self.root / "stages" / name

    @property
    def model_dir(self) -> Path:
        """The final model: the last stage's export."""
        return self.stage_dir(self.recipe.stages[-1].name) / "model"

    @property
    def quarantine_path(self) -> Path:
        return self.root / "quarantine.jsonl"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process; `RuntimeError` if another one has it. The system frees it at process end."""
        with (self.root / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RuntimeError(f"another process is working in {self.root}; wait for it or end it") from error
            yield


def finished(folder: Path) -> dict[str, Any] | None:
    """What a finished step left in its `done.json`; none if it has not finished."""
    path = folder / "done.json"
    return json.loads(path.read_text()) if path.is_file() else None


def mark_finished(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Write a step's `done.json`, the last thing it does, and return the facts."""
    write_atomic(folder / "done.json", json.dumps(facts, indent=1))
    return facts


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block ends well."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The steps of `metrics.jsonl`, in order. Steps repeated after a restart count once, the later line winning."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    steps: dict[int, dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the last line of a killed writer; the step is repeated after the restart
        steps[row["step"]] = row
    return [steps[step] for step in sorted(steps)]


def _difference(before: str, after: str) -> str:
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), "saved", "given", lineterm="", n=1)
    return "\n".join(lines)
