"""What training costs beside its arithmetic: time outside a step, a plain loop's speed, a frozen tower's cache, disk.

A small corpus of rendered sounds and the models of recipe `tiny`, the tower random, two workers of one thread, AdamW
for all. The last line is one JSON object:

- `outside_share`: share of stage 2's time, after warm-up, spent waiting for data, reporting and checkpointing; goal: at
  most 0.1.
- `vs_plain`: questions a second of the same stage against a plain PyTorch loop, two DDP processes over batches decoded
  and collated beforehand, products in bf16 too; goal: at least 0.85.
- `mixed_share`: median time of a step of that stage, which is `mixed`, over the same in fp32.
- `cached_stage_speedup`: stage 3 over 3 epochs, the time of its steps with `features: cached` and of building the cache
  against without, with a tower of HTSAT-tiny's size (27 M parameters, as in LAION's CLAP; the paper's has 200 M); goal:
  above 1.3. Starting the stage's workers takes as long either way and is left out, starting the cache's is counted.
  `cached_stage_speedup_tiny` is that with the tower of `tiny`, 1.5 M, whose cache costs mostly the start of processes.
  `cached_loss_gap` is the largest difference of a step's loss. All in fp32: in bf16 rounding alone makes more.
- `checkpoint_share`: size of a stage-3 checkpoint over a full one (all weights and an optimiser for them, 12 bytes a
  parameter), and `checkpoint_mb`.

With --quick stage 2 alone runs, once, and the first two figures are all there is.

    python benchmarks/train_step.py [--quick] [--dir DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors import safe_open
from transformers import AutoTokenizer

from af2_ray import console
from af2_ray.config import Recipe, load_recipe
from af2_ray.data.batching import plan_epoch, text_lengths, window_counts
from af2_ray.data.collate import LmCollator
from af2_ray.data.manifest import read_samples
from af2_ray.runs.fork import fork
from af2_ray.runs.run import Run, finished, read_metrics
from af2_ray.runs.tracking import Tracker
from af2_ray.synth.corpus import make_corpus
from af2_ray.train.optim import optimizer_groups
from af2_ray.train.precision import autocast, resolve
from af2_ray.train.stages import assemble, plan_stage, prepare_language_model, train_run, train_stage
from af2_ray.train.task import LmTask

WORKERS = 2
EPOCHS = 3
HTSAT_TINY = (
    "model.audio={embed_dim: 96, depths: [2, 2, 6, 2], num_heads: [4, 8, 16, 32], mlp_ratio: 4, hidden_act: gelu}"
)
WARMUP = 0.25  # of the steps


def recipe_of(folder: Path, *, quick: bool, features: str = "audio", precision: str, large: bool = False) -> Recipe:
    """Recipe tiny on a small corpus: a short LM run, a random tower, stages 2 and 3; `large`: HTSAT-tiny, stage 3."""
    data = folder / "data"
    scenes = (24, 8) if quick else (160, 40)
    common = "split: train, captions_per_scene: 0, num_events: [1, 3]"
    sets = [
        f"{{name: short, {common}, num_scenes: {scenes[0]}, duration_s: [5, 30], questions_per_scene: 5}}",
        f"{{name: long, {common}, num_scenes: {scenes[1]}, duration_s: [90, 180], questions_per_scene: 7}}",
    ]
    base = load_recipe(
        "tiny",
        [
            f"corpus={{dir: {data}, sources: rendered, num_classes: 8, sets: [{', '.join(sets)}]}}",
            "model.lm.pretrain.steps=4",
            "model.lm.pretrain.reading=[]",
            "model.lm.pretrain.drills=[]",
            "clap=null",
            *([HTSAT_TINY] if large else []),
            f"model.audio.weights={tower_of(folder, large=large)}",
            "stages.finetune.optimizer.muon_lr=null",
            "stages.long.optimizer.muon_lr=null",
            f"stages.finetune.data=[{{manifest: {data}/short/train.json}}]",
            f"stages.finetune.steps={12 if quick else 60}",
            f"stages.finetune.checkpoint_every={6 if quick else 20}",
            f"stages.long.data=[{{manifest: {data}/long/train.json}}]",
            f"stages.long.features={features}",
            f"deepspeed.precision={precision}",
            "evaluation={}",
        ],
    )
    return base.model_copy(update={"stages": base.stages[2 if large else 1 :]})


def tower_of(folder: Path, *, large: bool) -> Path:
    """Where the random tower lies."""
    return folder / ("htsat-tiny" if large else "tower")


def save_tower(recipe: Recipe, folder: Path) -> None:
    """A random AF-CLAP of the recipe's tower."""
    from transformers import T5Config

    from af2_ray.models.afclap import AfClapConfig, AfClapModel
    from af2_ray.models.from_recipe import audio_tower_config

    torch.manual_seed(0)
    text = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    config = AfClapConfig(text_config=text, audio_config=audio_tower_config(recipe.model.audio), projection_dim=16)
    AfClapModel(config).save_pretrained(folder)


def cached_and_not(folder: Path, first: Run, *, large: bool) -> dict[str, Run]:
    """Stage 3 (and, with the tower of tiny, stage 2) with audio and with cached features, in fp32."""
    runs: dict[str, Run] = {}
    for features in ("audio", "cached"):
        exact = steps_of(recipe_of(folder, quick=False, features=features, precision="fp32", large=large), first)
        origin = runs["audio"].root if runs else first.root
        runs[features] = fork(exact, origin, folder / f"{features}{'-large' if large else ''}")[0]
        train_run(runs[features])
    return runs


def cache_figures(runs: dict[str, Run]) -> dict[str, float]:
    """What stage 3 gains by the cache, and what it loses."""
    last = {name: run.stage_dir(run.recipe.stages[-1].name) for name, run in runs.items()}
    history = {name: read_metrics(path) for name, path in last.items()}
    seconds = {name: sum(row["step_s"] for row in rows) for name, rows in history.items()}
    facts: dict[str, Any] = finished(last["cached"]) or {}
    gaps = [abs(a["loss"] - b["loss"]) for a, b in zip(history["audio"], history["cached"], strict=True)]
    return {
        "cached_stage_speedup": seconds["audio"] / (seconds["cached"] + facts["features_s"]),
        "cached_loss_gap": max(gaps),
        "features_s": facts["features_s"],
        **{f"steps_s_{name}": value for name, value in seconds.items()},
    }


def steps_of(recipe: Recipe, run: Run) -> Recipe:
    """The recipe with as many steps in its last stage as `EPOCHS` epochs of its data have."""
    stage = recipe.stages[-1]
    samples = read_samples(stage.data[0].manifest)
    tokenizer = AutoTokenizer.from_pretrained(run.lm_dir / "model")
    lengths = text_lengths(tokenizer, samples, max_tokens=recipe.model.max_text_tokens)
    windows = window_counts(samples, stage.max_windows)
    epoch = plan_epoch(samples, windows=windows, text_lengths=lengths, budget=stage.budget, seed=recipe.seed)
    last = stage.model_copy(update={"steps": EPOCHS * epoch.num_steps, "checkpoint_every": 10**6})
    return recipe.model_copy(update={"stages": [*recipe.stages[:-1], last]})


def outside_share(folder: Path) -> float:
    """Share of the steps' time spent outside forward, backward and update."""
    history = read_metrics(folder)
    steady = history[int(WARMUP * len(history)) :]
    return sum(row["wait_s"] + row["report_s"] for row in steady) / sum(row["step_s"] for row in steady)


def questions_per_s(folder: Path) -> float:
    """Questions a second of a stage after warm-up."""
    history = read_metrics(folder)
    steady = history[int(WARMUP * len(history)) :]
    return sum(row["questions"] for row in steady) / sum(row["step_s"] for row in steady)


def median_step_s(folder: Path) -> float:
    """Median seconds of a step after warm-up."""
    history = read_metrics(folder)
    return statistics.median(row["step_s"] for row in history[int(WARMUP * len(history)) :])


def plain_loop(rank: int, rows_path: str, start: str, recipe: Recipe, result_path: str) -> None:
    """One of two processes of a loop without Ray, DeepSpeed, feed, checkpoints: DDP over batches that are there."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{result_path}.store", WORKERS)
    dist.init_process_group("gloo", rank=rank, world_size=WORKERS, store=store)
    stage = recipe.stages[0]
    task = LmTask(start, stage)
    module = task.build()
    precision = resolve(recipe.deepspeed.precision, on_gpu=False)
    if precision == "mixed":
        module.language_model.set_attn_implementation("eager")  # as the engine does
    model = torch.nn.parallel.DistributedDataParallel(module, find_unused_parameters=True)
    optimizer = torch.optim.AdamW(optimizer_groups(module, stage.optimizer), betas=stage.optimizer.betas)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    rows = torch.load(rows_path, weights_only=False)[rank::WORKERS]
    first = int(WARMUP * len(rows))
    for number, row in enumerate(rows):
        if number == first:
            dist.barrier()
            started = time.perf_counter()
        with autocast("cpu", precision):
            loss = task.loss(model, row, task.count(row))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, stage.optimizer.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
    dist.barrier()
    if rank == 0:
        Path(result_path).write_text(str(time.perf_counter() - started))
    dist.destroy_process_group()


def plain_questions_per_s(run: Run, folder: Path) -> float:
    """Questions a second of `plain_loop` over the rows of the run's first stage."""
    stage = run.recipe.stages[0]
    tokenizer = AutoTokenizer.from_pretrained(run.lm_dir / "model")
    collator = LmCollator(tokenizer, max_windows=stage.max_windows, max_text_tokens=run.recipe.model.max_text_tokens)
    rows = [collator(row).tensors() for row in plan_stage(run, stage, tokenizer).rows()]
    rows_path, result = folder / "rows.pt", folder / "plain_s.txt"
    torch.save(rows, rows_path)
    start = str(run.start_dir / "model")
    mp.spawn(plain_loop, args=(str(rows_path), start, run.recipe, str(result)), nprocs=WORKERS)
    first = int(WARMUP * (len(rows) // WORKERS)) * WORKERS
    return sum(len(row.sample_ids) for row in rows[first:]) / float(result.read_text())


def checkpoint_sizes(run: Run) -> dict[str, float]:
    """Size of the last stage's last checkpoint, and over that of a full one."""
    folder = run.stage_dir(run.recipe.stages[-1].name)
    last = sorted((folder / "train").glob("step_*"))[-1]
    size = sum(path.stat().st_size for path in last.rglob("*") if path.is_file())
    with safe_open(folder / "model" / "model.safetensors", framework="np") as file:
        count = sum(int(torch.Size(file.get_slice(name).get_shape()).numel()) for name in file.keys())  # noqa: SIM118
    return {"checkpoint_share": size / (12 * count), "checkpoint_mb": size / 1e6}


def measure(folder: Path, *, quick: bool) -> dict[str, float]:
    """All figures; with `quick` those of stage 2 alone."""
    recipe = recipe_of(folder, quick=quick, precision="mixed")
    assert recipe.corpus is not None
    make_corpus(recipe.corpus)
    save_tower(recipe, tower_of(folder, large=False))
    with console.cluster(folder / "logs"):
        first = Run.open(recipe, folder / "first")
        tracker = Tracker(first)
        prepare_language_model(first, tracker)
        train_stage(first, recipe.stages[0], assemble(first), tracker)
        plain = plain_questions_per_s(first, folder)  # at once: a machine's speed changes within minutes
        if not quick:
            runs = cached_and_not(folder, first, large=False)
            save_tower(recipe_of(folder, quick=False, precision="fp32", large=True), tower_of(folder, large=True))
            large = cached_and_not(folder, first, large=True)
    stage = first.stage_dir("finetune")
    result = {
        "outside_share": outside_share(stage),
        "vs_plain": questions_per_s(stage) / plain,
    }
    if quick:
        return result
    return result | {
        "mixed_share": median_step_s(stage) / median_step_s(runs["audio"].stage_dir("finetune")),
        **cache_figures(large),
        **{f"{name}_tiny": value for name, value in cache_figures(runs).items()},
        **checkpoint_sizes(runs["audio"]),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps on a few scenes")
    parser.add_argument("--dir", type=Path, help="keep runs and corpus here, to go on from (default: thrown away)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.dir or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        result = measure(folder, quick=args.quick)
    print(json.dumps({key: round(value, 5) for key, value in result.items()}))


if __name__ == "__main__":
    main()
