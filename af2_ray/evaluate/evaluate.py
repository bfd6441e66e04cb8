"""One evaluation, whole: predictions beside their controls, a row for each benchmark, retrieval; and its files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from af2_ray.config import Cluster, Dataset, Evaluation
from af2_ray.data.quarantine import Failure
from af2_ray.data.samples import Sample
from af2_ray.evaluate.answers import Prediction, is_caption, question_words
from af2_ray.evaluate.benchmarks import find
from af2_ray.evaluate.benchmarks.benchmark import EmbeddingBenchmark, QuestionBenchmark
from af2_ray.evaluate.benchmarks.manifest import with_columns
from af2_ray.evaluate.clap_embed import ClapModel, ClapSettings
from af2_ray.evaluate.clap_score import ClapScores
from af2_ray.evaluate.controls import deaf_pairs
from af2_ray.evaluate.predict import predict
from af2_ray.evaluate.scoring import Answered, score, summary_of
from af2_ray.evaluate.table import Table
from af2_ray.storage.places import shown

Read = list[tuple[QuestionBenchmark, Table]]
"""Manifests as they were read, each with the benchmark that it is of."""


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found.

    Attributes:
        details: scores of the unseen manifests, pooled and by benchmark (`scoring.score`).
        clap: scores of AF-CLAP; none where no folder of it was given.
        predictions: answers to the unseen manifests, captions included.
        seen: answers to the seen manifests.
        failures: clips and questions that were set aside.
    """

    details: dict[str, Any]
    clap: ClapScores | None
    predictions: list[Prediction] = field(repr=False)
    seen: list[Prediction] = field(repr=False)
    failures: list[Failure] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """The contents of metrics.json; `accuracy` and `clap` are blocks of summary.json, too."""
        return {
            "accuracy": summary_of(self.details),
            "clap": self.clap.figures if self.clap else {},
            "details": self.details,
            "set_aside": [asdict(failure) for failure in self.failures],
        }


def evaluate_run(
    model_dir: str | Path,
    evaluation: Evaluation,
    *,
    train: Sequence[Dataset] = (),
    clap_dir: str | Path | None = None,
    out_dir: str | Path | None = None,
    cluster: Cluster | None = None,
    clap_max_windows: int = 1,
    wordings: Mapping[str, Sequence[str]] = MappingProxyType({}),
    deaf: bool = True,
) -> EvaluationResult:
    """Evaluate an exported model, and an AF-CLAP folder if one is given.

    Args:
        model_dir: Hugging Face folder of the model.
        evaluation: manifests, captions and limits, as a recipe has them.
        train: training manifests, on which majority and text-only are fitted; none: those controls are left out.
        clap_dir: AF-CLAP folder.
        out_dir: folder of predictions.jsonl, seen_predictions.jsonl and metrics.json; none: nothing is written.
        cluster: actors on the connected Ray cluster, as training's workers; none: this process alone.
        clap_max_windows: number of windows of a clip that AF-CLAP hears (the recipe's `clap.max_windows`).
        wordings: texts by which captions may name a label, for their event F1; the label itself always counts.
        deaf: control by which each question is also asked over another clip, at twice the cost.

    Raises:
        ValueError: nothing to evaluate, no model there, or a manifest that cannot be read.
    """
    read, seen_read = _read(evaluation.manifests), _read(evaluation.seen_manifests)
    samples, seen = _questions(read), _questions(seen_read)
    unusable = [failure for _, table in (*read, *seen_read) for failure in table.failures]
    if not samples:
        why = f": {shown(unusable[0].uri)}: {unusable[0].reason}, for instance" if unusable else ""
        raise ValueError(f"evaluation.manifests: no usable question{why}; name at least one manifest that holds some")
    # The seen questions travel in the same pass but have no deaf answer.
    deaf_of = deaf_pairs(samples) if deaf else {}
    found, unread = predict(model_dir, samples + seen, evaluation, deaf_of=deaf_of, cluster=cluster)
    predictions, seen_predictions = _predictions(read, found), _predictions(seen_read, found)
    details = score(predictions, _questions(_read(train)), seen_predictions, wordings, _by_benchmark(read, predictions))
    clap = None
    if clap_dir is not None and evaluation.captions is not None:
        settings = ClapSettings(clap_max_windows, evaluation.batch_windows, evaluation.gallery)
        clap = evaluate_clap(ClapModel.load(clap_dir, settings), evaluation.captions)
    failures = [*unusable, *unread, *(clap.failures if clap else ())]
    result = EvaluationResult(details, clap, predictions, seen_predictions, failures)
    if out_dir is not None:
        write(result, Path(out_dir))
    return result


def evaluate_clap(clap: ClapModel, uri: str, root: str | None = None) -> ClapScores:
    """Scores of an AF-CLAP model on one file of captions or labels.

    Args:
        clap: model, and how far it is asked.
        uri: file of a benchmark (`benchmarks.BENCHMARKS`).
        root: folder of the audio; none: where the benchmark has it.

    Raises:
        ValueError: a file that cannot be read, or no clip that can.
    """
    benchmark = find(uri, EmbeddingBenchmark)
    return benchmark.score(clap, benchmark.read(uri, root))


def write(result: EvaluationResult, out_dir: Path) -> None:
    """Write predictions.jsonl, seen_predictions.jsonl and metrics.json."""
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, predictions in (("predictions", result.predictions), ("seen_predictions", result.seen)):
        if predictions:
            lines = [json.dumps(prediction.to_json(), ensure_ascii=False) for prediction in predictions]
            (out_dir / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (out_dir / "metrics.json").write_text(json.dumps(result.to_json(), indent=1), encoding="utf-8")


def choose_examples(predictions: Sequence[Prediction], *, num_right: int = 6, num_wrong: int = 4) -> list[Prediction]:
    """A few predictions to show, right and wrong, no skill and question template twice while others are left."""
    chosen: list[Prediction] = []
    for right, count in ((True, num_right), (False, num_wrong)):
        pool = [p for p in predictions if not is_caption(p.sample) and p.right == right]
        fresh: dict[str, Prediction] = {}
        for prediction in pool:
            fresh.setdefault(prediction.sample.template or question_words(prediction.sample), prediction)
        ordered = [*fresh.values(), *(p for p in pool if p not in list(fresh.values()))]
        chosen += ordered[:count]
    return chosen


def _read(datasets: Sequence[Dataset]) -> Read:
    benchmarks = [_benchmark_of(dataset) for dataset in datasets]
    return [(one, one.read(dataset.manifest, dataset.root)) for one, dataset in zip(benchmarks, datasets, strict=True)]


def _benchmark_of(dataset: Dataset) -> QuestionBenchmark:
    """The benchmark that a file is of; where the user names its columns, it is a manifest."""
    return with_columns(dataset.columns) if dataset.columns else find(dataset.manifest, QuestionBenchmark)


def _questions(read: Read) -> list[Sample]:
    return [sample for _, table in read for sample in table.questions]


def _predictions(read: Read, found: Sequence[Prediction]) -> list[Prediction]:
    """The predictions of these manifests, in order, with their benchmarks' rules."""
    rules = {id(sample): benchmark.is_right for benchmark, table in read for sample in table.questions}
    return [replace(one, is_right=rules[id(one.sample)]) for one in found if id(one.sample) in rules]


def _by_benchmark(read: Read, predictions: Sequence[Prediction]) -> dict[str, Answered]:
    """Those of each dataset, under its name; of each manifest apart where several have a dataset of that name."""
    homes = {id(sample): (benchmark, table.uri) for benchmark, table in read for sample in table.questions}
    named = {(sample.dataset, table.uri) for _, table in read for sample in table.questions}
    times = Counter(dataset for dataset, _ in named)
    rows: dict[str, Answered] = {}
    for prediction in predictions:
        benchmark, uri = homes[id(prediction.sample)]
        dataset = prediction.sample.dataset
        name = f"{dataset} ({shown(uri)})" if times[dataset] > 1 else dataset
        rows.setdefault(name, Answered([], benchmark.groups)).predictions.append(prediction)
    return rows
