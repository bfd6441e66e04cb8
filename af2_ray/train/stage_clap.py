"""AF-CLAP training (docs/paper.md, "AF-CLAP"): the towers at their start, the mel statistics, and the Ray Train run.

Batches are contrastive batches: `clap.batch_size` clips over all workers, so the plan gives each worker
`batch_size / num_workers` of them a row and every step one row a worker.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from af2_ray.audio.decode import AudioError
from af2_ray.audio.hear import hear
from af2_ray.config import Clap, Dataset
from af2_ray.data.batching import plan_captions
from af2_ray.data.collate import ClapCollator
from af2_ray.data.durations import fill_durations
from af2_ray.data.manifest import read_captions
from af2_ray.data.quarantine import Failure, Quarantine
from af2_ray.data.samples import CaptionSet, check_samples
from af2_ray.models.afclap import AfClapModel, load_text_encoder
from af2_ray.models.from_recipe import afclap_config, audio_tower_config
from af2_ray.models.processing_afclap import AfClapProcessor
from af2_ray.runs.run import Run, finished
from af2_ray.runs.tracking import Tracker
from af2_ray.storage.stores import replacing
from af2_ray.text import add_special_tokens, train_tokenizer
from af2_ray.train.task import ClapTask
from af2_ray.train.trainer import Job, fit

logger = logging.getLogger(__name__)

CAPTION_TOKENS = 4096  # at most, of a tokenizer made of captions


def train_clap(run: Run, tracker: Tracker) -> dict[str, Any]:
    """Train AF-CLAP to `<run>/clap/model`, or return its facts if it is finished."""
    recipe = run.recipe.clap
    if recipe is None:
        raise ValueError(f"recipe {run.recipe.name!r} has no clap block")
    folder = run.clap_dir
    if done := finished(folder):
        return done
    captions = usable_captions(run, recipe.captions)
    easy = usable_captions(run, recipe.warmup_captions)
    phases = [(easy, recipe.warmup_steps), (captions, recipe.steps - recipe.warmup_steps)]
    start = folder / "start"
    if not (start / "config.json").exists():
        _make_start(run, recipe, captions)
        run.keep()
    num_workers = run.recipe.cluster.num_workers
    job = Job(
        name="afclap",
        folder=folder,
        task=ClapTask(run.address(start), recipe),
        plan=plan_captions(
            [phase for phase in phases if phase[1]],
            clips_per_row=recipe.batch_size // num_workers,
            step_batches=num_workers,
            max_windows=recipe.max_windows,
            seed=run.recipe.seed,
        ),
        collator=ClapCollator(AutoTokenizer.from_pretrained(start), recipe, seed=run.recipe.seed),
        num_steps=recipe.steps,
        checkpoint_every=recipe.checkpoint_every,
    )
    return fit(run, job, tracker)


def usable_captions(run: Run, datasets: Sequence[Dataset]) -> list[CaptionSet]:
    """All usable caption sets of some datasets; the others go to the run's quarantine."""
    quarantine = run.quarantine()
    return [item for dataset in datasets for item in usable_items(run, dataset, read_captions, quarantine)]


def usable_items(run: Run, dataset: Dataset, read: Callable[..., Any], quarantine: Quarantine) -> Any:
    """What is usable of a manifest's items; the others go to the quarantine, and too many of them end the run.

    Args:
        read: reader of the manifest, `read_samples` or `read_captions`.
    """
    items = read(dataset.manifest, dataset.root, dataset.columns)
    items, unread = fill_durations(items, dataset.manifest, fallback=str(run.root / "durations"))
    good, bad = check_samples(items, unread)
    quarantine.add([Failure(item.uri, reason, item.offset_s) for item, reason in bad], len(items))
    return good


def _make_start(run: Run, recipe: Clap, captions: list[CaptionSet]) -> None:
    """Fresh towers (or a given text encoder) with the mel BatchNorm set from one pass over training clips."""
    torch.manual_seed(run.recipe.seed)
    tokenizer = _tokenizer(run, recipe, captions)
    model = AfClapModel(afclap_config(recipe, audio_tower_config(run.recipe.model.audio), tokenizer))
    model.direct_heads(recipe.head_direction)
    if recipe.text.path:
        model.text_tower = load_text_encoder(recipe.text.path)
    _set_mel_statistics(model, captions, recipe, run.recipe.seed)
    with replacing(run.clap_dir / "start") as temporary:
        model.save_pretrained(temporary)
        AfClapProcessor.of(model.config, tokenizer, recipe.max_windows).save_pretrained(temporary)


def _tokenizer(run: Run, recipe: Clap, captions: Sequence[CaptionSet]) -> Any:
    """The text encoder's own; without one, the LM's; where AF-CLAP trains alone, one made of the captions."""
    if recipe.text.path is not None:
        return AutoTokenizer.from_pretrained(recipe.text.path)
    if (run.lm_dir / "model").is_dir():
        return AutoTokenizer.from_pretrained(run.lm_dir / "model")
    texts = (t for item in captions for t in (item.caption, *item.positives, *chain.from_iterable(item.negatives)))
    pretrain = run.recipe.model.lm.pretrain
    tokenizer = train_tokenizer(texts, pretrain.vocab_size if pretrain else CAPTION_TOKENS)
    add_special_tokens(tokenizer)
    return tokenizer


def _set_mel_statistics(model: AfClapModel, captions: list[CaptionSet], recipe: Clap, seed: int) -> None:
    chosen = np.random.default_rng(seed).permutation(len(captions))[: recipe.mel_statistics_clips]
    windows = []
    for index in chosen:
        try:
            windows.append(hear(captions[index].stretch, 1, short_clips=recipe.short_clips, allow_silent=True))
        except AudioError as error:
            logger.warning("mel statistics go without %s", error)  # the feed counts and lists it
    if not windows:
        raise ValueError(f"none of {len(chosen)} clips could be read for the mel statistics; look at their paths")
    model.audio_tower.calibrate(torch.from_numpy(np.concatenate(windows)))
