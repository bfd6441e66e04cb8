"""From a model and somebody's data to the recipe of a fine-tuning: which one, on what, how long.

What the user gave as `key=value` always counts; what is worked out here is only what they left open.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from af2_ray.cluster import prospect
from af2_ray.config import Recipe, Stage, load_recipe
from af2_ray.data.batching import plan_epoch, text_lengths, window_counts
from af2_ray.data.packing import Index
from af2_ray.data.samples import Sample
from af2_ray.finetune.choice import Choice, choose, gpu_memory_gib
from af2_ray.finetune.data import Parts, Sources, check_audio, check_lengths, places_of, read_parts
from af2_ray.models.configuration_af2 import AudioFlamingo2Config
from af2_ray.models.start import check_tokenizer, start_config, start_folder
from af2_ray.storage.places import allow

EPOCHS = 10  # of the new data, at most; the recipe's `steps` is the other limit
FEWEST_STEPS = 40
CHECKPOINTS = 8  # looks at the validation recordings in all


@dataclass(frozen=True)
class Request:
    """What a user asks for.

    Attributes:
        model: export to start from: a folder, an address, a name on the hub.
        sources: manifests or folders of the data.
        run: run directory or its address; none: `<storage>/finetune-<name of the first manifest>`.
        recipe: name or file of a recipe; none: a shipped one is chosen.
        overrides: `key=value` changes of the recipe.
        replay_share: share of what is trained on that is replayed, if anything is.
        cut_audio: whether only the beginning of recordings that are too long is heard.
    """

    model: str
    sources: Sources
    run: str | None = None
    recipe: str | None = None
    overrides: tuple[str, ...] = ()
    replay_share: float = 0.5
    cut_audio: bool = False


@dataclass(frozen=True)
class Planned:
    """A fine-tuning that can begin: its recipe, its run's place, its data, and why this recipe."""

    recipe: Recipe
    place: str
    parts: Parts
    choice: Choice


def plan(request: Request) -> Planned:
    """Check the model and the data, and choose a recipe; nothing is written.

    Raises:
        ValueError: a model that cannot be trained further, or data that cannot be used (`data.read_parts`).
    """
    if not 0 < request.replay_share < 1:
        raise ValueError(f"--replay-share {request.replay_share} is not within 0 and 1")
    folder = start_folder(request.model, small_files=True)
    config = AudioFlamingo2Config.from_pretrained(folder)
    tokenizer = check_tokenizer(folder, config)
    choice = _choice(request, config)
    first = load_recipe(choice.recipe, [*choice.overrides, f"model.start={_quoted(request.model)}", *request.overrides])
    allow(first.access.schemes, parents=first.access.parents)
    if len(first.stages) != 1:
        raise ValueError(f"recipe {first.name} has {len(first.stages)} stages: fine-tuning takes a recipe of one")
    stage = first.stages[0]
    parts = read_parts(request.sources, seed=first.seed)
    given = {override.partition("=")[0] for override in request.overrides}
    max_windows = stage.max_windows
    if f"stages.{stage.name}.max_windows" not in given:
        max_windows = min(_longest(parts), max(stage.max_windows, config.max_windows))
    parts = check_audio(parts, max_windows, cut=request.cut_audio)
    max_tokens = start_config(first).max_text_tokens or 0
    lengths = {
        name: text_lengths(tokenizer, samples, max_tokens=2**30)
        for name, samples in parts.named().items()
        if name in ("train", "validation", "replay")
    }
    check_lengths(parts, lengths, max_tokens=max_tokens)
    stage = stage.model_copy(update={"max_windows": max_windows})
    stage = _with_room(stage)
    per_epoch = _steps_of(parts.train, stage, lengths["train"], first.seed)
    place = request.run or f"{first.storage.rstrip('/')}/finetune-{_stem(request.sources.train[0].manifest)}"
    filled = _filled(stage, parts, places_of(parts, place), per_epoch, request.replay_share)
    mine = [f"stages.{stage.name}.{key}={json.dumps(value)}" for key, value in filled.items()]
    mine = [override for override in mine if override.partition("=")[0] not in given]
    start = f"model.start={_quoted(request.model)}"
    recipe = load_recipe(choice.recipe, [*choice.overrides, start, *mine, *request.overrides])
    return Planned(recipe, place, parts, choice)


def _choice(request: Request, config: AudioFlamingo2Config) -> Choice:
    if request.recipe is not None:
        return Choice(request.recipe, "as asked for")
    resources = prospect() or {}
    return choose(config, resources, gpu_memory_gib(resources))


def _with_room(stage: Stage) -> Stage:
    """The stage with a budget that holds its longest clip."""
    windows = max(stage.budget.windows_per_row, stage.max_windows)
    return stage.model_copy(update={"budget": stage.budget.model_copy(update={"windows_per_row": windows})})


def _filled(
    stage: Stage, parts: Parts, written: Mapping[str, str], per_epoch: int, replay_share: float
) -> dict[str, object]:
    """The keys of the stage that follow from the data."""
    data: list[dict[str, object]] = [{"manifest": written["train"]}]
    share = 0.0
    if parts.replay:
        share = replay_share
        weight = share / (1 - share) * len(parts.train) / len(parts.replay)
        data.append({"manifest": written["replay"], "weight": round(weight, 6)})
    steps = min(stage.steps, max(FEWEST_STEPS, math.ceil(EPOCHS * per_epoch / (1 - share))))
    return {
        "data": data,
        "validation": [{"manifest": written["validation"]}],
        "max_windows": stage.max_windows,
        "budget.windows_per_row": stage.budget.windows_per_row,
        "steps": steps,
        "checkpoint_every": max(1, math.ceil(steps / CHECKPOINTS)),
    }


def _steps_of(samples: Sequence[Sample], stage: Stage, lengths: Index, seed: int) -> int:
    """Optimiser steps of one epoch."""
    windows = window_counts(samples, stage.max_windows)
    return plan_epoch(samples, windows=windows, text_lengths=lengths, budget=stage.budget, seed=seed).num_steps


def _longest(parts: Parts) -> int:
    """Windows that hold the longest recording."""
    return max(
        stretch.num_windows()
        for samples in parts.named().values()
        for sample in samples
        for stretch in sample.stretches
    )


def _stem(uri: str) -> str:
    """A name for the run, from the manifest's."""
    name = uri.rstrip("/").rsplit("/", 1)[-1].split(".", 1)[0]
    return "".join(letter if letter.isalnum() else "-" for letter in name).strip("-").lower() or "data"


def _quoted(text: str) -> str:
    return json.dumps(text)
