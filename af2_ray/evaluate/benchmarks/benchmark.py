"""What a benchmark says of itself: how its files are recognised, read, scored and grouped.

Two kinds, by what is asked: a model that answers questions, or AF-CLAP, which embeds clips and texts. Both are plain
functions in a frozen dataclass; to add one, write a file beside this one and a line in `BENCHMARKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from af2_ray.evaluate.answers import Groups, Rule
from af2_ray.evaluate.clap_embed import ClapModel
from af2_ray.evaluate.clap_score import ClapScores
from af2_ray.evaluate.table import Table

Matches = Callable[[str, frozenset[str]], bool]
"""Whether a file is of a benchmark, by its name and, where it is a CSV, its columns."""

Read = Callable[[str, str | None], Table]
"""Items of a file and the folder of its audio (none: where the benchmark has it); `ValueError` if it cannot be read."""


@dataclass(frozen=True)
class QuestionBenchmark:
    """Questions that a model answers.

    Attributes:
        matches: test of a file's name and columns.
        read: reader of the file.
        is_right: rule by which an answer is right.
        groups: parts under which a question is reported, by what they divide (`skill`, `duration`).
    """

    matches: Matches
    read: Read
    is_right: Rule
    groups: Groups


@dataclass(frozen=True)
class EmbeddingBenchmark:
    """Clips with captions or classes, for AF-CLAP.

    Attributes:
        matches: test of a file's name and columns.
        read: reader of the file.
        score: measures of a model, with those by group (class, kind of relation).
    """

    matches: Matches
    read: Read
    score: Callable[[ClapModel, Table], ClapScores]


def with_columns(names: Sequence[str]) -> Matches:
    """A CSV that has all these columns."""
    return lambda uri, columns: set(names) <= columns
