"""Seconds of audio a second through the whole feed, against the limit of the decoder and a PyTorch DataLoader.

Files: 44.1 kHz, mono and stereo, FLAC, OGG and WAV, 2 to 60 s; on two cores. The feed is Ray Data as in training: rows
of 64 windows, as the paper's sizes have them, decoded, resampled, cut into windows, collated with their questions,
through the object store to tensors at a rank; four decode tasks share the cores, so that none idles while Ray hands out
the next row. Its limit is a bare pool of two processes of soundfile and soxr on the same stretches, sending nothing
back. The reference's way is a DataLoader of two workers that does what NVIDIA's loader does: float64, every channel
resampled, the first kept, scaled to its peak, rounded through int16 and back, cut into windows, padded to the batch's
longest clip. Process start-up is left out on all sides: after one run to warm up, each is run in turn (twice with
--quick, else three times) and the best counts. The feed's time has the start of Ray Data in it, some tenths of a second
of --quick's few. The last line is one JSON object.

    python benchmarks/feed.py [--quick] [--audio FOLDER]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "1073741824")  # for all processes of all ways, as the Makefile has it
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", "4294967296")
os.environ.setdefault("MALLOC_TOP_PAD_", "67108864")

import numpy as np
import soundfile as sf
import soxr

from af2_ray.audio.windows import WINDOW_SAMPLES
from af2_ray.config import Budget
from af2_ray.data.batching import Plan, plan_epoch, window_counts
from af2_ray.data.samples import Sample

CORES = 2
RATE = 44_100
MAX_WINDOWS = 6
DECODE_CPUS = 0.45


def make_files(folder: Path, num: int) -> list[str]:
    """Sounds of the three formats, one and two channels, 2 to 60 s."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(num):
        suffix = ("flac", "ogg", "wav")[number % 3]
        t = np.arange(int(rng.uniform(2, 60) * RATE)) / RATE
        tone = 0.4 * np.sin(2 * np.pi * rng.uniform(100, 4000) * t) * np.exp(-((t % 1.5) / 0.5))
        channels = 1 + (number // 3) % 2
        sound = np.stack([tone + rng.normal(0, 0.02, len(t)) for _ in range(channels)], axis=1)
        path = folder / f"{number}.{suffix}"
        with sf.SoundFile(path, "w", RATE, channels) as file:
            for start in range(0, len(sound), RATE):  # libsndfile's OGG encoder falls over a minute in one call
                file.write(sound[start : start + RATE])
        paths.append(str(path))
    return paths


def decode_bare(path: str) -> float:
    """The limit: read, first channel, resample; the seconds read."""
    audio, rate = sf.read(path, dtype="float32", always_2d=True)
    return len(soxr.resample(audio[:, 0], rate, 16_000)) / 16_000


class AllChannels:
    """The reference's dataset: float64, every channel resampled and the first one kept, through int16 and back.

    `librosa.resample` is soxr's high quality along an axis, a channel at a time; it is called here without librosa.
    """

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: int) -> Any:
        import torch

        with sf.SoundFile(self.paths[place]) as file:
            audio = file.read(min(len(file), MAX_WINDOWS * 10 * file.samplerate))
            rate = file.samplerate
        if audio.max() > 1 or audio.min() < -1:
            audio = audio / max(abs(audio.max()), abs(audio.min()))
        assert np.isfinite(audio).all()  # as librosa makes sure
        mono = np.atleast_2d(np.apply_along_axis(soxr.resample, -1, audio.T, rate, 16_000, "soxr_hq"))[0]
        mono = 2 * mono / abs(mono.max()) - 1 if mono.min() >= 0 else mono / max(abs(mono.max()), abs(mono.min()))
        whole = np.append(mono, np.zeros(-len(mono) % WINDOW_SAMPLES))
        rounded = (np.clip(whole, -1.0, 1.0) * 32767.0).astype(np.int16)
        return torch.from_numpy((rounded / 32767.0).astype(np.float32)).float().reshape(-1, WINDOW_SAMPLES)


def padded(clips: list[Any]) -> Any:
    """A batch of windows: every clip padded with silent ones to the clip with the most, then all put together."""
    import torch

    most = max(map(len, clips))
    whole = [torch.cat([*clip, *[torch.zeros_like(clip[0])] * (most - len(clip))]) for clip in clips]
    return torch.cat([clip.unsqueeze(0) for clip in whole])


def planned(paths: list[str]) -> Plan[Sample]:
    """The files as a plan, as a stage would have it."""
    samples = [
        Sample(str(n), path, 0.0, min(sf.info(path).duration, 10.0 * MAX_WINDOWS), "what is heard?", "a tone", "", "")
        for n, path in enumerate(paths)
    ]
    budget = Budget(windows_per_row=64, text_tokens_per_row=2048, questions_per_clip=1, step_batches=2)
    lengths = np.full(len(samples), 12)
    return plan_epoch(samples, windows=window_counts(samples, MAX_WINDOWS), text_lengths=lengths, budget=budget, seed=0)


def run_feed(made: Plan[Sample], collator: Any) -> int:
    """All rows through Ray Data, in order; how many windows came."""
    from af2_ray.data.collate import LmBatch
    from af2_ray.data.feed import iter_batches, make_dataset

    dataset = make_dataset(made, collator, decode_cpus=DECODE_CPUS)
    dataset.context.execution_options.preserve_order = True
    num_windows = 0
    for batch in iter_batches(dataset.iterator(), LmBatch):
        assert not batch.failures, batch.failures
        num_windows += len(batch.waveforms)
    return num_windows


def timed(work: Callable[[], Any]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(paths: list[str], num_runs: int) -> dict[str, float]:
    """Audio seconds a second of the three ways."""
    import ray
    from torch.utils.data import DataLoader

    from af2_ray.data.collate import LmCollator
    from af2_ray.text import add_special_tokens, train_tokenizer

    tokenizer = train_tokenizer(["what is heard? a tone"], vocab_size=320)
    add_special_tokens(tokenizer)
    made, collator = planned(paths), LmCollator(tokenizer, max_windows=MAX_WINDOWS)
    audio_s = sum(sf.info(path).duration for path in paths)
    ray.init(num_cpus=CORES, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    loader = DataLoader(AllChannels(paths), batch_size=8, num_workers=CORES, collate_fn=padded, persistent_workers=True)  # type: ignore[type-var]
    best = {"feed": np.inf, "limit": np.inf, "reference": np.inf}
    with ProcessPoolExecutor(CORES, multiprocessing.get_context("spawn")) as pool:
        ways: dict[str, Callable[[], Any]] = {
            "feed": lambda: run_feed(made, collator),
            "limit": lambda: list(pool.map(decode_bare, paths)),
            "reference": lambda: sum(len(batch) for batch in loader),
        }
        for attempt in range(1 + num_runs):  # the first warms up
            for name, work in ways.items():
                seconds = timed(work)
                print(f"run {attempt}: {name:10} {seconds:6.1f} s for {audio_s:.0f} s of audio", flush=True)
                best[name] = min(best[name], seconds) if attempt else np.inf
    ray.shutdown()
    return {name: audio_s / seconds for name, seconds in best.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="64 files and two runs, not 600 (each twice) and three")
    parser.add_argument("--audio", type=Path, help="folder of sound files (default: made for the purpose)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.audio:
            paths = [str(p) for p in sorted(args.audio.rglob("*")) if p.suffix in (".flac", ".ogg", ".wav")]
        else:
            paths = make_files(Path(folder), 64 if args.quick else 600)
        rates = measure(paths if args.quick else 2 * paths, 2 if args.quick else 3)
    for name, rate in rates.items():
        print(f"{name:10} {rate:8.0f} s of audio a second")
    result = {"vs_limit": rates["feed"] / rates["limit"], "vs_reference": rates["feed"] / rates["reference"]}
    print(json.dumps({key: round(value, 3) for key, value in (result | rates).items()}))


if __name__ == "__main__":
    main()
