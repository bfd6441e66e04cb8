"""Manifests in the formats that corpora come in, all to the same samples.

| what | recognised by |
|---|---|
| NVIDIA's JSON | `.json` |
| JSON lines | `.jsonl`, `.jsonl.gz`: an object a sample |
| lhotse cuts | JSON lines whose objects have a `recording`; a supervision is a sample |
| Parquet | `.parquet`, or a folder of them |
| Hugging Face `datasets` | a folder from `save_to_disk` (Arrow streams), read without that library |

Keys (or columns) are NVIDIA's, and the usual other names for them (`KEYS`). Columns become a
`SampleTable` without an object a sample. Audio bytes inside Parquet or Arrow are refused: a clip must be readable on
its own, from a file or a tar shard.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from af2_ray.data import manifest
from af2_ray.data.columns import SampleTable
from af2_ray.data.manifest import CaptionSet, Root, Sample
from af2_ray.storage import check_regular, inner_name, locate, open_text

KEYS: Mapping[str, tuple[str, ...]] = {
    "name": ("name", "audio", "uri", "path", "file", "file_name", "audio_path"),
    "prompt": ("prompt", "question", "instruction"),
    "output": ("output", "answer", "response", "text", "caption"),
    "duration": ("duration", "duration_s"),
    "audio_start": ("audio_start", "offset_s", "offset", "start"),
}


def read_table(uri: str, root: str | None = None) -> SampleTable:
    """Read a manifest of any format; see the module's table.

    Args:
        uri: file or folder, local or remote.
        root: folder of the audio; none: the manifest's own.

    Raises:
        ValueError: it cannot be read; the message names the file and the line or column.
    """
    kind = kind_of(uri)
    if kind == "nvidia":
        return SampleTable.from_samples(manifest.read_samples(uri, root))
    if kind == "lines":
        return SampleTable.from_samples(list(_samples_of_lines(uri, root)))
    return _samples_of_columns(uri, _columns(uri, kind), root)


def kind_of(uri: str) -> str:
    """`nvidia`, `lines`, `parquet` or `arrow`."""
    plain = uri.rstrip("/").removesuffix(".gz")
    for suffix, kind in ((".json", "nvidia"), (".jsonl", "lines"), (".parquet", "parquet"), (".arrow", "arrow")):
        if plain.endswith(suffix):
            return kind
    fs, path = locate(uri)
    names = [entry.rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False)] if fs.isdir(path) else []
    if any(name.endswith(".arrow") for name in names):
        return "arrow"
    if any(name.endswith(".parquet") for name in names):
        return "parquet"
    if "dataset_dict.json" in names:
        check_regular(fs, f"{path}/dataset_dict.json")
        splits = json.loads(fs.cat_file(f"{path}/dataset_dict.json"))["splits"]
        raise ValueError(f"{uri}: a dataset of several splits: name one of {', '.join(f'{uri}/{s}' for s in splits)}")
    raise ValueError(f"{uri}: no such manifest, or of no known format (.json, .jsonl, .parquet, a `datasets` folder)")


def read_caption_rows(uri: str, root: str | None = None) -> list[CaptionSet]:
    """Caption sets from Parquet, Arrow or lhotse cuts (a supervision's text is the caption)."""
    base = Root.of(uri, root if root is not None else _folder(uri))
    if kind_of(uri) == "lines":
        rows: Iterator[dict[str, Any]] = (row for _, row in _lines(uri))
    else:
        rows = iter(_columns(uri, kind_of(uri)).to_pylist())
    sets = []
    for number, row in enumerate(rows, 1):
        try:
            for item in _cut_items(row) if "recording" in row else [row]:
                named = _renamed(item) | {"caption": item.get("caption") or item.get("text") or item.get("output")}
                sets.append(manifest.caption_set(named, base))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{uri}, row {number}: {manifest.told(error)}") from error
    return sets


# --- JSON lines and lhotse cuts ----------------------------------------------------------------------------------


def _samples_of_lines(uri: str, root: str | None) -> Iterator[Sample]:
    base = Root.of(uri, root if root is not None else _folder(uri))
    dataset = _stem(uri)
    for number, row in _lines(uri):
        try:
            for place, item in enumerate(_cut_items(row) if "recording" in row else [row]):
                id_ = str(item.get("id") or f"{dataset}/{number - 1}") + (f".{place}" if place else "")
                task = str(item.get("task") or dataset.rsplit("-", 1)[-1])
                yield manifest.sample(_renamed(item), id_, base, str(item.get("dataset") or dataset), task)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{uri}, line {number}: {manifest.told(error)}") from error


def _lines(uri: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers from 1 on, and the objects."""
    try:
        with open_text(uri) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError(f"{uri}, line {number}: expected an object, got {type(row).__name__}")
                    yield number, row
    except FileNotFoundError as error:
        raise ValueError(f"{uri}: no such manifest") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{uri}, line {number}: not JSON: {error.msg}") from error
    except RecursionError as error:
        raise ValueError(f"{uri}, line {number}: objects within objects too deep to read") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{uri}: not UTF-8 text: {error}") from error


def _cut_items(cut: dict[str, Any]) -> list[dict[str, Any]]:
    """A lhotse cut as one item a supervision: question in `custom.prompt`, answer in `text`."""
    sources = cut["recording"]["sources"]
    if len(sources) != 1 or sources[0]["type"] not in ("file", "url"):
        raise ValueError(f"cut {cut.get('id')!r}: its audio must be one file or url, not {sources[0]['type']!r}")
    if (channel := cut.get("channel") or 0) != 0:
        raise ValueError(f"cut {cut.get('id')!r} is of channel {channel!r}: the first is heard; write it as a file")
    common = {
        "id": cut.get("id"),
        "name": sources[0]["source"],
        "audio_start": cut.get("start", 0.0),
        "duration": cut.get("duration"),
    }
    items = []
    for supervision in cut.get("supervisions") or []:
        custom = {**(cut.get("custom") or {}), **(supervision.get("custom") or {})}
        items.append(custom | common | _part_of(cut, supervision) | {"text": supervision.get("text")})
    return items


def _part_of(cut: dict[str, Any], supervision: dict[str, Any]) -> dict[str, float]:
    """The stretch that a supervision tells of, as far as it lies in its cut; empty: all of it."""
    start, length, whole = supervision.get("start") or 0.0, supervision.get("duration"), cut.get("duration")
    if length is None or whole is None:
        return {}
    end = min(start + length, whole)
    start = max(start, 0.0)
    return {"audio_start": (cut.get("start") or 0.0) + start, "duration": end - start}


def _renamed(item: dict[str, Any]) -> dict[str, Any]:
    """The item under NVIDIA's keys."""
    named = dict(item)
    for key, others in KEYS.items():
        found = next((other for other in others if named.get(other) is not None), None)
        if found is not None and found != key:
            named[key] = named.pop(found)
    for key in ("id", "dataset", "task"):
        named.pop(key, None)
    return named


# --- Columns -----------------------------------------------------------------------------------------------------


def _columns(uri: str, kind: str) -> pa.Table:
    fs, path = locate(uri)
    suffix = ".parquet" if kind == "parquet" else ".arrow"
    files = _data_files(fs, path, suffix) if fs.isdir(path) else [path]
    try:
        tables = []
        for file in files:
            check_regular(fs, file)
            with fs.open(file, "rb") as stream:
                tables.append(pq.read_table(stream) if kind == "parquet" else _arrow(stream))
    except FileNotFoundError as error:
        raise ValueError(f"{uri}: no such manifest") from error
    except pa.ArrowInvalid as error:
        raise ValueError(f"{uri}: not readable as {kind}: {error}") from error
    return pa.concat_tables(tables, promote_options="permissive")


def _data_files(fs: Any, folder: str, suffix: str) -> list[str]:
    """The files of a table's folder; not what `datasets` derived from them (`map`, `filter`) and keeps there, too."""
    state = f"{folder}/state.json"
    check_regular(fs, state)
    if named := json.loads(fs.cat_file(state)).get("_data_files") if fs.exists(state) else None:
        return [f"{folder}/{inner_name(entry['filename'])}" for entry in named]
    found = sorted(fs.glob(f"{folder}/*{suffix}"))
    return [file for file in found if not file.rsplit("/", 1)[-1].startswith("cache-")]


def _arrow(stream: Any) -> pa.Table:
    """`datasets` writes Arrow streams; others write files."""
    try:
        return pa.ipc.open_stream(stream).read_all()
    except pa.ArrowInvalid:
        stream.seek(0)
        return pa.ipc.open_file(stream).read_all()


def _samples_of_columns(uri: str, table: pa.Table, root: str | None) -> SampleTable:
    """A table of samples, no object made of any of them."""
    names = {key: next((o for o in others if o in table.column_names), None) for key, others in KEYS.items()}
    for key in ("name", "prompt", "output"):
        if names[key] is None:
            raise ValueError(f"{uri}: no column {key!r} (or {', '.join(KEYS[key][1:])}); it has {table.column_names}")
    dataset = _stem(uri)
    found: dict[str, Any] = {
        "uri": _joined_uris(uri, table[names["name"]], Root.of(uri, root if root is not None else _folder(uri))),
        "prompt": table[names["prompt"]],
        "answer": table[names["output"]],
    }
    found["id"] = table["id"].cast(pa.large_string()) if "id" in table.column_names else _ids(dataset, len(table))
    for key, column, missing in (("duration_s", names["duration"], math.nan), ("offset_s", names["audio_start"], 0.0)):
        found[key] = (
            pc.fill_null(table[column].cast(pa.float64()), missing).to_numpy()
            if column is not None
            else np.full(len(table), missing)
        )
    for key, value in (("dataset", dataset), ("task", dataset.rsplit("-", 1)[-1])):
        found[key] = table[key] if key in table.column_names else pa.array([value] * len(table), pa.large_string())
    for key in ("skill", "pair", "template"):
        if key in table.column_names:
            found[key] = table[key].cast(pa.large_string())
    if "options" in table.column_names:
        found["options"] = [json.dumps(o, ensure_ascii=False) if o else "" for o in table["options"].to_pylist()]
    return SampleTable.from_columns(found)


def _joined_uris(uri: str, column: pa.ChunkedArray, root: Root) -> pa.ChunkedArray:
    """Names as uris: a name that is absolute or has a scheme stays as it is."""
    if pa.types.is_struct(column.type):  # the `Audio` feature of `datasets`: path, or the file's bytes
        paths = pc.struct_field(column, "path")
        if paths.null_count or pc.any(pc.is_valid(pc.struct_field(column, "bytes"))).as_py():
            raise ValueError(f"{uri}: audio bytes inside the table; write the clips to files or tar shards first")
        column = paths
    column = column.cast(pa.large_string())
    if column.null_count:
        raise ValueError(f"{uri}: row {pc.index(pc.is_null(column), True).as_py()} has no audio name")
    if pc.any(pc.or_(pc.match_substring(column, ".."), pc.equal(column, ""))).as_py():
        return pa.chunked_array([[root.join(name) for name in column.to_pylist()]], pa.large_string())
    stays = pc.match_substring_regex(column, r"^/|^data:|://")
    empty = pa.scalar("", pa.large_string())
    joined = pc.binary_join_element_wise(pa.scalar(f"{root.folder.rstrip('/')}/", pa.large_string()), column, empty)
    return pc.if_else(stays, column, joined)


def _ids(dataset: str, num: int) -> pa.Array:
    numbers = pa.array(np.arange(num)).cast(pa.large_string())
    words = (pa.scalar(f"{dataset}/", pa.large_string()), numbers, pa.scalar("", pa.large_string()))
    return pc.binary_join_element_wise(*words)


def _folder(uri: str) -> str:
    """Where a manifest's audio is: beside it; for a folder, in it."""
    last = uri.rstrip("/").rsplit("/", 1)[-1]
    return manifest.split_uri(uri)[0] if "." in last else uri.rstrip("/")


def _stem(uri: str) -> str:
    folder, stem = manifest.split_uri(uri.rstrip("/"))
    return f"{folder.rstrip('/').rsplit('/', 1)[-1]}/{stem}" if folder != "." else stem
