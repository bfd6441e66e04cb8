"""Benchmarks as they come: CSV files of captions or labels, and where their audio lies.

| layout | columns | audio |
|---|---|---|
| Clotho | file_name, caption_1 ... caption_5 | folder of the split (last part of the CSV's name) beside it |
| AudioCaps | youtube_id, start_time, caption | beside it, named by youtube_id, Y + youtube_id or audiocap_id |
| ESC-50 | filename, fold, category | ../audio |
| UrbanSound8K | slice_file_name, fold, class | ../audio/fold1 ... fold10 |
| any | a name (file, filename, fname, path ...) and caption, or label(s) with `,` `;` `|` between them | beside it |

`root` replaces the place of the audio. What the CSV names and no file has is a failure of the caller's list.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from af2_ray.audio.hear import Stretch
from af2_ray.data.quarantine import Failure
from af2_ray.data.samples import CaptionSet
from af2_ray.storage.places import locate, open_text

NAMES = ("file_name", "filename", "fname", "name", "file", "path", "audio", "audio_path")
LABELS = ("category", "label", "labels", "class")
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".m4a")
WHOLE_S = math.inf  # these tables give no length: the file's header does
Row = dict[str, str]


@dataclass(frozen=True, slots=True)
class Labelled:
    """A clip and its classes."""

    uri: str
    offset_s: float
    duration_s: float
    labels: tuple[str, ...]

    @property
    def stretch(self) -> Stretch:
        return Stretch(self.uri, self.offset_s, self.duration_s)


@dataclass(frozen=True)
class Table:
    """A benchmark: caption sets or labelled clips (one of both is empty), and what has no file."""

    captions: list[CaptionSet]
    labelled: list[Labelled]
    failures: list[Failure]


def read_csv(uri: str, root: str | None = None) -> Table:
    """Read a benchmark's CSV; see the module's table.

    Raises:
        ValueError: no such file, or columns of no layout; the message lists them.
    """
    rows = _rows(uri)
    columns = set(rows[0]) if rows else set()
    folder = str(PurePosixPath(uri).parent) if "://" not in uri else uri.rsplit("/", 1)[0]
    if {"slice_file_name", "fold", "class"} <= columns:
        files = _Files(root or f"{_parent(folder)}/audio", uri)
        return files.labelled((f"fold{row['fold']}/{row['slice_file_name']}", row["class"]) for row in rows)
    if {"filename", "fold", "category"} <= columns:
        files = _Files(root or f"{_parent(folder)}/audio", uri)
        return files.labelled((row["filename"], row["category"]) for row in rows)
    if {"youtube_id", "caption"} <= columns:
        return _Files(root or folder, uri).audiocaps(rows)
    name = next((name for name in NAMES if name in columns), None)
    captions = sorted(column for column in columns if re.fullmatch(r"captions?(_\d+)?", column))
    label = next((label for label in LABELS if label in columns), None)
    if name and captions:
        files = _Files(root or _split_folder(uri, folder), uri)
        return files.captioned((row[name], [row[column] for column in captions if row[column].strip()]) for row in rows)
    if name and label:
        return _Files(root or folder, uri).labelled((row[name], row[label]) for row in rows)
    raise ValueError(f"{uri}: columns {sorted(columns)} are of no known layout: give a name and captions or labels")


class _Files:
    """The audio files under a folder, found with or without their suffix."""

    def __init__(self, root: str, table: str) -> None:
        self._fs, path = locate(root)
        self._root, self._scheme, self._table = path.rstrip("/"), root.split("://")[0] + "://" * ("://" in root), table
        if not self._fs.isdir(path):
            raise ValueError(f"{root}: no folder of audio for {table}; name it with --root")
        found = [file for file in self._fs.find(path) if file.lower().endswith(AUDIO_SUFFIXES)]
        self._known = {file.removeprefix(self._root + "/"): file for file in found}
        self._known |= {PurePosixPath(name).with_suffix("").as_posix(): file for name, file in self._known.items()}

    def find(self, *names: str) -> str | None:
        """The uri of the first of these names that there is."""
        for name in names:
            if name in self._known:
                file = self._known[name]
                return self._scheme + file if self._scheme.endswith("://") else file
        return None

    def labelled(self, rows: Iterable[tuple[str, str]]) -> Table:
        table = Table([], [], [])
        for name, text in rows:
            labels = tuple(label.strip().replace("_", " ") for label in re.split(r"[,;|]", text) if label.strip())
            if (uri := self._found(table, name)) and labels:
                table.labelled.append(Labelled(uri, 0.0, WHOLE_S, labels))
        return table

    def captioned(self, rows: Iterable[tuple[str, list[str]]]) -> Table:
        """Rows of the same clip become one set."""
        table, texts = Table([], [], []), dict[str, list[str]]()
        for name, captions in rows:
            if name in texts or self._found(table, name):
                texts.setdefault(name, []).extend(captions)
        for name, captions in texts.items():
            if captions:
                uri = str(self.find(name))
                table.captions.append(CaptionSet(uri, 0.0, WHOLE_S, captions[0], tuple(captions[1:]), ()))
        return table

    def audiocaps(self, rows: list[Row]) -> Table:
        """A clip has five rows, each with an `audiocap_id` of its own: any of its names will do."""
        clips: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            clips.setdefault((row["youtube_id"], row.get("start_time", "")), []).append(row)
        table = Table([], [], [])
        for (youtube, start), group in clips.items():
            names = [f"{prefix}{youtube}{tail}" for tail in (f"_{start}", "") for prefix in ("", "Y")]
            uri = self._found(table, *names, *(row["audiocap_id"] for row in group if row.get("audiocap_id")))
            if uri:
                captions = tuple(row["caption"] for row in group)
                table.captions.append(CaptionSet(uri, 0.0, WHOLE_S, captions[0], captions[1:], ()))
        return table

    def _found(self, table: Table, *names: str) -> str | None:
        uri = self.find(*names)
        if uri is None:
            table.failures.append(Failure(f"{self._root}/{names[0]}", "no file", detail=f"named by {self._table}"))
        return uri


def _rows(uri: str) -> list[Row]:
    try:
        with open_text(uri, encoding="utf-8-sig", newline="") as file:
            text = str(file.read())
    except FileNotFoundError as error:
        raise ValueError(f"{uri}: no such file") from error
    dialect = "excel-tab" if uri.endswith(".tsv") else "excel"
    rows = list(csv.DictReader(io.StringIO(text), dialect=dialect))
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise ValueError(f"{uri}, line {number}: not as many values as columns")
    return rows


def _parent(folder: str) -> str:
    return folder.rsplit("/", 1)[0] if "/" in folder else "."


def _split_folder(uri: str, folder: str) -> str:
    """Clotho's `clotho_captions_evaluation.csv` has its audio in `evaluation/`, where there is such a folder."""
    split = f"{folder}/{PurePosixPath(uri).stem.rsplit('_', 1)[-1]}"
    fs, path = locate(split)
    return split if fs.isdir(path) else folder
