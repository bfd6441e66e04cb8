"""What a stage takes of a GPU on paper, by part, and the largest rows that fit one of a given size.

Weights, gradients, optimiser and activations are those of `costs`; ZeRO's stage, its bucket and the numbers that
gradients add up in are read from the configuration that DeepSpeed would get. The rest is an allowance: what CUDA and
its libraries take for themselves, and the share of the memory that the allocator cannot use because it is in pieces.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from af2_ray.config import Optimizer, Recipe, Stage
from af2_ray.config.read import merge
from af2_ray.models.groups import group_of
from af2_ray.models.lora import add_lora
from af2_ray.train import costs
from af2_ray.train.deepspeed import deepspeed_config
from af2_ray.train.memory_probe import RowCost, Shape, largest_budget

CARD_GIB = {16: 15.0, 24: 22.0, 40: 39.4, 80: 79.1}
"""GiB that a card of so many GB has at least: T4, L4 and A10, A100, H100."""

CONTEXT_GIB, NCCL_GIB = 1.0, 1.0  # CUDA's context with its kernels; buffers where there is more than one GPU
FRAGMENTS = 0.05  # share of the rest that is lost in pieces
_BUCKET = 500_000_000  # DeepSpeed's default of zero_optimization.reduce_bucket_size, in numbers
_MOST_WINDOWS = 1024
_BF16_SUMS = {"data_types": {"grad_accum_dtype": "bf16"}}


class StageMemory:
    """A stage of a recipe on GPUs, with a model that takes no memory.

    Args:
        config: configuration of the model.
        gpus: number of GPUs that share what ZeRO shares out.

    Attributes:
        model: model with the stage's adapters.
        counts: parameters by group (`costs.parameters`).
    """

    def __init__(self, recipe: Recipe, stage: Stage, config: Any, *, gpus: int) -> None:
        self._recipe, self._stage, self._gpus = recipe, stage, gpus
        self.model = costs.meta_model(config)
        if stage.lora is not None:
            add_lora(self.model.language_model, stage.lora)
        self.counts = costs.parameters(self.model)
        trained = (p.numel() for name, p in self.model.named_parameters() if group_of(name) in stage.trainable)
        self._largest = max(trained, default=0)

    def parts(self, recipe: Recipe | None = None, stage: Stage | None = None) -> dict[str, float]:
        """GiB on each GPU while rows are full: weights, gradients, optimizer, activations, working and total.

        Args:
            recipe: the same computed in another way; none: as it is.
            stage: the same with another budget; none: as it is.
        """
        recipe, stage = recipe or self._recipe, stage or self._stage
        config = deepspeed_config(recipe.deepspeed, Optimizer(), accumulation=2, precision="bf16")
        zero = config["zero_optimization"]
        in_fp32 = config.get("data_types", {}).get("grad_accum_dtype") == "fp32"
        sums: Literal["fp32", "bf16"] = "fp32" if in_fp32 else "bf16"
        offload = "offload_optimizer" in zero
        parts = costs.state_gib(
            self.counts, stage.trainable, zero_stage=zero["stage"], gpus=self._gpus, offload=offload, sums=sums
        )
        parts["activations"] = sum(self.activations(recipe, stage).values())
        bucket = zero.get("reduce_bucket_size", _BUCKET) if zero["stage"] else 0
        passing = bucket + self._largest * (
            2 if offload else 1
        )  # a gradient before it is in the bucket, on its way out
        fixed = CONTEXT_GIB + 2 * passing / costs.GIB + (NCCL_GIB if self._gpus > 1 else 0.0)
        parts["working"] = fixed + FRAGMENTS * sum(parts.values())
        return {**parts, "total": sum(parts.values())}

    def activations(self, recipe: Recipe | None = None, stage: Stage | None = None) -> dict[str, float]:
        """GiB of what a full row keeps for its backward pass, by part (`costs.activation_gib`)."""
        recipe, stage = recipe or self._recipe, stage or self._stage
        return costs.activation_gib(
            self.model,
            row_of(stage, 1.0),
            stage.trainable,
            checkpointing=recipe.model.audio.gradient_checkpointing,
            layers=recipe.deepspeed.activation_checkpointing,
            cached=stage.features == "cached",
        )

    def largest_rows(self, recipe: Recipe, limit_gib: float) -> int | None:
        """The most `budget.windows_per_row` that fit, found to an eighth, with text tokens in proportion.

        None: not even one clip of the stage's longest fits.
        """

        def trial(shape: Shape, windows: int, text_tokens: int) -> RowCost:
            update = {"windows_per_row": windows, "text_tokens_per_row": text_tokens}
            row = self._stage.model_copy(update={"budget": self._stage.budget.model_copy(update=update)})
            return RowCost(shape, windows, text_tokens, self.parts(recipe, row)["total"], math.nan)

        try:
            return largest_budget(self._stage, limit_gib, trial, max_windows=_MOST_WINDOWS).windows_per_row
        except ValueError:
            return None

    def fitting(self) -> dict[str, Mapping[int, int | None]]:
        """The largest rows by way of computing (`ways`) and by GB of the card (`CARD_GIB`)."""
        return {
            name: {size: self.largest_rows(recipe, limit_gib) for size, limit_gib in CARD_GIB.items()}
            for name, recipe in ways(self._recipe, self._stage)
        }


def row_of(stage: Stage, fill: float) -> costs.Work:
    """A row of a stage with both sides of its budget `fill` full, clips of middling length, short answers."""
    budget = stage.budget
    windows = fill * budget.windows_per_row
    clip_windows = max(1.0, stage.max_windows / 2)
    text_tokens = fill * budget.text_tokens_per_row
    questions = windows / clip_windows * budget.questions_per_clip
    length = max(16.0, text_tokens / max(1.0, questions))
    return costs.Work(windows, text_tokens, clip_windows, min(length, text_tokens), text_tokens / 3)


def with_deepspeed(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with keys of its block `deepspeed` changed."""
    return recipe.model_copy(update={"deepspeed": recipe.deepspeed.model_copy(update=changes)})


def ways(recipe: Recipe, stage: Stage) -> Iterator[tuple[str, Recipe]]:
    """The recipe as it is, and with each key that makes a stage take less, beside those before it."""
    yield "as the recipe has it", recipe
    if "clap" in stage.trainable and not recipe.model.audio.gradient_checkpointing:
        audio = recipe.model.audio.model_copy(update={"gradient_checkpointing": True})
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"audio": audio})})
        yield "+ model.audio.gradient_checkpointing", recipe
    settings = recipe.deepspeed
    if not settings.activation_checkpointing:
        recipe = with_deepspeed(recipe, activation_checkpointing=True)
        yield "+ deepspeed.activation_checkpointing", recipe
    if settings.zero_stage and not settings.offload_optimizer:
        recipe = with_deepspeed(recipe, offload_optimizer=True)
        yield "+ deepspeed.offload_optimizer", recipe
    raw = merge(settings.raw, _BF16_SUMS)
    if settings.zero_stage >= 2 and raw != settings.raw:
        yield "+ gradients add up in bf16", with_deepspeed(recipe, raw=raw)
