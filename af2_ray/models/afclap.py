"""AF-CLAP: an audio tower and a text tower that meet in one space, trained by contrast (GOLDEN: AF-CLAP two towers).

Its audio tower, trained here, is the one Audio Flamingo 2 hears with. Shapes: S windows of C clips, N captions, T text
tokens, J joint width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, ClapAudioConfig, PreTrainedConfig, PreTrainedModel, T5EncoderModel
from transformers import initialization as init
from transformers.configuration_utils import SubConfigSpec

from af2_ray.models.htsat import AudioTower
from af2_ray.models.transform import time_moments


class AfClapConfig(PreTrainedConfig):
    """Sizes of both towers and of the joint space.

    Attributes:
        text_config: an encoder's configuration; of a T5 only the encoder is built.
        text_pooling: `masked_mean` over real tokens (our training), or `mean` over all positions, padding included,
            which converted weights need (with texts padded to 77 tokens).
        initial_temperature: the similarity's divisor at the start of training.
        moments: how many moments of time the heads see beside the mean (`pool`); 0, as in the paper, for none.
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

    def get_audio_features(self, waveforms: Tensor, windows_per_clip: Tensor | Sequence[int]) -> Tensor:
        """Unit vectors [C, J] of clips: the mean over all tokens of a clip's windows, through the head."""
        counts = torch.as_tensor(windows_per_clip, device=waveforms.device)
        if int(counts.sum()) != waveforms.shape[0] or int(counts.min()) < 1:
            raise ValueError(
                f"windows_per_clip {counts.tolist()} must be 1 or more each, {len(waveforms)} (the windows) in all"
            )
        features = self.audio_tower(waveforms)  # [S, F, D]
        bands, steps = self.audio_tower.window_shape
        inside = torch.arange(bands * steps, device=features.device) % steps / steps
        windows = torch.cat([torch.arange(int(count), device=features.device) for count in counts])
        length = torch.repeat_interleave(counts, counts)
        share = (windows[:, None] + inside) / length[:, None]
        pooled = pool(features, torch.full_like(share, 1 / share.shape[1]), share, self.config.moments)  # [S, P * D]
        owner = torch.repeat_interleave(torch.arange(len(counts), device=features.device), counts)
        sums = pooled.new_zeros(len(counts), pooled.shape[1]).index_add(0, owner, pooled)
        return nnf.normalize(self.audio_projection(sums / counts[:, None]), dim=-1)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Unit vectors [N, J] of captions [N, T]."""
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
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Features of clips [C, J] and captions [N, J], and the log of the factor on their dot products."""
        return (
            self.get_audio_features(waveforms, windows_per_clip),
            self.get_text_features(input_ids, attention_mask),
            self.logit_scale,
        )


def pool(x: Tensor, weights: Tensor, share: Tensor, moments: int) -> Tensor:
    """The weighted mean of tokens [N, T, D], and their moments of time (`time_moments`): [N, (1 + moments) * D].

    Args:
        weights, share: [N, T], a token's weight in the mean, and where it lies from beginning (0) to end (1).
    """
    cosines = torch.cat([torch.ones_like(share)[..., None], time_moments(share, moments)], dim=-1)  # [N, T, 1 + P]
    return torch.einsum("ntp,ntd->npd", (weights[..., None] * cosines).to(x.dtype), x).flatten(1)


def _text_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    return T5EncoderModel(config) if config.model_type == "t5" else AutoModel.from_config(config)


def _head(in_features: int, out_features: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_features, out_features), nn.ReLU(), nn.Linear(out_features, out_features))


AutoConfig.register(AfClapConfig.model_type, AfClapConfig, exist_ok=True)
AutoModel.register(AfClapConfig, AfClapModel, exist_ok=True)
