"""Folders in object storage, or any other place of fsspec: sent, fetched, and copied once for a whole machine.

Credentials come from the environment or the pod's role, never from an address. A store that is away for a minute is
waited for; refused credentials and a full disk are not. What marks a folder as whole (`config.json`, `done.json`,
`corpus.json`) is sent last, so a kill in the middle leaves nothing that looks finished.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from af2_ray.storage.files import (
    DIGESTS,
    Damaged,
    check_digests,
    replace_folder,
    temporary_of,
    write_digests,
)
from af2_ray.storage.places import Late, check_name, inner_name, is_remote, locate, shown, within

ResultT = TypeVar("ResultT")

_RETRIES = 5  # with a pause that doubles from half a second: a server may be away for 15 s
PATIENCE = 7  # retries where whole folders are at stake: it may be away for a minute
_CLIENTS = {"botocore", "aiobotocore", "aiohttp", "gcsfs"}  # whose faults are not all OSErrors
_NO_KEYS = {"NoCredentialsError", "PartialCredentialsError"}
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EUCLEAN}  # of this machine: to try again is no help
_CHUNK = 32  # files that are sent or fetched, and tried again, together; a large one comes alone
_CHUNK_BYTES = 256 * 2**20
_VERSION_KEYS = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "updated", "mtime", "created")
_UNUSED_S = 24 * 3600.0  # after which a machine's copy of a folder is removed

Wanted = Callable[[str], bool]  # of a path relative to its folder


def retried(call: Callable[[], ResultT], retries: int = _RETRIES, limit_s: float | None = None) -> ResultT:
    """What `call` returns; a passing fault is tried again, any fault of a store's client is an `OSError`.

    Args:
        limit_s: seconds that a try may take; one that takes longer is tried once more.

    Raises:
        PermissionError: the store refuses the credentials, or there are none.
        storage.Late: two tries took longer than `limit_s`.
        OSError: it still fails after so many retries, or this machine's disk is full or read-only.
    """
    num_late = 0
    for attempt in range(retries + 1):
        try:
            return call() if limit_s is None else within(limit_s, call)
        except (FileNotFoundError, PermissionError):
            raise
        except Late:
            num_late += 1
            if num_late == 2 or attempt == retries:
                raise
        except Exception as error:
            if type(error).__name__ in _NO_KEYS:
                raise PermissionError(f"{error}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role") from error
            if isinstance(error, OSError) and error.errno in _DISK:
                raise
            if not (isinstance(error, OSError) or type(error).__module__.split(".")[0] in _CLIENTS):
                raise
            if attempt == retries:
                raise OSError(f"{type(error).__name__}: {error}") from error
            time.sleep(0.5 * 2**attempt)
    raise AssertionError("unreachable")


def send(names: Iterable[str], folder: Path, uri: str) -> None:
    """Send files of a folder, named relative to it, to the same names below `uri`; marks of what is whole go last."""
    fs, root = locate(uri.rstrip("/"))
    for _, wave in groupby(sorted(names, key=lambda name: (_wave(name), name)), key=_wave):
        for part in _chunks({name: (folder / name).stat().st_size for name in wave}):
            here, there = [str(folder / name) for name in part], [f"{root}/{name}" for name in part]
            retried(lambda here=here, there=there: fs.put(here, there), PATIENCE)  # type: ignore[misc]


def fetch(uri: str, folder: Path, wanted: Wanted = lambda name: True) -> list[str]:
    """Fetch the files below `uri` whose relative names are wanted into `folder`, and return their names.

    Raises:
        ValueError: the store has a key there that would lead out of `folder`; the message names it.
    """
    fs, root, found = _listed(uri)
    return _fetched(fs, root, {name: facts for name, facts in found.items() if wanted(name)}, folder)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file of this machine; others wait. The system frees it at process end."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def scratch(kind: str) -> Path:
    """This user's own folder among the temporary files (`TMPDIR`), the same for all processes; made where it is not.

    Raises:
        PermissionError: somebody else could have put files there, which would be taken for ours.
    """
    folder = Path(tempfile.gettempdir()) / f"af2_ray_{kind}_{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(
            f"{folder} belongs to another user, or others may write to it: remove it, or set TMPDIR to your own"
        )
    folder.chmod(0o700)
    return folder


def local_model(folder: str | Path) -> Path:
    """A Hugging Face folder on this machine's disk: the folder itself, or a copy of it that all processes here share.

    A copy is known by what the store lists, so a folder that was written anew is fetched anew. Copies lie in `TMPDIR`;
    with each new one those go that were not asked for within a day. A folder that has digests is compared with them,
    once a day and machine.

    Raises:
        ValueError: it is no such folder, or (`files.Damaged`) a file of it is not as it was written.
    """
    path = model_folder(folder)
    if not is_remote(folder):
        _check_once(path)
        return path
    try:
        _check_once(path)
    except Damaged:  # of a copy, whose original may well be whole
        path = _shared_copy(str(folder).rstrip("/"), anew=True)
        _check_once(path)
    return path


def model_folder(folder: str | Path) -> Path:
    """`local_model` without the comparison with its digests: enough for who reads its small files alone."""
    check_name(str(folder))
    path = _shared_copy(str(folder).rstrip("/")) if is_remote(folder) else Path(folder)
    if not (path / "config.json").is_file():
        raise ValueError(f"no model in {shown(str(folder))}: name the folder that an export wrote, with config.json")
    return path


def _check_once(folder: Path) -> None:
    """Compare a folder with its digests, unless a process of this machine has done so since its files last changed."""
    if not (folder / DIGESTS).is_file():
        return
    with note_of("checked", folder) as seen:
        if not seen.exists():
            check_digests(folder)
            seen.touch()


@contextmanager
def note_of(kind: str, folder: Path) -> Iterator[Path]:
    """The file, there or not, in which this machine notes something of a folder as its files are now.

    A note counts for a day, in which all processes of the machine share it; one at a time has it open here.
    """
    notes = scratch(kind)
    with locked(notes / ".lock"):  # the ranks of a machine ask at once, and one of them looks
        found = sorted((path.name, path.stat()) for path in folder.iterdir() if path.is_file())
        states = [(name, state.st_size, state.st_mtime_ns, state.st_ino) for name, state in found]
        state = json.dumps([str(folder.absolute()), states])
        note = notes / hashlib.sha256(state.encode()).hexdigest()[:32]
        for other in notes.glob("[!.]*"):
            with suppress(FileNotFoundError):
                if _is_unused(other):
                    other.unlink()
        yield note


def _is_unused(path: Path) -> bool:
    return time.time() - path.stat().st_mtime > _UNUSED_S


def _wave(name: str) -> int:
    """When a file is sent: 0 first; what marks a folder as whole after that folder's other files."""
    base = name.rsplit("/", 1)[-1]
    return 3 if base == "corpus.json" else 2 if base.endswith("done.json") else 1 if base == "config.json" else 0


def _chunks(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    chunk: list[str] = []
    for name in sizes:
        if chunk and (len(chunk) == _CHUNK or sum(sizes[each] for each in chunk) + sizes[name] > _CHUNK_BYTES):
            yield chunk
            chunk = []
        chunk.append(name)
    if chunk:
        yield chunk


def _fetched(fs: Any, root: str, found: Mapping[str, Mapping[str, Any]], folder: Path) -> list[str]:
    for part in _chunks({name: int(facts["size"] or 0) for name, facts in found.items()}):
        here, there = [str(folder / name) for name in part], [f"{root}/{name}" for name in part]
        retried(lambda here=here, there=there: fs.get(there, here), PATIENCE)  # type: ignore[misc]
    return list(found)


class Ranges(io.RawIOBase):
    """A stretch of a file as a stream, each read a request of its own: one that hangs or fails harms no other.

    libsndfile takes a failed read for the end of the file, so the fault is kept in `failed`.

    Args:
        fs, path: file system of fsspec, and the file in it.
        offset, size: the stretch, in bytes.
        limit_s: seconds that a read may take; none: as long as it likes.
    """

    def __init__(self, fs: Any, path: str, offset: int, size: int, limit_s: float | None) -> None:
        self._fs, self._path, self._offset, self._size, self._limit_s = fs, path, offset, size, limit_s
        self._place = 0
        self.failed: Exception | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        start = self._offset + self._place
        end = self._offset + min(self._size, self._place + len(buffer))
        if end <= start:
            return 0
        try:
            data = retried(lambda: self._fs.cat_file(self._path, start=start, end=end), limit_s=self._limit_s)
        except Exception as error:
            self.failed = error
            return 0
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


def _listed(uri: str) -> tuple[Any, str, dict[str, dict[str, Any]]]:
    """The store, its own name of a folder, and what it knows of each file below, by relative name.

    Raises:
        ValueError: a key there is not fit to be the name of a file below a folder of this machine.
    """
    fs, root = locate(uri.rstrip("/"))
    fs.invalidate_cache()
    found = retried(lambda: fs.find(root, detail=True), PATIENCE)
    files = {}
    for path, facts in found.items():
        if path.endswith("/"):
            continue  # what a console leaves for an empty folder
        try:
            files[inner_name(path.removeprefix(f"{root}/"))] = facts
        except ValueError as error:
            raise ValueError(f"{uri}: {error}") from error
    return fs, root, files


def version_of(facts: Mapping[str, Any]) -> str:
    """What tells a file from an earlier one in its place, by what fsspec knows of it."""
    mark = next((facts[key] for key in _VERSION_KEYS if key in facts), "")  # `created` changes with every hard link
    return f"{facts['size']}:{mark}"


def _shared_copy(uri: str, *, anew: bool = False) -> Path:
    """This machine's copy of a folder; the first process that asks for it fetches it, and the others wait."""
    fs, root, found = _listed(uri)
    version = json.dumps([uri, sorted((name, version_of(facts)) for name, facts in found.items())])
    copies = scratch("copies")
    copy = copies / hashlib.sha256(version.encode()).hexdigest()[:16]
    with locked(copies / f".{copy.name}.lock"):
        if anew or not copy.is_dir():
            shutil.rmtree(copy, ignore_errors=True)
            _remove_unused(copies)
            part = copies / f".{copy.name}.part"
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            _fetched(fs, root, found, part)
            part.replace(copy)
        os.utime(copy)
    return copy


def _remove_unused(copies: Path) -> None:
    """Remove copies that were not asked for within a day: whole, under their own lock, or not at all."""
    for other in [path for path in copies.iterdir() if path.is_dir() and not path.name.startswith(".")]:
        with (copies / f".{other.name}.lock").open("w") as lock, suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_unused(other):
                old = other.replace(copies / f".{other.name}.old")
                shutil.rmtree(old, ignore_errors=True)


@contextmanager
def replacing(place: Path | str) -> Iterator[Path]:
    """A temporary folder that takes the place of the folder or address `place` when the block ends well.

    It then has the digests of its files (`files.check_digests`).
    """
    if is_remote(place):
        with tempfile.TemporaryDirectory(prefix="af2_ray_") as name:
            yield Path(name)
            write_digests(Path(name))
            send(
                [str(path.relative_to(name)) for path in Path(name).rglob("*") if path.is_file()],
                Path(name),
                str(place),
            )
        return
    folder = Path(place)
    temporary = temporary_of(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        write_digests(temporary)
        replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
