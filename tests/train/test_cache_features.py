"""The frozen-tower cache: the same losses as with audio, and features of no other tower, file or stretch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import torch
import toy

from af2_ray.audio.decode import AudioError
from af2_ray.audio.hear import hear
from af2_ray.config import Budget, DeepSpeedSettings, Stage
from af2_ray.data.batching import Row, plan_epoch, text_lengths, window_counts
from af2_ray.data.collate import LmBatch, LmCollator
from af2_ray.data.feature_store import CacheEntry, FeatureStore, entries_to_json, open_folder, stamps
from af2_ray.data.samples import Sample, Turn
from af2_ray.text import AUDIO
from af2_ray.train import precision
from af2_ray.train.cache_features import (
    Encoding,
    FeatureEncoder,
    decode_row,
    entries_of,
    load_tower,
    make_encoding,
    shards_of,
    tower_mark,
)
from af2_ray.train.task import LmTask

MAX_WINDOWS = 2
SECONDS = (3.0, 14.0, 45.0, 10.0)


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A stage's start folder."""
    small.make_model().save_pretrained(tmp_path / "start")
    return tmp_path / "start"


@pytest.fixture
def samples(make_sound: Callable[..., str]) -> list[Sample]:
    """Four clips, one longer than the windows, and one that is not there."""
    uris = [make_sound(f"{n}.flac", seconds, hz=200 + 90 * n) for n, seconds in enumerate(SECONDS)]
    return [
        Sample(str(n), uri, 0.0, seconds, "which?", "a bell", "AQA", "d")
        for n, (uri, seconds) in enumerate([*zip(uris, SECONDS, strict=True), ("none.flac", 5.0)])
    ]


def encode_all(start: Path, root: Path, samples: list[Sample], dtype: str = "fp32") -> tuple[FeatureStore, Encoding]:
    """What the Ray job does, in this process."""
    encoding = make_encoding(start, root, dtype, DeepSpeedSettings(), max_windows=MAX_WINDOWS)
    marks = stamps([sample.uri for sample in samples])
    clips = [CacheEntry(s.stretch.first(MAX_WINDOWS), mark) for s, mark in zip(samples, marks, strict=True)]
    store, lacking = FeatureStore.of(encoding.folder, clips)
    failures: dict[int, tuple[str, str]] = {}
    encoder = FeatureEncoder(encoding)
    for shard in shards_of(lacking, MAX_WINDOWS, windows_per_shard=3):
        row = encoder(decode_row({"clips": entries_to_json(shard)}, MAX_WINDOWS))
        failures |= {key: (reason, detail) for key, reason, detail in json.loads(row["failures"])}
    store, lacking = FeatureStore.of(encoding.folder, clips, failures)
    assert [stretch.uri for stretch, _ in lacking] == ["none.flac"]
    return store, encoding


def batches(samples: list[Sample], tokenizer: Any, store: FeatureStore) -> list[LmBatch]:
    """One row of all samples: from the audio, and from the store through Ray's row form."""
    row = Row(0, tuple((sample,) for sample in samples))
    heard = LmCollator(tokenizer, max_windows=MAX_WINDOWS)(row)
    cached = LmCollator(tokenizer, max_windows=MAX_WINDOWS, source=store)(row)
    first = tokenizer.convert_tokens_to_ids(AUDIO)
    return [as_small(batch, first) for batch in (heard.tensors(), LmBatch.from_row(cached.to_row()))]


def as_small(batch: LmBatch, first: int) -> LmBatch:
    """The batch in the small model's ids: its special tokens, `first` on, stand at other places."""

    def renamed(ids: torch.Tensor) -> torch.Tensor:
        return torch.where(ids >= first, ids - first + small.AUDIO, ids.clamp(max=small.AUDIO - 1))

    return replace(batch, input_ids=renamed(batch.input_ids), labels=renamed(batch.labels))


def test_losses_and_gradients_are_those_with_audio(
    tmp_path: Path, start: Path, samples: list[Sample], tiny_tokenizer: Any
) -> None:
    task = LmTask(start, toy.stage())
    losses, gradients = {}, {}
    for dtype in ("fp32", "bf16"):
        store, _ = encode_all(start, tmp_path / "cache", samples, dtype)
        for name, batch in zip(("audio", dtype), batches(samples, tiny_tokenizer, store), strict=True):
            assert [failure.reason for failure in batch.failures] == ["missing"]
            assert batch.windows_per_clip.tolist() == [1, 2, 2, 1]
            model = task.build()
            loss = task.loss(model, batch, task.count(batch))
            loss.backward()
            losses[name] = loss.item()
            gradients[name] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert losses["fp32"] == pytest.approx(losses["audio"], abs=1e-5)
    torch.testing.assert_close(gradients["fp32"], gradients["audio"], rtol=1e-3, atol=1e-6)
    assert losses["bf16"] == pytest.approx(losses["audio"], abs=0.05)  # what half the disk costs
    assert losses["bf16"] != losses["audio"]


@pytest.mark.skipif(not precision.multiplies_bf16(), reason="needs a CPU that multiplies bf16")
def test_mixed_losses_are_those_with_audio(
    tmp_path: Path, start: Path, samples: list[Sample], tiny_tokenizer: Any
) -> None:
    """As near as bf16 allows: products are rounded in the cache too, of other numbers of windows at a time."""
    encoding = make_encoding(start, tmp_path, "auto", DeepSpeedSettings(precision="mixed"), max_windows=MAX_WINDOWS)
    assert encoding.dtype == "mixed"
    store, _ = encode_all(start, tmp_path / "cache", samples, "mixed")
    task = LmTask(start, toy.stage())
    losses = []
    for batch in batches(samples, tiny_tokenizer, store):
        with precision.autocast("cpu", "mixed"):
            losses.append(task.loss(task.build(), batch, task.count(batch)).item())
    assert store.dtype == "float32"
    assert losses[1] == pytest.approx(losses[0], abs=0.05)


def test_a_clip_is_what_the_tower_makes_of_its_windows(tmp_path: Path, start: Path, samples: list[Sample]) -> None:
    store, encoding = encode_all(start, tmp_path / "cache", samples)
    tower = load_tower(start)
    for sample in samples[:-1]:
        features = store.read(sample.stretch, MAX_WINDOWS)
        wanted = tower(torch.from_numpy(hear(sample.stretch, MAX_WINDOWS)))
        np.testing.assert_allclose(features, wanted.numpy(), atol=1e-5)
    assert store.silence.shape == (1, *features.shape[1:])
    with pytest.raises(AudioError, match="missing"):
        store.read(samples[-1].stretch, MAX_WINDOWS)
    with pytest.raises(ValueError, match="made for another plan"):
        store.read(samples[2].stretch, MAX_WINDOWS + 1)  # more of the clip than was encoded
    again, lacking = FeatureStore.of(
        encoding.folder, [CacheEntry(samples[0].stretch.first(9), stamps([samples[0].uri])[0])]
    )
    assert (len(again.keys), lacking) == (1, []), "short clips serve stages of any length"


def test_another_tower_another_file_and_a_broken_shard_are_refused(
    tmp_path: Path, start: Path, samples: list[Sample]
) -> None:
    store, encoding = encode_all(start, tmp_path / "cache", samples)
    with pytest.raises(ValueError, match="features of another tower"):
        open_folder(encoding.folder, {"weights": "other", "dtype": "fp32"})

    model = small.make_model()
    with torch.no_grad():
        model.audio_tower.model.audio_encoder.norm.bias += 1e-3
    model.save_pretrained(tmp_path / "finetuned")
    assert tower_mark(tmp_path / "finetuned") != tower_mark(start)

    changed = samples[0].uri
    os.utime(changed, ns=(1, 1))
    clip = CacheEntry(samples[0].stretch.first(MAX_WINDOWS), stamps([changed])[0])
    assert FeatureStore.of(encoding.folder, [clip])[1] == [clip], "another date: encoded anew"

    Path(store.shards[0]).write_bytes(b"half")
    with pytest.raises(ValueError, match="remove it"):
        FeatureStore.of(encoding.folder, [])


def test_a_row_without_clips_keeps_its_place(
    tmp_path: Path, start: Path, samples: list[Sample], tiny_tokenizer: Any
) -> None:
    store, _ = encode_all(start, tmp_path / "cache", samples)
    _, empty = batches(samples[-1:], tiny_tokenizer, store)
    task = LmTask(start, toy.stage())
    loss = task.loss(task.build(), empty, 7)
    loss.backward()
    assert float(loss) == 0


def test_a_job_that_goes_on_with_broken_clips_alone_sets_them_aside_again(
    tmp_path: Path, start: Path, samples: list[Sample]
) -> None:
    encode_all(start, tmp_path / "cache", samples)
    store, _ = encode_all(start, tmp_path / "cache", samples)
    assert [reason for reason, _ in store.failures.values()] == ["missing"]


def test_a_stage_that_trains_the_tower_cannot_be_cached() -> None:
    stage = {"name": "s", "max_windows": 1, "data": [{"manifest": "m"}], "steps": 1, "features": "cached"}
    assert Stage.model_validate({**stage, "trainable": ["xattn"]}).features == "cached"
    with pytest.raises(ValueError, match="cached needs a frozen tower"):
        Stage.model_validate({**stage, "trainable": ["xattn", "clap"]})


def test_turns_conversations_and_several_recordings_train_together(
    tmp_path: Path, start: Path, samples: list[Sample], tiny_tokenizer: Any
) -> None:
    """Answer tokens are counted, cached features give the loss of audio, and it falls."""
    one, two, three = samples[:3]
    turns = (Turn("which?", "a bell"), Turn("how often?", "twice"))
    both = {"more_audio": (two.stretch,)}
    blend = [
        one,
        replace(one, id="a conversation", prompt="is it loud?", answer="no", history=turns),
        replace(one, id="two recordings", prompt="which is longer?", answer="the second", **both),
        replace(one, id="the same two", history=turns[:1], prompt="why?", answer="it goes on", **both),
        replace(
            three,
            id="one more with a later question",
            history=(Turn("<audio>which?", "a bell"),),
            prompt="<audio>and here?",
            answer="a drum",
            more_audio=(one.stretch,),
        ),
    ]
    made = plan_epoch(
        blend,
        windows=window_counts(blend, MAX_WINDOWS),
        text_lengths=text_lengths(tiny_tokenizer, blend),
        budget=Budget(windows_per_row=9, text_tokens_per_row=999, questions_per_clip=4, step_batches=1),
        seed=0,
    )
    encoding = make_encoding(start, tmp_path / "cache", "fp32", DeepSpeedSettings(), max_windows=MAX_WINDOWS)
    entries = entries_of(made, MAX_WINDOWS)
    assert {entry.stretch for entry in entries} == {s.stretch.first(MAX_WINDOWS) for s in (one, two, three)}
    encoder = FeatureEncoder(encoding)
    for shard in shards_of(entries, MAX_WINDOWS, windows_per_shard=3):
        encoder(decode_row({"clips": entries_to_json(shard)}, MAX_WINDOWS))
    store, lacking = FeatureStore.of(encoding.folder, entries)
    assert lacking == []

    task, first = LmTask(start, toy.stage()), tiny_tokenizer.convert_tokens_to_ids(AUDIO)
    collator = LmCollator(tiny_tokenizer, max_windows=MAX_WINDOWS)
    rows = [collator(row) for row in made.rows()]
    cached = [replace(collator, source=store)(row) for row in made.rows()]
    answers = [answer for s in blend for answer in (*(turn.answer for turn in s.history), s.answer)]
    endings = 2 * len(answers)
    wanted = sum(map(len, tiny_tokenizer(answers)["input_ids"])) + endings
    small_rows = [as_small(row.tensors(), first) for row in rows]
    assert sum(task.count(row) for row in small_rows) == wanted
    assert sum(task.tokens(row) for row in small_rows) == made.stats.num_text_tokens
    assert sum(int(row.windows_per_clip.sum()) for row in small_rows) == made.stats.num_windows
    small_cached = [as_small(LmBatch.from_row(row.to_row()), first) for row in cached]
    losses: dict[str, list[float]] = {}
    for name, batches_ in (("audio", small_rows), ("cached", small_cached)):
        model = task.build().train()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses[name] = []
        for _ in range(4):
            optimizer.zero_grad()
            parts = [task.loss(model, row, wanted) for row in batches_]
            sum(parts, torch.zeros(())).backward()
            optimizer.step()
            losses[name].append(sum(float(part.detach()) for part in parts))
    assert losses["cached"] == pytest.approx(losses["audio"], rel=1e-2)
    assert losses["cached"][0] == pytest.approx(losses["audio"][0], abs=1e-5)
    assert losses["audio"][-1] < losses["audio"][0] - 0.1
