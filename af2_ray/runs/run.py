"""A run: one directory that holds everything of it, and the marks by which it is continued.

    <run>/recipe.yaml         the resolved recipe
    <run>/lm/                 language model and tokenizer (Hugging Face folder)
    <run>/clap/model/         AF-CLAP export
    <run>/start/model/        where stage 1 begins: tower + LM + fresh fusion, or the model that the recipe starts from
    <run>/stages/<name>/model/  a stage's export; the last one is the run's model
    <run>/**/train/           Ray Train's own storage (checkpoints)
    <run>/**/metrics.jsonl    one line an optimiser step
    <run>/quarantine.jsonl    what was set aside, and why

A step is finished when its folder has `done.json`; it is written last, so a kill never leaves half a step that looks
whole. What is written here survives a power cut and carries digests that show damage (`files`). The price of plain
files instead of a database: one writer at a time, which `lock` enforces.

A run may live in object storage (`storage: s3://...`). Then `root` is a scratch folder of this process, filled from the
store at the start (without weights, which are fetched where they are read) and sent to it at each finished step, with
each checkpoint and at the end, however that comes (`keep`). Workers read what they start from, and write what they
export, by `address`. One thing is weaker there: nothing keeps drivers on two machines out of one run, as stores have no
locks.
"""

from __future__ import annotations

import atexit
import difflib
import fcntl
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from af2_ray.config import Recipe, load_recipe
from af2_ray.data.quarantine import Quarantine
from af2_ray.storage.files import (
    Damaged,
    check_seal,
    read_json,
    read_rows,
    remove_leftovers,
    sealed_json,
    sealed_yaml,
    write_whole,
)
from af2_ray.storage.places import allow, is_remote
from af2_ray.storage.stores import fetch, send

_ELSEWHERE = re.compile(r"(features|clap/train|stages/[^/]+/train)/")  # what a driver neither sends nor fetches
_WEIGHTS = ".safetensors"

logger = logging.getLogger(__name__)
_scratch: set[Path] = set()  # folders of this process that go when it ends


@dataclass(frozen=True)
class Run:
    """One run directory and its recipe. Make it with `Run.open`, find it again with `Run.load`.

    Attributes:
        root: the directory, on this machine.
        uri: address in object storage; none: it is in `root` and nowhere else.
    """

    root: Path
    recipe: Recipe
    uri: str | None = None
    _kept: dict[str, tuple[int, int]] = field(default_factory=dict, compare=False, repr=False)  # size, date as sent

    @classmethod
    def open(cls, recipe: Recipe, root: str | Path | None = None) -> Run:
        """Create the run directory, or continue in it.

        Args:
            recipe: the resolved recipe; where its model has a start, sizes and digest are filled in from that.
            root: the directory or its address; none: `<recipe.storage>/<recipe.name>`.

        Raises:
            ValueError: the directory holds a run whose recipe differs in something that decides the weights (the
                message shows the difference), the recipe asks for what cannot be kept in object storage, or the model
                that it starts from cannot be trained further.
            RuntimeError: another process is working in it; nothing was written.
        """
        place = str(root or f"{recipe.storage.rstrip('/')}/{recipe.name}")
        allow(recipe.access.schemes, parents=recipe.access.parents)
        if is_remote(place):
            _check_features(recipe, place)
        if recipe.model.start is not None:
            from af2_ray.models.start import settled  # loads torch, which a job's --help does without

            recipe = settled(recipe)
        path, uri, kept = _working_copy(place)
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path, recipe, uri, kept)
        with run._held():
            run._write_recipe()
        run.keep()
        return run

    @classmethod
    def load(cls, root: str | Path) -> Run:
        """The run in an existing directory; `ValueError` if there is none."""
        path, uri, kept = _working_copy(str(root))
        if not (path / "recipe.yaml").is_file():
            raise ValueError(f"{uri or path} is not a run directory (it has no recipe.yaml)")
        recipe = _saved_recipe(path / "recipe.yaml")
        allow(recipe.access.schemes, parents=recipe.access.parents)
        return cls(path, recipe, uri, kept)

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

    def quarantine(self) -> Quarantine:
        """The run's list of what is set aside so far; for one process at a time."""
        path = self.root / "quarantine.jsonl"
        return Quarantine(str(path), self.recipe.faults.max_bad_share, name=self.address(path))

    def address(self, folder: Path) -> str:
        """The address under which every machine finds a folder (or file) of this run."""
        return str(folder) if self.uri is None else f"{self.uri}/{folder.relative_to(self.root)}"

    def fetched(self, folder: Path) -> Path:
        """A folder of this run with all of its files, weights included, on this machine."""
        if self.uri is not None:
            names = fetch(self.address(folder), folder, lambda name: not (folder / name).exists())
            self._kept.update((str((folder / name).relative_to(self.root)), _state(folder / name)) for name in names)
        return folder

    def keep(self) -> None:
        """Send what has changed here since the last call to the store that holds the run, if one does.

        Raises:
            OSError: the store cannot be reached for a minute, or refuses.
        """
        if self.uri is None:
            return
        states = {name: _state(self.root / name) for name in _names(self.root)}  # a log may grow while it is sent
        changed = {name: state for name, state in states.items() if state != self._kept.get(name)}
        send(changed, self.root, self.uri)
        self._kept.update(changed)

    def finish(self, folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
        """`mark_finished` for a step of this run, which is then kept."""
        mark_finished(folder, facts)
        self.keep()
        return facts

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process; `RuntimeError` if another one has it. The system frees it at process end.

        What a killed process left half written is removed. However the block ends, the store that holds the run then
        gets what it lacks.
        """
        with self._held():
            self._write_recipe()  # that of this process, whoever opened the run in between
            for path in remove_leftovers(self.root):
                logger.info("removed what a killed process had left: %s", path)
            try:
                yield
            finally:
                try:
                    self.keep()
                except OSError:
                    _scratch.discard(self.root.parent)
                    logger.exception("%s cannot be reached: what it lacks stays in %s", self.uri, self.root)

    @contextmanager
    def _held(self) -> Iterator[None]:
        with (self.root / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RuntimeError(f"another process is working in {self.root}; wait for it or end it") from error
            yield

    def _write_recipe(self) -> None:
        """Keep the recipe with the run, unless that is a run of another one."""
        saved, text = self.root / "recipe.yaml", sealed_yaml(self.recipe.to_yaml())
        if (self.root / "sweep.yaml").exists():
            raise ValueError(f"{self.root} holds a sweep, not a run; give another --run")
        if saved.exists():
            before = _saved_recipe(saved)
            if before.fingerprint() != self.recipe.fingerprint():
                place = self.uri or self.root
                saved_lines, given_lines = before.to_yaml().splitlines(), self.recipe.to_yaml().splitlines()
                difference = difflib.unified_diff(saved_lines, given_lines, "saved", "given", lineterm="", n=1)
                raise ValueError(
                    f"{place} holds a run of another recipe; give its own recipe, or another --run (and on a disk "
                    f"--fork {place}, to start from what this one has finished). It differs in:\n"
                    + "\n".join(difference)
                )
            if saved.read_text() == text:
                return
        write_whole(saved, text)


def _working_copy(place: str) -> tuple[Path, str | None, dict[str, tuple[int, int]]]:
    """A run's folder here, its address if it is in object storage, and what of it was fetched."""
    if not is_remote(place):
        return Path(place).absolute(), None, {}
    uri = place.rstrip("/")
    folder = Path(tempfile.mkdtemp(prefix="af2_ray_run_"))
    _scratch.add(folder)
    root = folder / uri.rsplit("/", 1)[-1]
    root.mkdir()
    names = fetch(uri, root, lambda name: not (name.endswith(_WEIGHTS) or _ELSEWHERE.match(name)))
    return root, uri, {name: _state(root / name) for name in names}


@atexit.register
def _remove_scratch() -> None:
    for folder in _scratch:
        shutil.rmtree(folder, ignore_errors=True)


def _check_features(recipe: Recipe, place: str) -> None:
    """Shards of features are read in place, so they need a file system."""
    cached = [stage.name for stage in recipe.stages if stage.features == "cached"]
    if cached and (recipe.feature_cache.dir is None or is_remote(recipe.feature_cache.dir)):
        raise ValueError(
            f"stages.{cached[0]}.features=cached in {place}: shards of features are read in place, so give "
            "feature_cache.dir, a folder that all nodes share"
        )


def _names(root: Path) -> list[str]:
    """The files of a run that are kept, relative to it."""
    found = []
    for folder, inner, files in os.walk(root):
        below = "" if folder == str(root) else f"{os.path.relpath(folder, root)}/"
        inner[:] = [name for name in inner if not (name.startswith(".") or _ELSEWHERE.match(f"{below}{name}/"))]
        found += [f"{below}{name}" for name in files if not name.startswith(".")]
    return found


def _state(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def finished(folder: Path) -> dict[str, Any] | None:
    """What a finished step left in its `done.json`; none if it has not finished."""
    return read_json(folder / "done.json")


def mark_finished(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Write a step's `done.json`, the last thing it does, and return the facts."""
    write_whole(folder / "done.json", sealed_json(facts))
    return facts


def _saved_recipe(path: Path) -> Recipe:
    try:
        check_seal(str(path), path.read_bytes())
    except Damaged as error:
        raise Damaged(
            f"{error}; put back a copy, or remove it: training then keeps the recipe that it is given"
        ) from error
    return load_recipe(path)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The steps of `metrics.jsonl`, in order. Steps repeated after a restart count once, the later line winning."""
    rows = read_rows(folder / "metrics.jsonl")
    steps = {row["step"]: row for row in rows if isinstance(row.get("step"), int)}
    return [steps[step] for step in sorted(steps)]
