"""Rows to batches: ragged windows, each clip once, failures left out and recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf
import torch
import toy

from af2_ray.audio.decode import decode
from af2_ray.audio.windows import WINDOW_SAMPLES, to_windows
from af2_ray.config import Augment
from af2_ray.data.batching import Row
from af2_ray.data.collate import ClapBatch, ClapCollator, LmBatch, LmCollator
from af2_ray.data.samples import CaptionSet, Sample
from af2_ray.text import encode


def ask(uri: str, duration_s: float, number: int = 0, offset_s: float = 0.0) -> Sample:
    return Sample(f"{uri}#{number}", uri, offset_s, duration_s, f"Which {number}?", "a bell " * number, "AQA", "d")


def same(one: Any, two: Any) -> bool:
    values = [(getattr(one, name), getattr(two, name)) for name in vars(one)]
    return all(
        bool((torch.as_tensor(a) == torch.as_tensor(b)).all()) if hasattr(a, "shape") else a == b for a, b in values
    )


@pytest.fixture
def collator(tiny_tokenizer: Any) -> LmCollator:
    return LmCollator(tiny_tokenizer, max_windows=3, max_text_tokens=64)


def test_lm_batch(make_sound: Callable[..., str], collator: LmCollator) -> None:
    short, long = make_sound("s.flac", 4.0), make_sound("l.flac", 45.0, hz=300)
    row = Row(5, ((ask(short, 4.0, 1), ask(short, 4.0, 2)), (ask(long, 20.5, 3, offset_s=10.0),)))
    batch = collator(row)
    assert batch.row == 5
    assert batch.num_clips == 2
    assert batch.failures == ()
    assert batch.waveforms.shape == (1 + 3, WINDOW_SAMPLES)
    assert batch.waveforms.dtype == np.int16
    assert batch.windows_per_clip.tolist() == [1, 3]
    assert batch.audio_index.tolist() == [[0], [1]]
    np.testing.assert_array_equal(batch.waveforms[:1], to_windows(decode(short)))
    np.testing.assert_array_equal(batch.waveforms[1:], to_windows(decode(long, 10.0, 20.5)))
    samples = [sample for clip in row.clips for sample in clip]
    expected = encode(collator.tokenizer, [s.prompt for s in samples], [s.answer for s in samples])
    lengths = expected.attention_mask.sum(1).tolist()
    for name in ("input_ids", "labels"):
        first, second, third = (v[:n] for v, n in zip(getattr(expected, name), lengths, strict=True))
        values = getattr(batch, name)
        np.testing.assert_array_equal(values[0], np.concatenate([first, second]))
        np.testing.assert_array_equal(values[1, : len(third)], third)
    assert batch.attention_mask[0].tolist() == [1] * lengths[0] + [2] * lengths[1]
    assert batch.attention_mask[1].tolist() == [1] * lengths[2] + [0] * (lengths[0] + lengths[1] - lengths[2])
    assert (batch.labels[1, lengths[2] :] == -100).all()
    assert batch.sample_ids == tuple(sample.id for sample in samples)


def test_more_than_the_windows_is_not_read(make_sound: Callable[..., str], collator: LmCollator) -> None:
    long = make_sound("l.flac", 45.0)
    batch = collator(Row(0, ((ask(long, 45.0),),)))
    np.testing.assert_array_equal(batch.waveforms, to_windows(decode(long, 0.0, 30.0)))


def test_ids_with_line_breaks_survive(make_sound: Callable[..., str], collator: LmCollator) -> None:
    batch = collator(Row(0, ((ask(make_sound(duration_s=1.0), 1.0),),)))
    for ids in ((), ("a\nb", "c", ""), ("",)):
        odd = replace(batch, sample_ids=ids)
        assert LmBatch.from_row(odd.to_row()).sample_ids == ids


def test_there_and_back(make_sound: Callable[..., str], collator: LmCollator) -> None:
    sound = make_sound(duration_s=2.0)
    batch = collator(Row(1, ((ask(sound, 2.0, 1),), (ask("none.flac", 1.0),))))
    row = batch.to_row()
    assert all(not isinstance(value, np.ndarray) or value.ndim == 1 for value in row.values())
    back = LmBatch.from_row(row)
    assert isinstance(back.waveforms, torch.Tensor)
    assert back.waveforms.dtype == torch.int16
    assert same(back, batch.tensors())
    assert back.failures == batch.failures
    assert same(back.to("cpu"), back.located())


def test_failures_are_left_out_and_told(make_sound: Callable[..., str], tmp_path: Path, collator: LmCollator) -> None:
    good = make_sound("good.flac", 3.0)
    data = Path(good).read_bytes()
    nan = np.full(16_000, 0.1, np.float32)
    nan[3] = np.nan
    sf.write(tmp_path / "nan.wav", nan, 16_000, subtype="FLOAT")
    for name, content in {"empty": b"", "cut": data[: len(data) // 2], "head": data[:86]}.items():
        (tmp_path / f"{name}.flac").write_bytes(content)
    expected = {
        "none.flac": "missing",
        "empty.flac": "empty file",
        "cut.flac": "truncated",
        "head.flac": "no samples",
        "nan.wav": "not finite",
        "silent.flac": "silent",
    }
    make_sound("silent.flac", 3.0, peak=0.0)
    bad = [(ask(str(tmp_path / name), 3.0 if "nan" not in name else 1.0, 7),) for name in expected]
    batch = collator(Row(2, (*bad[:3], (ask(good, 3.0, 1),), *bad[3:])))
    assert {Path(f.uri).name: f.reason for f in batch.failures} == expected
    assert all(f.row == 2 for f in batch.failures)
    assert batch.num_clips == 7
    alone = collator(Row(2, ((ask(good, 3.0, 1),),)))
    np.testing.assert_array_equal(batch.waveforms, alone.waveforms)
    np.testing.assert_array_equal(batch.labels, alone.labels)
    assert batch.audio_index.tolist() == [[0]]
    assert batch.sample_ids == alone.sample_ids


@pytest.mark.parametrize("clips", [(), ((ask("none.flac", 3.0),),)])
def test_an_emptied_row_is_one_silent_window_without_labels(collator: LmCollator, clips: Any) -> None:
    batch = collator(Row(0, clips))
    assert batch.waveforms.shape == (1, WINDOW_SAMPLES)
    assert not batch.waveforms.any()
    assert batch.windows_per_clip.tolist() == [1]
    assert batch.audio_index.tolist() == [[0]]
    assert (batch.labels == -100).all()
    assert len(batch.input_ids) == 1
    assert batch.sample_ids == ()
    assert same(LmBatch.from_row(batch.to_row()), batch.tensors())


def captions(uri: str, number: int) -> CaptionSet:
    return CaptionSet(
        uri, 0.0, 1.0, f"a{number}", (f"b{number}", f"c{number}"), (("x", "y"), ("z", "w"), ("u", "v")), ("order",) * 2
    )


def test_clap_batch(make_sound: Callable[..., str], tiny_tokenizer: Any) -> None:
    one, two = make_sound("1.flac"), make_sound("2.flac", hz=300)
    collator = ClapCollator(tiny_tokenizer, toy.clap(num_positives=2, num_negatives=1))
    batch = collator(Row(3, ((captions(one, 1),), (captions("none.flac", 2),), (captions(two, 3),))))
    assert batch.waveforms.shape == (2, WINDOW_SAMPLES)
    assert batch.windows_per_clip.tolist() == [1, 1]
    assert [f.reason for f in batch.failures] == ["missing"]
    assert batch.num_clips == 3
    assert batch.caption_owner.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert batch.caption_slot.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert batch.caption_rank.tolist() == [0, 1, 0, 1, 0, 1, 0, 1]
    texts = tiny_tokenizer.batch_decode(batch.text_ids, skip_special_tokens=True)
    assert texts == ["a1", "x", "b1", "z", "a3", "x", "b3", "z"]
    assert batch.text_mask.sum(1).max() == batch.text_ids.shape[1], "padded to the longest, no further"
    assert same(ClapBatch.from_row(batch.to_row()), batch.tensors())


def hear(collator: ClapCollator, *rows: Row[CaptionSet]) -> np.ndarray[Any, Any]:
    return np.concatenate([collator(row).waveforms for row in rows])


def test_a_clip_is_heard_anew_in_each_place_of_the_plan(make_sound: Callable[..., str], tiny_tokenizer: Any) -> None:
    clip = (replace(captions(make_sound("l.flac", 25.0), 1), duration_s=25.0),)
    augment = Augment(crop=True, eq_db=6.0, noise_snr_db=(20.0, 30.0))
    collator = ClapCollator(tiny_tokenizer, toy.clap(augment=augment), seed=1)
    one, two = hear(collator, Row(3, (clip, clip)))
    assert (one != two).mean() > 0.9
    np.testing.assert_array_equal(hear(collator, Row(6, (clip,)), Row(7, (clip,))), [one, two])  # of twice the workers
    assert (hear(replace(collator, seed=2), Row(3, (clip,)))[0] != one).mean() > 0.9


def test_a_crop_is_a_stretch_of_the_clip_and_a_silent_one_its_beginning(tiny_tokenizer: Any, tmp_path: Path) -> None:
    collator = ClapCollator(tiny_tokenizer, toy.clap(augment=Augment(crop=True)))
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 30 * 16_000)
    noise[5 * 16_000 :: 16_000] = 0.6  # the peak of every stretch
    sf.write(tmp_path / "long.wav", noise, 16_000)
    sf.write(tmp_path / "half.wav", np.concatenate([noise[: 8 * 16_000], np.zeros(52 * 16_000)]), 16_000)
    long, half = (
        replace(captions(str(tmp_path / name), 1), duration_s=duration_s)
        for name, duration_s in (("long.wav", 30.0), ("half.wav", 60.0))
    )
    whole = decode(long.uri)
    starts = []
    for heard in hear(collator, *(Row(number, ((long,),)) for number in range(4))):
        start = int(np.correlate(whole, heard[:400] / 32767, "valid").argmax())
        np.testing.assert_array_equal(heard, to_windows(whole[start : start + WINDOW_SAMPLES])[0])
        starts.append(start / 16_000)
    assert len(set(starts)) == 4
    assert 0 <= min(starts) < max(starts) <= 20
    assert hear(collator, *(Row(number, ((half,),)) for number in range(6))).any(1).all()


def test_short_clips_are_repeated(make_sound: Callable[..., str], tiny_tokenizer: Any) -> None:
    uri = make_sound("s.flac", 3.0)
    heard = hear(
        ClapCollator(tiny_tokenizer, toy.clap(short_clips="repeat")),
        Row(0, ((replace(captions(uri, 1), duration_s=3.0),),)),
    )
    np.testing.assert_array_equal(heard, to_windows(np.tile(decode(uri), 3)))


def test_an_emptied_clap_row(tiny_tokenizer: Any) -> None:
    batch = ClapCollator(tiny_tokenizer, toy.clap())(Row(0, ((captions("none.flac", 1),),)))
    assert batch.waveforms.shape == (1, WINDOW_SAMPLES)
    assert batch.text_ids.shape == (0, 1)
    back = ClapBatch.from_row(batch.to_row())
    assert back.text_ids.shape == (0, 1)
    assert back.caption_owner.shape == (0,)
    assert same(back, batch.tensors())
