"""What one GPU gives at the paper's sizes, on random weights: training rows of each stage, encoding, answering.

Training goes through the DeepSpeed engine as a stage does (ZeRO of the recipe, bf16, one worker, the row's budget
full); MFU and the memory foretold are those of `af2_ray/train/costs.py`, on which `jobs/plan.py` stands. Answering is
the serving engine's, on recordings of 10 s and 5 minutes, one answer at a time and sixteen together, the prompt's
reading included. The last line is one JSON object, its keys `<recipe>/<what>`:

- `<stage>/step_s` (null: out of memory), `windows_per_s`, `mfu`, `peak_gib` and `plan_gib` (foretold for one GPU),
- `encode_windows_per_s`, and of answers `tokens_per_s_1x10s`, `1x300s`, `16x300s`,
- `first_token_300s_s` and `second_question_ratio`, its share for a further question about the same recording.

    python benchmarks/gpu.py [--quick] [--recipes af2-0.5b af2-3b]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from af2_ray.audio.windows import WINDOW_SAMPLES
from af2_ray.config import Recipe, Serve, Stage, load_recipe
from af2_ray.engine.engine import Engine
from af2_ray.engine.request import Answer, Clip, Request
from af2_ray.models.from_recipe import recipe_config
from af2_ray.models.modeling_af2 import AudioFlamingo2ForConditionalGeneration
from af2_ray.models.random import open_gates
from af2_ray.text import add_special_tokens, train_tokenizer
from af2_ray.train import costs
from af2_ray.train.costs import Work
from af2_ray.train.deepspeed import checkpoint_activations, start_engine
from af2_ray.train.memory_probe import made_up_row
from af2_ray.train.optim import freeze_except
from af2_ray.train.step import Step
from af2_ray.train.task import LmTask

WARM, TIMED = 2, 4  # steps
NEW_TOKENS = 64
QUESTION = "Which sound is heard first? (A) dog (B) drum (C) rain (D) violin"


def build(recipe: Recipe, audio_token_id: int | None = None) -> AudioFlamingo2ForConditionalGeneration:
    """A random model of the recipe's size on the GPU, in bf16; `audio_token_id`: a small tokenizer's."""
    config = recipe_config(recipe)
    config.audio_token_id = audio_token_id or config.audio_token_id
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = AudioFlamingo2ForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(torch.float32)
    open_gates(model)
    return model.to("cuda", torch.bfloat16)


def train(recipe: Recipe, stage: Stage) -> dict[str, float]:
    """Seconds, rates and memory of a stage's fullest step of one row."""
    model = build(recipe)
    freeze_except(model, stage.trainable)
    checkpoint_activations(
        model, layers=recipe.deepspeed.activation_checkpointing, tower=recipe.model.audio.gradient_checkpointing
    )
    budget = stage.budget
    row = made_up_row(
        stage,
        "longest",
        budget.windows_per_row,
        budget.text_tokens_per_row,
        recipe.model.max_text_tokens,
        model.config.audio_token_id,
    )
    questions, length = row.input_ids.shape
    work = Work(len(row.waveforms), questions * length, stage.max_windows, length, int((row.labels >= 0).sum()))
    meta = costs.meta_model(model.config)
    counts = costs.parameters(meta)
    engine = start_engine(model, recipe.deepspeed, stage.optimizer, num_steps=100, accumulation=1)
    step = Step(engine, LmTask("", stage))
    for number in range(WARM + TIMED):
        if number == WARM:
            torch.cuda.synchronize()
            started = time.perf_counter()
        step([row])
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / TIMED
    flops = costs.step_flops(meta, work, stage.trainable)
    gpu = torch.cuda.get_device_name().lower()
    peak = next((flops for name, flops in costs.PEAK_FLOPS.items() if name in gpu), float("nan"))
    state = costs.state_gib(counts, stage.trainable, zero_stage=recipe.deepspeed.zero_stage, gpus=1)
    activations = costs.activation_gib(
        meta, work, stage.trainable, checkpointing=recipe.model.audio.gradient_checkpointing
    )
    return {
        "step_s": seconds,
        "windows_per_s": work.windows / seconds,
        "mfu": flops / seconds / peak,
        "peak_gib": torch.cuda.max_memory_allocated() / costs.GIB,
        "plan_gib": sum(state.values()) + sum(activations.values()),
    }


def encode(model: AudioFlamingo2ForConditionalGeneration, *, num_windows: int = 256) -> float:
    """Windows a second through the tower and the audio transformer, clips of one window."""
    waveforms = torch.randint(-9999, 9999, (num_windows, WINDOW_SAMPLES), dtype=torch.int16, device="cuda")
    with torch.inference_mode():
        for _ in range(2):
            torch.cuda.synchronize()
            started = time.perf_counter()
            model.encode_audio(waveforms, [1] * num_windows)
            torch.cuda.synchronize()
    return num_windows / (time.perf_counter() - started)


def answer(engine: Engine, clips: list[Clip]) -> tuple[float, list[Answer]]:
    """Seconds of one question about each clip, answered together in `NEW_TOKENS` tokens each."""
    asked = [Request(QUESTION, (clip,), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS) for clip in clips]
    torch.cuda.synchronize()
    started = time.perf_counter()
    answers = engine.answer(asked)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    if faults := [event for event in answers if not isinstance(event, Answer)]:
        raise RuntimeError(f"no answer: {faults[0]}")
    return seconds, [event for event in answers if isinstance(event, Answer)]


def noise(num_windows: int, seed: int) -> Clip:
    """A recording of noise."""
    random = np.random.default_rng(seed)
    return Clip.of(random.integers(-9999, 9999, (num_windows, WINDOW_SAMPLES), dtype=np.int16))


def serve(recipe: Recipe) -> dict[str, float]:
    """Rates of encoding and answering."""
    tokenizer = train_tokenizer([QUESTION.lower()] * 2, vocab_size=400)
    model = build(recipe, add_special_tokens(tokenizer))
    found = {"encode_windows_per_s": encode(model)}
    engine = Engine(model, tokenizer, Serve(num_slots=16, max_new_tokens=NEW_TOKENS, audio_memory_mb=16384))
    answer(engine, [noise(1, 0)])  # warm
    short, long = noise(1, 1), noise(30, 2)
    _, first = answer(engine, [long])
    _, second = answer(engine, [long])
    found["first_token_300s_s"] = first[0].first_token_s
    found["second_question_ratio"] = second[0].first_token_s / first[0].first_token_s
    answer(engine, [short])  # encoded now: what follows reads the prompt and writes
    many = [noise(30, 10 + number) for number in range(16)]
    answer(engine, many)
    for name, clips in (("1x10s", [short]), ("1x300s", [long]), ("16x300s", many)):
        seconds, _ = answer(engine, clips)
        found[f"tokens_per_s_{name}"] = len(clips) * NEW_TOKENS / seconds
    return found


def measure(name: str, stage_name: str | None, rows: int) -> dict[str, float]:
    """A stage of a recipe with rows `rows` times as large, or without one encoding and answering, in this process."""
    recipe = load_recipe(name)
    if stage_name is None:
        return serve(recipe)
    stage = {stage.name: stage for stage in recipe.stages}[stage_name]
    size = {key: rows * getattr(stage.budget, key) for key in ("windows_per_row", "text_tokens_per_row")}
    stage = stage.model_copy(update={"budget": stage.budget.model_copy(update=size)})
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("nccl", rank=0, world_size=1, store=dist.HashStore(), device_id=torch.device("cuda:0"))
    try:
        return train(recipe, stage)
    except torch.cuda.OutOfMemoryError:
        return {"step_s": float("inf")}
    finally:
        dist.destroy_process_group()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="af2-0.5b alone")
    parser.add_argument("--recipes", nargs="+", default=["af2-0.5b", "af2-3b"])
    parser.add_argument("--rows", type=int, metavar="N", help="training alone, rows N times as large as the recipe's")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(json.dumps({"gpu": None}))
        return
    result: dict[str, Any] = {"gpu": torch.cuda.get_device_name()}
    for name in ["af2-0.5b"] if args.quick else args.recipes:
        stages = load_recipe(name).stages
        for stage in stages if args.rows else [*stages, None]:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # its end frees the memory
                found = pool.submit(measure, name, stage.name if stage else None, args.rows or 1).result()
            print(name, stage.name if stage else "", {key: round(value, 3) for key, value in found.items()}, flush=True)
            prefix = f"{name}/{stage.name}" if stage else name
            result |= {f"{prefix}/{key}": value for key, value in found.items()}
    finite = {key: None if value == float("inf") else value for key, value in result.items()}
    print(json.dumps({k: round(value, 4) if isinstance(value, float) else value for k, value in finite.items()}))


if __name__ == "__main__":
    main()
