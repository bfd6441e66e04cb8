"""Keys of a recipe that were declared, and never reached who needs them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import serve_toy
from transformers import AutoProcessor

from af2_ray.audio.hear import Stretch
from af2_ray.config import Cluster, DeepSpeedSettings, Evaluation, FeatureCache, Serve, load_recipe
from af2_ray.data.feature_store import CacheEntry
from af2_ray.engine import batch
from af2_ray.engine.engine import Engine
from af2_ray.engine.request import Answer, Request, RequestFailure
from af2_ray.evaluate import predict
from af2_ray.models.from_recipe import recipe_config
from af2_ray.models.processing_af2 import AudioFlamingo2FeatureExtractor, AudioFlamingo2Processor
from af2_ray.train import cache_features


def test_the_trained_text_length_reaches_the_server(tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The engine read a field that no configuration had, and took 512 tokens of any model."""
    assert recipe_config(load_recipe("tiny")).max_text_tokens == load_recipe("tiny").model.max_text_tokens == 96
    model = serve_toy.build(tiny_tokenizer, max_text_tokens=20)
    engine = Engine(model, tiny_tokenizer, Serve(max_new_tokens=8))
    positions = model.config.text_config.max_position_embeddings
    words = ["bell " * 5, "bell " * 600, "bell " * positions]
    with caplog.at_level(logging.WARNING):
        short, long, endless = engine.answer([Request(text, max_new_tokens=4, id=text[:9]) for text in words])
    assert isinstance(short, Answer)
    assert isinstance(long, Answer), "longer than it was trained on: with a warning"
    assert 512 < long.prompt_tokens < positions
    # Ray Serve, where it has run in this process before, makes a second record of each line.
    assert sum("the model was trained on 20" in message for message in {*caplog.messages}) == 1
    assert isinstance(endless, RequestFailure)
    assert f"{positions - 1} tokens" in endless.message
    limited = Engine(model, tiny_tokenizer, Serve(max_prompt_tokens=300))
    assert isinstance(limited.answer([Request(words[1], max_new_tokens=4)])[0], RequestFailure)


def test_the_trained_text_length_travels_with_the_processor(tmp_path: Path, tiny_tokenizer: Any) -> None:
    extractor = AudioFlamingo2FeatureExtractor(3)
    AudioFlamingo2Processor(extractor, tiny_tokenizer, max_text_tokens=24).save_pretrained(tmp_path)
    serve_toy.build(tiny_tokenizer).config.save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert processor.max_text_tokens == 24
    assert processor("bell " * 50, answers=["a bell"])["input_ids"].shape[1] == 24
    assert processor("bell " * 50)["input_ids"].shape[1] > 24


def test_threads_of_workers_reach_the_feature_cache_and_the_actors_of_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any
) -> None:
    cluster = Cluster(num_workers=2, cpus_per_worker=3.0, threads_per_worker=3, gpus="no")
    calls: list[Any] = []

    def record(rows: Any, worker: Any, args: Any, actors: Any, **options: Any) -> list[Any]:
        calls.append((worker, args, actors))
        return []

    monkeypatch.setattr(cache_features, "map_on_ray", record)
    monkeypatch.setattr(batch, "map_on_ray", record)
    serve_toy.build(tiny_tokenizer).save_pretrained(tmp_path / "start")
    stretch = Stretch("a.wav", 0.0, 3.0)
    monkeypatch.setattr(cache_features, "entries_of", lambda plan, max_windows: [CacheEntry(stretch)])
    settings = {"settings": FeatureCache(), "max_windows": 1, "cluster": cluster, "deepspeed": DeepSpeedSettings()}
    with pytest.raises(RuntimeError, match="not encoded"):
        cache_features.cache_features(None, tmp_path / "start", tmp_path, **settings)  # type: ignore[arg-type]
    question = batch.Question(0, "q", stretch, "what?")
    predict._answered(tmp_path / "start", [question], Evaluation(), cluster)
    (_, (encoding,), one), (_, (*_, threads), other) = calls
    assert encoding.threads == threads == one.threads == other.threads == 3
    assert (one.num, one.cpus) == (other.num, other.cpus) == (2, 3.0)


def test_a_model_that_is_lent_to_an_evaluation_stays_as_it_is(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """Its `max_windows` was raised to what the evaluation hears."""
    model = serve_toy.build(tiny_tokenizer, max_windows=1)
    engine = Engine(model, tiny_tokenizer, max_windows=3)
    before = json.dumps(model.config.to_dict(), default=str)
    batch.answer_all(
        engine, [batch.Question(0, "q", Stretch("none.wav", 0.0, 30.0), "what?")], batch.AnswerLimits(3, 4)
    )
    assert json.dumps(model.config.to_dict(), default=str) == before
