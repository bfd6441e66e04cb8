"""CSV files of captions or labels, and the audio files that they name.

What a CSV names and no file has is a failure of the table, not an error: benchmarks lose clips over the years.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePosixPath

from af2_ray.data.names import AUDIO_SUFFIXES
from af2_ray.data.quarantine import Failure
from af2_ray.data.samples import CaptionSet
from af2_ray.data.tables import csv_rows
from af2_ray.evaluate.benchmarks.benchmark import EmbeddingBenchmark, Matches, with_columns
from af2_ray.evaluate.clap_score import score_captions, score_labels
from af2_ray.evaluate.table import WHOLE_S, Labelled, Table
from af2_ray.storage.places import locate

Row = dict[str, str]


def read_rows(uri: str) -> list[Row]:
    """The rows of a CSV (or, by its suffix, a TSV), by column.

    Raises:
        ValueError: no such file, or a line with another number of values than there are columns.
    """
    return [row for _, row in csv_rows(uri)]


def columns_of(uri: str) -> frozenset[str]:
    """The columns of a CSV; none of what is no CSV, by its suffix, or has no row."""
    rows = read_rows(uri) if uri.endswith((".csv", ".tsv")) else []
    return frozenset(rows[0]) if rows else frozenset()


def folder_of(uri: str) -> str:
    """The folder that the CSV is in."""
    return posixpath.dirname(uri) or "."


def folder_beside(uri: str, name: str) -> str:
    """A folder beside the CSV's own: `x/meta/esc50.csv` and `audio` -> `x/audio`."""
    return posixpath.join(folder_of(folder_of(uri)), name)


def folder_of_split(uri: str) -> str:
    """A folder named as the last part of the CSV's name, where there is one (`clotho_captions_evaluation.csv` has its
    audio in `evaluation/`), else the CSV's own.
    """
    split = posixpath.join(folder_of(uri), PurePosixPath(uri).stem.rsplit("_", 1)[-1])
    fs, path = locate(split)
    return split if fs.isdir(path) else folder_of(uri)


def labelled_csv(
    matches: Matches | Sequence[str], *, clip: Callable[[Row], tuple[str, str]], folder: Callable[[str], str]
) -> EmbeddingBenchmark:
    """A benchmark of classes, from a CSV with a row a clip.

    Args:
        matches: columns that it has, or a test of its name and columns.
        clip: name of a row's audio below the folder, and its labels with `,` `;` or `|` between them.
        folder: place of the audio, from the CSV's uri, where the user names none.
    """

    def read(uri: str, root: str | None) -> Table:
        rows = map(clip, read_rows(uri))
        found, failures = find_audio(uri, root or folder(uri), (((name,), labels_in(text)) for name, text in rows))
        clips = [Labelled(file, 0.0, WHOLE_S, tuple(labels)) for file, labels in found if labels]
        return Table(uri, labelled=clips, failures=failures)

    return EmbeddingBenchmark(matches if callable(matches) else with_columns(matches), read, score_labels)


def labels_in(text: str) -> list[str]:
    """Labels with `,` `;` or `|` between them, in plain words."""
    return [label.strip().replace("_", " ") for label in re.split(r"[,;|]", text) if label.strip()]


def captioned_csv(
    matches: Matches | Sequence[str], *, clip: Callable[[Row], tuple[str, list[str]]], folder: Callable[[str], str]
) -> EmbeddingBenchmark:
    """A benchmark of captions: `labelled_csv`, but `clip` gives a name and captions; rows of one clip are one set."""

    def read(uri: str, root: str | None) -> Table:
        clips: dict[tuple[str, ...], list[str]] = {}
        for name, texts in map(clip, read_rows(uri)):
            clips.setdefault((name,), []).extend(text for text in texts if text.strip())
        return read_captioned(uri, root or folder(uri), clips)

    return EmbeddingBenchmark(matches if callable(matches) else with_columns(matches), read, score_captions)


def read_captioned(uri: str, folder: str, clips: Mapping[tuple[str, ...], list[str]]) -> Table:
    """Caption sets, from the names below `folder` that a clip may have and its captions."""
    found, failures = find_audio(uri, folder, clips.items())
    captions = [CaptionSet(file, 0.0, WHOLE_S, texts[0], tuple(texts[1:]), ()) for file, texts in found if texts]
    return Table(uri, captions=captions, failures=failures)


def find_audio(
    uri: str, folder: str, clips: Iterable[tuple[Sequence[str], Sequence[str]]]
) -> tuple[list[tuple[str, Sequence[str]]], list[Failure]]:
    """The audio files of a CSV's clips, each with its labels or captions; and clips that have no file.

    Args:
        uri: name of the CSV, for messages.
        folder: place of the audio.
        clips: names below `folder` that a clip may have, with or without suffix, and its labels or captions.
    """
    fs, path = locate(folder)
    root, scheme = path.rstrip("/"), folder.partition("://")[0] + "://" if "://" in folder else ""
    if not fs.isdir(path):
        raise ValueError(f"{folder}: no folder of audio for {uri}; name it with --root")
    files = [file for file in fs.find(path) if file.lower().endswith(AUDIO_SUFFIXES)]
    known = {file.removeprefix(root + "/"): file for file in files}
    known |= {PurePosixPath(name).with_suffix("").as_posix(): file for name, file in known.items()}
    found, failures = list[tuple[str, Sequence[str]]](), list[Failure]()
    for names, texts in clips:
        if name := next((name for name in names if name in known), None):
            found.append((scheme + known[name], texts))
        else:
            failures.append(Failure(f"{root}/{names[0]}", "no file", detail=f"named by {uri}"))
    return found, failures
