"""Peak memory of one training step against the length of the audio: cross-attention beside a prefix.

LM 512 wide x 12 layers (4 with --quick; random, frozen), the fusion trained, 64 text tokens, audio states given (the
tower is the same for both). Each point runs in a process of its own, whose allocator hands every tensor back to the
kernel when it is freed: peak resident memory is then that of live tensors, not of a heap that grows in steps. From it
goes what the process held before the step: weights, and their gradients, which have their place from a step before.

PyTorch's fused attention keeps no scores, so a prefix costs memory in proportion to its length too, but that of whole
LM layers for every audio token, where cross-attention keeps a key and a value. What is quadratic in it is time.

Writes a plot; the last line is one JSON object: MiB by length in seconds; each curve's growth a second of audio in the
second half (300 to 600 s) over that in the first (10 to 300 s), 1 being a straight line (`bend`); and how many times
more a prefix grows.

    python benchmarks/memory.py [--quick]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import matplotlib
import torch
from transformers import Qwen2Config

from af2_ray.models.audio_states import AudioStates
from af2_ray.models.configuration_af2 import AudioFlamingo2Config
from af2_ray.models.htsat import tower_config
from af2_ray.models.modeling_af2 import AudioFlamingo2ForConditionalGeneration

LENGTHS_S = (10, 60, 120, 200, 300, 400, 500, 600)
QUICK_S = (10, 300, 600)
FUSIONS = ("xattn", "prefix")
TEXT_TOKENS = 64
WIDTH = 512
PLOT = Path("build/benchmarks/memory.png")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def build(fusion: str, num_layers: int) -> AudioFlamingo2ForConditionalGeneration:
    """A random model of which the fusion trains."""
    torch.manual_seed(0)
    lm = Qwen2Config(
        vocab_size=4096,
        hidden_size=WIDTH,
        num_hidden_layers=num_layers,
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
    return model


def step_mib(fusion: str, length_s: int, num_layers: int) -> float:
    """Peak MiB of a forward and backward pass over `length_s` of audio, less what this process held before."""
    malloc = ctypes.CDLL(None)
    malloc.mallopt(M_MMAP_THRESHOLD, 2**16)
    malloc.mallopt(M_TRIM_THRESHOLD, 0)
    torch.set_num_threads(2)
    model = build(fusion, num_layers)

    def step(num_tokens: int) -> None:
        states = AudioStates(torch.randn(1, num_tokens, WIDTH), torch.ones(1, num_tokens, dtype=torch.bool))
        ids = torch.arange(TEXT_TOKENS)[None]
        ids[0, 0] = model.config.audio_token_id
        model(input_ids=ids, audio_states=states, labels=ids).loss.backward()

    step(64)  # what libraries set up at first use is not the step's, nor are the gradients it adds to
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    held = memory_mib("VmRSS")
    step(length_s // 10 * 64)
    return memory_mib("VmHWM") - held


def memory_mib(name: str) -> float:
    """Resident memory of this process: `VmRSS` now, `VmHWM` at its peak (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 2**10


def bend(mib: dict[int, float]) -> float:
    """Growth a second from 300 s to 600 s over that from 10 s to 300 s."""
    return ((mib[600] - mib[300]) / 300) / ((mib[300] - mib[10]) / 290)


def plot(curves: dict[str, dict[int, float]]) -> None:
    """Both curves to `PLOT`, each beside the straight line through its first half."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(curves), figsize=(9, 3.6), layout="constrained")
    for axes, (fusion, mib) in zip(panels, curves.items()):
        axes.plot(list(mib), list(mib.values()), marker="o", label="measured")
        slope = (mib[300] - mib[10]) / 290
        axes.plot([10, 600], [mib[10], mib[10] + 590 * slope], "--", color="gray", label="as from 10 to 300 s")
        axes.set(title=fusion, xlabel="audio, s", ylabel="peak of a training step, MiB", xlim=0, ylim=0)
        axes.legend()
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, dpi=120)


def main() -> None:
    """Measure all lengths with both fusions, plot, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"only {QUICK_S} s, 4 layers of the LM")
    quick = parser.parse_args().quick
    curves: dict[str, dict[int, float]] = {fusion: {} for fusion in FUSIONS}
    # A fork has its own peak, and everything imported; nothing has been computed here, so no threads are lost by it.
    for length_s in QUICK_S if quick else LENGTHS_S:
        for fusion in FUSIONS:
            with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
                curves[fusion][length_s] = round(
                    pool.submit(step_mib, fusion, length_s, 4 if quick else 12).result(), 1
                )
        print(f"{length_s:4d} s: " + ", ".join(f"{fusion} {curves[fusion][length_s]:.0f} MiB" for fusion in FUSIONS))
    plot(curves)
    print(f"plot: {PLOT}")
    growth = {fusion: mib[600] - mib[10] for fusion, mib in curves.items()}
    result: dict[str, object] = {f"{fusion}_mib": mib for fusion, mib in curves.items()}
    result |= {f"{fusion}_bend": round(bend(mib), 2) for fusion, mib in curves.items()}
    print(json.dumps(result | {"prefix_growth_over_xattn": round(growth["prefix"] / growth["xattn"], 1)}))


if __name__ == "__main__":
    main()
