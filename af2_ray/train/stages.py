"""The curriculum: a recipe's steps in order, each from the one before, each skipped once it is finished.

language model -> AF-CLAP -> assembled start -> stage 1 -> stage 2 -> stage 3; or, where the recipe names a model to
train further (`model.start`), that model -> stage 1 ... A step reads only the export of the step before it, so any of
them can be repeated by removing its folder.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from af2_ray.config import Dataset, Stage
from af2_ray.data.batching import Plan, plan_epoch, plan_steps, text_lengths, window_counts
from af2_ray.data.collate import LmCollator
from af2_ray.data.feature_store import FeatureStore
from af2_ray.data.manifest import read_samples
from af2_ray.data.samples import Sample
from af2_ray.models.afclap import AfClapModel
from af2_ray.models.from_recipe import model_config
from af2_ray.models.modeling_af2 import AudioFlamingo2ForConditionalGeneration
from af2_ray.models.processing_af2 import AudioFlamingo2FeatureExtractor, AudioFlamingo2Processor
from af2_ray.models.start import adopt, start_config, start_folder
from af2_ray.runs.card import write_card
from af2_ray.runs.run import Run, finished, read_metrics
from af2_ray.runs.tracking import Tracker
from af2_ray.storage.places import is_remote
from af2_ray.storage.stores import local_model, replacing
from af2_ray.text import AUDIO, SPECIAL_TOKENS
from af2_ray.train.cache_features import cache_features
from af2_ray.train.precision import resolve
from af2_ray.train.stage_clap import train_clap, usable_items
from af2_ray.train.stage_lm import prepare_lm
from af2_ray.train.task import LmTask
from af2_ray.train.trainer import Job, fit
from af2_ray.train.validation import Band

logger = logging.getLogger(__name__)

Watch = Callable[[str, Path, int], AbstractContextManager[Any]]
"""Called around each step with its title, its folder (whose `metrics.jsonl` grows) and its number of steps."""


def train_run(run: Run, *, watch: Watch = lambda *_: nullcontext()) -> list[dict[str, Any]]:
    """Bring a run to its end: every step that is not finished yet, in order.

    Returns:
        The facts of LM, AF-CLAP and stages (see `trainer.fit`), finished now or before.
    """
    tracker = Tracker(run)
    with tracker.closing():
        tracker.parent()
        facts = [prepare_language_model(run, tracker, watch)] if run.recipe.model.start is None else []
        if run.recipe.clap is not None:
            with watch("AF-CLAP", run.clap_dir, run.recipe.clap.steps):
                facts.append(train_clap(run, tracker))
        start = assemble(run)
        for stage in run.recipe.stages:
            with watch(f"stage {stage.name}", run.stage_dir(stage.name), stage.steps):
                facts.append(train_stage(run, stage, start, tracker))
            start = run.stage_dir(stage.name) / "model"
        if run.recipe.stages:
            write_card(run)
            if run.recipe.tracking.register_model:
                tracker.register(run.recipe.serve.model_name, run.fetched(run.model_dir))
        tracker.finish("parent")
        run.keep()
    return facts


def train_stage(run: Run, stage: Stage, start: Path, tracker: Tracker) -> dict[str, Any]:
    """Train one stage from the Hugging Face folder `start`, or return its facts if it is finished."""
    folder = run.stage_dir(stage.name)
    if done := finished(folder):
        return done
    tokenizer = AutoTokenizer.from_pretrained(run.start_dir / "model")
    max_tokens = run.recipe.model.max_text_tokens
    made = plan_stage(run, stage, tokenizer)
    began = time.perf_counter()
    source = _features(run, stage, start, made) if stage.features == "cached" else None
    job = Job(
        name=stage.name,
        folder=folder,
        task=LmTask(run.address(start), stage),
        plan=made,
        collator=LmCollator(tokenizer, max_windows=stage.max_windows, max_text_tokens=max_tokens, source=source),
        num_steps=stage.steps,
        checkpoint_every=stage.checkpoint_every,
        bands=validation_bands(run, stage, tokenizer),
        export=stage.export,
        facts={"features_s": round(time.perf_counter() - began, 1)} if stage.features == "cached" else {},
        base=_base(run, start) if run.recipe.leaves_part(stage) else None,
    )
    return fit(run, job, tracker)


def _base(run: Run, start: Path) -> str:
    """What a stage's small part is of: the model that the run started from, if any, or what the stage starts from."""
    given = run.recipe.model.start
    if given is None:
        return run.address(start)
    return given if is_remote(given) else str(start_folder(given, small_files=True).absolute())


def cache_stages(run: Run) -> None:
    """Make the features of all stages that take them from the run's first tower, before any of them is trained."""
    start = assemble(run)
    tokenizer = AutoTokenizer.from_pretrained(start)
    for stage in run.recipe.stages:
        if "clap" in stage.trainable:
            return  # what follows hears through another tower
        if stage.features == "cached":
            _features(run, stage, start, plan_stage(run, stage, tokenizer))


def _features(run: Run, stage: Stage, start: Path, plan: Plan[Sample]) -> FeatureStore:
    """What the tower that a stage starts from makes of the stage's clips, kept in the run."""
    recipe = run.recipe
    return cache_features(
        plan,
        run.address(start),
        run.root / "features",
        settings=recipe.feature_cache,
        max_windows=stage.max_windows,
        cluster=recipe.cluster,
        deepspeed=recipe.deepspeed,
    )


def validation_bands(run: Run, stage: Stage, tokenizer: Any) -> tuple[Band, ...]:
    """The validation of this stage and of those before it, each under its own number of windows."""
    bands = []
    max_tokens = run.recipe.model.max_text_tokens
    stages = run.recipe.stages
    for band in stages[: stages.index(stage) + 1]:
        samples = [sample for dataset in band.validation for sample in usable_samples(run, dataset)]
        if not samples:
            continue
        made = plan_epoch(
            samples,
            windows=window_counts(samples, band.max_windows),
            text_lengths=text_lengths(tokenizer, samples, max_tokens=max_tokens),
            budget=band.budget.model_copy(
                update={"step_batches": run.recipe.cluster.num_workers, "balanced_rows": None}
            ),
            seed=run.recipe.seed,
        )
        collator = LmCollator(tokenizer, max_windows=band.max_windows, max_text_tokens=max_tokens)
        bands.append(Band(band.name, made, collator, is_own=band is stage))
    return tuple(bands)


def plan_stage(run: Run, stage: Stage, tokenizer: Any) -> Plan[Sample]:
    """The stage's plan: usable samples of its blend, what is unusable listed in the run's quarantine."""
    datasets = [(usable_samples(run, dataset), dataset.weight) for dataset in stage.data]
    return plan_steps(
        datasets,
        stage.steps,
        max_windows=stage.max_windows,
        text_length=partial(text_lengths, tokenizer, max_tokens=run.recipe.model.max_text_tokens),
        budget=stage.budget,
        seed=run.recipe.seed,
    )


def usable_samples(run: Run, dataset: Dataset) -> Sequence[Sample]:
    """A manifest's usable samples, as columns."""
    return usable_items(run, dataset, read_samples, run.quarantine())


def assemble(run: Run) -> Path:
    """Where stage 1 begins, as one Hugging Face folder: tower of AF-CLAP + LM + fresh fusion, or the recipe's start."""
    target = run.start_dir / "model"
    if finished(run.start_dir):
        return target
    recipe = run.recipe.model
    if recipe.start is not None:
        with replacing(target) as temporary:
            adopt(start_folder(recipe.start), start_config(run.recipe), temporary)
        run.finish(run.start_dir, {"start": recipe.start, "digest": recipe.start_digest})
        return target
    torch.manual_seed(run.recipe.seed)
    lm = local_model(run.fetched(run.lm_dir / "model"))
    language_model = AutoModelForCausalLM.from_pretrained(lm, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(run.lm_dir / "model")
    clap_folder = recipe.audio.weights or run.address(run.clap_dir / "model")
    is_folder = is_remote(clap_folder) or Path(clap_folder).is_dir()
    found = local_model(clap_folder) if is_folder else clap_folder  # otherwise a name on a hub
    audio_tower = AfClapModel.from_pretrained(found, dtype=torch.float32).audio_tower
    audio_token_id = tokenizer.convert_tokens_to_ids(AUDIO)
    config = model_config(run.recipe, audio_tower.config, language_model.config, audio_token_id)
    model = AudioFlamingo2ForConditionalGeneration.from_parts(config, language_model, audio_tower)
    if recipe.lm.pretrain:  # this LM was trained with the added tokens in its own table
        rows = language_model.get_input_embeddings().weight[audio_token_id:]
        model.added_embeddings.data.copy_(rows[: len(SPECIAL_TOKENS)])
    with replacing(target) as temporary:
        model.save_pretrained(temporary)
        extractor = AudioFlamingo2FeatureExtractor(config.max_windows)
        processor = AudioFlamingo2Processor(extractor, tokenizer, max_text_tokens=recipe.max_text_tokens)
        processor.save_pretrained(temporary)
    run.finish(run.start_dir, {"parameters": model.num_parameters()})
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
            [(turn.prompt, turn.answer) for sample in samples for turn in sample.turns],
            temporary,
            seed=run.recipe.seed,
            max_text_tokens=run.recipe.model.max_text_tokens,
            precision=resolve(run.recipe.deepspeed.precision, on_gpu=False),
            log=log,
        )
    tracker.log_history(child, read_metrics(folder))
    tracker.finish("lm")
    return run.finish(folder, {"name": "lm", **facts, "seconds": round(time.perf_counter() - started, 1)})
