"""A sweep: one recipe, what to vary in it, how often, and how trials are compared."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from pydantic import Field, model_validator

from af2_ray.config.base import Strict
from af2_ray.config.read import RECIPE_DIR, checked, find_yaml, load_recipe, read_yaml, yaml_names
from af2_ray.config.recipe import Recipe

SWEEP_DIR = RECIPE_DIR / "sweeps"


class Asha(Strict):
    """Early stopping: at each rung (optimiser steps over all stages) the worst by loss end (Ray Tune's ASHA)."""

    grace_steps: int = Field(ge=1, description="steps before which no trial is ended")
    reduction_factor: float = Field(3, gt=1, strict=False)


class Sweep(Strict):
    """What to vary and how to compare; every combination of `keys` runs once for each seed."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    recipe: str = Field(description="the base: a shipped recipe or a .yaml file")
    overrides: list[str] = Field([], description="overrides of the base for all trials: key=value")
    keys: dict[str, list[Any]] = Field(
        min_length=1,
        description="dotted recipe key -> its values, the baseline first; the key `recipe` varies the base itself",
    )
    samples: int | None = Field(None, ge=1, description="combinations drawn at random; none: all of them")
    seeds: list[int] = Field([0, 1, 2], min_length=1)
    metric: Literal["accuracy", "composition", "loss"] = Field(
        "accuracy",
        description="measure of a trial; accuracy: on evaluation.manifests; composition: of AF-CLAP alone, mirrored "
        "pairs of evaluation.captions of which both texts are found, over captions and paraphrases; loss: the last one",
    )
    share: list[Literal["lm", "clap", "features"]] = Field(
        [],
        description="steps that are done once for all trials (which vary nothing in them); features: what the frozen "
        "tower makes of the clips of stages with `features: cached`",
    )
    asha: Asha | None = None
    max_concurrent_trials: int | None = Field(
        None, ge=1, description="most trials at a time; none: as many as the cluster holds"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Sweep:
        for name, values in self.keys.items():
            if not values or len({_yaml(value) for value in values}) != len(values):
                raise ValueError(f"keys.{name}: give each value once, and at least one")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: each once, got {self.seeds}")
        if "features" in self.share and not {"lm", "clap"} <= set(self.share):
            raise ValueError("share: features are made by the tower of a shared AF-CLAP: share lm and clap, too")
        return self

    def num_steps(self, recipe: Recipe) -> int:
        """Optimiser steps of a trial, shared ones left out."""
        if self.metric == "composition":
            return recipe.clap.steps if recipe.clap else 0
        return sum(stage.steps for stage in recipe.stages)

    def trials(self, overrides: Sequence[str] = ()) -> list[Trial]:
        """All trials, seed by seed, checked before any starts; `overrides` come after the sweep's own.

        Raises:
            ValueError: a combination is no valid recipe; the message names the combination.
        """
        combinations = list(itertools.product(*self.keys.values()))
        if self.samples is not None and self.samples < len(combinations):
            drawn = np.random.default_rng(0).choice(len(combinations), self.samples, replace=False)
            combinations = [combinations[place] for place in sorted(drawn)]
        trials = []
        for seed, (place, values) in itertools.product(self.seeds, enumerate(combinations)):
            point = dict(zip(self.keys, values, strict=True))
            given = [f"{key}={_yaml(value)}" for key, value in point.items() if key != "recipe"]
            base = str(point.get("recipe", self.recipe))
            try:
                recipe = load_recipe(base, [*self.overrides, *overrides, *given, f"seed={seed}"])
            except ValueError as error:
                raise ValueError(f"sweep {self.name}, {', '.join([base, *given])}: {error}") from error
            if self.metric == "accuracy" and not recipe.evaluation.manifests:
                raise ValueError(f"sweep {self.name}: metric `accuracy` needs evaluation.manifests in the recipe")
            if self.metric == "composition" and not (recipe.clap and recipe.evaluation.captions):
                raise ValueError(
                    f"sweep {self.name}: metric `composition` needs clap and evaluation.captions in the recipe"
                )
            trials.append(Trial(f"{place:03d}-seed{seed}", place, point, seed, recipe))
        for trial, step in itertools.product(trials, self.share):
            if _made_from(step, trial.recipe) != _made_from(step, trials[0].recipe):
                raise ValueError(
                    f"sweep {self.name}: share: {step} is made once, but {trial.values} changes what it is made from"
                )
        return trials


@dataclass(frozen=True)
class Trial:
    """One run of a sweep: a point (combination of values) with one seed."""

    id: str
    point: int
    values: dict[str, Any]
    seed: int
    recipe: Recipe


def _made_from(step: str, recipe: Recipe) -> tuple[Any, ...]:
    """The settings that a shared step depends on, which must be those of all trials."""
    language = (recipe.corpus, recipe.model.lm, recipe.model.max_text_tokens, recipe.deepspeed.precision)
    if step == "lm":
        return language
    return (*language, recipe.clap, recipe.model.audio.model_copy(update={"features": "dense"}), recipe.deepspeed)


def sweep_names() -> list[str]:
    """Names of the sweeps that ship with the package."""
    return yaml_names(SWEEP_DIR)


def load_sweep(name: str | Path) -> Sweep:
    """Read a shipped sweep by its name, or a YAML file.

    Raises:
        ValueError: no such sweep, an unknown key (the nearest right one is named) or a bad value.
    """
    path = find_yaml(name, SWEEP_DIR, "sweep")
    return checked(Sweep, read_yaml(path), path)


def _yaml(value: Any) -> str:
    """A value as YAML on one line, as an override takes it."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")
