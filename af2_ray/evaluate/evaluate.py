"""One evaluation, whole: predictions beside their controls, metrics, retrieval; files and the summary's blocks."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from af2_ray.config import Cluster, Dataset, Evaluation
from af2_ray.data.durations import fill_durations
from af2_ray.data.manifest import read_samples
from af2_ray.data.quarantine import Failure
from af2_ray.data.samples import Sample, check_samples
from af2_ray.evaluate.answers import Prediction, is_caption, is_right, question_words
from af2_ray.evaluate.clap import evaluate_clap
from af2_ray.evaluate.controls import control_scores, deaf_pairs
from af2_ray.evaluate.metrics import Scores, by_duration, by_skill, caption_scores, summarise
from af2_ray.evaluate.predict import predict
from af2_ray.storage.places import shown
from af2_ray.storage.stores import scratch

log = logging.getLogger(__name__)

_ARTICLE = re.compile(r"^(an?|the) ")


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found.

    Attributes:
        accuracy: the `accuracy` block of summary.json.
        clap: its `clap` block; empty where no AF-CLAP folder was given.
        details: `all` (not of captions alone), `by_skill`, `by_duration`, `seen` (rows with controls, chance and
            intervals), `captions`.
        predictions: of the unseen manifests, captions included.
        failures: what was set aside.
    """

    accuracy: dict[str, Any]
    clap: dict[str, Any]
    details: dict[str, Any]
    predictions: list[Prediction] = field(repr=False)
    failures: list[Failure] = field(repr=False)


def evaluate_run(
    model_dir: str | Path,
    evaluation: Evaluation,
    *,
    train: Sequence[Dataset | str] = (),
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
        out_dir: where predictions.jsonl, seen_predictions.jsonl and metrics.json go; none: nothing is written.
        cluster: actors on the connected Ray cluster, as training's workers; none: this process alone.
        clap_max_windows: windows of a clip that AF-CLAP hears (the recipe's `clap.max_windows`).
        wordings: label -> how captions may word it, for their event F1; the label itself always counts.
        deaf: also ask each question over another clip: a control, at twice the cost.

    Raises:
        ValueError: nothing to evaluate, no model there, or a manifest that cannot be read.
    """
    (samples, unusable), (seen, seen_unusable) = _read(evaluation.manifests), _read(evaluation.seen_manifests)
    unusable += seen_unusable
    if not samples:
        why = f": {shown(unusable[0].uri)}: {unusable[0].reason}, for instance" if unusable else ""
        raise ValueError(f"evaluation.manifests: no usable question{why}; name at least one manifest that holds some")
    # The seen questions travel in the same pass but have no deaf answer.
    deaf_of = deaf_pairs(samples) if deaf else {}
    found, failures = predict(model_dir, samples + seen, evaluation, deaf_of=deaf_of, cluster=cluster)
    failures = unusable + failures
    seen_ids = {id(sample) for sample in seen}
    seen_predictions = [prediction for prediction in found if id(prediction.sample) in seen_ids]
    predictions = [prediction for prediction in found if id(prediction.sample) not in seen_ids]

    details = score(predictions, _read(train)[0], seen_predictions, wordings)
    clap: dict[str, Any] = {}
    if clap_dir is not None and evaluation.captions is not None:
        clap = evaluate_clap(
            clap_dir,
            evaluation.captions,
            gallery=evaluation.gallery,
            max_windows=clap_max_windows,
            batch_windows=evaluation.batch_windows,
        )
        failures = failures + clap.pop("failures")
    result = EvaluationResult(summary_block(details), clap, details, predictions, failures)
    if out_dir is not None:
        write(result, Path(out_dir), seen_predictions)
    return result


def score(
    predictions: Sequence[Prediction],
    train: Sequence[Sample] = (),
    seen: Sequence[Prediction] = (),
    wordings: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Everything that is measured of predictions: the `details` of an EvaluationResult (see `evaluate_run`)."""
    closed = [prediction for prediction in predictions if not is_caption(prediction.sample)]
    captions = [prediction for prediction in predictions if is_caption(prediction.sample)]
    samples = [prediction.sample for prediction in closed]
    systems = _systems(closed, train)
    details: dict[str, Any] = {"by_skill": by_skill(samples, systems), "by_duration": by_duration(samples, systems)}
    if closed or not captions:  # captions alone have no accuracy
        details["all"] = summarise(samples, systems)
    if captions:
        details["captions"] = caption_scores(captions, event_wordings([*train, *samples], wordings))
    closed_seen = [prediction for prediction in seen if not is_caption(prediction.sample)]
    if closed_seen:
        right = np.array([prediction.right for prediction in closed_seen], dtype=float)
        details["seen"] = summarise([prediction.sample for prediction in closed_seen], {"model": right})
    return details


def _systems(closed: Sequence[Prediction], train: Sequence[Sample]) -> dict[str, Scores]:
    systems: dict[str, Scores] = {"model": np.array([prediction.right for prediction in closed], dtype=float)}
    if any(prediction.deaf_text is not None for prediction in closed):
        systems["deaf"] = np.array(
            [np.nan if p.deaf_text is None else is_right(p.sample, p.deaf_text) for p in closed], dtype=float
        )
    # Drills do not help a control that is asked other questions: fitted to them too, text-only scored 1.3 points less.
    asked = {prediction.sample.template for prediction in closed}
    alike = [sample for sample in train if sample.template in asked] or train
    if alike:
        systems |= control_scores(alike, [prediction.sample for prediction in closed])
    return systems


def event_wordings(samples: Sequence[Sample], wordings: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Wording -> label, for reading captions: the labels that identification questions name, and `wordings` of labels.

    A wording counts without its article, so that `a loud dog` names the dog.
    """
    labels = {
        label.lower()
        for sample in samples
        if sample.skill == "identification"
        for label in (*sample.options, sample.answer)
    }
    words = {label: label for label in labels}
    return words | {_ARTICLE.sub("", text.lower()): label for label, texts in wordings.items() for text in texts}


def summary_block(details: dict[str, Any]) -> dict[str, Any]:
    """The `accuracy` block of summary.json."""
    row, seen = details.get("all"), details.get("seen")
    if row is None:
        return {"questions": 0}
    return {
        "all": row["model"],
        "pairs": row["pairs"],
        "deaf": row.get("deaf"),
        "majority": row.get("majority"),
        "text_only": row.get("text_only"),
        "questions": row["questions"],
        "ci95": row.get("above_best_control_ci95"),
        "by_skill": {name: group["model"] for name, group in details["by_skill"].items()},
        "by_duration": {name: group["model"] for name, group in details["by_duration"].items()},
        "seen_clips": seen["model"] if seen else None,
    }


def write(result: EvaluationResult, out_dir: Path, seen: Sequence[Prediction] = ()) -> None:
    """Write predictions.jsonl, seen_predictions.jsonl and metrics.json."""
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, predictions in (("predictions", result.predictions), ("seen_predictions", seen)):
        if predictions:
            lines = [json.dumps(prediction.to_json(), ensure_ascii=False) for prediction in predictions]
            (out_dir / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    metrics = {
        "accuracy": result.accuracy,
        "clap": result.clap,
        "details": result.details,
        "set_aside": [asdict(failure) for failure in result.failures],
    }
    (out_dir / "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")


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


def _read(datasets: Sequence[Dataset | str]) -> tuple[list[Sample], list[Failure]]:
    """The usable samples of some manifests, and what cannot be used, with its reason."""
    given = [Dataset(manifest=item, weight=1.0) if isinstance(item, str) else item for item in datasets]
    fallback = str(scratch("durations"))  # of those that cannot be kept beside their manifest
    found: list[Sample] = []
    failures: list[Failure] = []
    for item in given:
        read = read_samples(item.manifest, item.root)
        samples, unread = fill_durations(read, item.manifest, fallback=fallback)
        good, bad = check_samples(samples, unread)
        found += good
        failures += [Failure(sample.uri, reason, sample.offset_s, sample.id) for sample, reason in bad]
    return found, failures
