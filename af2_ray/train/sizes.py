"""A recipe's model configuration without its weights: for plans and trials, where no hub need be in reach."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, Qwen2Config

from af2_ray.config import Recipe
from af2_ray.models.configuration_af2 import AudioFlamingo2Config
from af2_ray.text import SPECIAL_TOKENS
from af2_ray.train.clap import audio_config_of
from af2_ray.train.stages import model_config

QWEN = {  # the paper's LMs: hidden size, layers, heads, KV heads, inner size; embeddings are tied
    "Qwen/Qwen2.5-0.5B": (896, 24, 14, 2, 4864),
    "Qwen/Qwen2.5-1.5B": (1536, 28, 12, 2, 8960),
    "Qwen/Qwen2.5-3B": (2048, 36, 16, 2, 11008),
}
_QWEN_ROWS = 151_936


def recipe_config(recipe: Recipe) -> AudioFlamingo2Config:
    """The configuration of a recipe's model; the LM's from the recipe, from a known size, or from its folder.

    Raises:
        ValueError: the LM comes from a package, whose sizes only its weights tell.
    """
    settings = recipe.model.lm
    if settings.pretrain is not None:
        sizes = (settings.hidden_size, settings.num_layers, settings.num_heads, settings.num_kv_heads)
        text: Any = _qwen(*sizes, settings.intermediate_size, settings.pretrain.vocab_size)
    elif settings.path in QWEN:
        text = _qwen(*QWEN[settings.path], _QWEN_ROWS)
    elif settings.path is not None:
        text = AutoConfig.from_pretrained(settings.path)
    else:
        raise ValueError(
            f"model.lm.package={settings.package}: its sizes are unknown before it is fetched; once a run has it, give "
            "model.lm.package=null model.lm.path=<run>/lm/model"
        )
    tower = audio_config_of(recipe.model.audio)
    return model_config(recipe, tower, text, text.vocab_size - len(SPECIAL_TOKENS))


def _qwen(hidden: int, layers: int, heads: int, kv_heads: int, inner: int, vocabulary: int) -> Qwen2Config:
    return Qwen2Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=inner,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        eos_token_id=0,
        bos_token_id=None,
    )
