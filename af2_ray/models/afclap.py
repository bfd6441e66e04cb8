"""AF-CLAP: an audio tower and a text tower that meet in one space, trained by contrast (docs/paper.md, "AF-CLAP").

Its audio tower, trained here, is the one Audio Flamingo 2 hears with. It is used as transformers' CLAP is:
`get_audio_features`, `get_text_features`, `logits_per_audio`, the pipeline `zero-shot-audio-classification`. Shapes: S
windows of C clips, N captions, T text tokens, J joint width.

Contrast wants batches of more captions than a device can hold activations for. With `windows_per_chunk` and
`captions_per_chunk` both towers keep features alone, and work a chunk out again when its gradient is there: the
gradient cache of Gao et al. 2021 (arXiv 2101.06983), as PyTorch's checkpointing does it, random numbers included. It
costs one more forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, ClapAudioConfig, PreTrainedConfig, PreTrainedModel, T5EncoderModel
from transformers import initialization as init
from transformers.configuration_utils import SubConfigSpec
from transformers.models.clap.modeling_clap import ClapOutput

from af2_ray.models.htsat import AudioTower
from af2_ray.models.reorder import to_device
from af2_ray.models.transform import time_moments


class AfClapConfig(PreTrainedConfig):
    """Sizes of both towers and of the joint space.

    Attributes:
        text_config: an encoder's configuration; of a T5 only the encoder is built.
        text_pooling: kind of mean: `masked_mean` over real tokens (our training), or `mean` over all positions, padding
            included, which converted weights need (with texts padded to `text_length`; `AfClapProcessor` does).
        text_length: tokens of a text at most; with pooling `mean`, always.
        short_clips: what fills a clip's window after its end: `silence`, or the clip again (`repeat`, as often as it
            fits whole: the reference's way).
        initial_temperature: divisor of the similarity at the start of training.
        moments: number of moments of time that the heads see beside the mean (`pool`); 0, as in the paper, for none.
    """

    model_type = "af_clap"
    sub_configs_defaults = {  # noqa: RUF012 - transformers' own class attribute
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="t5"),
        "audio_config": SubConfigSpec(config_class=ClapAudioConfig),
    }

    text_config: Any = None
    audio_config: Any = None
    projection_dim: int = 512
    text_pooling: Literal["masked_mean", "mean"] = "masked_mean"
    text_length: int = 77
    short_clips: Literal["silence", "repeat"] = "silence"
    initial_temperature: float = 0.07
    moments: int = 0


class AfClapModel(PreTrainedModel):
    """Two towers with an MLP head each; `logit_scale` is the logarithm of the factor on dot products."""

    config: AfClapConfig
    config_class = AfClapConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = {"audio_encoder.batch_norm"}  # noqa: RUF012

    def __init__(self, config: AfClapConfig) -> None:
        super().__init__(config)
        self.audio_tower = AudioTower(config.audio_config)
        self.text_tower = _text_encoder(config.text_config)
        parts = 1 + config.moments
        self.audio_projection = _head(parts * self.audio_tower.output_size, config.projection_dim)
        self.text_projection = _head(parts * config.text_config.hidden_size, config.projection_dim)
        self.logit_scale = nn.Parameter(
            torch.full((1,), math.log(1 / config.initial_temperature))
        )  # DeepSpeed cannot broadcast a 0-d one
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The text tower's table."""
        return self.text_tower.get_input_embeddings()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's linear initialisation in the heads; the towers have their own."""
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            init.uniform_(module.bias, -bound, bound)
        elif module is self:
            init.constant_(self.logit_scale, math.log(1 / self.config.initial_temperature))

    @torch.no_grad()
    def direct_heads(self, strength: float) -> None:
        """Start both towers with heads that listen back or ahead (`AudioTower.direct_heads`); for new towers only.

        Both sides mean over tokens, so neither embedding tells "a dog, then a bell" from "a bell, then a dog" before
        attention has learned a direction; each side waits for the other to begin. A text tower other than T5 has
        positions of its own and is left as it is.
        """
        self.audio_tower.direct_heads(strength)
        if self.config.text_config.model_type == "t5":
            table = self.text_tower.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
            back = table.shape[0] // 2  # buckets of tokens before; as many after
            sign = strength * (1 - 2 * (torch.arange(table.shape[1]) % 2))
            table[1:back] += sign
            table[back + 1 :] -= sign

    def get_audio_features(
        self, waveforms: Tensor, windows_per_clip: Tensor | Sequence[int], *, windows_per_chunk: int | None = None
    ) -> Tensor:
        """Unit vectors [C, J] of clips: the mean over all tokens of a clip's windows, through the head.

        `windows_per_chunk`: activations of so many windows at a time (see the module); none: of all.
        """
        counts, device = torch.as_tensor(windows_per_clip).cpu(), waveforms.device  # a GPU is not asked, if it can be
        if int(counts.sum()) != waveforms.shape[0] or int(counts.min()) < 1:
            raise ValueError(
                f"windows_per_clip {counts.tolist()} must be 1 or more each, {len(waveforms)} (the windows) in all"
            )
        bands, steps = self.audio_tower.window_shape
        inside = torch.arange(bands * steps) % steps / steps
        windows = torch.cat([torch.arange(count) for count in counts.tolist()])
        share = (windows[:, None] + inside) / torch.repeat_interleave(counts, counts)[:, None]  # [S, F]
        pooled = _in_chunks(self._pool_windows, windows_per_chunk, waveforms, to_device(share, device))  # [S, P * D]
        owner = to_device(torch.repeat_interleave(torch.arange(len(counts)), counts), device)
        sums = pooled.new_zeros(len(counts), pooled.shape[1]).index_add(0, owner, pooled)
        return nnf.normalize(self.audio_projection(sums / to_device(counts[:, None], device)), dim=-1)

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor, *, captions_per_chunk: int | None = None
    ) -> Tensor:
        """Unit vectors [N, J] of captions [N, T]; `captions_per_chunk` as `windows_per_chunk`."""
        return _in_chunks(self._caption_vectors, captions_per_chunk, input_ids, attention_mask)

    def _pool_windows(self, waveforms: Tensor, share: Tensor) -> Tensor:
        """Mean and moments [S, P * D]. The tower learns from the mean alone, the head reads the moments as they are.

        Heads on a frozen tower learn order as well (0.95 of mirrored pairs), and a tower that learned from moments gave
        the language model worse features (identification 0.50 against 0.63).
        """
        features = self.audio_tower(waveforms)  # [S, F, D]
        weights = torch.full_like(share, 1 / share.shape[1])
        moments = pool(features.detach(), weights, share, self.config.moments)[:, features.shape[-1] :]
        return torch.cat([features.mean(dim=1), moments], dim=1)

    def _caption_vectors(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.text_tower(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        real = torch.ones_like(attention_mask) if self.config.text_pooling == "mean" else attention_mask
        count = real.sum(dim=1, keepdim=True).clamp(min=1)
        share = (real.cumsum(dim=1) - 0.5) / count
        pooled = pool(hidden, real / count, share.to(hidden.dtype), self.config.moments)
        return nnf.normalize(self.text_projection(pooled), dim=-1)

    def forward(
        self,
        waveforms: Tensor,
        windows_per_clip: Tensor | Sequence[int],
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        windows_per_chunk: int | None = None,
        captions_per_chunk: int | None = None,
        logits: bool = True,
    ) -> ClapOutput | tuple[Tensor, Tensor, Tensor]:
        """Clips [C] against captions [N]: similarities times the factor, [C, N] and [N, C], and the features behind.

        With `logits=False`, for training, whose loss never holds the table [C, N]: features of clips [C, J] and of
        captions [N, J], and the logarithm of the factor on their dot products.
        """
        audio = self.get_audio_features(waveforms, windows_per_clip, windows_per_chunk=windows_per_chunk)
        text = self.get_text_features(input_ids, attention_mask, captions_per_chunk=captions_per_chunk)
        if not logits:
            return audio, text, self.logit_scale
        similarity = self.logit_scale.exp() * audio @ text.T
        return ClapOutput(
            logits_per_audio=similarity, logits_per_text=similarity.T, audio_embeds=audio, text_embeds=text
        )


def load_text_encoder(path: str | Path) -> PreTrainedModel:
    """The pretrained encoder of a Hugging Face folder, in float32; of an encoder-decoder its encoder alone."""
    if AutoConfig.from_pretrained(path).model_type == "t5":
        return T5EncoderModel.from_pretrained(path, dtype=torch.float32)
    return _encoder_of(AutoModel.from_pretrained(path, dtype=torch.float32))


def pool(x: Tensor, weights: Tensor, share: Tensor, moments: int) -> Tensor:
    """The weighted mean of tokens [N, T, D], and their moments of time (`time_moments`): [N, (1 + moments) * D].

    Args:
        weights, share: weight of each token in the mean, and its place from beginning (0) to end (1), [N, T].
    """
    cosines = torch.cat([torch.ones_like(share)[..., None], time_moments(share, moments)], dim=-1)  # [N, T, 1 + P]
    return torch.einsum("ntp,ntd->npd", (weights[..., None] * cosines).to(x.dtype), x).flatten(1)


def _text_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    return T5EncoderModel(config) if config.model_type == "t5" else _encoder_of(AutoModel.from_config(config))


def _encoder_of(model: PreTrainedModel) -> PreTrainedModel:
    return model.get_encoder() if model.config.is_encoder_decoder else model


def _in_chunks(encode: Callable[..., Tensor], size: int | None, *inputs: Tensor) -> Tensor:
    """`encode` of inputs that share their first dimension, `size` rows at a time; activations are not kept."""
    if size is None or len(inputs[0]) <= size:
        return encode(*inputs)
    parts = zip(*(tensor.split(size) for tensor in inputs))
    if not torch.is_grad_enabled():
        return torch.cat([encode(*part) for part in parts])
    return torch.cat([checkpoint(encode, *part, use_reentrant=False) for part in parts])


def _head(in_features: int, out_features: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_features, out_features), nn.ReLU(), nn.Linear(out_features, out_features))


AutoConfig.register(AfClapConfig.model_type, AfClapConfig, exist_ok=True)
AutoModel.register(AfClapConfig, AfClapModel, exist_ok=True)
