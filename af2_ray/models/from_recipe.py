"""From a recipe to the configurations of its models, without their weights: no hub need be in reach."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, ClapAudioConfig, Qwen2Config, T5Config

from af2_ray.config import AudioTowerSettings, Clap, LanguageModelSettings, Recipe
from af2_ray.models.afclap import AfClapConfig
from af2_ray.models.configuration_af2 import AudioFlamingo2Config
from af2_ray.models.htsat import tower_config
from af2_ray.models.start import start_config
from af2_ray.text import SPECIAL_TOKENS

QWEN = {  # the paper's LMs: hidden size, layers, heads, KV heads, inner size; embeddings are tied
    "Qwen/Qwen2.5-0.5B": (896, 24, 14, 2, 4864),
    "Qwen/Qwen2.5-1.5B": (1536, 28, 12, 2, 8960),
    "Qwen/Qwen2.5-3B": (2048, 36, 16, 2, 11008),
}
_QWEN_ROWS = 151_936
_MIN_POSITIONS = 512


def audio_tower_config(settings: AudioTowerSettings) -> ClapAudioConfig:
    """The configuration of a new tower of a recipe's size."""
    return tower_config(
        settings.embed_dim,
        settings.depths,
        settings.num_heads,
        patch_size=settings.patch_size,
        window_size=settings.window_size,
        mlp_ratio=settings.mlp_ratio,
        hidden_act=settings.hidden_act,
        initializer_factor=settings.initializer_factor,
    )


def small_lm_config(settings: LanguageModelSettings, max_text_tokens: int, **token_ids: Any) -> Qwen2Config:
    """The configuration of an LM that is made here.

    Args:
        max_text_tokens: tokens of a question with its answer.
        token_ids: sizes and ids of its tokenizer: `vocab_size`, `eos_token_id`, `pad_token_id`.
    """
    return _qwen(
        settings.hidden_size,
        settings.num_layers,
        settings.num_heads,
        settings.num_kv_heads,
        settings.intermediate_size,
        max_position_embeddings=max(_MIN_POSITIONS, max_text_tokens),
        initializer_range=settings.hidden_size**-0.5,  # 0.02 is for widths of thousands: attention would start flat
        **token_ids,
    )


def afclap_config(settings: Clap, audio_config: ClapAudioConfig, tokenizer: Any) -> AfClapConfig:
    """The configuration of AF-CLAP; a text encoder that is made here takes the tokenizer's size."""
    text = settings.text
    text_config = (
        AutoConfig.from_pretrained(text.path)
        if text.path
        else T5Config(
            vocab_size=len(tokenizer),
            d_model=text.hidden_size,
            d_kv=text.hidden_size // text.num_heads,
            d_ff=text.inner_size,
            num_layers=text.num_layers,
            num_heads=text.num_heads,
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return AfClapConfig(
        audio_config=audio_config,
        text_config=text_config,
        projection_dim=settings.joint_dim,
        text_pooling=text.pooling,
        short_clips=settings.short_clips,
        moments=settings.moments,
        initial_temperature=settings.temperature,
    )


def model_config(recipe: Recipe, audio_config: Any, text_config: Any, audio_token_id: int) -> AudioFlamingo2Config:
    """The whole model's configuration, from a recipe and the configurations of its tower and its LM."""
    settings = recipe.model
    return AudioFlamingo2Config(
        audio_config=audio_config,
        text_config=text_config,
        audio_token_id=audio_token_id,
        fusion=settings.fusion,
        audio_features=settings.audio.features,
        cross_attn_every=settings.cross_attention.every,
        cross_attn_heads=settings.cross_attention.num_heads,
        cross_attn_head_dim=settings.cross_attention.head_dim,
        cross_attn_ff_mult=settings.cross_attention.ff_mult,
        transform_layers=settings.transform.num_layers,
        transform_heads=settings.transform.num_heads,
        transform_inner_size=settings.transform.inner_size,
        transform_rope_base=settings.transform.rope_base,
        transform_time_features=settings.transform.time_features,
        transform_moments=settings.transform.moments,
        max_windows=max(stage.max_windows for stage in recipe.stages),
        max_text_tokens=settings.max_text_tokens,
    )


def recipe_config(recipe: Recipe) -> AudioFlamingo2Config:
    """The configuration of a recipe's model: of its start, or of the LM that the recipe names and all else it says.

    Raises:
        ValueError: the LM comes from a package, whose sizes only its weights tell.
    """
    if recipe.model.start is not None:
        return start_config(recipe)
    settings = recipe.model.lm
    if settings.pretrain is not None:
        text: Any = small_lm_config(
            settings, recipe.model.max_text_tokens, vocab_size=settings.pretrain.vocab_size, eos_token_id=0
        )
    elif settings.path in QWEN:
        text = _qwen(*QWEN[settings.path], vocab_size=_QWEN_ROWS, eos_token_id=0)
    elif settings.path is not None:
        text = AutoConfig.from_pretrained(settings.path)
    else:
        raise ValueError(
            f"model.lm.package={settings.package}: its sizes are unknown before it is fetched; once a run has it, give "
            "model.lm.package=null model.lm.path=<run>/lm/model"
        )
    return model_config(recipe, audio_tower_config(recipe.model.audio), text, text.vocab_size - len(SPECIAL_TOKENS))


def _qwen(hidden: int, layers: int, heads: int, kv_heads: int, inner: int, **more: Any) -> Qwen2Config:
    return Qwen2Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=inner,
        tie_word_embeddings=True,
        bos_token_id=None,
        **more,
    )
