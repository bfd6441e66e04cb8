"""Any CSV with a file name and captions (`caption`, `captions`, `caption_1` ...) or labels; clips beside it."""

from __future__ import annotations

import re
from collections.abc import Iterable

from af2_ray.evaluate.benchmarks.csv_files import captioned_csv, folder_of, folder_of_split, labelled_csv

NAMES = ("file_name", "filename", "fname", "name", "file", "path", "audio", "audio_path")
LABELS = ("category", "label", "labels", "class")


def captions_among(columns: Iterable[str]) -> list[str]:
    return sorted(column for column in columns if re.fullmatch(r"captions?(_\d+)?", column))


def first(names: Iterable[str], columns: Iterable[str]) -> str | None:
    """The first of some names that is a column."""
    return next((name for name in names if name in columns), None)


ANY_CAPTIONS = captioned_csv(
    lambda uri, columns: bool(first(NAMES, columns) and captions_among(columns)),
    clip=lambda row: (row[first(NAMES, row) or ""], [row[column] for column in captions_among(row)]),
    folder=folder_of_split,
)
ANY_LABELS = labelled_csv(
    lambda uri, columns: bool(first(NAMES, columns) and first(LABELS, columns)),
    clip=lambda row: (row[first(NAMES, row) or ""], row[first(LABELS, row) or ""]),
    folder=folder_of,
)
