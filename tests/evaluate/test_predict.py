from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import serve_toy
import soundfile as sf
import torch
from job_runner import run_job
from quiz import write_corpus
from transformers import AutoTokenizer

from af2_ray.audio.decode import decode
from af2_ray.audio.hear import Stretch
from af2_ray.config import Cluster, Dataset, Evaluation
from af2_ray.data.manifest import read_samples
from af2_ray.data.samples import Sample
from af2_ray.engine.batch import AnswerLimits, Question, answer_all
from af2_ray.engine.engine import Engine
from af2_ray.evaluate.controls import deaf_pairs
from af2_ray.evaluate.evaluate import evaluate_run
from af2_ray.evaluate.predict import answer_one, predict
from af2_ray.models.modeling_af2 import AudioFlamingo2ForConditionalGeneration
from af2_ray.models.processing_af2 import AudioFlamingo2FeatureExtractor, AudioFlamingo2Processor

LIMITS = Evaluation(max_windows=3, batch_windows=4, max_new_tokens=6)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    return serve_toy.export(tmp_path_factory.mktemp("model"), tiny_tokenizer)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("quiz"))


@pytest.fixture(scope="module")
def samples(corpus: Path) -> list[Sample]:
    return list(read_samples(str(corpus / "test.json")))


def test_answers_are_those_of_one_question_alone(model_dir: Path, samples: list[Sample]) -> None:
    """What shares a step with a question changes nothing; the deaf answer is the other clip's."""
    deaf_of = deaf_pairs(samples)
    predictions, failures = predict(model_dir, samples, LIMITS, deaf_of=deaf_of)
    assert failures == []
    assert [prediction.sample for prediction in predictions] == samples
    assert len({prediction.text for prediction in predictions}) > 1, "a model that says one thing tests nothing"
    for index, prediction in list(enumerate(predictions))[::3]:
        alone = {"max_windows": 3, "max_new_tokens": 6}
        assert prediction.text == answer_one(model_dir, samples[index].uri, samples[index].prompt, **alone)
        other = samples[deaf_of[index]].uri
        assert prediction.deaf_text == answer_one(model_dir, other, samples[index].prompt, **alone)
        assert prediction.deaf_uri == other


def test_answers_are_those_of_generate(model_dir: Path, samples: list[Sample]) -> None:
    model = AudioFlamingo2ForConditionalGeneration.from_pretrained(model_dir).eval()
    processor = AudioFlamingo2Processor(AudioFlamingo2FeatureExtractor(3), AutoTokenizer.from_pretrained(model_dir))
    predictions, _ = predict(model_dir, samples[:4], LIMITS)
    for prediction in predictions:
        sample = prediction.sample
        audio = decode(sample.uri, 0.0, sample.duration_s)
        inputs = processor(sample.prompt, audio, sampling_rate=16_000)
        new = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert prediction.text == processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_a_clip_longer_than_any_in_training_is_heard_whole(
    tmp_path: Path, tiny_tokenizer: Any, samples: list[Sample]
) -> None:
    """And the model that is asked stays as it is."""
    model = serve_toy.build(tiny_tokenizer, max_windows=1)
    sound = tmp_path / "long.flac"
    sf.write(sound, np.random.default_rng(0).uniform(-0.1, 0.1, 25 * 16_000), 16_000)
    question = Question(0, "q", Stretch(str(sound), 0.0, 25.0), "what?")
    engine = Engine(model, tiny_tokenizer, max_windows=3)
    (result,) = answer_all(engine, [question], AnswerLimits(3, 4))
    assert result.answer is not None
    assert engine.encoder.num_encoded == 3
    assert model.config.max_windows == 1


def test_bad_clips_are_set_aside_with_the_reason(model_dir: Path, samples: list[Sample], tmp_path: Path) -> None:
    silent = tmp_path / "silent.flac"
    sf.write(silent, np.zeros(16_000), 16_000)
    broken = [
        replace(samples[0], id="gone", uri=str(tmp_path / "gone.flac")),
        replace(samples[0], id="silent", uri=str(silent), duration_s=1.0),
        replace(samples[0], id="zero", duration_s=0.0),
    ]
    predictions, failures = predict(model_dir, [*samples[:2], *broken], LIMITS, deaf_of={0: 2, 1: 0})
    assert [prediction.sample.id for prediction in predictions] == [sample.id for sample in samples[:2]]
    assert {failure.reason for failure in failures} == {"missing", "silent", "zero duration"}
    assert [prediction.deaf_text is None for prediction in predictions] == [True, False]


def test_a_model_that_fails_ends_an_evaluation_and_a_long_question_is_set_aside(
    model_dir: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    long = replace(samples[1], id="long", prompt="bell " * 2000)
    predictions, failures = predict(model_dir, [samples[0], long], LIMITS, deaf_of={0: 1, 1: 0})
    assert [prediction.sample.id for prediction in predictions] == [samples[0].id]
    assert [(failure.reason, failure.uri) for failure in failures] == [("refused", long.uri)]
    assert failures[0].detail.startswith("long: the prompt is longer")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(AudioFlamingo2ForConditionalGeneration, "embed_windows", fail)
    with pytest.raises(RuntimeError, match=samples[0].id):
        predict(model_dir, samples[:1], LIMITS)


def test_on_ray_the_answers_are_the_same(model_dir: Path, samples: list[Sample], ray_cluster: Any) -> None:
    deaf_of = deaf_pairs(samples)
    here, _ = predict(model_dir, samples, LIMITS, deaf_of=deaf_of)
    cluster = Cluster(num_workers=2, cpus_per_worker=0.5)
    there, failures = predict(model_dir, samples, LIMITS, deaf_of=deaf_of, cluster=cluster)
    assert there == here
    assert failures == []


def test_captions_alone_are_evaluated(model_dir: Path, corpus: Path, tmp_path: Path) -> None:
    """A captioning benchmark has no closed question, so no accuracy; its captions are scored and written."""
    facts = json.loads((corpus / "test.json").read_text())
    facts["data"] = {key: row for key, row in facts["data"].items() if "caption" in row.get("skill", "").lower()}
    manifest = corpus / "captions_only.json"
    manifest.write_text(json.dumps(facts))
    block = LIMITS.model_copy(update={"manifests": [Dataset(manifest=str(manifest))]})
    result = evaluate_run(model_dir, block, out_dir=tmp_path)
    assert result.to_json()["accuracy"] == {"questions": 0}
    assert result.details["captions"]["captions"] == len(facts["data"]) == 8
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 8


def test_a_whole_evaluation(model_dir: Path, corpus: Path, tmp_path: Path) -> None:
    datasets = [Dataset(manifest=str(corpus / "test.json"))]
    block = LIMITS.model_copy(update={"manifests": datasets, "seen_manifests": datasets})
    result = evaluate_run(model_dir, block, train=datasets, out_dir=tmp_path)
    accuracy = result.to_json()["accuracy"]
    assert set(accuracy) == {
        *("all", "pairs", "deaf", "majority", "text_only", "questions", "ci95"),
        *("by_skill", "by_duration", "seen_clips"),
    }
    assert accuracy["questions"] == 8
    assert accuracy["seen_clips"] == accuracy["all"]
    assert result.details["captions"]["captions"] == 8
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 16
    closed = [row["right"] for row in rows if row["right"] is not None]
    assert np.mean(closed) == pytest.approx(accuracy["all"], abs=1e-4)
    assert json.loads((tmp_path / "metrics.json").read_text())["accuracy"] == accuracy


def test_jobs(model_dir: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = str(corpus / "test.json")
    options = ["--train", manifest, "--out", str(tmp_path / "out"), "--max-new-tokens", "4"]
    assert run_job("evaluate", model_dir, manifest, *options) == 0
    assert "order" in capsys.readouterr().out
    assert (tmp_path / "out" / "metrics.json").is_file()
    assert run_job("ask", model_dir, corpus / "test/00000.flac", "Which comes first?") == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("broken", ["model", "file", "question", "manifest"])
def test_bad_input_is_one_line_and_exit_code_2(
    model_dir: Path, corpus: Path, tmp_path: Path, broken: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"model": str(model_dir), "file": str(corpus / "test/00000.flac"), "question": "what?"}
    if broken == "manifest":
        (tmp_path / "bad.json").write_text("{")
        code = run_job("evaluate", model_dir, tmp_path / "bad.json")
    else:
        given[broken] = "" if broken == "question" else str(tmp_path / "nothing")
        code = run_job("ask", *given.values())
    assert code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
