"""What a GPU would be asked for at the paper's sizes, counted without one: kernels, bytes moved, waits of the host.

The models have their true sizes and no memory; `pretended_gpu` counts. A kernel is an operator that is no view, fused
attention is one, and where CUDA's fused kernels refuse, PyTorch's formula counts in full. Of the LM two and four layers
are run, and the others told from those. Not counted: DeepSpeed, the optimiser, what a CUDA graph saves of the launches.
The last line is one JSON object, each key also as `<key>_before`, as it was at commit {COMMIT}:

- `decode_3b_1_kernels`, `decode_3b_16_kernels`, `decode_05b_1_kernels`: launches of one more token of 1 or 16 answers
  about as many clips; `decode_syncs`: waits of the host in such a step of 16 answers;
- `replayed_share`: share of 16 slots' steps that a recorded graph does, of answers of 64 tokens that come by chance,
  one in four steps (so that the slots stay full);
- `tower_mb_per_window`: MB read and written by a window on its way to features; `tower_fused_blocks`: blocks of the 18
  whose attention is fused;
- `train_syncs`: waits of the host in the forward pass and loss of a full row of 3B, stage 1; `train_stage1_kernels` and
  `train_stage1_saved_mb`: launches of that row, forward and backward, and MB that it keeps for the backward pass;
- `lora_saved_mb`, `lora_recomputed_mb`: MB kept where adapters train too and features are cached, as it is and with
  the layers recomputed;
- `host_ms_1`, `host_ms_16`: ms of Python a step of 1 and 16 answers, of a model of almost nothing on the CPU.

    python benchmarks/launches.py [--quick] [--names]
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from pretended_gpu import CUDA, PretendedGpu, backward, tensor_bytes
from transformers import Qwen2Config

from af2_ray.audio.windows import WINDOW_SAMPLES
from af2_ray.config import Lora, Serve, load_recipe
from af2_ray.engine.engine import Engine
from af2_ray.engine.request import Clip, Request
from af2_ray.models.configuration_af2 import AudioFlamingo2Config
from af2_ray.models.from_recipe import recipe_config
from af2_ray.models.htsat import tower_config
from af2_ray.models.lora import add_lora
from af2_ray.models.modeling_af2 import AudioFlamingo2ForConditionalGeneration as Model
from af2_ray.models.random import random_model
from af2_ray.text import add_special_tokens, train_tokenizer
from af2_ray.train.costs import TOKENS_PER_WINDOW
from af2_ray.train.deepspeed import checkpoint_activations
from af2_ray.train.memory_probe import made_up_row
from af2_ray.train.optim import freeze_except
from af2_ray.train.task import LmTask

COMMIT = "abe0346"
BEFORE: dict[str, float] = {
    "decode_05b_1_kernels": 1463,
    "decode_05b_16_kernels": 2543,
    "decode_3b_1_kernels": 2171,
    "decode_3b_16_kernels": 3791,
    "decode_syncs": 5,
    "replayed_share": 0.456,
    "recorded_share": 0.112,
    "eager_share": 0.432,
    "tower_mb_per_window": 1086.238,
    "tower_fused_blocks": 8,
    "train_syncs": 11,
    "train_stage1_kernels": 10491,
    "train_stage1_moved_gb": 286.619,
    "train_stage1_saved_mb": 13712.461,
}
QUESTION = "which sound is heard first? (A) dog (B) drum (C) rain (D) violin"
SLOTS, NEW_TOKENS, ARRIVALS = 16, 64, 0.25


def paper_model(recipe: str, num_layers: int = 0) -> Model:
    """A recipe's model in bf16 that takes no memory, its LM cut to `num_layers`, if any."""
    config = recipe_config(load_recipe(recipe))
    if num_layers:
        config.text_config.num_hidden_layers = num_layers
        config.text_config.layer_types = config.text_config.layer_types[:num_layers]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            return Model(config).eval()
    finally:
        torch.set_default_dtype(default)


def at_depth(recipe: str, count: Callable[[int], Counter[str]]) -> Counter[str]:
    """What all layers make, of `count` for two of them and for four: they are alike."""
    two, four = count(2), count(4)
    more = (recipe_config(load_recipe(recipe)).text_config.num_hidden_layers - 2) // 2
    return Counter({name: two[name] + more * (four[name] - two[name]) for name in two | four})


def small_model(tokenizer: Any) -> Model:
    """A model of almost nothing: what it takes is Python."""
    first = add_special_tokens(tokenizer)
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
    )
    config = AudioFlamingo2Config(
        audio_config=tower_config(8, (1, 1, 1, 1), (1, 1, 1, 1)),
        text_config=text,
        audio_token_id=first,
        transform_heads=2,
        transform_inner_size=16,
        cross_attn_heads=2,
        cross_attn_head_dim=8,
        max_windows=3,
        max_text_tokens=128,
    )
    return random_model(config).to(torch.float32)


def noise(num_windows: int, seed: int) -> Clip:
    """A recording of noise."""
    random = np.random.default_rng(seed)
    return Clip.of(random.integers(-9999, 9999, (num_windows, WINDOW_SAMPLES), dtype=np.int16))


def request(clip: Clip) -> Request:
    """A question that is answered in `NEW_TOKENS` tokens."""
    return Request(QUESTION, (clip,), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)


def tokenizer_of(size: int = 400) -> Any:
    """A small tokenizer."""
    return train_tokenizer([QUESTION] * 2, vocab_size=size)


# --- Answering -------------------------------------------------------------------------------------------------------


def decode(recipe: str, num: int) -> tuple[Counter[str], Counter[str]]:
    """Launches of a token of `num` answers about as many clips, by operator, and the waits of a steady step.

    A step that is played launches next to nothing; what it plays is counted where it is recorded.
    """
    waits: Counter[str] = Counter()

    def count(num_layers: int) -> Counter[str]:
        tokenizer = tokenizer_of()
        model = paper_model(recipe, num_layers)
        model.config.audio_token_id = add_special_tokens(tokenizer)
        gpu = PretendedGpu(model.config.audio_token_id + 4)
        gpu.place(model)
        counted: list[Counter[str]] = []
        with gpu.running():
            settings = Serve(num_slots=SLOTS, max_new_tokens=NEW_TOKENS, audio_memory_mb=2**17)
            engine = Engine(model, tokenizer, settings)
            for number in range(num):
                engine.submit(request(noise(1, number)), lambda event: None)
            while engine.num_running < num:
                engine.step()
            for _ in range(4):
                gpu.reset()
                engine.step()
                counted.append(gpu.launches)
        if engine.num_running < num:
            raise RuntimeError(f"{num - engine.num_running} of {num} answers ended early: nothing was counted")
        waits.clear()
        waits.update(gpu.waits)
        most = max(launches.total() for launches in counted)
        return min((one for one in counted if one.total() > most / 2), key=Counter.total)

    return at_depth(recipe, count), waits


def churn(num_steps: int) -> dict[str, float]:
    """Shares of decoding steps that are played, recorded and launched one by one while answers come and go."""
    tokenizer = tokenizer_of()
    model = small_model(tokenizer)
    gpu = PretendedGpu(len(tokenizer))
    random = np.random.default_rng(0)
    clips = [noise(1 + number % 3, number) for number in range(2 * SLOTS)]
    kinds: Counter[str] = Counter()
    warm = 2 * NEW_TOKENS  # steps until as many answers run as ever
    with gpu.running():
        engine = Engine(model.to(CUDA), tokenizer, Serve(num_slots=SLOTS, max_new_tokens=NEW_TOKENS))
        for number in range(num_steps + warm):
            for _ in range(random.poisson(ARRIVALS)):
                engine.submit(request(clips[int(random.integers(len(clips)))]), lambda event: None)
            before = gpu.recorded, gpu.replayed, engine.counts.decode_steps
            engine.step()
            if number >= warm and engine.counts.decode_steps > before[2]:
                recorded, replayed = gpu.recorded > before[0], gpu.replayed > before[1]
                kinds["recorded" if recorded else "replayed" if replayed else "eager"] += 1
    return {kind: kinds[kind] / kinds.total() for kind in ("replayed", "recorded", "eager")}


def host_ms(num: int) -> float:
    """Milliseconds of a step of `num` answers of a model of almost nothing on the CPU."""
    tokenizer = tokenizer_of()
    engine = Engine(small_model(tokenizer), tokenizer, Serve(num_slots=SLOTS, max_new_tokens=NEW_TOKENS))
    for number in range(num):
        engine.submit(request(noise(1, number)), lambda event: None)
    while engine.num_running < num:
        engine.step()
    seconds = []
    for _ in range(NEW_TOKENS // 2):
        started = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - started)
    return 1000 * float(np.median(seconds))


# --- Audio and training ----------------------------------------------------------------------------------------------


def tower(num_windows: int = 128) -> dict[str, float]:
    """MB moved a window, and the blocks with fused attention."""
    model, gpu = paper_model("af2-3b"), PretendedGpu()
    gpu.place(model)
    with gpu.running(), torch.no_grad():
        waveforms = torch.zeros(num_windows, WINDOW_SAMPLES, dtype=torch.int16, device=CUDA)
        for _ in range(2):  # what is made once is there the second time
            gpu.reset()
            model.audio_tower(waveforms)
    return {"tower_mb_per_window": gpu.moved_bytes / num_windows / 1e6, "tower_fused_blocks": gpu.fused}


def train(recipe: str = "af2-3b") -> tuple[dict[str, float], Counter[str], Counter[str]]:
    """Figures of the first stage's fullest row, launches by operator and waits."""
    waits: Counter[str] = Counter()

    def count(num_layers: int) -> Counter[str]:
        gpu, saved, seen = train_row(recipe, num_layers)
        waits.clear()
        waits.update(seen)
        return gpu.launches + Counter({"saved bytes": saved, "moved bytes": gpu.moved_bytes})

    train_row(recipe, 2)  # what is made once
    launches = at_depth(recipe, count)
    saved, moved = launches.pop("saved bytes"), launches.pop("moved bytes")
    figures = {
        "train_syncs": waits.total(),
        "train_stage1_kernels": launches.total(),
        "train_stage1_moved_gb": moved / 1e9,
        "train_stage1_saved_mb": saved / 1e6,
    }
    return figures, launches, waits


def train_row(
    recipe: str, num_layers: int, *, lora: Lora | None = None, recomputed: bool = False
) -> tuple[PretendedGpu, int, Counter[str]]:
    """Forward and backward of the row: what the GPU counted, bytes kept in between, waits up to the loss.

    Args:
        lora: adapters beside what the stage trains, on cached features.
        recomputed: whether the backward pass, which is left out then, would recompute the layers.
    """
    found = load_recipe(recipe)
    stage, model, gpu = found.stages[0], paper_model(recipe, num_layers), PretendedGpu()
    if lora is not None:
        stage = stage.model_copy(update={"trainable": [*stage.trainable, "lora"], "lora": lora})
        add_lora(model.language_model, lora)
        model.to(torch.bfloat16)
    gpu.place(model)
    freeze_except(model, stage.trainable)
    model.train()
    checkpoint_activations(model, layers=recomputed, tower=False)
    budget, ids = stage.budget, model.config.audio_token_id
    row = made_up_row(
        stage, "longest", budget.windows_per_row, budget.text_tokens_per_row, found.model.max_text_tokens, ids
    )
    if lora is not None:
        features = torch.zeros(len(row.waveforms), TOKENS_PER_WINDOW, model.audio_tower.output_size)
        row = replace(row, waveforms=features.to(torch.bfloat16))
    kept: dict[int, tuple[Any, int]] = {}  # by storage, which is held so that its address stays its own

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.device.type == "cuda" and storage._cdata not in weights:
            kept[storage._cdata] = storage, max(kept.get(storage._cdata, (None, 0))[1], tensor_bytes(tensor))
        return tensor

    task = LmTask("", stage)
    with gpu.running():
        weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        moved = row.to(CUDA)
        gpu.reset()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = task.loss(model, moved, task.count(row))
        waits = Counter(gpu.waits)
        if not recomputed:
            backward(loss, gpu)
    return gpu, sum(num for _, num in kept.values()), waits


def adapted(recipe: str = "af2-3b") -> dict[str, float]:
    """MB that the row keeps with adapters beside the fusion and the transform, on cached features."""

    def count(num_layers: int, recomputed: bool) -> Counter[str]:
        return Counter({"saved": train_row(recipe, num_layers, lora=Lora(rank=16), recomputed=recomputed)[1]})

    return {
        f"lora_{name}_mb": at_depth(recipe, partial(count, recomputed=recomputed))["saved"] / 1e6
        for name, recomputed in (("saved", False), ("recomputed", True))
    }


def main() -> None:
    """Count and print."""
    torch.set_num_threads(1)
    description = (__doc__ or "").replace("{COMMIT}", COMMIT)
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a fifth of the arrivals, 0.5B with one answer alone")
    parser.add_argument("--names", action="store_true", help="also what is launched and waited for, by name")
    args = parser.parse_args()
    result: dict[str, Any] = {}

    def show(name: str, launches: Counter[str], waits: Counter[str]) -> None:
        if args.names:
            print(f"{name}: {dict(launches.most_common(30))}\n  waits: {dict(waits)}", flush=True)

    for recipe, short in (("af2-0.5b", "05b"), ("af2-3b", "3b")):
        for num in (1, SLOTS) if short == "3b" or not args.quick else (1,):
            launches, waits = decode(recipe, num)
            result[f"decode_{short}_{num}_kernels"] = launches.total()
            show(f"decode {recipe} {num}", launches, waits)
    result["decode_syncs"] = waits.total()
    shares = churn(100 if args.quick else 500)
    result |= {f"{kind}_share": share for kind, share in shares.items()} | tower()
    figures, launches, waits = train()
    show("train", launches, waits)
    result |= figures | adapted() | {f"host_ms_{num}": host_ms(num) for num in (1, SLOTS)}
    result |= {f"{key}_before": value for key, value in BEFORE.items() if key in result}
    print(json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in result.items()}))


if __name__ == "__main__":
    main()
