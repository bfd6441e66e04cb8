"""Manifests in columns (Parquet, Arrow) to samples, no object made of any of them.

Audio bytes inside a table are refused: a clip must be readable on its own, from a file or a tar shard.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from af2_ray.data.columns import SampleTable
from af2_ray.data.names import Root, stem_of
from af2_ray.storage.places import check_regular, inner_name, locate

KEYS: Mapping[str, tuple[str, ...]] = {
    "name": ("name", "audio", "uri", "path", "file", "file_name", "audio_path"),
    "prompt": ("prompt", "question", "instruction"),
    "output": ("output", "answer", "response", "text", "caption"),
    "duration": ("duration", "duration_s"),
    "audio_start": ("audio_start", "offset_s", "offset", "start"),
}


def read_columns(uri: str, kind: str) -> pa.Table:
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


def samples_of_columns(uri: str, table: pa.Table, root: str | None) -> SampleTable:
    """A table of samples, no object made of any of them."""
    names = {key: next((o for o in others if o in table.column_names), None) for key, others in KEYS.items()}
    for key in ("name", "prompt", "output"):
        if names[key] is None:
            raise ValueError(f"{uri}: no column {key!r} (or {', '.join(KEYS[key][1:])}); it has {table.column_names}")
    dataset = stem_of(uri)
    found: dict[str, Any] = {
        "uri": _joined_uris(uri, table[names["name"]], Root.of(uri, root)),
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
