"""Window padding of planned batches against random fixed-size batches, on two mixes of durations.

Stage 2: 55 % of 10 s, 15 % of 1-10 s, 20 % of 15-30 s, 10 % of 30-120 s, cut to 9 windows. Stage 3: log-normal, median
90 s, sigma 0.75, 5 to 1800 s, cut to 30 windows. Text lengths are log-normal (median 60, sigma 0.6, at most 512). The
last line is one JSON object; shares from 0 to 1.

    python benchmarks/padding.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
from numpy.typing import NDArray

from af2_ray.config import Budget
from af2_ray.data.batching import plan, window_counts
from af2_ray.data.manifest import Sample

WINDOWS = {"stage2": 9, "stage3": 30}


def durations(stage: str, num: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Clip lengths in seconds, [num]."""
    if stage == "stage3":
        return np.clip(rng.lognormal(np.log(90), 0.75, num), 5, 1800)
    kinds = rng.choice(4, num, p=[0.55, 0.15, 0.20, 0.10])
    bounds = np.array([[10, 10], [1, 10], [15, 30], [30, 120]])[kinds]
    return rng.uniform(bounds[:, 0], bounds[:, 1])


def measure(stage: str, num: int) -> dict[str, float]:
    """Padding of one mix."""
    rng = np.random.default_rng(0)
    samples = [
        Sample(str(i), str(i), 0.0, float(d), "q", "a", "", "") for i, d in enumerate(durations(stage, num, rng))
    ]
    texts = np.clip(rng.lognormal(np.log(60), 0.6, num), 4, 512).astype(np.int64)
    budget = Budget(windows_per_row=64, text_tokens_per_row=2048, questions_per_clip=1, step_batches=24)
    started = time.perf_counter()
    made = plan(samples, windows=window_counts(samples, WINDOWS[stage]), text_lengths=texts, budget=budget, seed=0)
    return {
        "random": round(made.stats.padding_share_unplanned, 4),
        "ours": round(made.stats.padding_share, 4),
        "text_padding": round(made.stats.text_padding_share, 4),
        "plan_s": round(time.perf_counter() - started, 2),
    }


def main() -> None:
    """Measure both mixes and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5000 clips instead of 50 000")
    num = 5_000 if parser.parse_args().quick else 50_000
    result = {stage: measure(stage, num) for stage in WINDOWS}
    for stage, row in result.items():
        print(f"{stage}: random batches {row['random']:.1%} padding, planned {row['ours']:.2%}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
