"""Disk space of a run: a forecast before it starts, and what can be removed once it is done.

The forecast is arithmetic: four bytes a parameter of an export, twelve or fourteen a trained one of a checkpoint, one
checkpoint more than are kept (the next is written before the oldest goes), 70 MB an hour of a corpus. It is an upper
bound where the data decide (cached features).
"""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from af2_ray.config import Recipe
from af2_ray.models.from_recipe import recipe_config
from af2_ray.runs.run import Run, finished
from af2_ray.storage.files import LEFTOVER
from af2_ray.storage.places import is_remote, locate
from af2_ray.train import costs
from af2_ray.train.mend import ASIDE
from af2_ray.train.trainer import checkpoint_storage

_EXPORT_BYTES = 4  # a parameter, fp32
_CHECKPOINT_BYTES = {"fp32": 12, "bf16": 14}  # a trained parameter: weights, two moments, and the master copy of bf16
_CORPUS_BYTES = 70e6  # an hour of FLAC at 16 kHz, with its texts
_TEXT_ENCODER = 341_000_000  # parameters of flan-t5-large's, where the recipe names an encoder
_AUDIO_HOUR = 360  # windows


@dataclass(frozen=True)
class Need:
    """Bytes that one part of a run takes, and the folder or address that they go to."""

    what: str
    place: str
    size: int


def forecast(recipe: Recipe, place: str) -> list[Need]:
    """What a run takes from its first step to its last, if nothing of it is there yet.

    Args:
        recipe: recipe of the run.
        place: directory or address of the run.

    Raises:
        ValueError: the LM comes from a package, whose sizes are not known before it is fetched.
    """
    model = costs.meta_model(recipe_config(recipe))
    counts = costs.parameters(model)
    whole = _EXPORT_BYTES * sum(counts.values())
    exports = _EXPORT_BYTES * counts.get("lm", 0) + whole * (1 + len(recipe.stages))
    trained = [sum(n for group, n in counts.items() if group in stage.trainable) for stage in recipe.stages]
    in_parts = [n for stage, n in zip(recipe.stages, trained, strict=True) if recipe.leaves_part(stage)]
    exports += _EXPORT_BYTES * sum(in_parts)
    if recipe.clap is not None:
        trained.append(counts.get("clap", 0) + _text_parameters(recipe))
        exports += 2 * _EXPORT_BYTES * trained[-1]
    if recipe.stages and recipe.tracking.register_model:
        exports += whole  # with MLflow, which has its artifacts in the run where it has no server
    checkpoint = _CHECKPOINT_BYTES["bf16" if recipe.deepspeed.precision == "bf16" else "fp32"] * sum(trained)
    needs = [
        Need("exports", place, exports),
        Need("checkpoints", recipe.checkpoints.storage or place, checkpoint * (recipe.checkpoints.keep + 1)),
        Need("features", recipe.feature_cache.dir or place, _feature_bytes(recipe, model)),
    ]
    if recipe.corpus is not None:
        needs.append(Need("corpus", recipe.corpus.dir, int(_corpus_hours(recipe) * _CORPUS_BYTES)))
    return [need for need in needs if need.size]


def _text_parameters(recipe: Recipe) -> int:
    assert recipe.clap is not None
    text, pretrain = recipe.clap.text, recipe.model.lm.pretrain
    if text.path is not None:
        return _TEXT_ENCODER
    layer = 4 * text.hidden_size**2 + 2 * text.hidden_size * text.inner_size
    return (pretrain.vocab_size if pretrain else 4096) * text.hidden_size + text.num_layers * layer


def _corpus_hours(recipe: Recipe) -> float:
    assert recipe.corpus is not None
    return sum(scenes.num_scenes * sum(scenes.duration_s) / 2 for scenes in recipe.corpus.sets) / 3600


def _feature_bytes(recipe: Recipe, model: Any) -> int:
    """Bytes of the cached stages' features: all windows of their rows, or of the corpus where that is less."""
    number_bytes = 4 if recipe.feature_cache.dtype == "fp32" else 2
    most = int(_corpus_hours(recipe) * _AUDIO_HOUR) + 1 if recipe.corpus else sys.maxsize
    windows = sum(
        min(most, stage.steps * stage.budget.step_batches * stage.budget.windows_per_row)
        for stage in recipe.stages
        if stage.features == "cached"
    )
    return windows * costs.TOKENS_PER_WINDOW * model.audio_tower.output_size * number_bytes


def shortages(needs: list[Need]) -> list[str]:
    """Which disks of this machine have less room than a run will want, in words; object storage is not asked.

    What lies in the places already counts as done.
    """
    places: Counter[str] = Counter()
    for need in needs:
        if not is_remote(need.place):
            places[need.place] += need.size
    folders: dict[int, Path] = {}  # of each disk, one that is there
    wanted: Counter[int] = Counter()
    for place, size in places.items():
        path = Path(place).absolute()
        folder = next(above for above in (path, *path.parents) if above.exists())
        folders[folder.stat().st_dev] = folder
        wanted[folder.stat().st_dev] += max(0, size - (_size(place) or 0))
    lines = []
    for disk, size in wanted.items():
        free = shutil.disk_usage(folders[disk]).free
        if size > free:
            lines.append(f"{folders[disk]} has {amount(free)} free, and about {amount(size)} are wanted")
    return lines


def amount(size: float) -> str:
    """Bytes for a person."""
    if size >= 2**30:
        return f"{size / 2**30:.1f} GiB"
    return f"{size / 2**20:.0f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"


# --- What may go -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spare:
    """A part of a run that no later step reads."""

    path: str  # folder, file or address
    why: str
    size: int


def spare(run: Run) -> list[Spare]:
    """What of a run can be removed without a finished step being lost."""
    jobs = {run.clap_dir: "AF-CLAP", **{run.stage_dir(s.name): f"stage {s.name}" for s in run.recipe.stages}}
    found = []
    for folder, name in jobs.items():
        train = f"{checkpoint_storage(run, folder)}/train"
        if finished(folder):
            found.append((train, f"checkpoints of {name}, which is finished"))
        else:
            found.append((f"{train}/{ASIDE}", f"damaged checkpoints of {name}"))
    if finished(run.clap_dir):
        found.append((run.address(run.clap_dir / "start"), "where AF-CLAP began"))
    cached = [stage for stage in run.recipe.stages if stage.features == "cached"]
    if cached and all(finished(run.stage_dir(stage.name)) for stage in cached):
        found.append((run.address(run.root / "features"), "features of stages that are finished"))
    if run.uri is None:
        left = sorted(path for path in run.root.rglob(".*") if LEFTOVER.fullmatch(path.name))
        found += [(str(path), "left by a killed process") for path in left]
    return [Spare(path, why, size) for path, why in found if (size := _size(path)) is not None]


def remove(spares: list[Spare]) -> None:
    """Remove them; call it while the run is locked."""
    for one in spares:
        fs, path = locate(one.path)
        with suppress(FileNotFoundError):
            fs.rm(path, recursive=True)


def _size(place: str) -> int | None:
    """Bytes of a folder or file; none where there is nothing."""
    fs, path = locate(place)
    fs.invalidate_cache()
    if not fs.exists(path):
        return None
    if fs.isfile(path):
        return int(fs.size(path))
    return sum(int(facts["size"] or 0) for facts in fs.find(path, detail=True).values())
