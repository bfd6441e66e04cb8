"""The digest of a model's weights: the same however they lie in files, so that it names the model.

Digests of files (`files.write_digests`) change when weights are sharded in another way or a header is padded. This one
is of what the files hold: SHA-256 over the names, types and shapes of all tensors with a SHA-256 of the bytes of each.
The tensors of 9 GB are read by several threads, at 1 to 2 GB a second and core; the result is kept in `TMPDIR` for as
long as the files stay as they are, so it is worked out once a machine. The configuration is no part of it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from af2_ray.storage.files import Damaged, read_json, sealed_json, write_whole
from af2_ray.storage.places import inner_name
from af2_ray.storage.stores import local_model, note_of

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_HEADER_BYTES = 100 * 2**20  # of safetensors' own limit
_READ_BYTES = 8 * 2**20
_THREADS = 8


def weights_digest(folder: str | Path) -> str:
    """SHA-256 of a model's tensors, in hexadecimal: their names, types, shapes and numbers.

    Args:
        folder: folder that an export wrote, or its address in object storage.

    Raises:
        ValueError: it is no such folder, it has no safetensors, or (`files.Damaged`) one of them cannot be read.
    """
    path = local_model(folder)
    files = weight_files(path)
    with note_of("weights", path) as note:
        if facts := read_json(note):
            return str(facts["digest"])
        digest = tensors_digest(files)
        write_whole(note, sealed_json({"folder": str(path), "digest": digest}))
    return digest


def weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights, those of `transformers`: one, or the shards that an index lists.

    Raises:
        ValueError: there are none.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        raise ValueError(f"no weights in {folder}: name a folder with {WEIGHTS} or {INDEX}, as save_pretrained writes")
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{index} is damaged: no index of safetensors: {error}; put back a copy") from error
    return [folder / inner_name(str(name)) for name in names]


def tensors_digest(files: list[Path]) -> str:
    """SHA-256 over all tensors of safetensors files, in the order of their names."""
    found = [(file, name, facts, start) for file in files for name, facts, start in _tensors(file)]
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        largest = sorted(found, key=lambda one: one[2]["data_offsets"][0] - one[2]["data_offsets"][1])
        digests = pool.map(lambda one: (one[1], one[2]["dtype"], one[2]["shape"], _digest(*one)), largest)
        lines = sorted(json.dumps(line) for line in digests)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _tensors(path: Path) -> Iterator[tuple[str, dict[str, Any], int]]:
    """Each tensor's name, facts (`dtype`, `shape`, `data_offsets`) and the place of byte 0 of the file's data."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(size, _HEADER_BYTES)))
        tensors = {name: facts for name, facts in header.items() if name != "__metadata__"}
        is_whole = path.stat().st_size == 8 + size + max(
            (facts["data_offsets"][1] for facts in tensors.values()), default=0
        )
    except FileNotFoundError as error:
        raise Damaged(f"{path} is missing: the index beside it names it; put back a copy") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise Damaged(
            f"{path} is damaged: it has no header of safetensors; put back a copy, or make it anew"
        ) from error
    if not is_whole:
        raise Damaged(f"{path} is damaged: it has not the size that its header says; put back a copy, or make it anew")
    for name, facts in tensors.items():
        yield name, facts, 8 + size


def _digest(path: Path, name: str, facts: dict[str, Any], start: int) -> str:
    """SHA-256 of a tensor's bytes."""
    begin, end = facts["data_offsets"]
    found = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        for place in range(start + begin, start + end, _READ_BYTES):
            data = os.pread(file.fileno(), min(_READ_BYTES, start + end - place), place)
            found.update(data)
    return found.hexdigest()
