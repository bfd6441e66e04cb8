"""The plan: coverage, budget, balance, determinism."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from af2_ray.config import Budget
from af2_ray.data.batching import Plan, plan_captions, plan_epoch, plan_steps, text_lengths, window_counts
from af2_ray.data.packing import Rows
from af2_ray.data.plan_stats import cost_spread
from af2_ray.data.samples import CaptionSet, Sample

BUDGET = Budget(windows_per_row=12, text_tokens_per_row=512, questions_per_clip=3, step_batches=4)


def make_samples(num_clips: int, seed: int = 0, name: str = "d", most: float = 85.0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return [
        Sample(f"{name}/{c}.{q}", f"{name}/{c}.flac", 0.0, duration, "q" * int(rng.integers(1, 90)), "a", "AQA", name)
        for c, duration in enumerate(rng.uniform(1, most, num_clips).tolist())
        for q in range(int(rng.integers(1, 6)))
    ]


def lengths_of(samples: Any) -> np.ndarray:
    return np.array([len(s.prompt) + 5 for s in samples])


def make_plan(samples: list[Sample], budget: Budget = BUDGET, **options: Any) -> Plan[Sample]:
    return plan_epoch(
        samples,
        windows=window_counts(samples, 9),
        text_lengths=lengths_of(samples),
        budget=budget,
        **({"seed": 0} | options),
    )


def check_budget(made: Plan[Sample], budget: Budget, max_windows: int = 9) -> None:
    assert len(made) % budget.step_batches == 0
    for row in made.rows():
        clips = [(c[0].uri, c[0].offset_s, c[0].duration_s) for c in row.clips]
        assert len(set(clips)) == len(clips), "a clip comes once in a row"
        assert all(len({s.uri for s in clip}) == 1 <= len(clip) <= budget.questions_per_clip for clip in row.clips)
        if row.clips:
            windows = window_counts([clip[0] for clip in row.clips], max_windows)
            texts = np.array([lengths_of(clip).sum() for clip in row.clips])
            assert len(windows) * windows.max() <= budget.windows_per_row
            assert len(texts) * texts.max() <= budget.text_tokens_per_row


@settings(deadline=None, max_examples=40)
@given(
    num_clips=st.integers(1, 60),
    seed=st.integers(0, 1000),
    windows=st.integers(9, 40),
    text=st.integers(95, 1500),
    questions=st.integers(1, 6),
    size=st.integers(1, 7),
)
def test_nothing_lost_nothing_repeated(
    num_clips: int, seed: int, windows: int, text: int, questions: int, size: int
) -> None:
    samples = make_samples(num_clips, seed)
    budget = Budget(windows_per_row=windows, text_tokens_per_row=text, questions_per_clip=questions, step_batches=size)
    made = make_plan(samples, budget, seed=seed)
    check_budget(made, budget)
    seen = Counter(sample.id for row in made.rows() for clip in row.clips for sample in clip)
    assert seen == Counter(sample.id for sample in samples)


def test_the_last_step_is_filled_up_with_empty_rows() -> None:
    made = make_plan(make_samples(50), BUDGET.model_copy(update={"step_batches": 31}))
    assert len(made) % 31 == 0
    assert 0 < sum(not row.clips for row in made.rows()) < 31


def test_equal_arguments_equal_plan() -> None:
    samples = make_samples(80)
    one, same = make_plan(samples), make_plan(samples)
    assert one.fingerprint == same.fingerprint
    assert list(one.rows()) == list(same.rows())
    assert list(one.rows(8)) == list(one.rows())[8:]
    others = [
        make_plan(samples, seed=1),
        make_plan(samples, epoch=1),
        make_plan(samples[:-1]),
        make_plan(samples, BUDGET.model_copy(update={"questions_per_clip": 2})),
    ]
    assert len({one.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_a_repeated_draw_shares_no_row() -> None:
    samples = make_samples(30)
    index = np.concatenate([np.arange(len(samples))] * 3)
    made = make_plan(samples, index=index)
    check_budget(made, BUDGET)
    assert set(Counter(made.entries.tolist()).values()) == {3}
    single = [s for s in make_samples(1) for _ in range(20)]  # one clip, asked over and over
    check_budget(make_plan(single), BUDGET)


def test_little_padding_even_cost_random_order() -> None:
    samples = make_samples(3000)
    budget = Budget(windows_per_row=64, text_tokens_per_row=4096, questions_per_clip=1, step_batches=8)
    made = make_plan(samples, budget)
    assert made.stats.padding_share < 0.03 < 0.3 < made.stats.padding_share_unplanned
    assert made.stats.text_padding_share < 0.12
    assert made.stats.cost_spread < 0.1
    longest = [max((c[0].duration_s for c in row.clips), default=0.0) for row in made.rows()]
    assert abs(np.corrcoef(np.arange(len(longest)), longest)[0, 1]) < 0.25
    assert made.stats.num_windows == sum(window_counts([c[0] for r in made.rows() for c in r.clips], 9))
    assert made.stats.num_samples == len(samples)


def test_what_cannot_fit_is_named() -> None:
    samples = make_samples(20)
    with pytest.raises(ValueError, match=r"budget\.windows_per_row=3 is less than sample d/"):
        make_plan(samples, BUDGET.model_copy(update={"windows_per_row": 3}))
    with pytest.raises(ValueError, match=r"budget\.text_tokens_per_row=20 is less than sample d/"):
        make_plan(samples, BUDGET.model_copy(update={"text_tokens_per_row": 20}))


def steps_plan(datasets: Any, num_steps: int, **options: Any) -> Plan[Sample]:
    return plan_steps(
        datasets, num_steps, **({"max_windows": 9, "text_length": lengths_of, "budget": BUDGET, "seed": 0} | options)
    )


def test_steps_over_epochs() -> None:
    samples = make_samples(50)
    per_epoch = make_plan(samples).num_steps - 1  # whole steps
    made = steps_plan([(samples, 1.0)], 5 * per_epoch)
    assert made.num_steps == 5 * per_epoch
    assert made.step_batches == BUDGET.step_batches
    assert all(row.clips for row in made.rows())
    check_budget(made, BUDGET)
    counts = Counter(made.entries.tolist())
    assert max(counts.values()) - min(counts.get(i, 0) for i in range(len(samples))) <= 2
    assert steps_plan([(samples, 1.0)], 5 * per_epoch).fingerprint == made.fingerprint


def test_steps_from_fewer_rows_than_a_step_takes() -> None:
    samples = make_samples(2)
    made = steps_plan([(samples, 1.0)], 6, budget=BUDGET.model_copy(update={"step_batches": 30}))
    assert len(made) == 180
    counts = Counter(made.entries.tolist())
    assert set(counts) == set(range(len(samples)))
    assert max(counts.values()) - min(counts.values()) <= 60


def test_steps_follow_the_weights() -> None:
    a, b = make_samples(40), make_samples(40, seed=1, name="other")
    made = steps_plan([(a, 1.0), (b, 3.0)], 40)
    shares = Counter(sample.dataset for row in made.rows() for clip in row.clips for sample in clip)
    assert 2.5 < shares["other"] * len(a) / (shares["d"] * len(b)) < 3.5
    with pytest.raises(ValueError, match="no usable samples"):
        steps_plan([([], 1.0)], 2)


def make_captions(num: int) -> list[CaptionSet]:
    return [CaptionSet(f"{i}.flac", 0.0, 8.0, f"caption {i}", (), ()) for i in range(num)]


def test_captions() -> None:
    sets = make_captions(50)
    made = plan_captions([(sets, 9)], clips_per_row=8, step_batches=2, max_windows=1, seed=0)
    assert len(made) == 18
    assert made.num_steps == 9
    rows = [[clip[0].uri for clip in row.clips] for row in made.rows()]
    assert all(len(set(row)) == 8 for row in rows)
    epoch = [uri for row in rows[:6] for uri in row]
    assert len(set(epoch)) == 48, "no clip twice in an epoch"
    assert epoch != [uri for row in rows[6:12] for uri in row]
    again = plan_captions([(sets, 9)], clips_per_row=8, step_batches=2, max_windows=1, seed=0)
    one_worker = plan_captions([(sets, 9)], clips_per_row=16, step_batches=1, max_windows=1, seed=0)
    assert one_worker.fingerprint == made.fingerprint, "the same clips in each step, whoever takes them"
    assert one_worker.entries.tolist() == made.entries.tolist()
    assert again.fingerprint == made.fingerprint
    with pytest.raises(ValueError, match="cannot fill a step"):
        plan_captions([(sets[:10], 1)], clips_per_row=8, step_batches=2, max_windows=1, seed=0)


def test_text_lengths_are_what_encoding_gives(tiny_tokenizer: Any) -> None:
    from af2_ray.text import encode

    samples = make_samples(20)
    encoded = encode(tiny_tokenizer, [s.prompt for s in samples], [s.answer for s in samples])
    estimate = partial(text_lengths, tiny_tokenizer, max_tokens=512)(samples)
    np.testing.assert_array_equal(estimate, encoded.attention_mask.sum(1))
    assert text_lengths(tiny_tokenizer, samples, max_tokens=12).max() == 12


def test_clips_of_one_caption_never_share_a_step() -> None:
    sets = [CaptionSet(f"{n}.flac", 0.0, 10.0, f"a sound of kind {n % 6}", (), ()) for n in range(60)]
    made = plan_captions([(sets, 20)], clips_per_row=2, step_batches=2, max_windows=1, seed=0)
    rows = [[clip[0].caption for clip in row.clips] for row in made.rows()]
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert len({*first, *second}) == 4


def test_phases_follow_one_another() -> None:
    easy = [CaptionSet(f"easy {n}", 0.0, 10.0, f"easy {n}", (), ()) for n in range(8)]
    hard = [CaptionSet(f"hard {n}", 0.0, 10.0, f"hard {n}", (), ()) for n in range(8)]
    made = plan_captions([(easy, 3), (hard, 2)], clips_per_row=4, step_batches=1, max_windows=1, seed=0)
    assert [row.clips[0][0].caption.split()[0] for row in made.rows()] == ["easy"] * 3 + ["hard"] * 2


@settings(deadline=None, max_examples=25)
@given(num_clips=st.integers(200, 800), seed=st.integers(0, 1000), size=st.sampled_from([2, 4, 8]))
def test_groups_are_balanced_and_mixed(num_clips: int, seed: int, size: int) -> None:
    """Any run of rows in a step is of nearer cost than the plan as a whole, and equal arguments give equal plans."""
    samples = make_samples(num_clips, seed)
    budget = Budget(windows_per_row=64, text_tokens_per_row=2048, questions_per_clip=3, step_batches=size)
    made = make_plan(samples, budget, seed=seed)
    windows, texts = window_counts(samples, 9), lengths_of(samples)
    cost = Rows(made.entries, made.clip_starts, made.row_starts).cost(windows, texts, budget)
    groups = cost.reshape(-1, size)
    within = np.sort((groups.max(1) - groups.min(1)) / groups.max(1))
    assert within[: max(1, len(within) * 3 // 4)].mean() <= 0.5 * (cost.max() - cost.min()) / cost.max() + 0.02
    assert (np.diff(groups, axis=1) <= 1e-9).all(), "the costliest row comes first"
    assert make_plan(samples, budget, seed=seed).fingerprint == made.fingerprint


def test_like_runs_inside_a_step_mix_its_lengths() -> None:
    samples = make_samples(6000)
    whole = Budget(windows_per_row=64, text_tokens_per_row=2048, questions_per_clip=1, step_batches=48)
    runs = whole.model_copy(update={"balanced_rows": 4})
    spans = []
    for budget in (whole, runs):
        made = make_plan(samples, budget)
        check_budget(made, budget)
        cost = Rows(made.entries, made.clip_starts, made.row_starts).cost(
            window_counts(samples, 9), lengths_of(samples), budget
        )
        assert cost_spread(cost, 4) < 0.06
        spans.append(cost_spread(cost, 48))
    assert spans[1] > 2 * spans[0]


def test_questions_of_a_clip_share_up_to_the_budgets() -> None:
    samples = [Sample(f"{i}", "a.flac", 0.0, 10.0, "q", "a", "AQA", "d") for i in range(7)]
    budget = BUDGET.model_copy(update={"text_tokens_per_row": 250})
    made = plan_epoch(samples, windows=[1] * 7, text_lengths=[20, 21, 22, 23, 24, 100, 200], budget=budget, seed=0)
    shared = [clip for row in made.rows() for clip in row.clips]
    assert sorted(sample.id for clip in shared for sample in clip) == [str(i) for i in range(7)]
    assert all(len(row.clips) <= 1 for row in made.rows()), "a clip comes once in a row"
    assert max(map(len, shared)) == 3


def test_questions_of_unlike_length_pad_next_to_nothing() -> None:
    rng = np.random.default_rng(0)
    samples = [
        Sample(f"{c}.{q}", f"{c}.flac", 0.0, float(seconds), "q", "a", "AQA", "d")
        for c, seconds in enumerate(rng.uniform(1, 85, 4000))
        for q in range(3)
    ]
    texts = np.clip(rng.lognormal(np.log(60), 0.6, len(samples)), 4, 512).astype(int)
    budget = Budget(windows_per_row=64, text_tokens_per_row=4096, questions_per_clip=3, step_batches=8)
    made = plan_epoch(samples, windows=window_counts(samples, 9), text_lengths=texts, budget=budget, seed=0)
    assert made.stats.num_clips == 4000
    assert made.stats.text_padding_share < 0.1


def test_a_plan_is_that_of_earlier_versions() -> None:
    """By its fingerprint, since version 0.1.0: another one refuses every run that is in the middle of a stage."""
    samples = [
        Sample(str(n), f"folder/{n // 2}.flac", 0.0, 3.0 + n * 1.7, f"question {n}?", "bell", "AQA", "d")
        for n in range(40)
    ]
    budget = Budget(windows_per_row=16, text_tokens_per_row=128, step_batches=2)

    def lengths(items: Any) -> Any:
        return np.arange(len(items)) % 7 + 9

    datasets = [(samples, 1.0), (samples[:10], 0.5)]
    steps = plan_steps(datasets, 7, max_windows=5, text_length=lengths, budget=budget, seed=3)
    assert steps.fingerprint == "e1156cae74a53b1f"
    windows = window_counts(samples, 5)
    epoch = plan_epoch(samples, windows=windows, text_lengths=lengths(samples), budget=budget, seed=3)
    assert epoch.fingerprint == "1355dc90473d533c"
