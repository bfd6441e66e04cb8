"""Clips in tar shards, read where they lie: `shard.tar#clip.flac`, local or remote.

Millions of clips as millions of objects cost a request and a directory entry each; WebDataset's way of packing them
into plain tar files does not. A tar has no table of contents, so one is made at the first use (one pass over the
headers) and kept beside the shard as `shard.tar.index.json`, or in this process alone where that place cannot be
written. From then on a clip is one ranged read, in any order.
"""

from __future__ import annotations

import functools
import io
import json
import logging
import tarfile
from typing import IO

import fsspec

from af2_ray.remote import version_of

logger = logging.getLogger(__name__)

_MARK = ".tar#"
_BLOCK_BYTES = 2**20  # of a remote read
Places = dict[str, tuple[int, int]]


def split_member(uri: str) -> tuple[str, str] | None:
    """Shard and member of `shard.tar#member`; none for any other uri."""
    shard, mark, member = uri.partition(_MARK)
    return (shard + _MARK[:-1], member) if mark and member else None


def member_uris(shard: str) -> list[str]:
    """Uris of all files in a shard, in order."""
    return [f"{shard}#{member}" for member in places(shard)]


@functools.lru_cache(maxsize=256)
def places(shard: str) -> Places:
    """Offset and size in bytes of each file in a shard, from its index, which is made where there is none.

    Raises:
        FileNotFoundError: there is no such shard.
        ValueError: it is not a tar file, or cut.
    """
    fs, path = fsspec.url_to_fs(shard)
    # Not by its size: tars come in whole blocks of 10 kB, and the same clips in another order are as many.
    index, version = f"{path}.index.json", version_of(fs.info(path))
    try:
        known = json.loads(fs.cat_file(index))
        if known["version"] == version:
            return {name: (int(offset), int(length)) for name, (offset, length) in known["files"].items()}
    except (OSError, ValueError, KeyError):
        pass  # none yet, half written, or of another shard: made anew
    found: Places = {}
    try:
        with fs.open(path, "rb", block_size=_BLOCK_BYTES) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            found = {entry.name: (entry.offset_data, entry.size) for entry in tar if entry.isfile()}
    except tarfile.TarError as error:
        raise ValueError(
            f"{shard}: not a readable tar file (a compressed one cannot be read by offset): {error}"
        ) from error
    try:
        fs.pipe_file(index, json.dumps({"version": version, "files": found}).encode())
    except OSError as error:
        logger.info("%s: the index is kept in memory only: %s", shard, error)
    return found


def open_member(uri: str, whole_bytes: int) -> tuple[IO[bytes], int]:
    """A member as a seekable stream, and its size; one up to `whole_bytes` is fetched in one read.

    Raises:
        FileNotFoundError: no such shard, or no such member in it.
    """
    split = split_member(uri)
    if split is None:
        raise ValueError(f"{uri}: not the uri of a file in a shard (shard.tar#member)")
    shard, member = split
    try:
        offset, size = places(shard)[member]
    except KeyError as error:
        raise FileNotFoundError(f"{shard} has no {member}") from error
    fs, path = fsspec.url_to_fs(shard)
    if size <= whole_bytes:
        return io.BytesIO(fs.cat_file(path, start=offset, end=offset + size)), size
    stream = fs.open(path, "rb", block_size=_BLOCK_BYTES, cache_type="blockcache")
    return io.BufferedReader(_Part(stream, offset, size)), size


class _Part(io.RawIOBase):
    """A stretch of a stream as a stream of its own."""

    def __init__(self, stream: IO[bytes], offset: int, size: int) -> None:
        self._stream, self._offset, self._size, self._place = stream, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        wanted = max(0, min(len(buffer), self._size - self._place))
        self._stream.seek(self._offset + self._place)
        data = self._stream.read(wanted)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()
