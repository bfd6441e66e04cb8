"""The curriculum: a recipe's steps in order, each from the one before, each skipped once it is finished.

language model -> AF-CLAP -> assembled start -> stage 1 -> stage 2 -> stage 3. A step reads only the export of the
step before it, so any of them can be repeated by removing its folder.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from af2_ray.config import Dataset, Stage
from af2_ray.data.batching import Plan, plan_steps, text_lengths
from af2_ray.data.collate import LmCollator
from af2_ray.data.durations import fill_durations
from af2_ray.data.manifest import Sample, check_samples, read_samples
from af2_ray.data.quarantine import Failure, Quarantine
from af2_ray.models.afclap import AfClapModel
from af2_ray.models.configuration_af2 import AudioFlamingo2Config
from af2_ray.models.modeling_af2 import AudioFlamingo2ForConditionalGeneration
from af2_ray.models.processing_af2 import AudioFlamingo2FeatureExtractor, AudioFlamingo2Processor
from af2_ray.text import AUDIO, SPECIAL_TOKENS
from af2_ray.train.clap import train_clap
from af2_ray.train.language_model import prepare_lm
from af2_ray.train.run import Run, finished, mark_finished, read_metrics, replacing
from af2_ray.train.task import LmTask
from af2_ray.train.tracking import Tracker
from af2_ray.train.trainer import Job, fit

logger = logging.getLogger(__name__)

Watch = Callable[[str, Path, int], AbstractContextManager[Any]]
"""Called around each step with its title, its folder (whose `metrics.jsonl` grows) and its number of steps."""


def train_run(run: Run, *, watch: Watch | None = None) -> list[dict[str, Any]]:
    """Bring a run to its end: every step that is not finished yet, in order.

    Returns:
        The facts of LM, AF-CLAP and stages (see `trainer.fit`), finished now or before.
    """
    watch = watch or (lambda title, folder, num_steps: nullcontext())
    tracker = Tracker(run)
    tracker.parent()
    facts = [prepare_language_model(run, tracker, watch)]
    if run.recipe.clap is not None:
        with watch("AF-CLAP", run.clap_dir, run.recipe.clap.steps):
            facts.append(train_clap(run, tracker))
    start = assemble(run)
    for stage in run.recipe.stages:
        with watch(f"stage {stage.name}", run.stage_dir(stage.name), stage.steps):
            facts.append(train_stage(run, stage, start, tracker))
        start = run.stage_dir(stage.name) / "model"
    tracker.finish("parent")
    return facts


def train_stage(run: Run, stage: Stage, start: Path, tracker: Tracker) -> dict[str, Any]:
    """Train one stage from the Hugging Face folder `start`, or return its facts if it is finished."""
    folder = run.stage_dir(stage.name)
    if done := finished(folder):
        return done
    tokenizer = AutoTokenizer.from_pretrained(run.lm_dir / "model")
    max_tokens = run.recipe.model.max_text_tokens
    job = Job(
        name=stage.name,
        folder=folder,
        task=LmTask(start, stage.optimizer, tuple(stage.trainable), stage.lora),
        plan=plan_stage(run, stage, tokenizer),
        collator=LmCollator(tokenizer, max_windows=stage.max_windows, max_text_tokens=max_tokens),
        num_steps=stage.steps,
        checkpoint_every=stage.checkpoint_every,
    )
    return fit(run, job, tracker)


def plan_stage(run: Run, stage: Stage, tokenizer: Any) -> Plan[Sample]:
    """The stage's plan: usable samples of its blend, what is unusable listed in the run's quarantine."""
    datasets = [(usable_samples(run, dataset), dataset.weight) for dataset in stage.data]
    length = partial(text_lengths, tokenizer, max_tokens=run.recipe.model.max_text_tokens)
    return plan_steps(
        datasets,
        stage.steps,
        max_windows=stage.max_windows,
        text_length=length,
        budget=stage.budget,
        seed=run.recipe.seed,
    )


def usable_samples(run: Run, dataset: Dataset) -> list[Sample]:
    """A manifest's usable samples; the others go to the quarantine, which ends the run when they are too many."""
    read = read_samples(dataset.manifest, dataset.root)
    samples, _ = fill_durations(read, dataset.manifest, fallback=str(run.root / "durations"))
    good, bad = check_samples(samples)
    quarantine = Quarantine(str(run.quarantine_path), run.recipe.faults.max_bad_share)
    quarantine.add([Failure(sample.uri, reason, sample.offset_s) for sample, reason in bad], len(samples))
    return good


def assemble(run: Run) -> Path:
    """Tower of AF-CLAP + LM + fresh fusion as one Hugging Face folder: where stage 1 begins."""
    target = run.start_dir / "model"
    if finished(run.start_dir):
        return target
    recipe = run.recipe.model
    torch.manual_seed(run.recipe.seed)
    language_model = AutoModelForCausalLM.from_pretrained(run.lm_dir / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(run.lm_dir / "model")
    clap_folder = recipe.audio.weights or run.clap_dir / "model"
    audio_tower = AfClapModel.from_pretrained(clap_folder, dtype=torch.float32).audio_tower
    audio_token_id = tokenizer.convert_tokens_to_ids(AUDIO)
    config = AudioFlamingo2Config(
        audio_config=audio_tower.config,
        text_config=language_model.config,
        audio_token_id=audio_token_id,
        fusion=recipe.fusion,
        audio_features=recipe.audio.features,
        cross_attn_every=recipe.cross_attention.every,
        cross_attn_heads=recipe.cross_attention.num_heads,
        cross_attn_head_dim=recipe.cross_attention.head_dim,
        cross_attn_ff_mult=recipe.cross_attention.ff_mult,
        transform_layers=recipe.transform.num_layers,
        transform_heads=recipe.transform.num_heads,
        transform_inner_size=recipe.transform.inner_size,
        transform_rope_base=recipe.transform.rope_base,
        transform_time_features=recipe.transform.time_features,
        max_windows=max(stage.max_windows for stage in run.recipe.stages),
    )
    model = AudioFlamingo2ForConditionalGeneration.from_parts(config, language_model, audio_tower)
    if recipe.lm.pretrain:  # this LM was trained with the added tokens in its own table
        rows = language_model.get_input_embeddings().weight[audio_token_id:]
        model.added_embeddings.data.copy_(rows[: len(SPECIAL_TOKENS)])
    with replacing(target) as temporary:
        model.save_pretrained(temporary)
        AudioFlamingo2Processor(AudioFlamingo2FeatureExtractor(config.max_windows), tokenizer).save_pretrained(
            temporary
        )
    mark_finished(run.start_dir, {"parameters": model.num_parameters()})
    return target


def prepare_language_model(run: Run, tracker: Tracker, watch: Watch = lambda *_: nullcontext()) -> dict[str, Any]:
    """Put the recipe's LM into the run: fetched, or trained here on the text of all stages' training manifests."""
    folder, settings = run.lm_dir, run.recipe.model.lm
    if done := finished(folder):
        return done
    started = time.perf_counter()
    datasets = {dataset.manifest: dataset for stage in run.recipe.stages for dataset in stage.data}
    samples = [sample for dataset in datasets.values() for sample in usable_samples(run, dataset)]
    child = tracker.child("lm", settings.model_dump(mode="json"))
    metrics = folder / "metrics.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    metrics.unlink(missing_ok=True)  # the LM has no checkpoints: a killed pre-training starts over

    def log(step: int, loss: float) -> None:
        with metrics.open("a") as file:
            file.write(json.dumps({"step": step, "loss": loss}) + "\n")

    num_steps = settings.pretrain.steps if settings.pretrain else 0
    with watch("language model", folder, num_steps), replacing(folder / "model") as temporary:
        facts = prepare_lm(
            settings,
            [(sample.prompt, sample.answer) for sample in samples],
            temporary,
            seed=run.recipe.seed,
            max_text_tokens=run.recipe.model.max_text_tokens,
            log=log,
        )
    tracker.log_history(child, read_metrics(folder))
    tracker.finish("lm")
    return mark_finished(folder, {"name": "lm", **facts, "seconds": round(time.perf_counter() - started, 1)})
