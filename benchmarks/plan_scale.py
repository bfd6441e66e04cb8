"""Time and memory of planning at scale, and the first batch of a large plan out of Ray Data.

Samples are a stage-2 like mix (1 to 120 s, many clips with several questions), held as columns as the readers make
them, planned for 128 workers in a process of its own: blend, rows, steps, measures and fingerprint, with text lengths
given. `seconds` are CPU seconds of its one core (`wall_s` has what else the machine does in it), `peak_gib` is the peak
of that process, its samples and Python included. `feed_start_s` is from a plan of a million rows to the first decoded
batch at rank 0, on a cluster of two CPUs of which two ranks hold three quarters each, as in recipe `tiny`; they are up,
decoders are not. `plan_scale.png` (in --out) plots time and memory against samples. The last line is one JSON
object.

    python benchmarks/plan_scale.py [--quick] [--out DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from af2_ray.config import Budget
from af2_ray.data.batching import plan_epoch, window_counts
from af2_ray.data.blend import Blend
from af2_ray.data.columns import SampleTable

WORKERS = 128
SIZES = (1_000_000, 2_000_000, 4_000_000, 8_000_000)
QUICK = (125_000, 250_000, 500_000, 1_000_000)
FEED_ROWS, FEED_ROWS_QUICK = 1_000_000, 200_000


def numbered(prefix: str, numbers: Any, suffix: str = "") -> pa.Array:
    """Texts that differ in a number, each distinct one once."""
    words = (pa.scalar(word, pa.large_string()) for word in (prefix, suffix, ""))
    before, after, between = words
    texts = pc.binary_join_element_wise(before, pa.array(numbers).cast(pa.large_string()), after, between)
    return texts.dictionary_encode()


def samples(num: int) -> SampleTable:
    """A corpus of `num` samples: its own uri for each clip, thousands of prompts, and answers of which few repeat."""
    rng = np.random.default_rng(0)
    clip = np.sort(rng.integers(0, max(1, num * 4 // 5), num))
    seconds = rng.choice([10.0, 4.0, 22.0, 70.0], num, p=[0.55, 0.15, 0.2, 0.1]) * rng.uniform(0.4, 1.7, num)
    return SampleTable.from_columns(
        {
            "id": numbered("corpus/train/", np.arange(num)),
            "uri": numbered("s3://bucket/corpus/audio/", clip, ".flac"),
            "prompt": numbered("what is heard in the recording, in words of kind ", rng.integers(0, 5000, num)),
            "answer": numbered("a sound that resembles number ", rng.integers(0, num, num)),
            "duration_s": np.round(seconds, 2)[clip],
        }
    )


def measure_plan(num: int) -> dict[str, float]:
    """Seconds and peak memory of planning one epoch of `num` samples."""
    table = samples(num)
    rng = np.random.default_rng(1)
    texts = np.clip(rng.lognormal(np.log(60), 0.6, num), 4, 512).astype(np.int32)
    budget = Budget(windows_per_row=64, text_tokens_per_row=2048, questions_per_clip=3, step_batches=WORKERS)
    wall, cpu = time.perf_counter(), time.process_time()
    index = Blend([(table, 1.0)], seed=0).epoch(0)
    made = plan_epoch(table, windows=window_counts(table, 9), text_lengths=texts, budget=budget, seed=0, index=index)
    return {
        "samples": num,
        "seconds": time.process_time() - cpu,
        "wall_s": time.perf_counter() - wall,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "rows": len(made),
    }


def in_process(num: int) -> dict[str, float]:
    """`measure_plan` in a process of its own, so that its peak is its own."""
    command = [sys.executable, __file__, "--plan", str(num)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_feed(num_rows: int) -> float:
    """Seconds from a plan of `num_rows` rows to the first batch out of Ray Data at the first of two ranks."""
    import ray
    import soundfile as sf

    from af2_ray.data.collate import LmCollator
    from af2_ray.data.feed import make_dataset
    from af2_ray.text import add_special_tokens, train_tokenizer

    tokenizer = train_tokenizer(["what is heard? a bell rings"], vocab_size=320)
    add_special_tokens(tokenizer)
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ranks = [ray.remote(num_cpus=0.75)(Rank).remote() for _ in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "clip.flac")
        sf.write(path, np.random.default_rng(0).normal(0, 0.1, 160_000), 16_000)
        table = SampleTable.from_columns(
            {
                "id": pa.array(np.arange(num_rows)).cast(pa.large_string()),
                "uri": pa.array([path] * num_rows, pa.large_string()),
                "prompt": pa.array(["what is heard?"] * num_rows, pa.large_string()),
                "answer": pa.array(["a bell"] * num_rows, pa.large_string()),
                "offset_s": np.arange(num_rows) * 1e-6,  # each a clip of its own
                "duration_s": np.full(num_rows, 5.0),
            }
        )
        budget = Budget(windows_per_row=1, text_tokens_per_row=512, questions_per_clip=1, step_batches=2)
        made = plan_epoch(
            table, windows=window_counts(table, 1), text_lengths=np.full(num_rows, 12), budget=budget, seed=0
        )
        ray.get([rank.load.remote() for rank in ranks])
        started = time.perf_counter()
        dataset = make_dataset(made, LmCollator(tokenizer, max_windows=1))
        dataset.context.execution_options.preserve_order = True
        shards = dataset.streaming_split(2, equal=True)
        firsts = [rank.first.remote(shard) for rank, shard in zip(ranks, shards, strict=True)]
        row, failures = ray.get(firsts[0])
        seconds = time.perf_counter() - started
        assert row == 0, "the first row comes first"
        assert not failures, failures
        assert ray.get(firsts[1])[0] == 1
        ray.shutdown()
    return seconds


class Rank:
    """A worker of a trainer, as far as the feed sees it."""

    def load(self) -> None:
        """What a trainer has loaded before it asks for batches."""
        import ray.data  # noqa: F401

        from af2_ray.models import modeling_af2  # noqa: F401

    def first(self, shard: Any) -> tuple[int, tuple[Any, ...]]:
        """The first batch's row, and what failed in it."""
        from af2_ray.data.collate import LmBatch
        from af2_ray.data.feed import iter_batches

        batch = next(iter_batches(shard, LmBatch))
        return batch.row, batch.failures


def plot(found: list[dict[str, float]], path: Path) -> None:
    """Time and memory against samples."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.8), layout="constrained")
    millions = [row["samples"] / 1e6 for row in found]
    for axes, key, label in zip(figure.subplots(1, 2), ("seconds", "peak_gib"), ("seconds", "GiB at the peak")):
        axes.plot(millions, [row[key] for row in found], "o-", color="#1f6f78")
        axes.set_xlabel("million samples")
        axes.set_title(label, loc="left")
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to a million samples, and a plan of 200 000 rows")
    parser.add_argument("--out", type=Path, default=Path("build"), help="folder of the plot (%(default)s)")
    parser.add_argument("--plan", type=int, metavar="SAMPLES", help="only plan so many samples, in this process")
    parser.add_argument("--feed", type=int, metavar="ROWS", help="only start a feed of so many rows")
    args = parser.parse_args()
    if args.plan:
        print(json.dumps(measure_plan(args.plan)))
        return
    if args.feed:
        print(json.dumps({"feed_rows": args.feed, "feed_start_s": round(measure_feed(args.feed), 2)}))
        return
    found = []
    for num in QUICK if args.quick else SIZES:
        found.append(in_process(num))
        print("{samples:>10,} samples: {seconds:6.2f} s, {peak_gib:.2f} GiB, {rows:,} rows".format(**found[-1]))
    plot(found, args.out / "plan_scale.png")
    num_rows = FEED_ROWS_QUICK if args.quick else FEED_ROWS
    start_s = measure_feed(num_rows)
    print(f"first batch of a plan of {num_rows:,} rows after {start_s:.1f} s")
    last = found[-1]
    result: dict[str, Any] = {
        "samples": last["samples"],
        "seconds": round(last["seconds"], 2),
        "wall_s": round(last["wall_s"], 2),
        "peak_gib": round(last["peak_gib"], 3),
        "feed_rows": num_rows,
        "feed_start_s": round(start_s, 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
