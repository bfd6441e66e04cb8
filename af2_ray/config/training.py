"""Settings of AF-CLAP, of the stages, of DeepSpeed and of what a job asks of Ray."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from af2_ray.config.base import Group, Strict, later
from af2_ray.config.data import Budget, Dataset


class Optimizer(Strict):
    """AdamW (and Muon for matrices), warm-up, then constant, as in the paper, or cosine (docs/paper.md, "Training")."""

    lr: float = Field(1e-4, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    betas: tuple[float, float] = Field((0.9, 0.999), strict=False)
    warmup_steps: int = Field(1875, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    grad_clip: float = Field(1.0, gt=0)
    lr_scale: dict[Group | Literal["gates"], float] = Field(
        default_factory=dict, description="learning-rate factor of a group; `gates`: the tanh gates, which start at 0"
    )
    muon_lr: float | None = Field(
        None,
        gt=0,
        description="rate of Muon for the matrices of `muon_groups` (lr_scale is not applied to it); needs "
        "deepspeed.zero_stage=0 and fp32 (or mixed). None: AdamW for all, as in the paper",
    )
    muon_groups: list[Group] = Field(
        ["transform", "xattn"],
        description="groups whose matrices Muon takes, best those that start at random; of AF-CLAP: `clap` (audio "
        "tower), `lm` (text tower and heads)",
    )
    batch_rule: Literal["none", "sqrt", "linear"] = Field(
        "none", description="growth of a step's rate with its number of answer tokens, from `batch_labels` on"
    )
    batch_labels: int | None = Field(None, ge=1, description="answer tokens of the step that `lr` is meant for")

    @model_validator(mode="after")
    def _rule_has_its_reference(self) -> Optimizer:
        if (self.batch_rule == "none") != (self.batch_labels is None):
            raise ValueError("optimizer: batch_rule (sqrt, linear) and batch_labels belong together: give both")
        return self


class DeepSpeedSettings(Strict):
    """DeepSpeed's part of a recipe; `raw` is merged into the JSON configuration last."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    offload_optimizer: bool = False
    precision: Literal["auto", "fp32", "bf16", "mixed"] = Field(
        "auto",
        description="numbers to compute in; auto: bf16 on GPUs, fp32 on CPUs; mixed: fp32 with products in bf16, on a "
        "CPU only if it has instructions for them",
    )
    activation_checkpointing: bool = Field(
        False, description="whether the backward pass recomputes transformer layers (the tower: model.audio)"
    )
    raw: dict[str, Any] = {}


class Lora(Strict):
    """Adapters on the LM for one stage, merged on export (`trainable: [lora, ...]`)."""

    rank: int = Field(8, ge=1)
    alpha: int = Field(16, ge=1)
    targets: list[str] = Field(["q_proj", "k_proj", "v_proj", "o_proj"], min_length=1)


class Stage(Strict):
    """What trains, on what data, with how many windows (docs/paper.md, "Training")."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    max_windows: int = Field(ge=1)
    trainable: list[Group]
    features: Literal["audio", "cached"] = Field(
        "audio",
        description="source of the tower's features; cached: a frozen tower encodes each clip once, before the "
        "stage (`feature_cache`)",
    )
    lora: Lora | None = None
    data: list[Dataset] = Field(min_length=1)
    validation: list[Dataset] = Field([], description="held-out band, scored at checkpoints of this and later stages")
    steps: int = Field(ge=1, description="optimiser steps")
    budget: Budget = Budget()
    optimizer: Optimizer = Optimizer()
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    z_loss: float = Field(0.0, ge=0, description="factor on the square of log-sum-exp of the logits")
    checkpoint_every: int = Field(500, ge=1)
    export: Literal["last", "best"] = later(
        "last", description="weights that the stage hands on: the last, or those whose loss on `validation` was least"
    )

    @model_validator(mode="after")
    def _best_is_measured(self) -> Stage:
        if self.export == "best" and not self.validation:
            raise ValueError(f"stage {self.name}: export: best needs `validation`, on which the best is found")
        return self

    @model_validator(mode="after")
    def _lora_has_its_block(self) -> Stage:
        if ("lora" in self.trainable) != (self.lora is not None):
            raise ValueError(f"stage {self.name}: trainable `lora` and a `lora` block belong together: give both")
        return self

    @model_validator(mode="after")
    def _a_training_tower_is_not_cached(self) -> Stage:
        if self.features == "cached" and "clap" in self.trainable:
            raise ValueError(
                f"stage {self.name}: features: cached needs a frozen tower, and `clap` is in `trainable`: drop one"
            )
        return self


class Checkpoints(Strict):
    """Where checkpoints lie and how many are kept: always the last one, then those that were best when made."""

    keep: int = Field(2, ge=1)
    storage: str | None = Field(None, description="folder or s3:// prefix; none: in the run")


class FeatureCache(Strict):
    """Where stages with `features: cached` keep what the frozen tower makes of their clips."""

    dir: str | None = Field(
        None, description="folder that runs may share (same tower, same features); none: in the run"
    )
    dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="numbers of the features; auto: those that the tower computes in"
    )
    windows_per_shard: int = Field(128, ge=1)


class ClapTextTower(Strict):
    """Text tower: `path` names an encoder (flan-t5-large in the paper); without it a small T5 encoder is made."""

    path: str | None = None
    hidden_size: int = 128
    num_layers: int = 2
    num_heads: int = 4
    inner_size: int = 256
    pooling: Literal["masked_mean", "mean"] = "masked_mean"


class Augment(Strict):
    """What AF-CLAP training changes in a clip each time it comes, so that its captions stay true; the default: nothing.

    A clip's level is none of it: every clip is scaled to a peak of 1 before it is heard.
    """

    crop: bool = Field(
        False, description="whether a random stretch of a clip longer than max_windows is taken, not its beginning"
    )
    eq_db: float = Field(0.0, ge=0, le=40, description="largest gain, up or down, at each of six frequencies")
    noise_snr_db: tuple[float, float] | None = Field(
        None, strict=False, description="range [least, most] of dB that white noise lies below the clip's RMS"
    )

    @field_validator("noise_snr_db")
    @classmethod
    def _range(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value and value[0] > value[1]:
            raise ValueError(f"a range [least, most] of dB, got {list(value)}")
        return value


class Clap(Strict):
    """AF-CLAP (docs/paper.md, "AF-CLAP"): M positives, M x N composition-aware negatives; M = 1, N = 0 is vanilla."""

    text: ClapTextTower = ClapTextTower()
    joint_dim: int = 512
    captions: list[Dataset] = Field(min_length=1)
    warmup_captions: list[Dataset] = Field([], description="easy clips (one sound each) for the first steps")
    warmup_steps: int = Field(0, ge=0, description="number of `steps` that draw on warmup_captions")
    num_positives: int = Field(3, ge=1)
    num_negatives: int = Field(3, ge=0)
    max_windows: int = Field(1, ge=1)
    short_clips: Literal["silence", "repeat"] = Field(
        "silence", description="filling of the window after a short clip's end; `repeat`: the clip, as often as it fits"
    )
    augment: Augment = Augment()
    batch_size: int = Field(256, ge=2, description="clips of one contrastive batch, over all workers")
    every_positive: bool = Field(
        False,
        description="whether each positive must be near its clip (the paper: one is enough, the sum is inside the log)",
    )
    symmetric: bool = Field(
        False, description="whether half of the loss is from text to audio (the paper: audio to text only)"
    )
    temperature: float = Field(0.07, gt=0, description="value at the start; it stays between 0.01 and 1")
    learn_temperature: bool = True
    windows_per_chunk: int | None = Field(
        None, ge=1, description="windows whose activations a device holds at a time; the rest is worked out twice"
    )
    captions_per_chunk: int | None = Field(
        None, ge=1, description="captions whose activations a device holds at a time"
    )
    steps: int = Field(ge=1)
    optimizer: Optimizer = Optimizer(lr=5e-4)
    checkpoint_every: int = Field(500, ge=1)
    head_direction: float = Field(
        0.0, ge=0, description="starting bias of attention heads to what comes before, or after (`direct_heads`)"
    )
    moments: int = Field(
        0, ge=0, description="moments of time that the heads see beside the mean of the tokens; 0 in the paper"
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

    @field_validator("gpus", mode="before")
    @classmethod
    def _yes_is_a_word(cls, value: Any) -> Any:
        """YAML reads an unquoted yes or no as true or false."""
        return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
