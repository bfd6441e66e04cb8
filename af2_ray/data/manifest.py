"""Manifests to samples: NVIDIA's JSON for questions, JSON lines for AF-CLAP's caption sets.

Two kinds of wrong are kept apart. A manifest that cannot be understood (broken JSON, a line without its keys) stops the
run with the file and the line: somebody must mend it. An understood sample that cannot be used (no duration, an empty
question) is set aside with its reason by `check_samples`, counted, and the run goes on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

from af2_ray.storage import NameRefused, check_name, is_remote, leads_up, open_text, parents_allowed, shown
from af2_ray.text import AUDIO, normalise

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sample:
    """One question about one stretch of audio."""

    id: str
    uri: str
    offset_s: float
    duration_s: float
    prompt: str
    answer: str
    task: str
    dataset: str
    skill: str = ""
    options: tuple[str, ...] = ()
    pair: str = ""  # samples of one counterbalanced pair share it
    template: str = ""  # samples asked in the same words share it
    meta: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class CaptionSet:
    """A clip with its caption, M-1 paraphrases, and for each of those M texts N captions that are wrong of it."""

    uri: str
    offset_s: float
    duration_s: float
    caption: str
    positives: tuple[str, ...]
    negatives: tuple[tuple[str, ...], ...]
    relations: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """The clip, as the failures and batches of a run name it."""
        return f"{self.uri}@{self.offset_s:g}" if self.offset_s else self.uri


class Stretch(Protocol):
    """What the plan needs to know of a sample: which stretch of which file."""

    @property
    def id(self) -> str: ...
    @property
    def uri(self) -> str: ...
    @property
    def offset_s(self) -> float: ...
    @property
    def duration_s(self) -> float: ...


StretchT = TypeVar("StretchT", bound=Stretch)


# --- Names -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Root:
    """Where a manifest's names lead.

    Attributes:
        folder: of the recordings.
        parents: whether `..` may lead out of it: the manifest is of this machine, and the recipe allows it.
    """

    folder: str
    parents: bool = False

    @classmethod
    def of(cls, manifest_uri: str, folder: str) -> Root:
        """The root of a manifest whose recordings are in `folder`."""
        if leads_up(folder) and not is_remote(folder):
            folder = os.path.abspath(folder)  # so that a `..` which is left was in a name
        return cls(folder, parents_allowed() and not is_remote(manifest_uri))

    def below(self, path: str) -> Root:
        """The same for a folder that the manifest itself names."""
        return Root(self.join(path) if path else self.folder, self.parents)

    def join(self, name: str) -> str:
        """A name as a uri. One that is absolute or has a scheme stays; a `..` that is not allowed stays in sight."""
        if "://" in name or name.startswith(("/", "data:")):
            return posixpath.normpath(name) if self.parents and name.startswith("/") and leads_up(name) else name
        if not name:
            return ""  # not the folder itself
        if leads_up(name):
            inner = posixpath.normpath(name)
            if inner != ".." and not inner.startswith("../"):
                name = inner
            elif self.parents and not is_remote(self.folder):
                return os.path.abspath(f"{self.folder}/{name}")
        return f"{self.folder.rstrip('/')}/{name}"


def name_fault(uri: str) -> str:
    """Why a sample's uri is not opened, as a short stable reason; empty if it may be."""
    try:
        check_name(uri)
    except NameRefused as error:
        return error.reason
    return "name leads outside" if leads_up(uri) else ""


# --- Reading -----------------------------------------------------------------------------------------------------


def read_samples(manifest_uri: str, root: str | None = None) -> list[Sample]:
    """Read a manifest: NVIDIA's JSON (PAPER 4), or any of the formats of `formats.read_table`.

    Args:
        manifest_uri: local path, or an address of a scheme that is allowed (`storage`).
        root: folder of the audio, found at `root/split_path/name`; none: the manifest's own folder. A name that is
            absolute or has a scheme stays as it is; one that may not be opened is left to `check_samples`.

    Raises:
        ValueError: the file cannot be read as a manifest; the message names it and the line.
    """
    if not manifest_uri.removesuffix(".gz").endswith(".json"):
        from af2_ray.data.formats import read_table

        return list(read_table(manifest_uri, root))
    samples, remarks = read_nvidia(manifest_uri, root)
    for remark in remarks:
        logger.warning("%s: %s", manifest_uri, remark)
    return samples


def read_nvidia(manifest_uri: str, root: str | None = None) -> tuple[list[Sample], list[str]]:
    """As `read_samples`, of NVIDIA's JSON: the samples, and what is odd about the manifest but keeps none of them out.

    Of two samples under one key both are read; a `total_num` that is not the number of samples is remarked.
    """
    text = _read_text(manifest_uri)
    try:
        manifest = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise ValueError(f"{manifest_uri}, line {error.lineno}: not JSON: {error.msg}") from error
    except RecursionError as error:
        raise ValueError(f"{manifest_uri}: objects within objects too deep to read") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("data"), dict):
        raise ValueError(f"{manifest_uri}, line 1: a manifest is an object with a `data` object of numbered samples")
    folder, stem = split_uri(manifest_uri)
    dataset = folder.rstrip("/").rsplit("/", 1)[-1] or stem
    split = str(manifest.get("split") or stem)
    flamingo_task = str(manifest.get("flamingo_task") or dataset)
    base = Root.of(manifest_uri, root if root is not None else folder).below(str(manifest.get("split_path") or ""))
    samples: list[Sample] = []
    remarks: list[str] = []
    items = _pairs(manifest["data"])
    times = Counter(key for key, _ in items)
    seen: Counter[str] = Counter()
    for key, item in items:
        seen[key] += 1
        id_ = f"{dataset}/{split}/{key}" + (f"#{seen[key]}" if seen[key] > 1 else "")
        try:
            samples.append(sample(item, id_, base, dataset, flamingo_task.rsplit("-", 1)[-1]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{manifest_uri}, line {_line_of(text, key)}: sample {key!r}: {told(error)}") from error
        if isinstance(item, _Repeated):
            remarks.append(f"sample {key!r} has a key twice; the last one counts")
    remarks += [
        f"the key {key!r} stands for {count} samples; all are read" for key, count in times.items() if count > 1
    ]
    total = manifest.get("total_num")
    if total is not None and total != len(samples):
        remarks.append(f"total_num is {total!r}, and there are {len(samples)} samples: is the file whole?")
    return samples, remarks


class _Repeated(dict[str, Any]):
    """An object of JSON that has a key more than once."""

    pairs: list[tuple[str, Any]]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    repeated = _Repeated(found)
    repeated.pairs = pairs
    return repeated


def _pairs(found: dict[str, Any]) -> list[tuple[str, Any]]:
    return found.pairs if isinstance(found, _Repeated) else list(found.items())


def read_captions(captions_uri: str, root: str | None = None) -> list[CaptionSet]:
    """Read AF-CLAP caption sets; audio at `root/name`, root defaults to the file's folder.

    One JSON object a line (`.jsonl`); or Parquet, Arrow, lhotse cuts and compressed lines as in `formats`.

    Raises:
        ValueError: a line cannot be understood; the message names the file and the line.
    """
    from af2_ray.data.formats import read_caption_rows

    base = Root.of(captions_uri, root if root is not None else split_uri(captions_uri)[0])
    if not captions_uri.endswith(".jsonl"):
        return read_caption_rows(captions_uri, root)
    sets = []
    for number, line in enumerate(_read_text(captions_uri).split("\n"), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            if isinstance(item, dict) and "recording" in item:  # a lhotse cut: so are the others
                return read_caption_rows(captions_uri, root)
            sets.append(caption_set(item, base))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{captions_uri}, line {number}: {told(error)}") from error
    return sets


_SAMPLE_KEYS = {"name", "prompt", "output", "duration", "audio_start", "skill", "options", "pair", "template"}


def sample(item: Any, id_: str, root: Root, dataset: str, task: str) -> Sample:
    """A sample from a manifest's item; `KeyError`, `TypeError` or `ValueError` if it cannot be understood."""
    _need_object(item)
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


def caption_set(item: Any, root: Root) -> CaptionSet:
    """A caption set from a line's item; `KeyError`, `TypeError` or `ValueError` if it cannot be understood."""
    _need_object(item)
    return CaptionSet(
        uri=root.join(_text(item, "name")),
        offset_s=_seconds(item.get("audio_start"), missing=0.0),
        duration_s=_seconds(item.get("duration"), missing=math.nan),
        caption=_text(item, "caption"),
        positives=tuple(str(text) for text in item.get("positives") or ()),
        negatives=tuple(tuple(str(text) for text in group) for group in item.get("negatives") or ()),
        relations=tuple(str(kind) for kind in item.get("relations") or ()),
    )


def _need_object(item: Any) -> None:
    if not isinstance(item, dict):
        raise TypeError(f"expected an object with name, duration ..., got {type(item).__name__}")


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


def told(error: Exception) -> str:
    """What was wrong with an item, for a message."""
    return f"key {error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)


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


def split_uri(uri: str) -> tuple[str, str]:
    """Folder and stem of a uri."""
    folder, _, name = uri.rpartition("/")
    return folder or ".", name.split(".", 1)[0]


# --- Checking ----------------------------------------------------------------------------------------------------


def check_samples(
    samples: Iterable[StretchT], unread: Mapping[str, str] = MappingProxyType({})
) -> tuple[list[StretchT], list[tuple[StretchT, str]]]:
    """Part the usable samples from the others, without opening a file.

    Args:
        samples: of one manifest.
        unread: why a file's duration could not be read, by uri (`durations.fill_durations`), where it has none.

    Returns:
        The good ones in order, and the bad ones with a short stable reason: those of `storage.NameRefused`, `no
        duration`, `zero duration`, `negative offset`, `empty prompt`, `audio markers` (a prompt that places more than
        the one recording), `empty answer`, `empty caption`, `ragged captions`.
    """
    good, bad = [], []
    for sample in samples:
        reason = _fault(sample)
        if reason:
            bad.append((sample, unread.get(sample.uri, reason) if reason == "no duration" else reason))
        else:
            good.append(sample)
    return good, bad


def _fault(sample: Stretch) -> str:
    if reason := name_fault(sample.uri):
        return reason
    if not math.isfinite(sample.duration_s):
        return "no duration"
    if sample.duration_s <= 0:
        return "zero duration"
    if not (math.isfinite(sample.offset_s) and sample.offset_s >= 0):
        return "negative offset"
    if isinstance(sample, Sample):
        if not sample.prompt.strip():
            return "empty prompt"
        if normalise(sample.prompt).count(AUDIO) > 1:
            return "audio markers"
        return "" if sample.answer.strip() else "empty answer"
    if isinstance(sample, CaptionSet):
        if not all(text.strip() for text in (sample.caption, *sample.positives)):
            return "empty caption"
        if sample.negatives and len(sample.negatives) != 1 + len(sample.positives):
            return "ragged captions"
    return ""


def fingerprint(samples: Sequence[Stretch]) -> str:
    """SHA-256 (first 16 hex digits) of what the samples say, in order; a moved corpus keeps its fingerprint."""
    if columns := getattr(samples, "fingerprint", None):  # a table hashes whole columns
        return str(columns())
    digest = hashlib.sha256()
    for sample in samples:
        name = "/".join(sample.uri.rsplit("/", 2)[-2:])
        said: tuple[Any, ...] = (name, sample.offset_s, sample.duration_s)
        if isinstance(sample, Sample):
            said += (sample.id, sample.prompt, sample.answer)
        elif isinstance(sample, CaptionSet):
            said += (sample.caption, sample.positives, sample.negatives)
        digest.update(json.dumps(said, ensure_ascii=False).encode())
    return digest.hexdigest()[:16]
