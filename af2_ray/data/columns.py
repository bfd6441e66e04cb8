"""Samples as columns: millions of them in the memory that a tenth of the objects would take.

A `SampleTable` behaves like a list of `Sample`s and makes one only where it is asked for. Each text column is a code a
sample and the distinct texts once (Arrow), so the questions of a clip share its uri, and a template costs a byte. The
price is some ten microseconds a sample when it is read, next to nothing beside decoding its audio. Arrays and Arrow
buffers travel through Ray's object store without a copy: every decode process of a machine reads the same memory.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Generic, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from af2_ray.audio.hear import Stretch
from af2_ray.data.names import name_fault
from af2_ray.data.samples import (
    Item,
    ItemT,
    Sample,
    check_samples,
    conversation_json,
    conversation_of,
    count_markers,
    fingerprint,
    measured_conversation,
    stretch_fault,
    stretches_of,
)
from af2_ray.storage.places import MAX_CHARACTERS, PLAIN_ADDRESS, UNUSUAL_NAME
from af2_ray.text import AUDIO

TEXT_COLUMNS = ("id", "uri", "prompt", "answer", "task", "dataset", "skill", "pair", "template")
JSON_COLUMNS = ("options", "meta", "conversation")  # as JSON text; empty where there is nothing
_BATCH = 4096  # samples made at a time while a table is iterated


class SampleTable(Sequence[Sample]):
    """A sequence of `Sample`s held as columns.

    Args:
        texts: distinct texts (Arrow) and each sample's code [N], for each of TEXT_COLUMNS and JSON_COLUMNS.
        offset_s, duration_s: seconds of each sample, float64 [N].
        remarks: oddities of the manifest that keep none of its samples out.
    """

    def __init__(
        self,
        texts: Mapping[str, tuple[pa.Array, NDArray[Any]]],
        offset_s: NDArray[np.float64],
        duration_s: NDArray[np.float64],
        remarks: Sequence[str] = (),
    ) -> None:
        self.remarks = tuple(remarks)
        self.texts = dict(texts)
        self.offset_s, self.duration_s = offset_s, duration_s

    @classmethod
    def from_columns(cls, columns: Mapping[str, Any], remarks: Sequence[str] = ()) -> SampleTable:
        """A table from columns: strings as Arrow arrays or lists, seconds as numbers (none: no duration).

        Columns other than `id`, `uri`, `prompt`, `answer` and `duration_s` may be missing.
        """
        num = len(columns["uri"])
        texts = {}
        for name in (*TEXT_COLUMNS, *JSON_COLUMNS):
            texts[name] = _encoded(columns[name]) if name in columns else (_strings([""]), np.zeros(num, np.uint8))
        offset_s = np.asarray(columns["offset_s"], np.float64) if "offset_s" in columns else np.zeros(num)
        pa.default_memory_pool().release_unused()  # what encoding took, as much again as the table
        return cls(texts, offset_s, np.asarray(columns["duration_s"], np.float64), remarks)

    @classmethod
    def from_samples(cls, samples: Sequence[Sample], remarks: Sequence[str] = ()) -> SampleTable:
        """A table of the samples."""
        columns: dict[str, Any] = {name: [getattr(s, name) for s in samples] for name in TEXT_COLUMNS}
        columns["options"] = [json.dumps(s.options, ensure_ascii=False) if s.options else "" for s in samples]
        columns["meta"] = [json.dumps(dict(s.meta), ensure_ascii=False) if s.meta else "" for s in samples]
        columns["conversation"] = [conversation_json(s) for s in samples]
        columns["offset_s"] = np.fromiter((s.offset_s for s in samples), np.float64, len(samples))
        columns["duration_s"] = np.fromiter((s.duration_s for s in samples), np.float64, len(samples))
        return cls.from_columns(columns, remarks)

    def __len__(self) -> int:
        return len(self.offset_s)

    @overload
    def __getitem__(self, place: int) -> Sample: ...
    @overload
    def __getitem__(self, place: slice) -> SampleTable: ...
    def __getitem__(self, place: int | slice) -> Sample | SampleTable:
        if isinstance(place, slice):
            return self.take(np.arange(*place.indices(len(self))))
        place = range(len(self))[place]
        texts = {name: values[int(codes[place])].as_py() for name, (values, codes) in self.texts.items()}
        return _sample(texts, float(self.offset_s[place]), float(self.duration_s[place]))

    def __iter__(self) -> Iterator[Sample]:
        for start in range(0, len(self), _BATCH):
            part = slice(start, start + _BATCH)
            columns = [values.take(pa.array(codes[part])).to_pylist() for values, codes in self.texts.values()]
            seconds = zip(self.offset_s[part].tolist(), self.duration_s[part].tolist(), strict=True)
            for row, (offset_s, duration_s) in zip(zip(*columns, strict=True), seconds, strict=True):
                yield _sample(dict(zip(self.texts, row, strict=True)), offset_s, duration_s)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other))

    __hash__ = None  # type: ignore[assignment]

    def take(self, places: NDArray[Any]) -> SampleTable:
        """The samples at `places` (or where a mask is true), sharing the texts with this table."""
        texts = {name: (values, codes[places]) for name, (values, codes) in self.texts.items()}
        return SampleTable(texts, self.offset_s[places], self.duration_s[places])

    def checked(self, unread: Mapping[str, str] = MappingProxyType({})) -> tuple[SampleTable, list[tuple[Sample, str]]]:
        """What `samples.check_samples` returns, for columns: an object is made of a bad sample only."""
        seconds, offset_s = self.duration_s, self.offset_s
        talks, of_talk = self.texts["conversation"]
        facts = [_conversation_facts(text) for text in talks.to_pylist()]
        good = np.isfinite(seconds) & (seconds > 0) & np.isfinite(offset_s) & (offset_s >= 0)
        uris, codes = self.texts["uri"]
        good &= _openable(uris)[codes]
        for name in ("prompt", "answer"):
            values, codes = self.texts[name]
            good &= pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(values)), 0).to_numpy(zero_copy_only=False)[codes]
        good &= np.array([is_good for is_good, _, _ in facts], bool)[of_talk]
        markers, recordings = (np.array([fact[place] for fact in facts], np.int64)[of_talk] for place in (1, 2))
        in_prompts, in_answers = (_num_markers(*self.texts[name]) for name in ("prompt", "answer"))
        markers += in_prompts
        good &= (markers == 0) | (markers == recordings)
        good &= in_answers == 0
        bad = check_samples(list(self.take(~good)), unread)[1]
        return (self if good.all() else self.take(good)), bad

    def measured(self, known: Mapping[str, float]) -> SampleTable:
        """The same samples, those without a duration with that of their files (seconds by uri), less their offset."""
        duration_s, texts = self.duration_s.copy(), dict(self.texts)
        uris, codes = self.texts["uri"]
        without = np.flatnonzero(~np.isfinite(duration_s))
        lengths = [known.get(uri, np.nan) for uri in uris.take(pa.array(codes[without])).to_pylist()]
        duration_s[without] = np.array(lengths, np.float64) - self.offset_s[without]
        talks, of_talk = self.texts["conversation"]
        if _not_measured(talks).any():
            found = [measured_conversation(text, known) if text else "" for text in talks.to_pylist()]
            texts["conversation"] = _strings(found), of_talk
        return SampleTable(texts, self.offset_s, duration_s, self.remarks)

    def fingerprint(self) -> str:
        """The same as `samples.fingerprint`, from columns: what the samples say, in order, wherever the audio lies."""
        digest = hashlib.sha256()
        for name in ("uri", "id", "prompt", "answer", "conversation"):
            values, codes = self.texts[name]
            if name == "conversation" and not any(values.to_pylist()):
                continue  # others keep the fingerprint that they had without the column
            for start in range(0, len(values), 2**20):
                part = values.slice(start, 2**20)
                if name == "uri":
                    part = pc.replace_substring_regex(part, r"^.*/([^/]*/[^/]*)$", r"\1")
                lengths = np.asarray(pc.binary_length(part), np.int64)
                digest.update(lengths.tobytes())
                digest.update("".join(part.to_pylist()).encode())
            digest.update(np.ascontiguousarray(codes).astype(np.uint32).tobytes())
        for seconds in (self.offset_s, self.duration_s):
            digest.update(np.ascontiguousarray(seconds).tobytes())
        return digest.hexdigest()[:16]


class Joined(Sequence[ItemT], Generic[ItemT]):
    """Several sequences read as one by index, none of them copied."""

    def __init__(self, parts: Sequence[Sequence[ItemT]]) -> None:
        self.parts = tuple(parts)
        self._ends = np.cumsum([len(part) for part in self.parts], dtype=np.int64).tolist()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, place: Any) -> Any:
        place = range(len(self))[place]
        part = bisect.bisect_right(self._ends, place)
        return self.parts[part][place - (self._ends[part - 1] if part else 0)]

    def __iter__(self) -> Iterator[ItemT]:
        for part in self.parts:
            yield from part

    def fingerprint(self) -> str:
        """The fingerprint of the parts, in order."""
        return hashlib.sha256(" ".join(fingerprint(part) for part in self.parts).encode()).hexdigest()[:16]


class Pickled(Sequence[ItemT], Generic[ItemT]):
    """Items as bytes in one array, each unpickled where it is asked for: reading one does not load the others.

    For the way through the object store alone; bytes from elsewhere are never unpickled.
    """

    def __init__(self, items: Sequence[ItemT]) -> None:
        parts = [pickle.dumps(item, pickle.HIGHEST_PROTOCOL) for item in items]
        self._bytes = np.frombuffer(b"".join(parts), np.uint8)
        self._starts = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, place: Any) -> Any:
        place = range(len(self))[place]
        return pickle.loads(self._bytes[self._starts[place] : self._starts[place + 1]].data)  # noqa: S301


def portable(items: Sequence[ItemT]) -> Sequence[ItemT]:
    """The same items in a form that crosses the object store as arrays: tables as they are, others pickled one by one.

    A table of a few samples of a large corpus takes the corpus' texts along; a plan uses nearly all of them.
    """
    if isinstance(items, SampleTable | Pickled):
        return items
    if isinstance(items, Joined):
        return Joined([portable(part) for part in items.parts])
    return Pickled(items)


# --- What the plan needs of samples ------------------------------------------------------------------------------


def durations(samples: Sequence[Item]) -> NDArray[np.float64]:
    """Seconds of each sample, all its recordings together, [N]."""
    first, owner, further = recordings(samples)
    if not len(owner):
        return first
    total = first.copy()
    np.add.at(total, owner, further)
    return total


def recordings(samples: Sequence[Item]) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    """Seconds of the first recording of each sample [N]; and of the further ones, the sample and the seconds [M]."""
    further = [(place, stretch.duration_s) for place, more in _more_audio(samples).items() for stretch in more]
    owner, seconds = zip(*further, strict=True) if further else ((), ())
    return _first_durations(samples), np.array(owner, np.int64), np.array(seconds, np.float64)


def _first_durations(samples: Sequence[Item]) -> NDArray[np.float64]:
    if isinstance(samples, SampleTable):
        return samples.duration_s
    if isinstance(samples, Joined):
        return np.concatenate([_first_durations(part) for part in samples.parts] or [np.empty(0)])
    return np.fromiter((s.duration_s for s in samples), np.float64, len(samples))


def _more_audio(samples: Sequence[Item]) -> dict[int, tuple[Stretch, ...]]:
    """The second recording and those after it of the samples that have some, by their place."""
    if isinstance(samples, Joined):
        starts = np.cumsum([0, *map(len, samples.parts)]).tolist()
        parts = [(start, _more_audio(part)) for start, part in zip(starts, samples.parts)]
        return {start + place: more for start, part in parts for place, more in part.items()}
    if isinstance(samples, SampleTable):
        values, codes = samples.texts["conversation"]
        found = [conversation_of(text)["more_audio"] for text in values.to_pylist()]
        is_more = np.array([bool(more) for more in found], bool)
        return {place: found[codes[place]] for place in np.flatnonzero(is_more[codes]).tolist()}
    return {place: more for place, sample in enumerate(samples) if (more := stretches_of(sample)[1:])}


def without_duration(samples: Sequence[Item]) -> NDArray[np.int64]:
    """Places of the samples of which a recording has no duration."""
    if isinstance(samples, SampleTable):
        talks, of_talk = samples.texts["conversation"]
        return np.flatnonzero(~np.isfinite(samples.duration_s) | _not_measured(talks)[of_talk])
    parts = (any(not math.isfinite(one.duration_s) for one in stretches_of(sample)) for sample in samples)
    return np.flatnonzero(np.fromiter(parts, bool, len(samples)))


def _not_measured(conversations: pa.Array) -> NDArray[np.bool_]:
    """Which conversations have a recording without a duration."""
    maybe = pc.match_substring(conversations, "NaN").to_numpy(zero_copy_only=False).copy()  # or a text that says so
    for place in np.flatnonzero(maybe).tolist():
        more = conversation_of(conversations[place].as_py())["more_audio"]
        maybe[place] = any(not math.isfinite(one.duration_s) for one in more)
    return maybe


def _conversation_facts(text: str) -> tuple[bool, int, int]:
    """Whether earlier turns and further recordings can be used, markers of these turns, and recordings in all."""
    if not text:
        return True, 0, 1
    found = conversation_of(text)
    history, more = found["history"], found["more_audio"]
    said = all(turn.prompt.strip() and turn.answer.strip() and not count_markers(turn.answer) for turn in history)
    is_good = said and not any(map(stretch_fault, more))
    return is_good, sum(count_markers(turn.prompt) for turn in history), 1 + len(more)


def _num_markers(texts: pa.Array, codes: NDArray[Any]) -> NDArray[np.int64]:
    """Number of `<audio>` markers of each sample."""
    return pc.count_substring(texts, AUDIO, ignore_case=True).to_numpy(zero_copy_only=False).astype(np.int64)[codes]


def _openable(uris: pa.Array) -> NDArray[np.bool_]:
    """Which uris may be opened, as `names.name_fault` has it; only those that look unusual are asked about."""
    asked = pc.or_(pc.match_substring_regex(uris, UNUSUAL_NAME), pc.greater(pc.utf8_length(uris), MAX_CHARACTERS))
    odd = pc.and_not(pc.match_substring(uris, "://"), pc.match_substring_regex(uris, PLAIN_ADDRESS))
    found = pc.invert(pc.or_(asked, odd)).to_numpy(zero_copy_only=False).copy()
    for place in np.flatnonzero(~found).tolist():
        found[place] = not name_fault(uris[place].as_py())
    return found


def clip_numbers(samples: Sequence[Item]) -> NDArray[np.int64]:
    """A number for all that a sample hears (uri, offset, duration of each recording), by appearance: int64 [N]."""
    parts = samples.parts if isinstance(samples, Joined) else (samples,)
    if len(samples) and all(isinstance(part, SampleTable) for part in parts):
        key = _clip_keys_of_tables([part for part in parts if isinstance(part, SampleTable)])
        return _by_appearance(_with_more_audio(key, samples))
    numbers: dict[tuple[Stretch, ...], int] = {}
    return np.fromiter((numbers.setdefault(stretches_of(s), len(numbers)) for s in samples), np.int64, len(samples))


def _with_more_audio(key: NDArray[np.int64], samples: Sequence[Item]) -> NDArray[np.int64]:
    """Labels of the first recordings, made different where the further ones differ."""
    further: dict[tuple[int, tuple[Stretch, ...]], int] = {}
    first = int(key.max()) + 1
    key = key.copy()
    for place, more in _more_audio(samples).items():
        key[place] = first + further.setdefault((int(key[place]), more), len(further))
    return key


def _clip_keys_of_tables(tables: Sequence[SampleTable]) -> NDArray[np.int64]:
    """A label of each sample's first recording, [N]."""
    known = pa.concat_arrays([table.texts["uri"][0] for table in tables])
    merged = known.dictionary_encode().indices.to_numpy(zero_copy_only=False).astype(np.int64)
    bases = np.cumsum([0, *(len(table.texts["uri"][0]) for table in tables)])
    key = np.concatenate([merged[base:][table.texts["uri"][1]] for table, base in zip(tables, bases)])
    offset_s, duration_s = (np.concatenate([getattr(t, n) for t in tables]) for n in ("offset_s", "duration_s"))
    for seconds in (offset_s, duration_s):  # most corpora have one stretch a file: nothing to tell apart
        first = np.zeros(int(key.max()) + 1)
        first[key] = seconds
        if not np.array_equal(first[key], seconds, equal_nan=True):
            codes = np.unique(seconds, return_inverse=True)[1]
            key = np.unique(key * (int(codes.max()) + 1) + codes, return_inverse=True)[1]
    return key


def _by_appearance(key: NDArray[np.int64]) -> NDArray[np.int64]:
    """The same labels numbered anew in the order in which they first come."""
    first = np.full(int(key.max()) + 1, len(key), np.int64)
    first[key[::-1]] = np.arange(len(key) - 1, -1, -1)
    used = np.flatnonzero(first < len(key))
    number = np.empty(len(first), np.int64)
    number[used[np.argsort(first[used])]] = np.arange(len(used))
    return number[key]


# --- Texts -------------------------------------------------------------------------------------------------------


def _strings(values: Any) -> pa.Array:
    return pa.array(values, pa.large_string())


def _encoded(column: Any) -> tuple[pa.Array, NDArray[Any]]:
    """Distinct texts of a column and the code of each sample in the smallest integers that hold it."""
    if not isinstance(column, pa.Array | pa.ChunkedArray):
        column = _strings(column)
    if not pa.types.is_dictionary(column.type):
        column = column.cast(pa.large_string()).dictionary_encode()
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    values, codes = column.dictionary.cast(pa.large_string()), column.indices
    if column.null_count or values.null_count:
        codes = pc.fill_null(codes, len(values))
        values = pa.concat_arrays([pc.fill_null(values, ""), _strings([""])])
    size = np.uint8 if len(values) <= 2**8 else np.uint16 if len(values) <= 2**16 else np.int32
    return values, codes.to_numpy(zero_copy_only=False).astype(size)


def _sample(texts: dict[str, Any], offset_s: float, duration_s: float) -> Sample:
    options, meta, conversation = texts.pop("options"), texts.pop("meta"), texts.pop("conversation")
    return Sample(
        **texts,
        offset_s=offset_s,
        duration_s=duration_s,
        options=tuple(json.loads(options)) if options else (),
        meta=json.loads(meta) if meta else {},
        **conversation_of(conversation),
    )
