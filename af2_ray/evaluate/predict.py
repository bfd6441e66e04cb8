"""Answers of an exported model to many questions, by the engine that serves it: what is scored is what users get.

For the deaf control a question is asked again over another clip: one more request. Of a conversation the last question
is asked, after the questions and answers before it as the sample has them. Clips are encoded once, whatever the
number of questions over them. As when serving, a GPU answers in bf16 and a CPU in fp32 (`Engine.from_pretrained`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

from af2_ray.audio.decode import AudioError, probe
from af2_ray.audio.hear import Stretch
from af2_ray.cluster import Actors
from af2_ray.config import Cluster, Evaluation, Serve
from af2_ray.data.quarantine import Failure
from af2_ray.data.samples import Sample, check_samples
from af2_ray.engine.batch import (
    FAILED,
    REFUSED,
    AnswerLimits,
    Question,
    Result,
    answer_all,
    answer_on_ray,
    offline,
    plan_chunks,
)
from af2_ray.engine.engine import Engine
from af2_ray.evaluate.answers import Prediction
from af2_ray.storage.places import is_remote, shown

log = logging.getLogger(__name__)

_SLOTS = 32  # answers written at one time: many and short
_CHUNK = 64  # questions that an actor is given at a time


def predict(
    model_dir: str | Path,
    samples: Sequence[Sample],
    evaluation: Evaluation,
    *,
    deaf_of: Mapping[int, int] | None = None,
    cluster: Cluster | None = None,
) -> tuple[list[Prediction], list[Failure]]:
    """Answer every question.

    Args:
        model_dir: Hugging Face folder as a stage exports it, local or remote.
        samples: questions.
        evaluation: limits: windows heard of a clip, windows encoded at a time, length of an answer.
        deaf_of: index of the sample whose clip is played for the deaf answer, by the question's index.
        cluster: actors on the connected Ray cluster, as training's workers; none: this process alone.

    Returns:
        Predictions in the order of `samples`, and what was set aside: questions that cannot be used and clips that
        cannot be read have no prediction, and a question whose deaf clip cannot be read has no deaf answer.

    Raises:
        ValueError: no model folder.
        RuntimeError: the model fails on a question (its memory, for instance): scores of the others would mislead.
    """
    deaf_of, samples = deaf_of or {}, list(samples)
    good, bad = check_samples(samples)
    usable = {id(sample) for sample in good}
    failures = [Failure(sample.uri, reason, sample.offset_s, sample.id) for sample, reason in bad]
    questions = []
    for index, sample in enumerate(samples):
        if id(sample) in usable:
            questions.append(Question.of(index, sample))
            if index in deaf_of and id(samples[deaf_of[index]]) in usable:
                questions.append(_deaf(questions[-1], samples[deaf_of[index]], index + len(samples)))
    log.info("%d questions over %d clips", len(good), len({part for one in questions for part in one.stretches}))
    answers: dict[int, str] = {}
    unread: dict[Any, Failure] = {}
    for result in _answered(model_dir, questions, evaluation, cluster):
        question = result.question
        stretch = question.stretches[result.recording]
        if result.answer is not None:
            answers[question.index] = result.answer.strip()
        elif result.reason == FAILED:
            raise RuntimeError(f"{question.id}: {result.detail}")
        elif result.reason != REFUSED:
            unread.setdefault(stretch, Failure(stretch.uri, result.reason, stretch.offset_s, result.detail))
        elif question.index < len(samples):
            detail = f"{question.id}: {result.detail}"
            unread[question.index] = Failure(stretch.uri, result.reason, stretch.offset_s, detail)
    predictions = []
    for index, sample in enumerate(samples):
        if index in answers:
            deaf = answers.get(index + len(samples))
            deaf_uri = samples[deaf_of[index]].uri if deaf is not None else None
            predictions.append(Prediction(sample, answers[index], deaf, deaf_uri))
    return predictions, failures + list(unread.values())


def _deaf(question: Question, other: Sample, index: int) -> Question:
    """The same question, after the same history, over another sample's recordings, by turns where it has fewer."""
    first, *more = (part for part, _ in zip(cycle(other.stretches), question.stretches, strict=False))
    name = f"{question.id} over another clip"
    return replace(question, index=index, id=name, stretch=first, more_audio=tuple(more))


def answer_one(
    model_dir: str | Path, uri: str, question: str, *, max_windows: int = 30, max_new_tokens: int = 64
) -> str:
    """The answer to one question about one recording, from its beginning to at most `max_windows` windows.

    Raises:
        ValueError: an empty question, or one that is too long; a recording that cannot be used; no model folder.
        RuntimeError: the model fails.
    """
    if not question.strip():
        raise ValueError("the question is empty: ask something")
    limits = AnswerLimits(max_windows, max_new_tokens)
    engine = Engine.from_pretrained(str(model_dir), settings=offline(Serve(), limits), max_windows=max_windows)
    try:
        stretch = Stretch(uri, 0.0, probe(uri))
    except AudioError as error:
        raise ValueError(str(error)) from error
    (result,) = answer_all(engine, [Question(0, "ask", stretch, question)], limits)
    if result.reason == FAILED:
        raise RuntimeError(result.detail)
    if result.answer is None:
        raise ValueError(f"{shown(uri)}: {result.reason}" + (f" ({result.detail})" if result.detail else ""))
    return result.answer.strip()


def _answered(
    model_dir: str | Path, questions: Sequence[Question], evaluation: Evaluation, cluster: Cluster | None
) -> list[Result]:
    limits = AnswerLimits(evaluation.max_windows, evaluation.max_new_tokens, allow_silent=False)
    chunks = plan_chunks(questions, _CHUNK, limits.max_windows)
    settings = Serve(num_slots=_SLOTS, encode_windows=evaluation.batch_windows, prefill_tokens=2**20)
    model = str(model_dir if is_remote(model_dir) else Path(model_dir).absolute())
    if cluster is None:
        engine = Engine.from_pretrained(model, settings=offline(settings, limits), max_windows=limits.max_windows)
        return answer_all(engine, [one for chunk in chunks for one in chunk], limits)
    done = answer_on_ray(model, dict(enumerate(chunks)), settings, limits, Actors.of(cluster))
    return [result for _, results in done for result in results]
