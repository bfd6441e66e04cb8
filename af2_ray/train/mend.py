"""Check the checkpoints of a job before it goes on from one, and set the damaged ones aside.

Ray Train lists a job's checkpoints in a snapshot and takes the last one as it is; a damaged file, or a listed folder
that is gone, ends the job at every start. Here the newest checkpoint whose files are all as they were written is found,
listed or not, what is newer is set aside in `damaged`, and the snapshot is made to fit. The driver reads it once for
that, and so does the first worker of each node: about a second a gigabyte each from a disk, at a restart.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _CheckpointManagerState, _TrainingResultState

from af2_ray.storage.files import Damaged, unsealed
from af2_ray.storage.places import inner_name, locate, put_text
from af2_ray.storage.stores import retried

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.json"  # of a checkpoint: what it is; the digests of its files are in the ranks' parts
SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray's list of a job's checkpoints
ASIDE = "damaged"  # folder beside the checkpoints
_BLOCK_BYTES = 2**22
_UNREADABLE = {errno.EIO, errno.EUCLEAN}


@dataclass(frozen=True)
class Newest:
    """The checkpoint that a job goes on from: optimiser steps done, and what was reported since the one before."""

    step: int
    accounts: Mapping[str, Any]


def mend(storage: str) -> Newest | None:
    """Make sure that Ray goes on from the newest whole checkpoint of a job; none if there is no checkpoint.

    Args:
        storage: the job's storage, a folder or an address; its checkpoints are below `train`.

    Raises:
        OSError: the storage cannot be read or written.
    """
    fs, root = locate(f"{storage.rstrip('/')}/train")
    fs.invalidate_cache()
    if not retried(lambda: fs.isdir(root)):
        return None
    snapshot = _read_snapshot(fs, root)
    below = [str(path).rstrip("/").rsplit("/", 1)[-1] for path in retried(lambda: fs.ls(root, detail=False))]
    listed = {result.checkpoint_dir_name: result.metrics for result in snapshot.checkpoint_results} if snapshot else {}
    names = sorted((name for name in below if re.fullmatch(r"step_\d+", name)), key=lambda name: int(name[5:]))
    damaged: list[str] = []
    newest: dict[str, Any] | None = None
    while names and newest is None:
        is_listed = snapshot is None or names[-1] in listed
        try:
            newest = check_files(fs, f"{root}/{names[-1]}", needs_digests=not is_listed)
        except Damaged as error:
            name = names.pop()
            if is_listed:
                logger.warning("%s; it is set aside, and the checkpoint before it is taken", error)
                damaged.append(name)
            else:
                logger.info("%s; Ray has not listed it: its job was killed while it was saved or removed", error)
    if not names and damaged:
        logger.warning("%s: no whole checkpoint is left, and the job begins anew; the others are in %s/", root, ASIDE)
    for name in damaged:
        _set_aside(fs, root, name)
    names = [name for name in names if snapshot is None or name in listed or name == names[-1]]
    latest = snapshot.latest_checkpoint_result if snapshot else None
    said = (latest.checkpoint_dir_name, latest.metrics.get("step")) if latest else None
    if newest is None or said != (names[-1], newest["step"]) or {*listed} != {*names}:
        _write_snapshot(fs, root, names, listed, snapshot.current_report_index if snapshot else 0)
    return Newest(int(newest["step"]), newest.get("accounts", {})) if newest else None


def part_name(rank: int) -> str:
    """The file of a checkpoint that one rank wrote last: `files` (its files' digests) and `failures`."""
    return f"part_{rank}.json"


def read_facts(fs: Any, folder: str) -> dict[str, Any]:
    """The facts of a checkpoint: `recipe`, `world_size`, `step`, `best`; `parts`, the number of ranks' parts.

    Raises:
        Damaged: there are none, or not as they were written.
    """
    facts, has_digest = _read_sealed(fs, folder, CHECKPOINT)
    if not has_digest:
        logger.warning("%s: written by a version without digests; damage would not be found", folder)
    if lacking := [key for key in ("recipe", "world_size", "step", "best") if key not in facts]:
        raise Damaged(f"{folder}/{CHECKPOINT} is damaged: it has no {', '.join(lacking)}")
    return facts


def check_files(fs: Any, folder: str, *, needs_digests: bool = False) -> dict[str, Any]:
    """`read_facts` with the failures of all ranks, and every file of the checkpoint compared with its digest.

    Args:
        needs_digests: whether a checkpoint without digests, which may not be whole, is refused.

    Raises:
        Damaged: a file is missing or not as it was written; the message names it.
    """
    facts = read_facts(fs, folder)
    if needs_digests and not {"parts", "files"} & {*facts}:
        raise Damaged(f"{folder} has no digests")
    files = dict(facts.get("files", {}))  # an earlier version had those of all ranks here
    for rank in range(int(facts.get("parts", 0))):
        part, has_digest = _read_sealed(fs, folder, part_name(rank))
        if not has_digest:
            raise Damaged(f"{folder}/{part_name(rank)} is damaged: it has no digest of its own")
        files |= part["files"]
        facts["accounts"]["failures"] += part["failures"]
    for name, mark in files.items():
        path = f"{folder}/{inner_name(name)}"
        try:
            found = retried(lambda path=path: _digest(fs, path))  # type: ignore[misc]
        except FileNotFoundError as error:
            raise Damaged(f"{path} is missing: the checkpoint is damaged") from error
        except OSError as error:
            if error.errno in _UNREADABLE:
                raise Damaged(f"{path} is damaged: its disk cannot read it: {error}") from error
            raise
        if found != mark:
            raise Damaged(f"{path} is damaged: it is not as it was written (by its SHA-256)")
    return facts


def _read_sealed(fs: Any, folder: str, name: str) -> tuple[dict[str, Any], bool]:
    """A JSON file of a checkpoint, and whether it has a digest of its own."""
    path = f"{folder}/{name}"
    try:
        data: bytes = retried(lambda: fs.cat_file(path))
    except FileNotFoundError as error:
        raise Damaged(f"{folder} is not a whole checkpoint: it has no {name}") from error
    return unsealed(path, data)


def _digest(fs: Any, path: str) -> str:
    with fs.open(path, "rb", block_size=_BLOCK_BYTES) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- Ray's list --------------------------------------------------------------------------------------------------


def _read_snapshot(fs: Any, root: str) -> _CheckpointManagerState | None:
    """Ray's list; none where there is none that can be read: Ray writes it in place, so a kill can leave it empty."""
    path = f"{root}/{SNAPSHOT}"
    try:
        data = retried(lambda: fs.cat_file(path))
    except FileNotFoundError:
        return None
    try:
        return _CheckpointManagerState.parse_obj(json.loads(data))
    except ValueError as error:  # pydantic's is one
        logger.warning("%s is damaged and is made anew from the checkpoints that are there: %s", path, error)
        return None


def _write_snapshot(fs: Any, root: str, names: list[str], listed: Mapping[str, dict[str, Any]], index: int) -> None:
    """List the checkpoints `names` as Ray would; without one there is no list, and Ray starts from the beginning."""
    results = []
    for name in names:
        try:
            facts = read_facts(fs, f"{root}/{name}")
        except Damaged as error:
            logger.warning("%s; it is set aside", error)
            _set_aside(fs, root, name)
            continue
        known = listed.get(name, {})
        keep = facts.get("keep", known.get("keep", facts["step"]))  # older ones have it in Ray's list alone
        metrics = {**known, "step": facts["step"], "best": facts["best"], "keep": keep}
        results.append(_TrainingResultState(checkpoint_dir_name=name, metrics=metrics))
    path = f"{root}/{SNAPSHOT}"
    if not results:
        with suppress(FileNotFoundError):
            retried(lambda: fs.rm(path))
        return
    places = {state.checkpoint_dir_name: place for place, state in enumerate(results)}
    ordered = sorted(results, key=lambda state: state.metrics["keep"])  # as Ray has them: those that go first, first
    snapshot = _CheckpointManagerState(
        checkpoint_results=ordered,
        checkpoint_report_indices=[places[state.checkpoint_dir_name] for state in ordered],
        latest_checkpoint_result=results[-1],
        pending_training_results=[],
        pending_validation_specs=[],
        current_report_index=max(index, len(results)),
        validated_checkpoint_dir_names=[],
        timed_out_validation_checkpoint_dir_names=[],
        failed_validation_checkpoint_dir_names=[],
    )
    retried(lambda: put_text(fs, path, snapshot.json()))


def _set_aside(fs: Any, root: str, name: str) -> None:
    """Move a checkpoint into `damaged`, where nothing is looked for; a person may want what is in it."""
    target, number = f"{root}/{ASIDE}/{name}", 1
    while fs.exists(target):
        number += 1
        target = f"{root}/{ASIDE}/{name}.{number}"
    fs.makedirs(f"{root}/{ASIDE}", exist_ok=True)
    retried(lambda: fs.mv(f"{root}/{name}", target, recursive=True))
