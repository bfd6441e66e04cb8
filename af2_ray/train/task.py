"""A task: model, loss and batch keys in one small object. The loop knows nothing else of what it trains.

Two exist: `LmTask` (the curriculum's stages) and `ClapTask` (AF-CLAP). Each has a `start` (the Hugging Face folder that
its model starts from, or its address in object storage), settings of its `optimizer` and the `batch_type` that the feed
hands over. `build` gives the model at its start with `requires_grad` set to what trains; `count` and `tokens` what a
batch adds to the step's global counts; `loss` this rank's share of the step's loss, already divided by the real global
count, so that every answer token (or clip) weighs alike however the step was cut into ranks and micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from af2_ray.config import Clap, Optimizer, Stage
from af2_ray.data.collate import ClapBatch, LmBatch
from af2_ray.models.afclap import AfClapModel
from af2_ray.models.groups import group_of
from af2_ray.models.lora import add_lora
from af2_ray.models.modeling_af2 import AudioFlamingo2ForConditionalGeneration
from af2_ray.storage.stores import local_model
from af2_ray.text import IGNORE
from af2_ray.train.losses import afclap_loss_sum, clamp_scale, token_loss_sum
from af2_ray.train.optim import freeze_except


@dataclass(frozen=True)
class LmTask:
    """Next-token loss on answer tokens (a curriculum stage)."""

    start: str | Path
    stage: Stage
    batch_type: ClassVar[type[Any]] = LmBatch

    @property
    def optimizer(self) -> Optimizer:
        return self.stage.optimizer

    def build(self) -> nn.Module:
        """The previous stage's export, frozen but for `trainable`."""
        model = AudioFlamingo2ForConditionalGeneration.from_pretrained(local_model(self.start), dtype=torch.float32)
        if self.stage.lora is not None:
            add_lora(model.language_model, self.stage.lora)
        freeze_except(model, self.stage.trainable)
        return model

    def count(self, batch: LmBatch) -> int:
        """Answer tokens: labels that some position predicts."""
        return int((batch.labels[:, 1:] != IGNORE).sum())

    def tokens(self, batch: LmBatch) -> int:
        """Tokens of prompts and answers."""
        return int((batch.attention_mask > 0).sum())

    def loss(self, model: nn.Module, batch: LmBatch, total: int) -> Tensor:
        """Summed cross-entropy over answer tokens, divided by the step's global number of them."""
        batch = batch.located()
        output = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            **_audio_argument(batch.waveforms),
            windows_per_clip=batch.windows_per_clip,
            audio_index=_clips_of_rows(batch),
            answer_places=batch.answer_places,
            texts_per_row=batch.texts_per_row,
        )
        smoothing, z_loss = self.stage.label_smoothing, self.stage.z_loss
        loss = token_loss_sum(output.logits, batch.answer_ids, label_smoothing=smoothing, z_loss=z_loss)
        return loss / max(total, 1)


def plain(task: Any) -> Any:
    """The task with its loss as it is measured: without label smoothing and z-loss."""
    if not isinstance(task, LmTask):
        return task
    return replace(task, stage=task.stage.model_copy(update={"label_smoothing": 0.0, "z_loss": 0.0}))


def _clips_of_rows(batch: LmBatch) -> Tensor | None:
    """The model's `audio_index`: none, as the collator has it, where row b hears clip b."""
    index: Tensor = batch.audio_index
    same = torch.arange(len(batch.windows_per_clip))[:, None]
    return None if index.shape == same.shape and torch.equal(index, same) else index


def _audio_argument(windows: Tensor) -> dict[str, Tensor]:
    """The model's argument for windows [S, 160000], or for the tower's features [S, F, D] (int16: bits of bf16)."""
    if windows.dim() == 2:
        return {"waveforms": windows}
    return {"tower_features": windows.view(torch.bfloat16) if windows.dtype == torch.int16 else windows}


@dataclass(frozen=True)
class ClapTask:
    """AF-CLAP's composition-aware contrastive loss over the clips of all ranks (docs/paper.md, "AF-CLAP")."""

    start: str | Path
    clap: Clap
    batch_type: ClassVar[type[Any]] = ClapBatch

    @property
    def optimizer(self) -> Optimizer:
        return self.clap.optimizer

    def build(self) -> nn.Module:
        """Both towers, all of them training but the mel BatchNorm (`group_of`) and a fixed temperature."""
        model = AfClapModel.from_pretrained(local_model(self.start), dtype=torch.float32)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(group_of(name) != "mel")
        model.logit_scale.requires_grad_(self.clap.learn_temperature)
        return model

    def count(self, batch: ClapBatch) -> int:
        """Clips with a caption; the silence that stands for a row of broken files has none."""
        return int(batch.caption_owner.unique().numel())

    def tokens(self, batch: ClapBatch) -> int:
        """Tokens of all captions."""
        return int(batch.text_mask.sum())

    def loss(self, model: nn.Module, batch: ClapBatch, total: int) -> Tensor:
        """Loss rows of this rank's clips against the positives of all ranks, divided by all clips of the step."""
        audio, text, log_scale = model(
            waveforms=batch.waveforms,
            windows_per_clip=batch.windows_per_clip,
            input_ids=batch.text_ids,
            attention_mask=batch.text_mask,
            windows_per_chunk=self.clap.windows_per_chunk,
            captions_per_chunk=self.clap.captions_per_chunk,
            logits=False,
        )
        positives, positive_mask, negatives, negative_mask = self._arrange(batch, text)
        loss = afclap_loss_sum(
            audio,
            positives,
            negatives,
            positive_mask,
            negative_mask,
            clamp_scale(log_scale),
            every_positive=self.clap.every_positive,
            symmetric=self.clap.symmetric,
            gather=True,
        )
        return loss / max(total, 1)

    def _arrange(self, batch: ClapBatch, text: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scatter ragged captions [N, J] to positives [C, M, J] and negatives [C, M, N, J], with their masks."""
        num_clips, width = len(batch.windows_per_clip), text.shape[-1]
        shape = (num_clips, self.clap.num_positives, 1 + self.clap.num_negatives)
        place = (batch.caption_owner * shape[1] + batch.caption_slot) * shape[2] + batch.caption_rank
        flat = text.new_zeros(shape[0] * shape[1] * shape[2], width).index_copy(0, place, text)
        mask = torch.zeros(len(flat), dtype=torch.bool, device=text.device)
        mask[place] = True
        table, mask = flat.view(*shape, width), mask.view(shape)
        return table[:, :, 0], mask[:, :, 0], table[:, :, 1:], mask[:, :, 1:]


Task = LmTask | ClapTask
