"""Dense features of a frozen audio tower, kept on disk and read in place of audio (`features: cached`).

A shard is one safetensors file with a tensor [W, F, D] a clip and, in its header, which clips these are: there is no
index that could disagree with the shards, and one clip is read without the others. Features are a pure function of
tower and clip, so a folder belongs to one tower (its mark is in the folder's name and in `cache.json`), and a clip is
found only with the stretch that was heard and the file's size and date (or ETag). Other weights are refused; another
file under the same name counts as missing and is encoded anew.

At 64 x 2048 numbers in bf16 a window takes 262 kB, its int16 audio 320 kB. numpy has no bf16: the bits travel as int16.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from af2_ray.audio.decode import AudioError
from af2_ray.audio.hear import Stretch
from af2_ray.audio.shards import split_member
from af2_ray.storage.files import put_in_place, read_json, temporary_of, write_whole
from af2_ray.storage.places import READ_S, locate, within

FORMAT = 1  # of the shards, and of what of the front end no configuration tells
_STAT_THREADS = 32  # waiting for headers of remote files


class CacheEntry(NamedTuple):
    """A stretch as a tower hears it, of one version of its file."""

    stretch: Stretch
    stamp: str = ""


def key_of(stretch: Stretch) -> int:
    """64 bits that stand for a stretch, whatever the version of its file."""
    text = json.dumps([stretch.uri, stretch.offset_s, stretch.duration_s]).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")


def entries_to_json(entries: Iterable[CacheEntry]) -> str:
    """Entries as JSON: [uri, offset_s, duration_s, stamp] each."""
    return json.dumps([[s.uri, s.offset_s, s.duration_s, stamp] for s, stamp in entries])


def entries_from_json(text: str) -> list[CacheEntry]:
    """Inverse of `entries_to_json`."""
    return [
        CacheEntry(Stretch(uri, offset_s, duration_s), stamp) for uri, offset_s, duration_s, stamp in json.loads(text)
    ]


def stamps(uris: Sequence[str]) -> list[str]:
    """Size and date (or ETag) of each file; `missing` where there is none that can be seen."""
    if not any("://" in uri.removeprefix("file://") for uri in uris):
        return [_stamp(uri) for uri in uris]
    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        return list(pool.map(_stamp, uris))


def _stamp(uri: str) -> str:
    member = split_member(uri)
    path = (member[0] if member else uri).removeprefix("file://")
    try:
        if "://" not in path:
            found = os.stat(path)
            return f"{found.st_size}:{found.st_mtime_ns}"
        fs, inner = locate(path)
        info = within(READ_S, lambda: fs.info(inner))
        return f"{info['size']}:{info.get('ETag') or info.get('LastModified') or info.get('mtime')}"
    except Exception:  # of a store's client, too
        return "missing"  # reading it will say why


# --- Shards ------------------------------------------------------------------------------------------------------


def open_folder(folder: Path, tower: Mapping[str, Any]) -> None:
    """Make a cache folder for a tower, or check that it is this tower's.

    Args:
        tower: facts that the features depend on beside the audio: `weights`, `dtype`.

    Raises:
        ValueError: the folder holds features of another tower.
    """
    path, facts = folder / "cache.json", {"format": FORMAT, **tower}
    found = read_json(path)
    if found is None:
        write_whole(path, json.dumps(facts))
    elif found != facts:
        raise ValueError(f"{folder} has features of another tower ({found}, not {facts}): remove it, or name another")


def write_shard(folder: Path, entries: Sequence[CacheEntry], features: Sequence[NDArray[Any]]) -> Path:
    """Write the features [W, F, D] of some clips as one shard; a half-written one is never seen under its name."""
    text = entries_to_json(entries)
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.safetensors"
    temporary = temporary_of(path)
    tensors = {str(place): np.ascontiguousarray(array) for place, array in enumerate(features)}
    save_file(tensors, temporary, metadata={"clips": text})
    put_in_place(temporary, path)
    return path


def read_entries(shard: Path) -> list[CacheEntry]:
    """The clips of a shard, from its header."""
    try:
        with safe_open(shard, framework="np") as file:
            return entries_from_json(file.metadata()["clips"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{shard} is not a readable shard of features ({error}): remove it, it is made anew"
        ) from error


# --- Reading -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class FeatureStore:
    """Where the features of a stage's clips are: what a collator reads from instead of decoding.

    Attributes:
        shards: paths of the shards in use.
        keys: keys of the clips, uint64 [N], ascending; `shard` and `place` [N] say where each one is.
        failures: reason and detail of the clips that could not be encoded, by key.
        shape: sizes F and D of a window's features.
        dtype: type of the arrays (int16: the bits of bf16).
    """

    shards: tuple[str, ...]
    keys: NDArray[np.uint64]
    shard: NDArray[np.int32]
    place: NDArray[np.int32]
    shape: tuple[int, int]
    dtype: str
    failures: Mapping[int, tuple[str, str]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, folder: Path, entries: Iterable[CacheEntry], failures: Mapping[int, tuple[str, str]] | None = None
    ) -> tuple[FeatureStore, list[CacheEntry]]:
        """The store of `entries`, with their present stamps, as far as the folder has them, and those it lacks."""
        shards = sorted(folder.glob("[!.]*.safetensors"))
        found = {
            entry: (number, place)
            for number, path in enumerate(shards)
            for place, entry in enumerate(read_entries(path))
        }
        wanted = dict.fromkeys(entries)
        have = sorted((key_of(entry.stretch), *found[entry]) for entry in wanted if entry in found)
        keys = np.array([key for key, _, _ in have], np.uint64)
        if len(np.unique(keys)) < len(keys):
            raise ValueError(f"{folder}: two clips with one key, or one file with two dates: start the stage again")
        shape, dtype = (1, 1), "float32"
        if have:
            example = _tensor(str(shards[have[0][1]]), have[0][2])
            shape, dtype = (example.shape[1], example.shape[2]), str(example.dtype)
        numbers = np.array([where for _, *where in have], np.int32).reshape(-1, 2)
        paths = tuple(map(str, shards))
        store = cls(paths, keys, numbers[:, 0], numbers[:, 1], shape, dtype, dict(failures or {}))
        return store, [entry for entry in wanted if entry not in found]

    @property
    def silence(self) -> NDArray[Any]:
        """What stands in a row without clips: one window [1, F, D], of which nothing is learned."""
        return np.zeros((1, *self.shape), self.dtype)

    def read(self, stretch: Stretch, max_windows: int) -> NDArray[Any]:
        """Features [W, F, D] of a stretch, as much of it as `max_windows` hold.

        Raises:
            AudioError: the clip could not be encoded, for the reason it then had.
            ValueError: the store was made for other clips.
        """
        first = stretch.first(max_windows)
        key = key_of(first)
        if key in self.failures:
            raise AudioError(first.uri, *self.failures[key])
        at = int(np.searchsorted(self.keys, np.uint64(key)))
        if at == len(self.keys) or int(self.keys[at]) != key:
            raise ValueError(f"{first} is not among the cached features: they were made for another plan")
        return _tensor(self.shards[self.shard[at]], int(self.place[at]))


def _tensor(shard: str, place: int) -> NDArray[Any]:
    try:
        return _opened(shard).get_tensor(str(place))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{shard}: features cannot be read ({error}): remove it and start again") from error


@functools.lru_cache(maxsize=64)
def _opened(shard: str) -> Any:
    """A shard mapped into memory; it stays so, as each row reads a few clips of many shards."""
    return safe_open(shard, framework="np")
