"""A random model with its processor in a folder, as a stage exports it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from af2_ray.config import LanguageModelPretrain, LanguageModelSettings
from af2_ray.models.configuration_af2 import AudioFlamingo2Config
from af2_ray.models.from_recipe import small_lm_config
from af2_ray.models.htsat import tower_config
from af2_ray.models.processing_af2 import AudioFlamingo2FeatureExtractor, AudioFlamingo2Processor
from af2_ray.models.random import random_model
from af2_ray.storage.files import write_digests
from af2_ray.text import AUDIO

SIZES = LanguageModelSettings(
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    intermediate_size=64,
    pretrain=LanguageModelPretrain(steps=1),
)


def write_export(folder: Path, tokenizer: Any, *, max_windows: int = 3, seed: int = 0, **settings: Any) -> Path:
    """Write a model of a few thousand parameters whose tokenizer is `tokenizer`; returns the folder."""
    text = small_lm_config(SIZES, 96, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    config = AudioFlamingo2Config(
        text_config=text,
        audio_config=tower_config(8, [1, 1, 1, 1], [1, 2, 2, 2], mlp_ratio=2),
        audio_token_id=tokenizer.convert_tokens_to_ids(AUDIO),
        cross_attn_heads=2,
        cross_attn_head_dim=16,
        transform_layers=1,
        transform_heads=2,
        transform_inner_size=64,
        **{"max_windows": max_windows, "max_text_tokens": 96, **settings},
    )
    random_model(config, seed=seed).save_pretrained(folder)
    extractor = AudioFlamingo2FeatureExtractor(config.max_windows)
    AudioFlamingo2Processor(extractor, tokenizer, max_text_tokens=96).save_pretrained(folder)
    write_digests(folder)
    return folder
