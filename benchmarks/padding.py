"""Window and text padding of planned batches, and how mixed and how even steps are, on two mixes of durations.

Stage 2: 55 % of 10 s, 15 % of 1-10 s, 20 % of 15-30 s, 10 % of 30-120 s, cut to 9 windows. Stage 3: log-normal, median
90 s, sigma 0.75, 5 to 1800 s, cut to 30 windows. Text lengths are log-normal (median 60, sigma 0.6, at most 512).
Four datasets of unlike lengths make up each mix.

Compared at equal mean batch cost: random batches of one size; the paper's Algorithm 2 (duration buckets in random
order within, filled while clips x longest <= budget); lhotse's DynamicBucketingSampler with 30 buckets, given the
clips' durations as it usually is, and given whole windows; ours. A step is 128 batches, one a worker, when the mix of
datasets is judged; in `max_step_dataset_ratio_8x30` it is 240 batches on 8 workers, in runs of 8 of like cost
(`balanced_rows: 8`). `spread_8` and `spread_128` are (largest - smallest) / largest predicted cost of the batches that
so many workers have at one time, in steps of 240 and of 128 of them. `text_padding_shared` is with three questions a
clip, which stand end to end in one row of text; `text_padding_side_by_side` is what a row each would pad.

The last line is one JSON object; shares from 0 to 1.

    python benchmarks/padding.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from af2_ray.config import Budget
from af2_ray.data.batching import Plan, plan_epoch, window_counts
from af2_ray.data.blend import BUCKET_EDGES_S
from af2_ray.data.columns import SampleTable
from af2_ray.data.packing import Rows, audio_cost, max_by, text_cost
from af2_ray.data.plan_stats import cost_spread, padding_share

WINDOWS = {"stage2": 9, "stage3": 30}
BUDGET = Budget(windows_per_row=64, text_tokens_per_row=2048, questions_per_clip=1, step_batches=128)
Batches = Sequence[NDArray[np.int64]]


def durations(stage: str, num: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Clip lengths in seconds, [num]."""
    if stage == "stage3":
        return np.clip(rng.lognormal(np.log(90), 0.75, num), 5, 1800)
    kinds = rng.choice(4, num, p=[0.55, 0.15, 0.20, 0.10])
    bounds = np.array([[10, 10], [1, 10], [15, 30], [30, 120]])[kinds]
    return rng.uniform(bounds[:, 0], bounds[:, 1])


class Mix:
    """Clips of a mix: `duration_s`, `windows`, `texts` and the dataset of each, [num]."""

    def __init__(self, stage: str, num: int, per_clip: int = 1) -> None:
        rng = np.random.default_rng(0)
        clips = durations(stage, num, rng)
        if stage == "stage2":
            dataset = np.where(clips == 10, 0, np.digitize(clips, [10, 30]) + 1)
        else:  # overlapping, as datasets are: sorted by length with noise
            blurred = np.log(clips) + rng.normal(0, 0.4, num)
            dataset = np.digitize(blurred, np.quantile(blurred, [0.4, 0.7, 0.9]))
        self.clip = np.repeat(np.arange(num), per_clip)
        self.duration_s, self.dataset = clips[self.clip], dataset[self.clip]
        self.texts = np.clip(rng.lognormal(np.log(60), 0.6, len(self.clip)), 4, 512).astype(np.int64)
        names = [f"{n}.flac" for n in self.clip.tolist()]
        words = ["q"] * len(names)
        self.table = SampleTable.from_columns(
            {"id": names, "uri": names, "prompt": words, "answer": words, "duration_s": self.duration_s}
        )
        self.windows = window_counts(self.table, WINDOWS[stage])

    def plan(self, budget: Budget) -> Plan[Any]:
        """The plan of `batching` over the mix."""
        return plan_epoch(self.table, windows=self.windows, text_lengths=self.texts, budget=budget, seed=0)


# --- The others --------------------------------------------------------------------------------------------------


def random_batches(mix: Mix, target: float) -> Batches:
    """Batches of one number of clips."""
    order = np.random.default_rng(1).permutation(len(mix.windows))

    def cut(size: float) -> Batches:
        return np.split(order, range(round(size), len(order), round(size)))

    return at_cost(mix, cut, 16.0, target)


def algorithm2(mix: Mix, target: float) -> Batches:
    """The paper's dynamic batching over its duration buckets."""
    order = np.lexsort((np.random.default_rng(1).random(len(mix.windows)), np.digitize(mix.duration_s, BUCKET_EDGES_S)))
    windows = mix.windows[order].tolist()

    def cut(limit: float) -> Batches:
        starts, longest, begin = [], 0, 0
        for place, length in enumerate(windows):
            longest = max(longest, length)
            if place > begin and (place + 1 - begin) * longest > limit:
                starts.append(place)
                begin, longest = place, length
        return np.split(order, starts)

    return at_cost(mix, cut, 64.0, target)


def lhotse(mix: Mix, target: float, *, lengths: NDArray[Any], num: int, num_ranks: int = 1) -> Batches:
    """Batches of lhotse's sampler over the first `num` clips, in the order of training: rank by rank, step by step."""
    from lhotse import CutSet, MonoCut
    from lhotse.dataset.sampling import DynamicBucketingSampler

    cuts = CutSet.from_cuts(MonoCut(str(i), 0, float(length), 0) for i, length in enumerate(lengths[:num]))

    def cut(limit: float) -> Batches:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sampler = DynamicBucketingSampler(
                *(cuts,),
                max_duration=limit,
                num_buckets=30,
                shuffle=True,
                world_size=num_ranks,
                rank=0,
                buffer_size=max(20_000, num // 2),
            )
        batches = []
        iter(sampler)
        try:
            while True:  # what all ranks would get; the public iterator gives one rank's
                batches.append(np.array([int(c.id) for c in sampler._next_batch()]))
        except StopIteration:
            return batches

    return at_cost(mix, cut, 640.0, target, tries=2)


def at_cost(mix: Mix, cut: Any, size: float, target: float, tries: int = 3) -> Batches:
    """Batches by `cut(size)` whose mean cost is nearest `target`: cost is about proportional to size."""
    for _ in range(tries):
        batches = cut(max(1.0, size))
        size *= target / mean_cost(mix, batches)
    return batches


def mean_cost(mix: Mix, batches: Batches) -> float:
    """Predicted cost of a batch in text tokens, as the plan predicts it."""
    costs = [audio_cost(mix.windows[b], BUDGET).sum() + text_cost(len(b), mix.texts[b].max(), BUDGET) for b in batches]
    return float(np.mean(costs))


def padding(mix: Mix, batches: Batches) -> float:
    """Padded share of the batches' rectangles of clips x windows."""
    return padding_share(mix.windows[np.concatenate(batches)], np.cumsum([0, *map(len, batches)]))


# --- Measures ----------------------------------------------------------------------------------------------------


def batches_of(made: Plan[Any]) -> Batches:
    """The samples of each row."""
    return np.split(made.entries, made.clip_starts[made.row_starts[1:-1]])


def order_correlation(mix: Mix, made: Plan[Any]) -> float:
    """Spearman's rank correlation of a batch's step and its longest clip."""
    longest = max_by(mix.windows[made.entries[made.clip_starts[:-1]]], made.row_starts)
    step = np.arange(len(made)) // made.step_batches
    return float(np.corrcoef(ranks(step), ranks(longest))[0, 1])


def ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    """Ranks, equal values sharing their mean."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def step_dataset_ratio(mix: Mix, batches: Batches, step: int = 128) -> float:
    """Largest ratio of a dataset's share in a full step to its share of the blend."""
    share = np.bincount(mix.dataset, minlength=4) / len(mix.dataset)
    worst = 0.0
    for start in range(0, len(batches) - step + 1, step):
        found = np.bincount(mix.dataset[np.concatenate(batches[start : start + step])], minlength=4)
        worst = max(worst, float((found / found.sum() / share).max()))
    return worst


def measure(stage: str, num: int, num_lhotse: int) -> dict[str, float]:
    """All measures of one mix."""
    mix, small = Mix(stage, num), Mix(stage, num_lhotse)
    started = time.perf_counter()
    made = mix.plan(BUDGET)
    plan_s = time.perf_counter() - started
    steps_of_240 = mix.plan(BUDGET.model_copy(update={"step_batches": 240}))
    rows = Rows(steps_of_240.entries, steps_of_240.clip_starts, steps_of_240.row_starts)
    dealt = mix.plan(BUDGET.model_copy(update={"step_batches": 240, "balanced_rows": 8}))
    target = mean_cost(mix, batches_of(made)[:5000])
    three = Mix(stage, num // 4, 3)
    shared = three.plan(BUDGET.model_copy(update={"questions_per_clip": 3}))
    few = num_lhotse // 4
    of_ranks = lhotse(small, target, lengths=small.duration_s, num=num_lhotse, num_ranks=128)
    capped = np.minimum(mix.duration_s, 10.0 * WINDOWS[stage])
    result = {
        "random": padding(mix, random_batches(small, target)),
        "algorithm2": padding(mix, algorithm2(small, target)),
        "lhotse": padding(mix, lhotse(mix, target, lengths=capped, num=few)),
        "lhotse_on_windows": padding(mix, lhotse(mix, target, lengths=10 * mix.windows, num=few)),
        "ours": made.stats.padding_share,
        "text_padding": made.stats.text_padding_share,
        "text_padding_shared": shared.stats.text_padding_share,
        "text_padding_side_by_side": padding_share(three.texts[shared.entries], shared.clip_starts[shared.row_starts]),
        "order_correlation": order_correlation(mix, made),
        "max_step_dataset_ratio": step_dataset_ratio(mix, batches_of(made)),
        "max_step_dataset_ratio_8x30": step_dataset_ratio(mix, batches_of(dealt), 240),
        "max_step_dataset_ratio_lhotse": step_dataset_ratio(small, of_ranks),
        "spread_8": cost_spread(rows.cost(mix.windows, mix.texts, BUDGET), 8),
        "spread_128": made.stats.cost_spread,
        "batch_cost": target,
        "plan_s": plan_s,
    }
    return {key: round(value, 4) for key, value in result.items()}


def main() -> None:
    """Measure both mixes and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer clips: half a minute instead of five")
    quick = parser.parse_args().quick
    sizes = {"num": 480_000, "num_lhotse": 20_000 if quick else 160_000}
    result = {stage: measure(stage, **sizes) for stage in WINDOWS}
    print(f"{'':32}" + "".join(f"{stage:>10}" for stage in result))
    for key in result["stage2"]:
        print(f"{key:32}" + "".join(f"{row[key]:10.4f}" for row in result.values()))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
