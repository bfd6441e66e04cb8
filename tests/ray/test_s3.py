"""Audio from a real S3 server: read, ranged, refused, missing, and through an outage in mid-epoch."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from ray import cloudpickle
from weed import Server

from af2_ray.audio.decode import AudioError, decode, probe
from af2_ray.audio.windows import to_windows
from af2_ray.config import Budget
from af2_ray.data.batching import Row, plan_epoch
from af2_ray.data.collate import LmBatch, LmCollator
from af2_ray.data.feed import iter_batches, make_dataset
from af2_ray.data.samples import Sample

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the cluster's processes do not have this module


def reason_of(uri: str) -> str:
    with pytest.raises(AudioError) as caught:
        decode(uri)
    return caught.value.reason


def test_read_ranged_missing_and_refused(
    server: Server, make_sound: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    short, long = make_sound("short.flac", 5.0), make_sound("long.wav", 600.0)
    for path in (short, long):
        server.client().upload_file(path, "audio", Path(path).name)
    np.testing.assert_array_equal(decode("s3://audio/short.flac"), decode(short))
    assert probe("s3://audio/long.wav") == 600.0
    read: list[int] = []
    s3 = fsspec.get_filesystem_class("s3")
    fetch = s3.cat_file
    monkeypatch.setattr(s3, "cat_file", lambda *args, **kwargs: read.append(1) or fetch(*args, **kwargs))
    np.testing.assert_array_equal(decode("s3://audio/long.wav", 300.0, 10.0), decode(long, 300.0, 10.0))
    assert not read, "19 MB for 10 s: the file is not fetched whole"
    assert reason_of("s3://audio/none.flac") == "missing"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    s3.clear_instance_cache()
    assert reason_of("s3://audio/short.flac") == "forbidden"


@dataclass(frozen=True)
class Gated:
    """A collator with the server's address, whose rows from `first` on are decoded after the server is down."""

    collator: LmCollator
    environment: dict[str, str]
    down: str  # a file that is there once the server was killed
    first: int

    def __call__(self, row: Row[Sample]) -> LmBatch:
        os.environ.update(self.environment)
        while row.index >= self.first and not Path(self.down).exists():
            time.sleep(0.05)
        return self.collator(row)


@pytest.mark.slow
def test_an_outage_in_mid_epoch_loses_nothing_of_the_feed(
    server: Server, make_sound: Callable[..., str], ray_cluster: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """Killed between two batches of Ray's feed and started again: every clip arrives, in order, as from the disk."""
    samples = []
    for number in range(32):
        path = make_sound(f"{number}.flac", 1.0, hz=300 + number)
        server.client().upload_file(path, "audio", f"{number}.flac")
        samples.append(Sample(str(number), f"s3://audio/{number}.flac", 0.0, 1.0, "which?", "bell", "AQA", "d"))
    budget = Budget(windows_per_row=1, text_tokens_per_row=64, questions_per_clip=1, step_batches=2)
    made = plan_epoch(samples, windows=[1] * 32, text_lengths=[20] * 32, budget=budget, seed=0)
    environment = {key: value for key, value in os.environ.items() if key.startswith("AWS_")}
    down = tmp_path / "down"
    gated = Gated(LmCollator(tiny_tokenizer, max_windows=1), environment, str(down), first=8)
    dataset = make_dataset(made, gated)
    dataset.context.execution_options.preserve_order = True
    batches = iter_batches(dataset.streaming_split(1, equal=True)[0], LmBatch)
    got = [next(batches) for _ in range(4)]
    server.kill()
    down.touch()
    back = threading.Timer(2.0, server.start)
    back.start()
    try:
        got += list(batches)
    finally:
        back.join()
    assert [batch.row for batch in got] == list(range(32))
    assert [failure for batch in got for failure in batch.failures] == []
    for batch, row in zip(got, made.rows(), strict=True):
        local = str(tmp_path / f"{row.clips[0][0].id}.flac")
        np.testing.assert_array_equal(batch.waveforms, to_windows(decode(local, 0.0, 1.0), 1))


def test_an_outage_loses_nothing(server: Server, make_sound: Callable[..., str]) -> None:
    """The server is killed between two clips and comes back: the reader waits for it."""
    paths = [make_sound(f"{i}.flac", 2.0, hz=300 + i) for i in range(6)]
    for path in paths:
        server.client().upload_file(path, "audio", Path(path).name)
    heard = []
    back = threading.Timer(2.0, server.start)
    try:
        for number, path in enumerate(paths):
            if number == 3:
                server.kill()
                back.start()
            heard.append(decode(f"s3://audio/{Path(path).name}"))
    finally:
        back.join()
    for mono, path in zip(heard, paths, strict=True):
        np.testing.assert_array_equal(mono, decode(path))
