"""The only place where settings are defined, read, overridden and checked.

A run is a recipe: one YAML file, strictly typed. The command line names it and overrides keys::

    recipe = load_recipe("tiny", ["stages.pretrain.steps=5", "cluster.num_workers=1"])

Strict means: an unknown key is an error that names the nearest right one, a mistyped value is an error that names
the key, and nothing is converted silently. The trade-off is a few more words in a recipe against never finding out
after three days that `learing_rate` was ignored. A recipe may name another as its `base` and say only what differs.
"""

from af2_ray.config.base import Group, Split, Strict
from af2_ray.config.data import Access, Budget, Corpus, Dataset, Faults, SceneSet, parse_columns
from af2_ray.config.model import (
    AudioTowerSettings,
    CrossAttentionSettings,
    LanguageModelPretrain,
    LanguageModelSettings,
    ModelSettings,
    TransformSettings,
)
from af2_ray.config.read import RECIPE_DIR, load_recipe, recipe_names
from af2_ray.config.recipe import NOT_STATED, Recipe
from af2_ray.config.sweep import Asha, Sweep, Trial, load_sweep, sweep_names
from af2_ray.config.training import (
    Augment,
    Checkpoints,
    Clap,
    ClapTextTower,
    Cluster,
    DeepSpeedSettings,
    FeatureCache,
    Lora,
    Optimizer,
    Stage,
)
from af2_ray.config.use import Evaluation, Serve, Tracking

__all__ = [
    "NOT_STATED",
    "RECIPE_DIR",
    "Access",
    "Asha",
    "AudioTowerSettings",
    "Augment",
    "Budget",
    "Checkpoints",
    "Clap",
    "ClapTextTower",
    "Cluster",
    "Corpus",
    "CrossAttentionSettings",
    "Dataset",
    "DeepSpeedSettings",
    "Evaluation",
    "Faults",
    "FeatureCache",
    "Group",
    "LanguageModelPretrain",
    "LanguageModelSettings",
    "Lora",
    "ModelSettings",
    "Optimizer",
    "Recipe",
    "SceneSet",
    "Serve",
    "Split",
    "Stage",
    "Strict",
    "Sweep",
    "Tracking",
    "TransformSettings",
    "Trial",
    "load_recipe",
    "load_sweep",
    "parse_columns",
    "recipe_names",
    "sweep_names",
]
