"""Clips in tar shards, read where they lie: `shard.tar#clip.flac`, local or remote.

Millions of clips as millions of objects cost a request and a directory entry each; WebDataset's way of packing them
into plain tar files does not. A tar has no table of contents, so one is made at the first use (one pass over the
headers) and kept beside the shard as `shard.tar.index.json`, or in this process alone where that place cannot be
written. From then on a clip is one ranged read, in any order. The read takes the clip's own tar headers along: if
they are not as the index knows them, the shard was written anew, and is listed anew. That costs no request, and 512
bytes a clip (1.5 kB if its name is long, or not ASCII).
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import tarfile
import threading
from dataclasses import dataclass
from typing import IO, Any, NamedTuple, cast

from af2_ray.storage.places import check_regular, locate, put_text
from af2_ray.storage.stores import Ranges, version_of

logger = logging.getLogger(__name__)

_MARK = ".tar#"
_BLOCK_BYTES = 2**20  # of a remote read
_FORMAT = 2  # of the index
_MOST_KNOWN = 256  # shards whose index this process keeps
_MOST_HEADER = 2**20  # bytes of a file's tar headers: names and dates


class Place(NamedTuple):
    """Where a file is in its shard: where its tar headers and its data begin, its size, a digest of the headers."""

    start: int
    offset: int
    size: int
    mark: str


Places = dict[str, Place]


@dataclass(frozen=True)
class Index:
    version: str  # of the shard, by what its store tells
    files: Places


_known: dict[str, Index] = {}
_lock = threading.Lock()  # of `_known`: clips are probed by many threads


def split_member(uri: str) -> tuple[str, str] | None:
    """Shard and member of `shard.tar#member`; none for any other uri."""
    shard, mark, member = uri.partition(_MARK)
    return (shard + _MARK[:-1], member) if mark and member else None


def index_of(shard: str, *, anew: bool = False) -> Index:
    """Where each file of a shard is, from its index, which is made where there is none.

    Args:
        anew: whether it is made in any case, for the one that is there is wrong.

    Raises:
        FileNotFoundError: there is no such shard.
        ValueError: it is not a tar file, or cut.
    """
    with _lock:
        index = None if anew else _known.get(shard)
    if index is None:
        index = _read_index(shard, anew)
        with _lock:
            while len(_known) >= _MOST_KNOWN:
                _known.pop(next(iter(_known)))
            _known[shard] = index
    return index


def _read_index(shard: str, anew: bool) -> Index:
    fs, path = locate(shard)
    # Not by its size: tars come in whole blocks of 10 kB, and the same clips in another order are as many.
    beside, version = f"{path}.index.json", version_of(fs.info(path))
    try:
        check_regular(fs, beside)
        known = {} if anew else json.loads(fs.cat_file(beside))
        if known["format"] == _FORMAT and known["version"] == version:
            return Index(version, {name: _place(*entry) for name, entry in known["files"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        pass  # none yet, half written, of another form or of another shard: made anew
    try:
        with fs.open(path, "rb", block_size=_BLOCK_BYTES) as stream:
            files = _listed(stream)
    except tarfile.TarError as error:
        raise ValueError(
            f"{shard}: not a readable tar file (a compressed one cannot be read by offset): {error}"
        ) from error
    try:
        put_text(fs, beside, json.dumps({"format": _FORMAT, "version": version, "files": files}))
    except OSError as error:
        logger.info("%s: the index is kept in memory only: %s", shard, error)
    return Index(version, files)


def _place(start: int, offset: int, size: int, mark: str) -> Place:
    if not (0 <= int(start) < int(offset) <= int(start) + _MOST_HEADER and int(size) >= 0):
        raise ValueError("no place in a tar file")
    return Place(int(start), int(offset), int(size), str(mark))


def _listed(stream: IO[bytes]) -> Places:
    found: Places = {}
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        for entry in tar:
            if entry.isfile():
                stream.seek(entry.offset)
                mark = _mark(stream.read(entry.offset_data - entry.offset))
                found[entry.name] = Place(entry.offset, entry.offset_data, entry.size, mark)
    return found


def _mark(headers: bytes) -> str:
    return hashlib.sha256(headers).hexdigest()[:16]


def open_member(shard: str, member: str, whole_bytes: int, limit_s: float | None = None) -> tuple[IO[bytes], int]:
    """A member as a seekable stream, and its size; one up to `whole_bytes` is fetched in one read.

    Args:
        shard, member: names of both (`split_member`).
        whole_bytes: size up to which a member is read at once.
        limit_s: seconds that each read of a larger member may take; none: as long as it likes.

    Raises:
        FileNotFoundError: no such shard, or no such member in it.
        ValueError: the shard changes while it is read.
    """
    fs, path = locate(shard)
    for anew in (False, True):
        index = index_of(shard, anew=anew)
        place = index.files.get(member)
        if place is None and (anew or index.version == version_of(fs.info(path))):
            raise FileNotFoundError(f"{shard} has no {member}")
        if place is not None and (found := _opened(fs, path, place, whole_bytes, limit_s)):
            return found, place.size
    raise ValueError(f"{shard} changes while it is read: {member} is not where its headers say")


def _opened(fs: Any, path: str, place: Place, whole_bytes: int, limit_s: float | None) -> IO[bytes] | None:
    """The member at a place; none if another one is there now."""
    num_header = place.offset - place.start
    whole = place.size <= whole_bytes
    data = fs.cat_file(path, start=place.start, end=place.offset + (place.size if whole else 0))
    if _mark(data[:num_header]) != place.mark:
        return None
    if whole:
        return io.BytesIO(data[num_header:])
    return cast(IO[bytes], io.BufferedReader(Ranges(fs, path, place.offset, place.size, limit_s), _BLOCK_BYTES))
