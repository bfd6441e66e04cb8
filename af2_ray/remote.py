"""Folders in object storage, or any other place of fsspec: sent, fetched, and copied once for a whole machine.

Credentials come from the environment or the pod's role, never from an address. A store that is away for a minute is
waited for. What marks a folder as whole (`config.json`, `done.json`, `corpus.json`) is sent last, so a kill in the
middle leaves nothing that looks finished.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import fsspec

ResultT = TypeVar("ResultT")

_RETRIES = 5  # with a pause that doubles from half a second: a server may be away for 15 s
PATIENCE = 7  # retries where whole folders are at stake: it may be away for a minute
_CLIENTS = {"botocore", "aiobotocore", "aiohttp", "gcsfs"}  # whose faults are not all OSErrors
_MARKS = ("config.json", "done.json", "corpus.json")  # in the order in which they are sent
_UNUSED_S = 24 * 3600.0  # after which a machine's copy of a folder is removed

Wanted = Callable[[str], bool]  # of a path relative to its folder


def is_remote(place: str | Path) -> bool:
    """Whether a path is an address such as `s3://bucket/folder`."""
    return "://" in str(place)


def retried(call: Callable[[], ResultT], retries: int = _RETRIES) -> ResultT:
    """What `call` returns; a passing fault is tried again, any fault of a store's client is an `OSError`."""
    for attempt in range(retries + 1):
        try:
            return call()
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:
            if not (isinstance(error, OSError) or type(error).__module__.split(".")[0] in _CLIENTS):
                raise
            if attempt == retries:
                raise OSError(f"{type(error).__name__}: {error}") from error
            time.sleep(0.5 * 2**attempt)
    raise AssertionError("unreachable")


def send(names: Iterable[str], folder: Path, uri: str) -> None:
    """Send files of a folder, named relative to it, to the same names below `uri`; marks of what is whole go last."""
    fs, root = fsspec.url_to_fs(uri)
    waves: dict[int, list[str]] = {}
    for name in sorted(names):
        waves.setdefault(next((n for n, mark in enumerate(_MARKS, 1) if name.endswith(mark)), 0), []).append(name)
    for _, wave in sorted(waves.items()):
        here, there = [str(folder / name) for name in wave], [f"{root}/{name}" for name in wave]
        retried(lambda here=here, there=there: fs.put(here, there), PATIENCE)  # type: ignore[misc]


def fetch(uri: str, folder: Path, wanted: Wanted = lambda name: True) -> list[str]:
    """Fetch the files below `uri` whose relative names are wanted into `folder`, and return their names."""
    fs, root, found = _listed(uri)
    names = [name for name in found if wanted(name)]
    if names:
        here, there = [str(folder / name) for name in names], [f"{root}/{name}" for name in names]
        retried(lambda: fs.get(there, here), PATIENCE)
    return names


def local_model(folder: str | Path) -> Path:
    """A Hugging Face folder on this machine's disk: the folder itself, or a copy of it that all processes here share.

    A copy is known by what the store lists, so a folder that was written anew is fetched anew. Copies lie in the
    system's folder for temporary files (`TMPDIR`) and go when none used them for a day.

    Raises:
        ValueError: it is no such folder.
    """
    path = Path(folder)
    if is_remote(folder):
        uri = str(folder).rstrip("/")
        _, _, found = _listed(uri)
        told = json.dumps([uri, sorted((name, _version(facts)) for name, facts in found.items())])
        path = _shared_copy(uri, hashlib.sha256(told.encode()).hexdigest()[:16])
    if not (path / "config.json").is_file():
        raise ValueError(f"no model in {folder}: name the folder that an export wrote, the one with config.json")
    return path


def _listed(uri: str) -> tuple[Any, str, dict[str, dict[str, Any]]]:
    """The store, its own name of a folder, and what it knows of each file below, by relative name."""
    fs, root = fsspec.url_to_fs(uri)
    root = root.rstrip("/")
    fs.invalidate_cache()
    found = retried(lambda: fs.find(root, detail=True), PATIENCE)
    return fs, root, {path.removeprefix(f"{root}/"): facts for path, facts in found.items()}


def _version(facts: dict[str, Any]) -> str:
    return f"{facts['size']}:{facts.get('ETag') or facts.get('LastModified') or facts.get('mtime')}"


def _shared_copy(uri: str, mark: str) -> Path:
    """The copy called `mark`; the first process that asks for it fetches it, and the others wait."""
    copies = Path(tempfile.gettempdir()) / f"af2_ray_copies_{os.getuid()}"
    copies.mkdir(mode=0o700, exist_ok=True)
    copy = copies / mark
    with (copies / f".{mark}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not copy.is_dir():
            _remove_unused(copies)
            part = copies / f".{mark}.part"
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            fetch(uri, part)
            part.replace(copy)
        os.utime(copy)
    return copy


def _remove_unused(copies: Path) -> None:
    for other in copies.iterdir():
        try:
            if other.is_dir() and time.time() - other.stat().st_mtime > _UNUSED_S:
                shutil.rmtree(other)
        except FileNotFoundError:
            pass  # another process removes it
