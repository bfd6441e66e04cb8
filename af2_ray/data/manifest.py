"""Manifests to samples, in the formats that corpora come in.

| what | recognised by |
|---|---|
| NVIDIA's JSON | `.json` |
| JSON lines | `.jsonl`, `.jsonl.gz`: an object a sample, or a caption set for AF-CLAP |
| lhotse cuts | JSON lines whose objects have a `recording`; a supervision is a sample |
| Parquet | `.parquet`, or a folder of them |
| Hugging Face `datasets` | a folder from `save_to_disk` (Arrow streams), read without that library |

Keys (or columns) are NVIDIA's, and the usual other names for them (`tables.KEYS`). Two kinds of wrong are kept apart. A
manifest that cannot be understood (broken JSON, a line without its keys) stops the run with the file and the line:
somebody must mend it. An understood sample that cannot be used (no duration, an empty question) is set aside with its
reason by `samples.check_samples`, counted, and the run goes on.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from af2_ray.data.columns import SampleTable
from af2_ray.data.names import Root, split_uri, stem_of
from af2_ray.data.samples import CaptionSet, Sample
from af2_ray.data.tables import KEYS, read_columns, samples_of_columns
from af2_ray.storage.places import check_regular, locate, open_text, shown

logger = logging.getLogger(__name__)


def read_samples(uri: str, root: str | None = None) -> SampleTable:
    """Read a manifest of any format; see the module's table. What is odd about it is logged (`SampleTable.remarks`).

    Args:
        uri: file or folder, local or at an address of a scheme that is allowed (`storage.places`).
        root: folder of the audio; none: the manifest's own. A name that is absolute or has a scheme stays as it is;
            one that may not be opened is left to `check_samples`.

    Raises:
        ValueError: it cannot be read; the message names the file and the line or column.
    """
    kind = kind_of(uri)
    if kind == "nvidia":
        return _read_nvidia(uri, root)
    if kind == "lines":
        return SampleTable.from_samples(list(_samples_of_lines(uri, root)))
    return samples_of_columns(uri, read_columns(uri, kind), root)


def read_captions(uri: str, root: str | None = None) -> list[CaptionSet]:
    """Read AF-CLAP caption sets: JSON lines, lhotse cuts (a supervision's text is the caption), Parquet or Arrow.

    Args:
        uri: file or folder, as in `read_samples`.
        root: folder of the audio; none: the manifest's own.

    Raises:
        ValueError: it cannot be read; the message names the file and the line or row.
    """
    base = Root.of(uri, root)
    kind = kind_of(uri)
    rows = _lines(uri) if kind == "lines" else enumerate(read_columns(uri, kind).to_pylist(), 1)
    sets = []
    for number, row in rows:
        try:
            for item in _cut_items(row) if "recording" in row else [row]:
                if kind != "lines" or "recording" in row:  # plain lines have the keys that are documented, and no other
                    caption = item.get("caption") or item.get("text") or item.get("output")
                    item = _renamed(item) | {"caption": caption}
                sets.append(_caption_set(item, base))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{uri}, {'line' if kind == 'lines' else 'row'} {number}: {_fault_of(error)}") from error
    return sets


def kind_of(uri: str) -> str:
    """`nvidia`, `lines`, `parquet` or `arrow`."""
    plain = uri.rstrip("/").removesuffix(".gz")
    for suffix, kind in ((".json", "nvidia"), (".jsonl", "lines"), (".parquet", "parquet"), (".arrow", "arrow")):
        if plain.endswith(suffix):
            return kind
    fs, path = locate(uri)
    names = [entry.rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False)] if fs.isdir(path) else []
    for kind in ("arrow", "parquet"):
        if any(name.endswith(f".{kind}") for name in names):
            return kind
    if "dataset_dict.json" in names:
        check_regular(fs, f"{path}/dataset_dict.json")
        splits = json.loads(fs.cat_file(f"{path}/dataset_dict.json"))["splits"]
        raise ValueError(f"{uri}: a dataset of several splits: name one of {', '.join(f'{uri}/{s}' for s in splits)}")
    raise ValueError(f"{uri}: no such manifest, or of no known format (.json, .jsonl, .parquet, a `datasets` folder)")


# --- NVIDIA's JSON -----------------------------------------------------------------------------------------------


def _read_nvidia(uri: str, root: str | None) -> SampleTable:
    """A manifest in NVIDIA's JSON (`{"data": {"0": {"name": ..., "prompt": ..., "output": ...}, ...}, ...}`).

    Of two samples under one key both are read; a `total_num` that is not the number of samples is remarked.
    """
    text = _read_text(uri)
    try:
        manifest = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise ValueError(f"{uri}, line {error.lineno}: not JSON: {error.msg}") from error
    except RecursionError as error:
        raise ValueError(f"{uri}: objects within objects too deep to read") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("data"), dict):
        raise ValueError(f"{uri}, line 1: a manifest is an object with a `data` object of numbered samples")
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
            samples.append(_sample(item, id_, base, dataset, flamingo_task.rsplit("-", 1)[-1]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{uri}, line {_line_of(text, key)}: sample {key!r}: {_fault_of(error)}") from error
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


# --- JSON lines and lhotse cuts ----------------------------------------------------------------------------------


def _samples_of_lines(uri: str, root: str | None) -> Iterator[Sample]:
    base = Root.of(uri, root)
    dataset = stem_of(uri)
    for number, row in _lines(uri):
        try:
            for place, item in enumerate(_cut_items(row) if "recording" in row else [row]):
                id_ = str(item.get("id") or f"{dataset}/{number - 1}") + (f".{place}" if place else "")
                task = str(item.get("task") or dataset.rsplit("-", 1)[-1])
                yield _sample(_renamed(item), id_, base, str(item.get("dataset") or dataset), task)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{uri}, line {number}: {_fault_of(error)}") from error


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


# --- Items -------------------------------------------------------------------------------------------------------


_SAMPLE_KEYS = {"name", "prompt", "output", "duration", "audio_start", "skill", "options", "pair", "template"}


def _sample(item: Any, id_: str, root: Root, dataset: str, task: str) -> Sample:
    """A sample from a manifest's item; `KeyError`, `TypeError` or `ValueError` if it cannot be understood."""
    if not isinstance(item, dict):
        raise TypeError(f"expected an object with name, duration ..., got {type(item).__name__}")
    return Sample(
        id=id_,
        uri=root.join(_text(item, "name")),
        offset_s=_seconds(item.get("audio_start"), missing=0.0),
        duration_s=_seconds(item.get("duration"), missing=math.nan),
        prompt=_text(item, "prompt"),
        answer=_text(item, "output"),
        task=task,
        dataset=dataset,
        skill=_whole(str(item.get("skill") or "")),
        options=tuple(_whole(str(option)) for option in item.get("options") or ()),
        pair=_whole(str(item.get("pair") or "")),
        template=_whole(str(item.get("template") or "")),
        meta={key: value for key, value in item.items() if key not in _SAMPLE_KEYS},
    )


def _caption_set(item: dict[str, Any], root: Root) -> CaptionSet:
    """A caption set from a line's item; `KeyError`, `TypeError` or `ValueError` if it cannot be understood."""
    return CaptionSet(
        uri=root.join(_text(item, "name")),
        offset_s=_seconds(item.get("audio_start"), missing=0.0),
        duration_s=_seconds(item.get("duration"), missing=math.nan),
        caption=_text(item, "caption"),
        positives=tuple(str(text) for text in item.get("positives") or ()),
        negatives=tuple(tuple(str(text) for text in group) for group in item.get("negatives") or ()),
        relations=tuple(str(kind) for kind in item.get("relations") or ()),
    )


def _text(item: dict[str, Any], key: str) -> str:
    if not isinstance(item[key], str):
        raise TypeError(f"key {key!r} must be a string, got {shown(repr(item[key]))}")
    return _whole(item[key])


def _whole(text: str) -> str:
    """A text that can be written: JSON can hold halves of characters (lone surrogates), which become `?`."""
    return text if text.isascii() else text.encode(errors="replace").decode()


def _seconds(value: Any, missing: float) -> float:
    if value is None:
        return missing
    if isinstance(value, bool):
        raise TypeError(f"seconds must be a number, got {value!r}")
    return float(value)


def _fault_of(error: Exception) -> str:
    """The fault of an item, for a message."""
    return f"key {error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
