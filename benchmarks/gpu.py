"""What one GPU gives at the paper's sizes, on random weights: answering (part a) and training (part b).

Answering is the serving engine's, on recordings of 10 s and 5 minutes. Training goes through the DeepSpeed engine as a
stage does (ZeRO of the recipe, bf16, one worker, the row's budget full); MFU and the memory foretold are those of
`af2_ray/train/costs.py`, on which `jobs/plan.py` stands. Every section is a process of its own, and is left out where
`--seconds` would not suffice. A part's last line is one JSON object, its keys `<recipe>/<what>`:

- `encode_windows_per_s`; `warm_s`: what the engine does before it is ready, if it does anything;
- `first_token_300s_s`: of the first recording of 5 minutes, `first_token_300s_warm_s`: of the third, and
  `first_token_280s_s`: of a length not met before; `second_question_ratio`: share of the first for a further question;
- `tokens_per_s_1x10s`, `1x300s`, `16x300s`: whole answers of 64 tokens, the prompt's reading included;
- `step_ms_1x300s`, `16x300s`: median of steady steps, `kernels_...` and `busy_...`: launches of one, and the share of
  its time in which the GPU works;
- `arrivals_tokens_per_s`, `arrivals_step_ms_p50`, `_p95`, `arrivals_replayed`: 16 slots, a question about one of 16
  recordings of 5 minutes by chance every fourth step, 64 tokens each; the share of steps that is a played recording;
- `<stage>/step_s` (null: out of memory), `windows_per_s`, `mfu`, `peak_gib`, `plan_gib` (foretold for one GPU) of steps
  of one row, `kernels`, `busy` and `syncs`; `<stage>/rows<N>/row_s`: of a row where N make a step, as in recipes;
- with `--compare`: `generate_tokens_per_s_1`, `_16`: transformers' `generate` with a static cache, compiled, on the
  plain LM of the same size, which hears nothing: what a user would take instead.

    python benchmarks/gpu.py [--part a|b] [--quick] [--recipes af2-0.5b af2-3b] [--tree FOLDER]

`--tree`: a checkout of another commit, whose `af2_ray` is measured by this same script.
"""

from __future__ import annotations

import sys

if "--tree" in sys.argv:  # before anything of the project is imported, here and in the sections' processes
    sys.path.insert(0, sys.argv[sys.argv.index("--tree") + 1])

import argparse
import json
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from typing import Any
from unittest import mock

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
from af2_ray.text import SPECIAL_TOKENS, add_special_tokens, train_tokenizer
from af2_ray.train import costs
from af2_ray.train.costs import Work
from af2_ray.train.deepspeed import checkpoint_activations, start_engine
from af2_ray.train.memory_probe import made_up_row
from af2_ray.train.optim import freeze_except
from af2_ray.train.step import Step
from af2_ray.train.task import LmTask

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
NEW_TOKENS, SLOTS, ARRIVALS = 64, 16, 0.25
QUESTION = "Which sound is heard first? (A) dog (B) drum (C) rain (D) violin"
TINY = [
    "model.audio.embed_dim=8",
    "model.audio.depths=[1, 1, 1, 1]",
    "model.audio.num_heads=[1, 2, 2, 2]",
    "model.lm.hidden_size=32",
    "model.lm.num_layers=2",
    "model.lm.num_heads=2",
    "model.lm.num_kv_heads=1",
    "model.lm.intermediate_size=64",
    "model.transform.num_heads=2",
    "model.transform.inner_size=64",
    "model.cross_attention.num_heads=2",
    "model.cross_attention.head_dim=16",
]


def read(name: str) -> Recipe:
    """A recipe; `tiny` is cut down to what a test of this script can run."""
    return load_recipe(name, TINY if name == "tiny" else ())


def build(recipe: Recipe) -> AudioFlamingo2ForConditionalGeneration:
    """A random model of the recipe's size on the device."""
    torch.set_default_dtype(DTYPE)
    try:
        with DEVICE:
            model = AudioFlamingo2ForConditionalGeneration(recipe_config(recipe))
    finally:
        torch.set_default_dtype(torch.float32)
    open_gates(model)
    return model.to(DEVICE, DTYPE)


def wait() -> None:
    """Until the device has done all it was told."""
    if ON_GPU:
        torch.cuda.synchronize()


def timed(call: Callable[[], Any]) -> float:
    """Seconds of a call."""
    wait()
    started = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - started


def profiled(call: Callable[[], Any], num: int = 1) -> dict[str, float]:
    """Kernels of a call, and the share of its time in which the GPU works; of a mean of `num` calls."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CUDA if ON_GPU else ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        seconds = timed(lambda: [call() for _ in range(num)])
    if not ON_GPU:
        return {"kernels": 0.0, "busy": 0.0}
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    busy, end = 0.0, 0.0
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return {"kernels": len(spans) / num, "busy": busy / 1e6 / seconds}


# --- Answering -------------------------------------------------------------------------------------------------------


def noise(num_windows: int, seed: int) -> Clip:
    """A recording of noise."""
    random = np.random.default_rng(seed)
    return Clip.of(random.integers(-9999, 9999, (num_windows, WINDOW_SAMPLES), dtype=np.int16))


def asked(clip: Clip, num_tokens: int = NEW_TOKENS) -> Request:
    """A question that is answered in so many tokens."""
    return Request(QUESTION, (clip,), max_new_tokens=num_tokens, min_new_tokens=num_tokens)


def answer(engine: Engine, clips: list[Clip], num_tokens: int = NEW_TOKENS) -> tuple[float, list[Answer]]:
    """Seconds of one question about each clip, answered together, and the answers."""
    answers: list[Any] = []
    seconds = timed(lambda: answers.extend(engine.answer([asked(clip, num_tokens) for clip in clips])))
    if faults := [event for event in answers if not isinstance(event, Answer)]:
        raise RuntimeError(f"no answer: {faults[0]}")
    return seconds, answers


def full_tokenizer(size: int) -> Any:
    """A tokenizer that makes `size` tokens of the LM's own ids, few of them by itself, and knows the markers."""
    tokenizer = train_tokenizer([QUESTION.lower()] * 2, vocab_size=400)
    tokenizer.add_tokens([f"<{number}>" for number in range(size - len(tokenizer))])
    add_special_tokens(tokenizer)
    return tokenizer


def encode(model: AudioFlamingo2ForConditionalGeneration, num_windows: int) -> float:
    """Windows a second through the tower and the audio transformer, clips of one window."""
    waveforms = torch.randint(-9999, 9999, (num_windows, WINDOW_SAMPLES), dtype=torch.int16, device=DEVICE)
    with torch.inference_mode():
        return num_windows / min(timed(lambda: model.encode_audio(waveforms, [1] * num_windows)) for _ in range(3))


def steady(engine: Engine, clips: list[Clip], name: str) -> dict[str, float]:
    """Median of steps in which nothing begins or ends, and what the profiler sees of them."""
    for clip in clips:
        engine.submit(asked(clip), lambda event: None)
    while engine.num_running < len(clips):
        engine.step()
    for _ in range(8):
        engine.step()
    found = {f"step_ms_{name}": 1000 * float(np.median([timed(engine.step) for _ in range(24)]))}
    found |= {f"{key}_{name}": value for key, value in profiled(engine.step, 4).items()}
    while engine.step():
        pass
    return found


def arrivals(engine: Engine, clips: list[Clip], num_steps: int) -> dict[str, float]:
    """Rates while answers come and go by chance, as many as the slots hold."""
    random, seconds, played = np.random.default_rng(0), [], 0
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph: Any) -> None:
        nonlocal played
        played += 1
        replay(graph)

    warm = 2 * NEW_TOKENS
    with mock.patch.object(torch.cuda.CUDAGraph, "replay", counted) if ON_GPU else nullcontext():
        for number in range(warm + num_steps):
            for _ in range(random.poisson(ARRIVALS)):
                engine.submit(asked(clips[int(random.integers(len(clips)))]), lambda event: None)
            if number == warm:
                tokens, steps, played = engine.counts.new_tokens, engine.counts.decode_steps, 0
            spent = timed(engine.step)
            if number >= warm:
                seconds.append(spent)
    engine.fail_all()
    return {
        "arrivals_tokens_per_s": (engine.counts.new_tokens - tokens) / sum(seconds),
        "arrivals_step_ms_p50": 1000 * float(np.percentile(seconds, 50)),
        "arrivals_step_ms_p95": 1000 * float(np.percentile(seconds, 95)),
        "arrivals_replayed": played / max(1, engine.counts.decode_steps - steps),
    }


def serve(recipe: Recipe, quick: bool) -> dict[str, float]:
    """Rates of encoding and answering."""
    model = build(recipe)
    long = min(30, int(model.config.max_windows))
    tokenizer = full_tokenizer(model.config.text_config.vocab_size - len(SPECIAL_TOKENS))
    found = {"encode_windows_per_s": encode(model, 256 if ON_GPU else 4)}
    engine = Engine(model, tokenizer, Serve(num_slots=SLOTS, max_new_tokens=NEW_TOKENS, audio_memory_mb=16384))
    if hasattr(engine, "warm"):
        found["warm_s"] = timed(engine.warm)
    answer(engine, [noise(1, 0)])
    first = noise(long, 2)
    for name, clip in (
        ("300s", first),
        ("300s_again", first),
        ("300s_", noise(long, 3)),
        ("300s_warm", noise(long, 4)),
    ):
        found[f"first_token_{name}_s"] = answer(engine, [clip], 8)[1][0].first_token_s
    found.pop("first_token_300s__s")
    found["first_token_280s_s"] = answer(engine, [noise(max(1, long - 2), 5)], 8)[1][0].first_token_s
    found["second_question_ratio"] = found.pop("first_token_300s_again_s") / found["first_token_300s_s"]
    short, many = noise(1, 1), [noise(long, 10 + number) for number in range(SLOTS)]
    answer(engine, [short])  # encoded now: what follows reads the prompt and writes
    answer(engine, many)
    for name, clips in (("1x10s", [short]), ("1x300s", [many[0]]), ("16x300s", many)):
        found[f"tokens_per_s_{name}"] = len(clips) * NEW_TOKENS / answer(engine, clips)[0]
        if name != "1x10s":
            found |= steady(engine, clips, name)
    return found | arrivals(engine, many, (100 if quick else 300) if ON_GPU else 8)


def compare(recipe: Recipe, quick: bool) -> dict[str, float]:
    """transformers' `generate` on the plain LM: static cache, compiled, the third call's tokens a second."""
    from transformers import AutoModelForCausalLM

    config = recipe_config(recipe).text_config
    with DEVICE:
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPE).to(DEVICE, DTYPE).eval()
    found = {}
    for num in (1,) if quick else (1, SLOTS):
        ids = torch.randint(5, 250, (num, 96), device=DEVICE)
        options: dict[str, Any] = {"do_sample": False, "min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
        options |= {"cache_implementation": "static", "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
        seconds = [timed(lambda ids=ids, options=options: model.generate(ids, **options)) for _ in range(3)]  # type: ignore[misc]
        found |= {f"generate_tokens_per_s_{num}": num * NEW_TOKENS / seconds[-1], f"generate_first_s_{num}": seconds[0]}
    return found


# --- Training --------------------------------------------------------------------------------------------------------


def train(recipe: Recipe, stage: Stage, num_rows: int, quick: bool) -> dict[str, float]:
    """Seconds, rates and memory of a stage's steps of `num_rows` of its fullest rows."""
    model = build(recipe)
    freeze_except(model, stage.trainable)
    checkpoint_activations(
        model, layers=recipe.deepspeed.activation_checkpointing, tower=recipe.model.audio.gradient_checkpointing
    )
    budget, limit, ids = stage.budget, recipe.model.max_text_tokens, model.config.audio_token_id
    row = made_up_row(stage, "longest", budget.windows_per_row, budget.text_tokens_per_row, limit, ids)
    questions, length = row.input_ids.shape
    work = Work(len(row.waveforms), questions * length, stage.max_windows, length, int((row.labels >= 0).sum()))
    meta = costs.meta_model(model.config)
    counts = costs.parameters(meta)
    engine = start_engine(model, recipe.deepspeed, stage.optimizer, num_steps=100, accumulation=num_rows)
    task = LmTask("", stage)
    step = Step(engine, task)
    warm, num = (2, 4) if num_rows == 1 else (1, 2)
    for _ in range(warm):
        step([row] * num_rows)
    seconds = timed(lambda: [step([row] * num_rows) for _ in range(num)]) / num
    if num_rows > 1:
        return {f"rows{num_rows}/row_s": seconds / num_rows, f"rows{num_rows}/step_s": seconds}
    flops = costs.step_flops(meta, work, stage.trainable)
    gpu = torch.cuda.get_device_name().lower() if ON_GPU else ""
    peak = next((flops for name, flops in costs.PEAK_FLOPS.items() if name in gpu), float("nan"))
    state = costs.state_gib(counts, stage.trainable, zero_stage=recipe.deepspeed.zero_stage, gpus=1)
    activations = costs.activation_gib(
        meta, work, stage.trainable, checkpointing=recipe.model.audio.gradient_checkpointing
    )
    found = {
        "step_s": seconds,
        "windows_per_s": work.windows / seconds,
        "mfu": flops / seconds / peak,
        "peak_gib": torch.cuda.max_memory_allocated() / costs.GIB if ON_GPU else 0.0,
        "plan_gib": sum(state.values()) + sum(activations.values()),
        "syncs": syncs(lambda: task.loss(engine, row.to(DEVICE), task.count(row))),
    }
    return found | ({} if quick else profiled(lambda: step([row])))


def syncs(call: Callable[[], Any]) -> float:
    """How often the host waits for the GPU in a call, by PyTorch's own count."""
    if not ON_GPU:
        call()
        return 0.0
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return float(sum("synchroniz" in str(warning.message) for warning in seen))


def measure(name: str, section: str, num_rows: int, scale: int, quick: bool) -> dict[str, float]:
    """One section in this process: `serve`, `compare`, or a stage, its rows `scale` times as large as the recipe's."""
    recipe = read(name)
    if section in ("serve", "compare"):
        return (serve if section == "serve" else compare)(recipe, quick)
    stage = {stage.name: stage for stage in recipe.stages}[section]
    size = {key: scale * getattr(stage.budget, key) for key in ("windows_per_row", "text_tokens_per_row")}
    if not ON_GPU:
        size = {"windows_per_row": stage.max_windows, "text_tokens_per_row": 64}
    stage = stage.model_copy(update={"budget": stage.budget.model_copy(update=size)})
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    where = {"device_id": torch.device("cuda:0")} if ON_GPU else {}
    dist.init_process_group("nccl" if ON_GPU else "gloo", rank=0, world_size=1, store=dist.HashStore(), **where)
    try:
        return train(recipe, stage, num_rows, quick)
    except torch.cuda.OutOfMemoryError:
        return {"step_s": float("inf")}
    finally:
        dist.destroy_process_group()


def sections(names: list[str], parts: str, scale: int, quick: bool, with_compare: bool) -> list[tuple[str, str, int]]:
    """Recipe, section and rows a step of all that is measured, the most important first."""
    found = []
    for name in reversed(names):  # the largest first
        recipe = read(name)
        if "a" in parts and not scale:
            found += [(name, "serve", 0)] + ([(name, "compare", 0)] if with_compare else [])
        if "b" in parts:
            first, *others = [stage.name for stage in recipe.stages]
            whole = max(1, recipe.stages[0].budget.step_batches // max(1, recipe.cluster.num_workers))
            found += [(name, first, 1), *([] if scale or whole == 1 else [(name, first, whole)])]
            found += [] if quick else [(name, other, 1) for other in others]
    return sorted(found, key=lambda section: section[1] == "compare")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["a", "b", "ab"], default="ab", help="answering, training, or both")
    parser.add_argument("--quick", action="store_true", help="fewer steps, the first stage alone, 100 s a part")
    parser.add_argument("--recipes", nargs="+", default=["af2-0.5b", "af2-3b"])
    parser.add_argument("--rows", type=int, metavar="N", help="training alone, rows N times as large as the recipe's")
    parser.add_argument("--compare", action="store_true", help="also transformers' generate on the plain LM")
    parser.add_argument("--seconds", type=float, help="no section begins that would end later (240 and 300)")
    parser.add_argument("--tree", metavar="FOLDER", help="a checkout whose af2_ray is measured in place of this one's")
    args = parser.parse_args()
    if not ON_GPU and args.recipes != ["tiny"]:
        print(json.dumps({"gpu": None}))
        return
    result: dict[str, Any] = {"gpu": torch.cuda.get_device_name() if ON_GPU else None, "tree": args.tree or "."}
    parts = "b" if args.rows else args.part
    limit = args.seconds or len(parts) * (100 if args.quick else 240 if parts == "a" else 300)
    started = time.perf_counter()
    longest = 0.0
    for name, section, num_rows in sections(args.recipes, parts, args.rows or 0, args.quick, args.compare):
        begun = time.perf_counter()
        if begun - started + longest > limit:
            print(f"{name} {section} {num_rows or ''}: left out, {limit:.0f} s would not suffice", flush=True)
            continue
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # its end frees the memory
            found = pool.submit(measure, name, section, num_rows, args.rows or 1, args.quick).result()
        longest = max(longest, (time.perf_counter() - begun) * 0.8)
        print(name, section, num_rows, {key: round(value, 4) for key, value in found.items()}, flush=True)
        prefix = name if section in ("serve", "compare") else f"{name}/{section}"
        result |= {f"{prefix}/{key}": value for key, value in found.items()}
    finite = {key: None if value in (float("inf"),) or value != value else value for key, value in result.items()}
    print(json.dumps({k: round(value, 4) if isinstance(value, float) else value for k, value in finite.items()}))


if __name__ == "__main__":
    main()
