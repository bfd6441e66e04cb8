"""Decoding, encoding and a training step against the reference's method, on the same random weights, CPU, fp32.

The reference's method, written here around the same modules: audio keys and values are projected anew for every
token, of padding too; clips are encoded one by one, each padded to the longest, of which all windows are encoded, a
window's mel at a time with a transform built for it; the audio transformer takes the padded rectangle. Tower and
attention kernels are those of our side. Each side runs in a process of its own; before any time is compared, outputs
must agree. Memory is the peak of the process less what it held with the weights loaded.

Decoding: LM 1024 wide x 12 layers, audio width 1024, at 10, 90 and 300 s of audio. Encoding and training: LM 512 x 12,
HTSAT 64 wide (2-2-6-2), clips of 10, 30, 60 and 300 s, 64 text tokens a row, the tower trained. The last line is one
JSON object.

    python benchmarks/decode.py [--quick]
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as nnf
from torch import Tensor
from transformers import Qwen2Config

from af2_ray.audio.mel import LogMel
from af2_ray.models.audio_states import AudioStates, Heard
from af2_ray.models.configuration_af2 import AudioFlamingo2Config
from af2_ray.models.cross_attention import AudioCache, AudioContext, GatedCrossAttention
from af2_ray.models.htsat import tower_config
from af2_ray.models.modeling_af2 import AudioFlamingo2ForConditionalGeneration as Model
from af2_ray.models.random import random_model
from af2_ray.models.transform import AudioTransform, rotary_table, rotate

DECODE_SIZE = (1024, 128, (1, 1, 1, 1))  # LM width, tower width, tower depths
MIXED_SIZE = (512, 64, (2, 2, 6, 2))
TOKENS_A_WINDOW = 64
MIXED_WINDOWS = (1, 3, 6, 30)
QUICK_WINDOWS = (1, 1, 2, 10)
TEXT_TOKENS = 64
VOCAB = 8192
DECODE_WINDOWS = {"decode_10": 1, "decode_90": 9, "decode_300": 30, "text_only": 0}
QUICK = {"decode_10", "decode_300", "text_only", "encode", "train"}


@functools.cache
def build(lm_width: int, tower_width: int, depths: tuple[int, ...]) -> Model:
    """A random model."""
    config = AudioFlamingo2Config(
        text_config=Qwen2Config(
            vocab_size=VOCAB,
            hidden_size=lm_width,
            num_hidden_layers=12,
            num_attention_heads=lm_width // 64,
            num_key_value_heads=lm_width // 64,
            intermediate_size=lm_width * 11 // 4,
            tie_word_embeddings=True,
        ),
        audio_config=tower_config(tower_width, depths, [4, 8, 16, 32][: len(depths)]),
        audio_token_id=VOCAB - 4,
        max_windows=max(MIXED_WINDOWS),
    )
    return random_model(config)


# --- The reference's method --------------------------------------------------------------------------------------


def context_with_states(cls: type[AudioContext], heard: Heard, *args: Any) -> AudioContext:
    """What a layer attends to, with the audio states themselves."""
    context = context_of(cls, heard, *args)
    context.states = heard.states  # type: ignore[attr-defined]
    return context


context_of = AudioContext.of.__func__  # type: ignore[attr-defined]


def project_each_time(self: GatedCrossAttention, audio: Any) -> tuple[Tensor, Tensor]:
    """Keys and values from the audio states at every call, whatever the cache holds."""
    keys, values = self.project(audio.states.hidden).permute(2, 0, 3, 1, 4)
    return keys, values


def encode_padded(model: Model, clips: list[Tensor]) -> AudioStates:
    """Clips one by one, each with silent windows up to the longest, a new mel transform a window."""
    rows = []
    for clip in clips:
        padded = nnf.pad(clip, (0, 0, 0, max(map(len, clips)) - len(clip)))
        mels = torch.cat([LogMel()(window[None]) for window in padded])
        rows.append(model.audio_tower.encode(mels).flatten(0, 1))
    features = torch.stack(rows)
    lengths = torch.tensor([len(clip) for clip in clips]) * TOKENS_A_WINDOW
    mask = torch.arange(features.shape[1]) < lengths[:, None]
    return AudioStates(transform_padded(model.audio_transform, features, mask), mask)


def transform_padded(transform: AudioTransform, features: Tensor, mask: Tensor) -> Tensor:
    """Audio states [C, A, D] of features padded to one length, padded keys masked."""
    num, length, width = features.shape
    assert transform.rope_base is not None
    table = [
        t.repeat(num, 1)[:, None] for t in rotary_table(length, transform.rotary_dims, transform.rope_base, features)
    ]
    x = transform.input_norm(features * width**0.5)
    for layer in transform.layers:
        q, k, v = (
            proj(x).view(num * length, layer.num_heads, -1) for proj in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        q, k, v = (t.view(num, length, *t.shape[1:]).transpose(1, 2) for t in (rotate(q, table), rotate(k, table), v))
        y = nnf.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        x = layer.attention_norm(x + layer.out_proj(y.transpose(1, 2).flatten(2)))
        x = layer.ff_norm(x + layer.fc2(layer.fc1(x).relu()))
    return x


# --- Cases -------------------------------------------------------------------------------------------------------


def decode(side: str, num_windows: int, num_tokens: int) -> dict[str, Any]:
    """Seconds a token of greedy decoding after the prompt, and the tokens."""
    model = build(*DECODE_SIZE)
    held = memory_gib()
    states = None
    if num_windows:
        hidden = torch.randn(1, num_windows * TOKENS_A_WINDOW, 1024)
        states = AudioStates(hidden, torch.ones(hidden.shape[:2], dtype=torch.bool))
    prompt = torch.arange(32)[None]
    if num_windows:
        prompt[0, 0] = model.config.audio_token_id
    cache, seconds, tokens = AudioCache(config=model.config.text_config), [], []
    ids = prompt
    with torch.inference_mode():
        for _ in range(num_tokens + 1):  # the first is the prompt's
            started = time.perf_counter()
            given = states if side == "reference" or ids is prompt else None
            logits = model(input_ids=ids, audio_states=given, past_key_values=cache, use_cache=True).logits[:, -1]
            seconds.append(time.perf_counter() - started)
            ids = logits.argmax(-1, keepdim=True)
            tokens.append(int(ids))
    return {"seconds": statistics.median(seconds[1:]), "tokens": tokens, "out": logits, "gib": peak_gib() - held}


def mixed_batch(counts: Sequence[int]) -> list[Tensor]:
    """Windows int16 [W, 160000] of clips of unlike length."""
    random = torch.Generator().manual_seed(1)
    return [torch.randint(-8000, 8000, (num, 160_000), generator=random, dtype=torch.int16) for num in counts]


def encode(side: str, counts: Sequence[int], repeats: int) -> dict[str, Any]:
    """Seconds to encode the mixed batch without gradients; the audio states of real tokens."""
    model, clips = build(*MIXED_SIZE), mixed_batch(counts)
    held = memory_gib()

    def once() -> AudioStates:
        if side == "reference":
            return encode_padded(model, clips)
        return model.encode_audio(torch.cat(clips), counts)

    with torch.inference_mode():
        states, seconds = timed(once, repeats)
    return {"seconds": seconds, "out": states.hidden[states.mask], "gib": peak_gib() - held}


def train(side: str, counts: Sequence[int], repeats: int) -> dict[str, Any]:
    """Seconds of one forward and backward pass over the mixed batch; the loss and the tower's first gradient."""
    model, clips = build(*MIXED_SIZE), mixed_batch(counts)
    model.language_model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if ".cross_attention." in name:
            parameter.requires_grad_(True)
    model.audio_tower.model.audio_encoder.batch_norm.requires_grad_(False)
    held = memory_gib()
    ids = torch.arange(len(clips) * TEXT_TOKENS).view(len(clips), TEXT_TOKENS)
    ids[:, 0] = model.config.audio_token_id
    labels = ids.masked_fill(torch.arange(TEXT_TOKENS) < TEXT_TOKENS // 2, -100)

    def once() -> Tensor:
        model.zero_grad(set_to_none=True)
        if side == "reference":
            loss = model(input_ids=ids, audio_states=encode_padded(model, clips), labels=labels).loss
        else:
            windows = torch.cat(clips)
            loss = model(input_ids=ids, waveforms=windows, windows_per_clip=counts, labels=labels).loss
        loss.backward()
        return loss

    loss, seconds = timed(once, repeats)
    gradient = model.audio_tower.model.audio_encoder.layers[0].blocks[0].layernorm_before.weight.grad
    return {"seconds": seconds, "out": torch.cat([loss.detach()[None], gradient]), "gib": peak_gib() - held}


def timed(step: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """The last result and the fastest of `repeats` calls."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = step()
        seconds.append(time.perf_counter() - started)
    return result, min(seconds)


def memory_gib() -> float:
    """Resident memory of this process now."""
    return float(psutil.Process().memory_info().rss) / 2**30


def peak_gib() -> float:
    """Its highest resident memory so far (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# --- Sides and ratios --------------------------------------------------------------------------------------------


def run_side(case: str, side: str, quick: bool) -> dict[str, Any]:
    """One case on one side, in this process."""
    torch.set_num_threads(2)
    if side == "reference":
        AudioContext.of = classmethod(context_with_states)  # type: ignore[assignment, method-assign]
        GatedCrossAttention._keys_values = project_each_time  # type: ignore[method-assign]
    if case in DECODE_WINDOWS:
        result = decode(side, DECODE_WINDOWS[case], 8 if quick else 32)
    else:
        counts, repeats = (QUICK_WINDOWS, 1) if quick else (MIXED_WINDOWS, 3)
        result = {"encode": encode, "train": train}[case](side, counts, repeats)
    return result | {"out": result["out"].detach().numpy()}


def compare(case: str, quick: bool) -> dict[str, dict[str, Any]]:
    """Both sides of a case, each in its own process, with equal outputs (else an error)."""
    sides: dict[str, dict[str, Any]] = {}
    for side in ("ours",) if case == "text_only" else ("ours", "reference"):
        # A fork has its own peak, and all that was imported and built; no thread but this one exists to be lost by it.
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
            sides[side] = pool.submit(run_side, case, side, quick).result()
        print(f"{case:>10} {side:>9}: {sides[side]['seconds']:.3f} s, {sides[side]['gib']:.2f} GiB beside weights")
    if "reference" in sides:
        np.testing.assert_allclose(sides["ours"]["out"], sides["reference"]["out"], rtol=1e-3, atol=1e-4)
        if sides["ours"].get("tokens") != sides["reference"].get("tokens"):
            raise AssertionError(f"{case}: the two sides decode different tokens")
    return sides


def main() -> None:
    """Measure all cases and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="8 tokens, one repetition, clips a third as long, without 90 s"
    )
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    for size in (DECODE_SIZE, MIXED_SIZE):
        build(*size)
    cases = [*DECODE_WINDOWS, "encode", "train"]
    done = {case: compare(case, quick) for case in cases if case in QUICK or not quick}

    def ratio(case: str, what: str = "seconds") -> float:
        return round(done[case]["reference"][what] / done[case]["ours"][what], 2)

    long_s = done["decode_300"]["ours"]["seconds"]
    result = {
        "decode_300s_speedup": ratio("decode_300"),
        "decode_300s_vs_10s": round(long_s / done["decode_10"]["ours"]["seconds"], 2),
        "decode_300s_vs_text_only": round(long_s / done["text_only"]["ours"]["seconds"], 2),
        "encode_mixed_speedup": ratio("encode"),
        "train_step_speedup": ratio("train"),
        "train_step_memory_ratio": round(1 / ratio("train", "gib"), 2),
    }
    if "decode_90" in done:
        result["decode_90s_speedup"] = ratio("decode_90")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
