"""Caption sets as AF-CLAP trains on them (`data.manifest.read_captions`), with their scenes' truth if it is there."""

from __future__ import annotations

from af2_ray.data.manifest import read_captions
from af2_ray.evaluate.benchmarks.benchmark import EmbeddingBenchmark
from af2_ray.evaluate.clap_score import score_captions
from af2_ray.evaluate.scenes import scenes_beside
from af2_ray.evaluate.table import Table, usable


def read(uri: str, root: str | None) -> Table:
    captions, failures = usable(read_captions(uri, root), uri)
    return Table(uri, captions=captions, scenes=scenes_beside(uri, captions), failures=failures)


CAPTIONS = EmbeddingBenchmark(lambda uri, columns: not uri.endswith((".csv", ".tsv")), read, score_captions)
