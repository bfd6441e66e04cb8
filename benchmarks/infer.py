"""Samples a second of the offline engine against `generate` on one sample after another, from files to text, on a CPU.

The model of `benchmarks/serve.py` (random weights), FLAC files of 5 to 60 s, answers of 8 to 64 tokens as the model
ends them (at most 32 with --quick). Both decode, encode and answer; the engine decodes ahead in threads, batches, and
encodes a clip once. The answers are compared: `equal_share` is below 1 only where two tokens are within rounding of
each other.

The last line is one JSON object: `throughput_vs_generate`, `samples_per_s`, `equal_share`.

    python benchmarks/infer.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
from serve import build, engine_of

from af2_ray.audio.decode import decode
from af2_ray.audio.hear import Stretch
from af2_ray.audio.windows import to_windows
from af2_ray.engine.batch import AnswerLimits, Question, answer_all
from af2_ray.text import format_prompt

NUM_SLOTS = 16


def write_files(folder: Path, num: int, rng: np.random.Generator) -> list[Question]:
    """Files of noise and a question about each."""
    asked = []
    for number in range(num):
        duration_s = float(rng.uniform(5, 60))
        uri = str(folder / f"{number}.flac")
        sf.write(uri, rng.uniform(-0.3, 0.3, round(duration_s * 16_000)), 16_000)
        stretch = Stretch(uri, 0.0, duration_s)
        asked.append(Question(number, str(number), stretch, f"what is heard in recording {number}?"))
    return asked


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller LM, fewer samples")
    quick = parser.parse_args().quick
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rng = np.random.default_rng(0)
    parts = model, tokenizer = build(quick)
    max_new_tokens = 32 if quick else 64
    with tempfile.TemporaryDirectory() as folder:
        asked = write_files(Path(folder), 16 if quick else 64, rng)
        warm = write_files(Path(folder), 1, rng)
        answer_all(engine_of(parts, NUM_SLOTS), warm, AnswerLimits(30, 2))

        engine = engine_of(parts, NUM_SLOTS)
        started = time.perf_counter()
        results = answer_all(engine, asked, AnswerLimits(30, max_new_tokens))
        engine_s = time.perf_counter() - started

        started, texts = time.perf_counter(), []
        for one in asked:
            windows = torch.from_numpy(to_windows(decode(one.stretch.uri, 0.0, one.stretch.duration_s)))
            ids = torch.tensor([tokenizer(format_prompt(one.prompt), add_special_tokens=False)["input_ids"]])
            new = model.generate(
                ids, waveforms=windows, windows_per_clip=[len(windows)], max_new_tokens=max_new_tokens, do_sample=False
            )
            texts.append(tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True))
        generate_s = time.perf_counter() - started
    equal = sum(result.answer == text for result, text in zip(results, texts, strict=True)) / len(asked)
    print(f"engine {engine_s:.1f} s, generate {generate_s:.1f} s for {len(asked)} samples, {equal:.0%} equal")
    result = {
        "throughput_vs_generate": generate_s / engine_s,
        "samples_per_s": len(asked) / engine_s,
        "equal_share": equal,
    }
    print(json.dumps({key: round(value, 3) for key, value in result.items()}))


if __name__ == "__main__":
    main()
