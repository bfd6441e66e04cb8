"""A row of a manifest to a sample: its keys under their several names, its values checked.

What does not fit is a `KeyError`, `TypeError` or `ValueError` that names the key and what was expected; who reads the
manifest adds file and line (`fault_of`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from af2_ray.audio.hear import Stretch
from af2_ray.data.names import Root
from af2_ray.data.samples import CaptionSet, Sample, Turn
from af2_ray.storage.places import shown

KEYS: Mapping[str, tuple[str, ...]] = {
    "name": ("name", "audio", "uri", "path", "file", "file_name", "audio_path", "filename"),
    "prompt": ("prompt", "question", "instruction"),
    "output": ("output", "answer", "response", "text", "caption"),
    "duration": ("duration", "duration_s"),
    "audio_start": ("audio_start", "offset_s", "offset", "start"),
}
"""NVIDIA's keys and the other names of each; of several in one row the first counts."""

TALK_KEYS = ("messages", "conversations", "audios", "sound")  # of conversations, see `conversations.py`
MORE_KEYS = ("id", "dataset", "task", "skill", "options", "pair", "template", "positives", "negatives", "relations")
_SAMPLE_KEYS = {"name", "prompt", "output", "duration", "audio_start", "skill", "options", "pair", "template"}
_SAMPLE_KEYS |= {"history", "more_audio"}
_MOST_SHOWN = 12  # names of columns in a message


def columns_by_key(columns: Mapping[str, str]) -> dict[str, str]:
    """The columns that a user named (`Dataset.columns`), by NVIDIA's keys.

    Raises:
        ValueError: a key that no sample has, or two names of one key.
    """
    found: dict[str, str] = {}
    for key, column in columns.items():
        name = next((name for name, others in KEYS.items() if key in others), key)
        if name not in (*KEYS, *TALK_KEYS, *MORE_KEYS):
            known = ", ".join(("audio", "question", "answer", "duration", *MORE_KEYS, *TALK_KEYS))
            raise ValueError(f"columns: {key!r} is no key of a sample: give some of {known}")
        if name in found:
            raise ValueError(f"columns: {key!r} is another name of a key that has a column already: give one of them")
        found[name] = column
    return found


def renamed(item: Any, columns: Mapping[str, str]) -> dict[str, Any]:
    """A row under NVIDIA's keys.

    Args:
        item: the row; only an object will do.
        columns: keys of the row by NVIDIA's keys, where a user named them (`columns_by_key`).
    """
    if not isinstance(item, dict):
        raise TypeError(f"expected an object with name, prompt, output ..., got {type(item).__name__}")
    named = {key: value for key, value in item.items() if key not in columns.values()} if columns else dict(item)
    for key, others in KEYS.items():
        found = next((other for other in others if named.get(other) is not None), None)
        if found is not None and found != key and key not in columns:
            named[key] = named.pop(found)
    for key, column in columns.items():
        if column not in item:
            there = ", ".join(sorted(map(str, item))[:_MOST_SHOWN])
            raise ValueError(f"key {column!r} is missing, which `columns` gives for {key!r}; there are {there}")
        named[key] = item[column]
    return named


def sample_of(item: Any, id_: str, root: Root, dataset: str, task: str) -> Sample:
    """A sample from a row under NVIDIA's keys; the other arguments are what the row does not say."""
    if not isinstance(item, dict):
        raise TypeError(f"expected an object with name, duration ..., got {type(item).__name__}")
    return Sample(
        id=id_,
        uri=root.join(text_of(item, "name")),
        offset_s=seconds_of(item, "audio_start", missing=0.0),
        duration_s=seconds_of(item, "duration", missing=math.nan),
        prompt=text_of(item, "prompt"),
        answer=text_of(item, "output"),
        task=task,
        dataset=dataset,
        skill=whole(str(item.get("skill") or "")),
        options=texts_of(item, "options"),
        pair=whole(str(item.get("pair") or "")),
        template=whole(str(item.get("template") or "")),
        history=tuple(Turn(text_of(row, "prompt"), text_of(row, "output")) for row in _objects(item, "history")),
        more_audio=tuple(_stretch_of(row, root) for row in _objects(item, "more_audio")),
        meta={key: value for key, value in item.items() if key not in _SAMPLE_KEYS},
    )


def _stretch_of(item: Mapping[str, Any], root: Root) -> Stretch:
    offset_s = seconds_of(item, "audio_start", missing=0.0)
    return Stretch(root.join(text_of(item, "name")), offset_s, seconds_of(item, "duration", missing=math.nan))


def _objects(item: Mapping[str, Any], key: str) -> list[Any]:
    """A row's list of objects under a key, as `manifest_rows` writes it; empty where it has none."""
    found = item.get(key) or []
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise TypeError(f"key {key!r} must be a list of objects, got {shown(repr(found))}")
    return found


def caption_set_of(item: dict[str, Any], root: Root) -> CaptionSet:
    """A caption set from a row under NVIDIA's keys, with `caption`."""
    return CaptionSet(
        uri=root.join(text_of(item, "name")),
        offset_s=seconds_of(item, "audio_start", missing=0.0),
        duration_s=seconds_of(item, "duration", missing=math.nan),
        caption=text_of(item, "caption"),
        positives=texts_of(item, "positives"),
        negatives=tuple(tuple(str(text) for text in group) for group in _listed(item, "negatives")),
        relations=tuple(str(kind) for kind in item.get("relations") or ()),
    )


def text_of(item: Mapping[str, Any], key: str) -> str:
    """A row's text under a key."""
    if not isinstance(item[key], str):
        raise TypeError(f"key {key!r} must be a string, got {shown(repr(item[key]))}")
    return whole(item[key])


def whole(text: str) -> str:
    """A text that can be written: JSON can hold halves of characters (lone surrogates), which become `?`."""
    return text if text.isascii() else text.encode(errors="replace").decode()


def seconds_of(item: Mapping[str, Any], key: str, missing: float) -> float:
    """A row's seconds under a key; `missing` where it has none (in a CSV: an empty cell)."""
    value = item.get(key)
    if value is None or value == "":
        return missing
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"key {key!r} must be a number of seconds, got {shown(repr(value))}") from None


def texts_of(item: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """A row's texts under a key, such as its options; none where it has none."""
    return tuple(whole(str(text)) for text in _listed(item, key))


def _listed(item: Mapping[str, Any], key: str) -> Sequence[Any]:
    """A list, or in one text (a CSV has no lists): JSON, or texts with `|` between them."""
    value = item.get(key)
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"key {key!r} must be a list in JSON, or texts with | between them: {error}") from error
    elif isinstance(value, str):
        value = [part.strip() for part in value.split("|") if part.strip()]
    if value is not None and not isinstance(value, list | tuple):
        raise TypeError(f"key {key!r} must be a list of texts, got {shown(repr(value))}")
    return value or ()


def fault_of(error: Exception) -> str:
    """The fault of a row, for a message."""
    if not isinstance(error, KeyError):
        return str(error)
    key = error.args[0]
    others = f" (or {', '.join(KEYS[key][1:])})" if key in KEYS else ""
    return f"key {key!r} is missing{others}"
