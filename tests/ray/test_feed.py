"""Through Ray Data: every row to its rank, in order, from any cursor."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
import toy
from ray import cloudpickle

from af2_ray.config import Budget
from af2_ray.data.batching import Plan, Row, plan_captions, plan_epoch, text_lengths, window_counts
from af2_ray.data.collate import ClapBatch, ClapCollator, LmBatch, LmCollator
from af2_ray.data.feed import Cursor, check_cursor, iter_batches, make_dataset
from af2_ray.data.samples import CaptionSet, Sample


def plan_files(make_sound: Callable[..., str], seed: int = 0) -> Plan[Sample]:
    """24 rows of real files, one of them missing."""
    samples = []
    for number in range(48):
        uri = make_sound(f"{number}.flac", 1.0 + 0.1 * number, hz=200 + 10 * number) if number != 7 else "none.flac"
        samples += [Sample(f"{number}.{q}", uri, 0.0, 1.0 + 0.1 * number, "which?", "bell", "AQA", "d") for q in (0, 1)]
    budget = Budget(windows_per_row=2, text_tokens_per_row=512, questions_per_clip=2, step_batches=4)
    ones = np.ones(len(samples), int)
    return plan_epoch(samples, windows=ones, text_lengths=20 * ones, budget=budget, seed=seed)


@pytest.fixture
def planned(make_sound: Callable[..., str]) -> Plan[Sample]:
    return plan_files(make_sound)


def split_batches(
    ray_cluster: Any,
    made: Plan[Any],
    collator: Any,
    num_ranks: int,
    batch_type: type = LmBatch,
    take: int | None = None,
    **options: Any,
) -> list[list[Any]]:
    """What each rank of a trainer would get (the first `take` of it): the ranks run at once, as the split needs it."""
    dataset = make_dataset(made, collator, **options)
    dataset.context.execution_options.preserve_order = True
    shards = dataset.streaming_split(num_ranks, equal=True)

    @ray_cluster.remote(num_cpus=0.5)
    def consume(shard: Any) -> list[Any]:
        return [batch.to_row() for batch in islice(iter_batches(shard, batch_type), take)]

    ranks = ray_cluster.get([consume.remote(shard) for shard in shards], timeout=120)
    return [[batch_type.from_row(row) for row in rank] for rank in ranks]


def iter_local(made: Plan[Any], collator: Any, *, start: int = 0) -> Iterator[Any]:
    """The same batches in this process, without Ray."""
    return (collator(row).tensors() for row in made.rows(start))


def assert_same(got: Any, wanted: Any) -> None:
    assert (got.row, got.failures, got.sample_ids) == (wanted.row, wanted.failures, wanted.sample_ids)
    for name, value in vars(wanted).items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(getattr(got, name), value, rtol=0, atol=0)


@pytest.mark.parametrize(("num_ranks", "start"), [(2, 0), (2, 8), (1, 8), (4, 12)])
def test_round_robin_is_exact_and_resumes(
    ray_cluster: Any, planned: Plan[Sample], tiny_tokenizer: Any, num_ranks: int, start: int
) -> None:
    collator = LmCollator(tiny_tokenizer, max_windows=1)
    truth = list(iter_local(planned, collator))
    assert sum(len(batch.failures) for batch in truth) == 1
    ranks = split_batches(ray_cluster, planned, collator, num_ranks, start=start)
    for rank, batches in enumerate(ranks):
        assert [batch.row for batch in batches] == list(range(start + rank, len(planned), num_ranks))
        for batch in batches:
            assert_same(batch, truth[batch.row])


def random_cursor(made: Plan[Any]) -> int:
    """Rows up to the end of some optimiser step, another one at each run of the tests."""
    return int(np.random.default_rng().integers(1, made.num_steps)) * made.step_batches


def resumed(made: Plan[Sample], rows: int, make_sound: Callable[..., str]) -> tuple[Plan[Sample], Cursor]:
    """The plan made anew, as after a restart, and the cursor as it was kept."""
    return plan_files(make_sound), Cursor(**json.loads(json.dumps(asdict(Cursor.of(made, rows)))))


def test_a_feed_alone_resumes_at_any_batch(
    planned: Plan[Sample], make_sound: Callable[..., str], tiny_tokenizer: Any
) -> None:
    collator = LmCollator(tiny_tokenizer, max_windows=1)
    rows = random_cursor(planned)
    again, cursor = resumed(planned, rows, make_sound)
    before = list(islice(iter_local(planned, collator), rows))
    after = list(iter_local(again, collator, start=check_cursor(again, cursor)))
    for batch, wanted in zip([*before, *after], iter_local(planned, collator), strict=True):
        assert_same(batch, wanted)
    with pytest.raises(ValueError, match=r"what changed: .*seed: was 0, is 1"):
        check_cursor(plan_files(make_sound, seed=1), cursor)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 4)])
def test_an_interrupted_epoch_is_the_uninterrupted_one(
    ray_cluster: Any,
    planned: Plan[Sample],
    make_sound: Callable[..., str],
    tiny_tokenizer: Any,
    before: int,
    after: int,
) -> None:
    """Stopped at a random batch and gone on with in another number of workers: the same rows, bit for bit."""
    collator = LmCollator(tiny_tokenizer, max_windows=1)
    rows = random_cursor(planned)
    again, cursor = resumed(planned, rows, make_sound)
    first = split_batches(ray_cluster, planned, collator, before, take=rows // before)
    second = split_batches(ray_cluster, again, collator, after, start=cursor)
    got = sorted((batch for rank in (*first, *second) for batch in rank), key=lambda batch: batch.row)
    assert [batch.row for batch in got] == list(range(len(planned))), f"interrupted after {rows} rows"
    for batch, wanted in zip(got, iter_local(planned, collator), strict=True):
        assert_same(batch, wanted)


def test_the_plan_tells_the_bytes_of_the_object_store(make_sound: Callable[..., str], tiny_tokenizer: Any) -> None:
    samples = [
        Sample(f"{n}.{q}", make_sound(f"{n}.flac", 2.0), 0.0, 2.0, "which?", "bell", "AQA", "d")
        for n in range(12)
        for q in range(2)
    ]
    budget = Budget(windows_per_row=4, text_tokens_per_row=512, questions_per_clip=2, step_batches=1)
    lengths = text_lengths(tiny_tokenizer, samples)
    made = plan_epoch(samples, windows=window_counts(samples, 1), text_lengths=lengths, budget=budget, seed=0)
    rows = (LmCollator(tiny_tokenizer, max_windows=1)(row).to_row() for row in made.rows())
    taken = sum(value.nbytes for row in rows for value in row.values() if isinstance(value, np.ndarray))
    assert made.stats.object_store_gb * 1e9 == pytest.approx(taken, rel=1e-3)


def test_caption_rows_with_nothing_left(ray_cluster: Any, make_sound: Callable[..., str], tiny_tokenizer: Any) -> None:
    uris = [make_sound(f"{i}.flac") if i % 2 else f"none{i}.flac" for i in range(8)]
    sets = [CaptionSet(uri, 0.0, 1.0, f"caption {i}", ("other",), (("wrong",),) * 2) for i, uri in enumerate(uris)]
    made = plan_captions([(sets, 4)], clips_per_row=1, step_batches=2, max_windows=1, seed=0)
    collator = ClapCollator(tiny_tokenizer, toy.clap(num_positives=2, num_negatives=1))
    (batches,) = split_batches(ray_cluster, made, collator, 1, ClapBatch)
    for batch, wanted in zip(batches, iter_local(made, collator), strict=True):
        assert_same(batch, wanted)
    assert sorted(len(batch.text_ids) for batch in batches) == [0] * 4 + [4] * 4


def count_only(row: Row[Any]) -> LmBatch:
    """A collator that decodes nothing."""
    nothing = np.zeros((1, 1), np.int64)
    return LmBatch(
        row=row.index,
        num_clips=1,
        failures=(),
        sample_ids=(),
        num_truncated=0,
        waveforms=np.zeros((1, 4), np.int16),
        windows_per_clip=nothing[0],
        audio_index=nothing,
        input_ids=nothing,
        attention_mask=nothing,
        labels=nothing,
    )


cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the cluster's processes do not have this module


def test_order_over_several_chunks(ray_cluster: Any) -> None:
    sets = [CaptionSet(f"{i}.flac", 0.0, 1.0, "c", (), ()) for i in range(300)]
    made = plan_captions([(sets, 300)], clips_per_row=1, step_batches=1, max_windows=1, seed=0)
    ranks = split_batches(ray_cluster, made, count_only, 2, start=20)
    assert [[batch.row for batch in rank] for rank in ranks] == [list(range(20 + r, 300, 2)) for r in range(2)]


def test_a_decode_task_takes_one_row(ray_cluster: Any, planned: Plan[Sample]) -> None:
    """Fused with the read, a task would decode a thousand rows while all others wait for their order."""
    stats = make_dataset(planned, count_only).materialize().stats()
    assert "Map(_Decode)" in stats, stats
    assert "->Map" not in stats, stats


def test_cursors_outside_the_plan_are_refused(ray_cluster: Any, planned: Plan[Sample]) -> None:
    with pytest.raises(ValueError, match="outside the plan"):
        make_dataset(planned, count_only, start=len(planned) + 4)
    with pytest.raises(ValueError, match="inside an optimiser step"):
        make_dataset(planned, count_only, start=3)
    assert split_batches(ray_cluster, planned, count_only, 2, start=len(planned)) == [[], []]
