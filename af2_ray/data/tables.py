"""Manifests in columns: Parquet and Arrow to samples with no object made of any of them, and the rows of a CSV.

Audio bytes inside a table are refused: a clip must be readable on its own, from a file or a tar shard.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from af2_ray.data.columns import SampleTable
from af2_ray.data.items import KEYS, MORE_KEYS, TALK_KEYS, seconds_of, texts_of
from af2_ray.data.names import Root, stem_of
from af2_ray.storage.places import check_regular, inner_name, locate, open_text


def csv_rows(uri: str) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a CSV (or, by its suffix, a TSV) by column, each with the number of its line.

    Raises:
        ValueError: no such file, no table, or a line with another number of values than there are columns.
    """
    dialect = "excel-tab" if uri.removesuffix(".gz").endswith(".tsv") else "excel"
    try:
        with open_text(uri, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, dialect=dialect)
            names = reader.fieldnames or ()
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise ValueError(f"{uri}, line 1: the column {twice!r} comes twice: rename one")
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(f"{uri}, line {reader.line_num}: not as many values as columns")
                yield reader.line_num, row
    except FileNotFoundError as error:
        raise ValueError(f"{uri}: no such file") from error
    except csv.Error as error:
        raise ValueError(f"{uri}, line {reader.line_num}: not a line of a CSV: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{uri}: not UTF-8 text: {error}") from error


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


def samples_of_columns(uri: str, table: pa.Table, root: str | None, columns: Mapping[str, str]) -> SampleTable:
    """A table of samples, no object made of any of them.

    Args:
        columns: names of columns by NVIDIA's keys, where a user gave them.
    """
    names = _names_of_columns(uri, table, columns)
    dataset = stem_of(uri)
    found: dict[str, Any] = {
        "uri": _joined_uris(uri, table[names["name"]], Root.of(uri, root)),
        "prompt": _texts(uri, table, names["prompt"], "prompt"),
        "answer": _texts(uri, table, names["output"], "output"),
    }
    found["id"] = _texts(uri, table, names["id"], "id") if "id" in names else _ids(dataset, len(table))
    for name, key, missing in (("duration_s", "duration", math.nan), ("offset_s", "audio_start", 0.0)):
        found[name] = _seconds(uri, table, names[key], key, missing) if key in names else np.full(len(table), missing)
    for key, value in (("dataset", dataset), ("task", dataset.rsplit("-", 1)[-1])):
        default = pa.array([value] * len(table), pa.large_string())
        found[key] = _texts(uri, table, names[key], key) if key in names else default
    for key in ("skill", "pair", "template"):
        if key in names:
            found[key] = _texts(uri, table, names[key], key)
    if "options" in names:
        found["options"] = list(_options(uri, table[names["options"]]))
    return SampleTable.from_columns(found)


def _names_of_columns(uri: str, table: pa.Table, columns: Mapping[str, str]) -> dict[str, str]:
    """The table's columns by NVIDIA's keys."""
    there = table.column_names
    for key, column in columns.items():
        if column not in there:
            raise ValueError(f"{uri}: no column {column!r}, which `columns` gives for {key!r}; it has {there}")
    free = [name for name in there if name not in columns.values()]
    names = {key: next((other for other in others if other in free), "") for key, others in KEYS.items()}
    names |= {key: key for key in MORE_KEYS if key in free}
    names = {key: name for key, name in names.items() if name} | dict(columns)
    for key in ("name", "prompt", "output"):
        if key not in names:
            others = ", ".join(KEYS[key][1:])
            raise ValueError(f"{uri}: no column {key!r} (or {others}); it has {there}: name the right one by `columns`")
    return names


def rows_of_columns(table: pa.Table, columns: Mapping[str, str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Row numbers from 1 on, and the rows as objects of the known keys; keys without a value are left out."""
    known = {*chain.from_iterable(KEYS.values()), *TALK_KEYS, *MORE_KEYS, *columns.values()}
    table = table.select([name for name in table.column_names if name in known])
    for number, row in enumerate(chain.from_iterable(batch.to_pylist() for batch in table.to_batches(4096)), 1):
        yield number, {key: value for key, value in row.items() if value is not None or key in columns.values()}


def _texts(uri: str, table: pa.Table, column: str, key: str) -> pa.ChunkedArray:
    """A column of texts, or of numbers as texts."""
    return _as_texts(f"{uri}: column {column!r} (key {key!r})", table[column])


def _as_texts(what: str, values: pa.ChunkedArray) -> pa.ChunkedArray:
    kind = values.type
    if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        raise ValueError(f"{what} must hold strings, it holds {kind}")
    return values if pa.types.is_dictionary(kind) else values.cast(pa.large_string())


def _options(uri: str, values: pa.ChunkedArray) -> Iterator[str]:
    """Options of each row as JSON; empty where there are none."""
    for number, value in enumerate(values.to_pylist(), 1):
        try:
            options = texts_of({"options": value}, "options")
        except (TypeError, ValueError) as error:
            raise ValueError(f"{uri}, row {number}: {error}") from error
        yield json.dumps(options, ensure_ascii=False) if options else ""


def _seconds(uri: str, table: pa.Table, column: str, key: str, missing: float) -> NDArray[np.float64]:
    """A column of seconds; `missing` where there is no value."""
    values = table[column]
    try:
        return pc.fill_null(values.cast(pa.float64()), missing).to_numpy()
    except pa.ArrowException:
        for number, value in enumerate(values.to_pylist(), 1):  # the first that is no number, or an empty text
            try:
                seconds_of({key: value}, key, missing)
            except TypeError as error:
                raise ValueError(f"{uri}, row {number}: column {column!r}: {error}") from None
        return np.array([seconds_of({key: value}, key, missing) for value in values.to_pylist()])


def _joined_uris(uri: str, column: pa.ChunkedArray, root: Root) -> pa.ChunkedArray:
    """Names as uris: a name that is absolute or has a scheme stays as it is."""
    if pa.types.is_struct(column.type):  # the `Audio` feature of `datasets`: path, or the file's bytes
        paths = pc.struct_field(column, "path")
        if paths.null_count or pc.any(pc.is_valid(pc.struct_field(column, "bytes"))).as_py():
            raise ValueError(f"{uri}: audio bytes inside the table; write the clips to files or tar shards first")
        column = paths
    column = _as_texts(f"{uri}: the column of audio names", column).cast(pa.large_string())
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
