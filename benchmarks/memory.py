"""Peak memory of one training step against the length of the audio: cross-attention beside a prefix.

LM 512 wide x 12 layers (random, frozen), the fusion trained, 64 text tokens, audio states given (the tower is the same
for both). Each point runs in a process of its own; memory is its peak less what it held with the weights loaded. Writes
a plot; the last line is one JSON object: MiB by length in seconds, and each curve's growth from 300 s to 600 s over its
growth from 10 s to 300 s, per second of audio (1: a straight line).

    python benchmarks/memory.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import matplotlib
import psutil
import torch
from transformers import Qwen2Config

from af2_ray.models.configuration_af2 import AudioFlamingo2Config
from af2_ray.models.htsat import tower_config
from af2_ray.models.modeling_af2 import AudioFlamingo2ForConditionalGeneration, AudioStates

LENGTHS_S = (10, 60, 120, 300, 450, 600)
QUICK_S = (10, 300, 600)
FUSIONS = ("xattn", "prefix")
TEXT_TOKENS = 64
WIDTH = 512
PLOT = Path("build/benchmarks/memory.png")


def step_mib(fusion: str, length_s: int) -> float:
    """Peak MiB of a forward and backward pass beside the weights, in this process."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    lm = Qwen2Config(
        vocab_size=4096,
        hidden_size=WIDTH,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=8,
        intermediate_size=1408,
        tie_word_embeddings=True,
    )
    config = AudioFlamingo2Config(
        text_config=lm,
        audio_config=tower_config(WIDTH // 8, (1, 1, 1, 1), (1, 2, 4, 8)),
        audio_token_id=4092,
        fusion=fusion,
        max_windows=60,
    )
    model = AudioFlamingo2ForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".cross_attention." in name or name.startswith("prefix."))
    num_tokens = length_s // 10 * 64
    states = AudioStates(torch.randn(1, num_tokens, WIDTH), torch.ones(1, num_tokens, dtype=torch.bool))
    ids = torch.arange(TEXT_TOKENS)[None]
    ids[0, 0] = config.audio_token_id
    held = psutil.Process().memory_info().rss
    model(input_ids=ids, audio_states=states, labels=ids).loss.backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - held) / 2**20


def bend(mib: dict[int, float]) -> float:
    """Growth a second from 300 s to 600 s over that from 10 s to 300 s."""
    return ((mib[600] - mib[300]) / 300) / ((mib[300] - mib[10]) / 290)


def plot(curves: dict[str, dict[int, float]]) -> None:
    """Both curves to `PLOT`."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for fusion, mib in curves.items():
        axes.plot(list(mib), list(mib.values()), marker="o", label=fusion)
    axes.set(xlabel="audio, s", ylabel="peak MiB of a training step", xlim=0, ylim=0)
    axes.legend()
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, dpi=120)


def main() -> None:
    """Measure all lengths with both fusions, plot, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"only {QUICK_S} s")
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.point:
        print(step_mib(arguments.point[0], int(arguments.point[1])))
        return
    curves: dict[str, dict[int, float]] = {fusion: {} for fusion in FUSIONS}
    for length_s in QUICK_S if arguments.quick else LENGTHS_S:
        for fusion in FUSIONS:
            command = [sys.executable, __file__, "--point", fusion, str(length_s)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            curves[fusion][length_s] = round(float(done.stdout.split()[-1]), 1)
        print(f"{length_s:4d} s: " + ", ".join(f"{fusion} {curves[fusion][length_s]:.0f} MiB" for fusion in FUSIONS))
    plot(curves)
    print(f"plot: {PLOT}")
    result = {f"{fusion}_mib": mib for fusion, mib in curves.items()}
    print(json.dumps(result | {f"{fusion}_bend": round(bend(mib), 2) for fusion, mib in curves.items()}))


if __name__ == "__main__":
    main()
