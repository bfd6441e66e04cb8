"""Questions in a manifest of any format (`data.manifest`), right if the answer is exactly the option or the text."""

from __future__ import annotations

from af2_ray.data.manifest import read_samples
from af2_ray.evaluate.answers import groups_of, is_right
from af2_ray.evaluate.benchmarks.benchmark import QuestionBenchmark
from af2_ray.evaluate.table import Table, usable


def read(uri: str, root: str | None) -> Table:
    questions, failures = usable(read_samples(uri, root), uri)
    return Table(uri, questions=questions, failures=failures)


MANIFEST = QuestionBenchmark(lambda uri, columns: True, read, is_right, groups_of)
