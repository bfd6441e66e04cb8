"""Manifests to samples, in the formats that corpora come in.

| what | recognised by |
|---|---|
| NVIDIA's JSON | `.json`: an object with `data` |
| a list of samples, of AF3's or of other conversations | `.json`: a list, or objects one after the other |
| JSON lines | `.jsonl`, `.jsonl.gz`: an object a sample, or a caption set for AF-CLAP |
| conversations | objects with `messages` or `conversations`, in either of these (`conversations.py`) |
| lhotse cuts | JSON lines whose objects have a `recording`; a supervision is a sample |
| CSV, TSV | `.csv`, `.tsv`, with a line of names |
| Parquet | `.parquet`, or a folder of them; with `messages` or `conversations`: conversations |
| Hugging Face `datasets` | a folder from `save_to_disk` (Arrow streams), read without that library |
| labels | a folder of `label/clip.*`: a question with options for each clip (`label_folders.py`) |

Keys (or columns) are NVIDIA's, and the usual other names for them (`items.KEYS`); others are named by `columns`. Two
kinds of wrong are kept apart. A manifest that cannot be understood (broken JSON, a line without its keys) stops the run
with the file and the line: somebody must mend it. An understood sample that cannot be used (no duration, an empty
question) is set aside with its reason by `samples.check_samples`, counted, and the run goes on.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from af2_ray.data.columns import SampleTable
from af2_ray.data.conversations import is_conversation, sample_of_conversation
from af2_ray.data.inline_clips import InlineClips
from af2_ray.data.items import caption_set_of, columns_by_key, fault_of, renamed, sample_of
from af2_ray.data.label_folders import read_label_folder
from af2_ray.data.names import Root, split_uri, stem_of
from af2_ray.data.samples import CaptionSet, Sample
from af2_ray.data.tables import csv_rows, read_columns, rows_of_columns, samples_of_columns
from af2_ray.storage.places import check_regular, locate, open_text

logger = logging.getLogger(__name__)

Rows = Iterable[tuple[int, Any]]
"""Rows of a manifest, each with its number: of its line, or among the rows."""

NO_COLUMNS: Mapping[str, str] = MappingProxyType({})


def read_samples(uri: str, root: str | None = None, columns: Mapping[str, str] = NO_COLUMNS) -> SampleTable:
    """Read a manifest of any format; see the module's table. What is odd about it is logged (`SampleTable.remarks`).

    Args:
        uri: file or folder, local or at an address of a scheme that is allowed (`storage.places`).
        root: folder of the audio; none: the manifest's own. A name that is absolute or has a scheme stays as it is;
            one that may not be opened is left to `check_samples`.
        columns: columns (or keys of JSON) by our keys, where they have names of their own: `{"audio": "path"}`.

    Raises:
        ValueError: it cannot be read; the message names the file, the line or row, the key and what was expected.
    """
    kind, named = kind_of(uri), columns_by_key(columns)
    if kind == "labels":
        _refuse_columns(uri, named, "a folder of labels has none")
        return read_label_folder(uri, root)
    if kind == "json":
        return _read_json(uri, root, named)
    if kind in ("lines", "csv"):
        rows: Rows = _lines(uri) if kind == "lines" else csv_rows(uri)
        return SampleTable.from_samples(list(_samples_of_rows(uri, rows, "line", root, named)))
    table = read_columns(uri, kind)
    if any(named.get(key, key) in table.column_names for key in ("messages", "conversations")):
        rows = rows_of_columns(table, named)
        return SampleTable.from_samples(list(_samples_of_rows(uri, rows, "row", root, named)))
    return samples_of_columns(uri, table, root, named)


def read_captions(uri: str, root: str | None = None, columns: Mapping[str, str] = NO_COLUMNS) -> list[CaptionSet]:
    """Read AF-CLAP caption sets: JSON lines, lhotse cuts (a supervision's text is the caption), CSV, Parquet or Arrow.

    Args:
        uri: file or folder, as in `read_samples`.
        root: folder of the audio; none: the manifest's own.
        columns: names of columns, as in `read_samples`; `caption` is one of the keys.

    Raises:
        ValueError: it cannot be read; the message names the file and the line or row.
    """
    base, named = Root.of(uri, root), columns_by_key(columns)
    kind = kind_of(uri)
    if kind in ("json", "labels"):
        raise ValueError(
            f"{uri}: caption sets are read from JSON lines, CSV, Parquet or Arrow: write them as one of these"
        )
    rows: Rows
    rows = _lines(uri) if kind == "lines" else csv_rows(uri) if kind == "csv" else _rows(read_columns(uri, kind))
    sets = []
    for number, row in rows:
        try:
            for item in _cut_items(row) if "recording" in row else [row]:
                if kind != "lines" or "recording" in row or named:  # plain lines have the documented keys, and no other
                    found = renamed(item, named)
                    caption = item.get("caption") or item.get("text") or item.get("output")
                    item = found | {"caption": found.get("output") if "output" in named else caption}
                sets.append(caption_set_of(item, base))
        except (KeyError, TypeError, ValueError) as error:
            word = "line" if kind in ("lines", "csv") else "row"
            raise ValueError(f"{uri}, {word} {number}: {fault_of(error)}") from error
    return sets


def kind_of(uri: str) -> str:
    """`json`, `lines`, `csv`, `parquet`, `arrow` or `labels`."""
    plain = uri.rstrip("/").removesuffix(".gz")
    suffixes = {
        ".json": "json",
        ".jsonl": "lines",
        ".csv": "csv",
        ".tsv": "csv",
        ".parquet": "parquet",
        ".arrow": "arrow",
    }
    for suffix, kind in suffixes.items():
        if plain.endswith(suffix):
            return kind
    fs, path = locate(uri)
    found = fs.ls(path, detail=True) if fs.isdir(path) else []
    names = [entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in found]
    for kind in ("arrow", "parquet"):
        if any(name.endswith(f".{kind}") for name in names):
            return kind
    if "dataset_dict.json" in names:
        check_regular(fs, f"{path}/dataset_dict.json")
        splits = json.loads(fs.cat_file(f"{path}/dataset_dict.json"))["splits"]
        raise ValueError(f"{uri}: a dataset of several splits: name one of {', '.join(f'{uri}/{s}' for s in splits)}")
    if manifests := [name for name in names if name.removesuffix(".gz").endswith((".json", ".jsonl", ".csv", ".tsv"))]:
        raise ValueError(f"{uri}: a folder with manifests: name one of them, such as {uri.rstrip('/')}/{manifests[0]}")
    if any(entry["type"] == "directory" for entry in found):
        return "labels"
    raise ValueError(
        f"{uri}: no such manifest, or of no known format (.json, .jsonl, .csv, .parquet, a `datasets` folder, a folder "
        "of label/clip.*)"
    )


def _refuse_columns(uri: str, columns: Mapping[str, str], why: str) -> None:
    if columns:
        raise ValueError(f"{uri}: columns: {why}; leave them out")


# --- JSON --------------------------------------------------------------------------------------------------------


def _read_json(uri: str, root: str | None, columns: Mapping[str, str]) -> SampleTable:
    """NVIDIA's object, a list of rows, or rows one after the other as some tools write them into `.json`."""
    text = _read_text(uri)
    try:
        manifest = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and _begins_with_a_row(text):
            return SampleTable.from_samples(list(_samples_of_rows(uri, _lines(uri), "line", root, columns)))
        raise ValueError(f"{uri}, line {error.lineno}: not JSON: {error.msg}") from error
    except RecursionError as error:
        raise ValueError(f"{uri}: objects within objects too deep to read") from error
    if isinstance(manifest, list) and manifest:
        rows = enumerate(manifest, 1)
        return SampleTable.from_samples(list(_samples_of_rows(uri, rows, "row", root, columns)))
    if not isinstance(manifest, dict) or not isinstance(manifest.get("data"), dict):
        raise ValueError(
            f"{uri}, line 1: a manifest is an object with a `data` object of numbered samples, or a list of samples"
        )
    _refuse_columns(uri, columns, "NVIDIA's JSON has keys of its own")
    return _samples_of_nvidia(uri, manifest, text, root)


def _begins_with_a_row(text: str) -> bool:
    """Whether the first value of a text is an object that is not NVIDIA's whole manifest."""
    first, _ = json.JSONDecoder().raw_decode(text.lstrip())
    return isinstance(first, dict) and "data" not in first


def _samples_of_nvidia(uri: str, manifest: dict[str, Any], text: str, root: str | None) -> SampleTable:
    """A manifest in NVIDIA's JSON (`{"data": {"0": {"name": ..., "prompt": ..., "output": ...}, ...}, ...}`).

    Of two samples under one key both are read; a `total_num` that is not the number of samples is remarked.
    """
    folder, stem = split_uri(uri)
    dataset = folder.rstrip("/").rsplit("/", 1)[-1] or stem
    split = str(manifest.get("split") or stem)
    flamingo_task = str(manifest.get("flamingo_task") or dataset)
    base = Root.of(uri, root).below(str(manifest.get("split_path") or ""))
    samples: list[Sample] = []
    remarks: list[str] = []
    items = _pairs(manifest["data"])
    times = Counter(key for key, _ in items)
    seen: Counter[str] = Counter()
    for key, item in items:
        seen[key] += 1
        id_ = f"{dataset}/{split}/{key}" + (f"#{seen[key]}" if seen[key] > 1 else "")
        try:
            samples.append(sample_of(item, id_, base, dataset, flamingo_task.rsplit("-", 1)[-1]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{uri}, line {_line_of(text, key)}: sample {key!r}: {fault_of(error)}") from error
        if isinstance(item, _Repeated):
            remarks.append(f"sample {key!r} has a key twice; the last one counts")
    remarks += [
        f"the key {key!r} stands for {count} samples; all are read" for key, count in times.items() if count > 1
    ]
    total = manifest.get("total_num")
    if total is not None and total != len(samples):
        remarks.append(f"total_num is {total!r}, and there are {len(samples)} samples: is the file whole?")
    for remark in remarks:
        logger.warning("%s: %s", uri, remark)
    return SampleTable.from_samples(samples, remarks)


class _Repeated(dict[str, Any]):
    """An object of JSON that has a key more than once."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.pairs = pairs


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else _Repeated(pairs)


def _pairs(found: dict[str, Any]) -> list[tuple[str, Any]]:
    return found.pairs if isinstance(found, _Repeated) else list(found.items())


def _line_of(text: str, key: str) -> int:
    """Line of a sample in the manifest's text (after its `data` key, where the numbers are)."""
    start = max(0, text.find('"data"'))
    found = re.compile(rf"{re.escape(json.dumps(key))}\s*:").search(text, start)
    return text.count("\n", 0, found.start() if found else start) + 1


def _read_text(uri: str) -> str:
    try:
        with open_text(uri) as file:
            return str(file.read())
    except FileNotFoundError as error:
        raise ValueError(f"{uri}: no such manifest") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{uri}: not UTF-8 text: {error}") from error


# --- Rows --------------------------------------------------------------------------------------------------------


def _samples_of_rows(uri: str, rows: Rows, word: str, root: str | None, columns: Mapping[str, str]) -> Iterator[Sample]:
    """Samples of rows, each of which says by its keys what it is.

    Args:
        word: name of what the rows' numbers count, for messages: `line` or `row`.
    """
    base, dataset, inline = Root.of(uri, root), stem_of(uri), InlineClips(uri)
    for number, row in rows:
        try:
            for place, cut in enumerate(_cut_items(row) if isinstance(row, dict) and "recording" in row else [row]):
                item = renamed(cut, columns)
                id_ = str(item.pop("id", None) or f"{dataset}/{number - 1}") + (f".{place}" if place else "")
                task = str(item.pop("task", None) or dataset.rsplit("-", 1)[-1])
                common = (id_, base, str(item.pop("dataset", None) or dataset), task)
                if is_conversation(item):
                    yield sample_of_conversation(item, *common, inline)
                else:
                    yield sample_of(item, *common)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{uri}, {word} {number}: {fault_of(error)}") from error


def _rows(table: Any) -> Rows:
    return enumerate(table.to_pylist(), 1)


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
    except (FileNotFoundError, IsADirectoryError) as error:
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
    return [
        (cut.get("custom") or {})
        | (supervision.get("custom") or {})
        | common
        | _part_of(cut, supervision)
        | {"text": supervision.get("text")}
        for supervision in cut.get("supervisions") or []
    ]


def _part_of(cut: dict[str, Any], supervision: dict[str, Any]) -> dict[str, float]:
    """The stretch that a supervision tells of, as far as it lies in its cut; empty: all of it."""
    start, length, whole = supervision.get("start") or 0.0, supervision.get("duration"), cut.get("duration")
    if length is None or whole is None:
        return {}
    end = min(start + length, whole)
    start = max(start, 0.0)
    return {"audio_start": (cut.get("start") or 0.0) + start, "duration": end - start}
