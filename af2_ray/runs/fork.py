"""A fork: a new run directory that starts with what another run has finished and a changed recipe leaves valid.

Steps depend on one another in order (language model, AF-CLAP, start, stages), so the copy ends before the first step
that the recipes make differently. Files are hard links where the file system allows it: a fork takes next to no room,
and no finished step is ever written to again.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import yaml

from af2_ray.config import Recipe
from af2_ray.runs.run import Run, finished
from af2_ray.storage.files import link, write_whole
from af2_ray.storage.places import is_remote


def fork(recipe: Recipe, source: str | Path, root: str | Path) -> tuple[Run, list[str]]:
    """Make the run directory `root` for a changed recipe, with the finished steps of `source` that it shares.

    Returns:
        The new run, and the names of the steps taken over.

    Raises:
        ValueError: `source` is no run, or `root` holds one already.
    """
    old = Run.load(source)
    if recipe.model.start is not None:
        from af2_ray.models.start import settled  # loads torch, which a job's --help does without

        recipe = settled(recipe)
    if is_remote(root) or old.uri is not None:
        raise ValueError("a fork links finished steps on one file system: give folders, not addresses of a store")
    target = Path(root).absolute()
    if (target / "recipe.yaml").exists():
        raise ValueError(f"{target} holds a run already: give a new --run for the fork")
    taken = []
    for (name, mark, folder), (_, now, _) in zip(_steps(old.recipe), _steps(recipe), strict=False):
        if mark != now or finished(old.root / folder) is None:
            break
        _link(old.root / folder, target / folder)
        taken.append(name)
    run = Run.open(recipe, target)
    origin = f"{old.root} {old.recipe.fingerprint()}: {', '.join(taken) or 'nothing'}\n"
    write_whole(target / "forked_from.txt", origin)
    return run, taken


def _steps(recipe: Recipe) -> list[tuple[str, str, str]]:
    """Name, fingerprint of all that decides it (what came before included) and folder of each step in order."""
    settings = recipe.model_dump(mode="json")
    model = {key: value for key, value in settings["model"].items() if key != "start"}  # wherever it lies
    texts = {(data["manifest"], data["root"]): None for stage in settings["stages"] for data in stage["data"]}
    precision = settings["deepspeed"]["precision"]
    # A small LM is trained on the text of all stages, whatever their weights; one that is given has read what it has.
    learned = (settings["corpus"], model["max_text_tokens"], list(texts), precision)
    reads = (settings["seed"], model["lm"], learned if model["lm"]["pretrain"] else None)
    steps: list[tuple[str, Any, str]] = [("lm", reads, "lm")] if recipe.model.start is None else []
    if recipe.clap is not None:
        steps.append(("clap", (settings["corpus"], settings["clap"], model["audio"], settings["deepspeed"]), "clap"))
    longest = max((stage.max_windows for stage in recipe.stages), default=0)
    steps.append(("start", (settings["corpus"], model, longest), "start"))
    caches = {key: value for key, value in settings["feature_cache"].items() if key != "dir"}
    for stage in settings["stages"]:
        measured = ("validation", "checkpoint_every") if stage.get("export", "last") == "last" else ()
        kept = {key: value for key, value in stage.items() if key not in measured}
        steps.append((stage["name"], (kept, settings["deepspeed"], caches), f"stages/{stage['name']}"))
    digest = hashlib.sha256()
    marked = []
    for name, decides, folder in steps:
        digest.update(yaml.safe_dump([name, decides], sort_keys=True).encode())
        marked.append((name, digest.hexdigest(), folder))
    return marked


def _link(source: Path, target: Path) -> None:
    """A copy of a finished step without its checkpoints, as hard links where possible."""

    shutil.copytree(source, target, copy_function=link, ignore=shutil.ignore_patterns("train"))
