"""Questions in a manifest of any format (`data.manifest`), right if the answer is exactly the option or the text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from af2_ray.data.manifest import NO_COLUMNS, read_samples
from af2_ray.evaluate.answers import groups_of, is_right
from af2_ray.evaluate.benchmarks.benchmark import QuestionBenchmark
from af2_ray.evaluate.table import Table, usable


def read(uri: str, root: str | None, columns: Mapping[str, str] = NO_COLUMNS) -> Table:
    questions, failures = usable(read_samples(uri, root, columns), uri)
    return Table(uri, questions=questions, failures=failures)


MANIFEST = QuestionBenchmark(lambda uri, columns: True, read, is_right, groups_of)


def with_columns(columns: Mapping[str, str]) -> QuestionBenchmark:
    """The benchmark of a manifest whose columns have names of their own (`Dataset.columns`)."""
    return replace(MANIFEST, read=partial(read, columns=columns))
