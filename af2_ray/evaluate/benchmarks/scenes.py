"""Composed scenes as a benchmark of labels: `x/test.scenes.jsonl`, the clips in `x/test`, a class for each event."""

from __future__ import annotations

from af2_ray.data.names import Root
from af2_ray.evaluate.benchmarks.benchmark import EmbeddingBenchmark
from af2_ray.evaluate.clap_score import score_labels
from af2_ray.evaluate.scenes import event_labels, read_scenes
from af2_ray.evaluate.table import Labelled, Table

_SUFFIX = ".scenes.jsonl"


def read(uri: str, root: str | None) -> Table:
    base, scenes = Root.of(uri, root or uri.removesuffix(_SUFFIX)), read_scenes(uri)
    try:
        clips = [
            Labelled(base.join(name), 0.0, float(scene["duration"]), tuple(sorted(event_labels(scene))))
            for name, scene in scenes.items()
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{uri}: a scene needs `duration` and `events` with a `label` each: {error!r}") from error
    return Table(uri, labelled=clips)


SCENES = EmbeddingBenchmark(lambda uri, columns: uri.endswith(_SUFFIX), read, score_labels)
