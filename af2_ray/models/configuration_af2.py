"""The configuration of an Audio Flamingo 2: an audio tower, an LM, and what lies between."""

from __future__ import annotations

from typing import Any, Literal

from transformers import AutoConfig, ClapAudioConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from af2_ray.text import SPECIAL_TOKENS

TESTED_FAMILIES = ("qwen2", "llama")
"""LMs whose layers are known to take keyword arguments through; others are refused, not tried."""


class AudioFlamingo2Config(PreTrainedConfig):
    """Sizes and ids; the defaults are the paper's 3B model (docs/paper.md, "Cross-attention").

    Attributes:
        text_config: the LM's configuration (`model_type` qwen2 or llama).
        audio_config: the tower's configuration, as transformers' `ClapAudioConfig`.
        audio_token_id: id of `<audio>`, the tokenizer's length before the four tokens were added. Ids below it are the
            LM's own; LM rows from there on are padding of its matrix and are never used.
        fusion: gated cross-attention, or the audio as a prefix of the text (docs/paper.md, "Prefix").
        audio_features: all 64 features of a window, or their mean alone.
        cross_attn_every: interval of cross-attention: before LM layer i where (i + 1) % cross_attn_every == 0.
        transform_rope_base: base of the audio transformer's rotary positions; none: no positions.
        transform_time_features: size of an embedding of each audio token's time; 0, as in the paper, for none.
        transform_moments: moments of time of the clip that are added to each audio token; 0, as in the paper, for none.
        max_windows: the longest audio, in windows of 10 s, that the model accepts.
        max_text_tokens: the longest question with its answer that the model was trained on; none: not known.
    """

    model_type = "audio_flamingo_2"
    sub_configs_defaults = {  # noqa: RUF012 - transformers' own class attribute
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2"),
        "audio_config": SubConfigSpec(config_class=ClapAudioConfig),
    }

    text_config: Any = None
    audio_config: Any = None
    audio_token_id: int = 151_665
    fusion: Literal["xattn", "prefix"] = "xattn"
    audio_features: Literal["dense", "pooled"] = "dense"
    cross_attn_every: int = 1
    cross_attn_heads: int = 8
    cross_attn_head_dim: int = 64
    cross_attn_ff_mult: int = 4
    transform_layers: int = 3
    transform_heads: int = 8
    transform_inner_size: int = 2048
    transform_rope_base: float | None = 4096.0
    transform_time_features: int = 0
    transform_moments: int = 0
    max_windows: int = 30
    max_text_tokens: int | None = None
    pad_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Check what no single value shows, and take the LM's ids where none is given."""
        super().__post_init__(**kwargs)
        family, num_layers = self.text_config.model_type, self.text_config.num_hidden_layers
        if family not in TESTED_FAMILIES:
            raise ValueError(
                f"text_config.model_type {family!r}: cross-attention is tested only with {TESTED_FAMILIES}"
            )
        if not 1 <= self.cross_attn_every <= num_layers:
            raise ValueError(
                f"cross_attn_every={self.cross_attn_every} leaves none of the LM's {num_layers} layers hearing the "
                "audio: use a value from 1 to that number"
            )
        if self.audio_token_id > self.text_config.vocab_size:
            raise ValueError(
                f"audio_token_id={self.audio_token_id} lies beyond the LM's {self.text_config.vocab_size} rows: "
                "it must be the tokenizer's length before the special tokens"
            )
        if self.pad_token_id is None:
            self.pad_token_id = self.audio_token_id + 2
        if self.eos_token_id is None:
            self.eos_token_id = self.text_config.eos_token_id

    @property
    def end_of_chunk_token_id(self) -> int:
        """Id of `<|endofchunk|>`."""
        return self.audio_token_id + 1

    @property
    def num_tokens(self) -> int:
        """The tokenizer's length with the four added tokens, and the width of the logits."""
        return self.audio_token_id + len(SPECIAL_TOKENS)
