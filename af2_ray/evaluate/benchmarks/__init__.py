"""Benchmarks, one small file each; the first that matches a file reads it."""

from __future__ import annotations

from typing import TypeVar

from af2_ray.evaluate.benchmarks.any_csv import ANY_CAPTIONS, ANY_LABELS
from af2_ray.evaluate.benchmarks.audiocaps import AUDIOCAPS
from af2_ray.evaluate.benchmarks.benchmark import EmbeddingBenchmark, QuestionBenchmark
from af2_ray.evaluate.benchmarks.captions import CAPTIONS
from af2_ray.evaluate.benchmarks.clotho import CLOTHO
from af2_ray.evaluate.benchmarks.csv_files import columns_of
from af2_ray.evaluate.benchmarks.esc50 import ESC50
from af2_ray.evaluate.benchmarks.manifest import MANIFEST
from af2_ray.evaluate.benchmarks.scenes import SCENES
from af2_ray.evaluate.benchmarks.urbansound import URBANSOUND

BENCHMARKS: dict[str, QuestionBenchmark | EmbeddingBenchmark] = {
    "urbansound": URBANSOUND,
    "esc50": ESC50,
    "audiocaps": AUDIOCAPS,
    "clotho": CLOTHO,
    "csv_captions": ANY_CAPTIONS,
    "csv_labels": ANY_LABELS,
    "scenes": SCENES,
    "captions": CAPTIONS,
    "manifest": MANIFEST,
}
"""All of them, the more particular first."""

BenchmarkT = TypeVar("BenchmarkT", QuestionBenchmark, EmbeddingBenchmark)


def find(uri: str, kind: type[BenchmarkT]) -> BenchmarkT:
    """The benchmark of a kind that a file is of.

    Raises:
        ValueError: no such file, or columns of no benchmark; the message lists them.
    """
    columns = columns_of(uri)
    for benchmark in BENCHMARKS.values():
        if isinstance(benchmark, kind) and benchmark.matches(uri, columns):
            return benchmark
    raise ValueError(f"{uri}: columns {sorted(columns)} are of no known layout: give a name and captions or labels")
