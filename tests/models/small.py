"""Tiny stand-ins of the same classes, for tests of the models: built in milliseconds, random but seeded."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from af2_ray.models.configuration_af2 import AudioFlamingo2Config
from af2_ray.models.htsat import AudioTower, tower_config
from af2_ray.models.modeling_af2 import AudioFlamingo2ForConditionalGeneration as Model

AUDIO, END, PAD, SEP = 300, 301, 302, 303
LM_ROWS = 310
FAMILIES = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}


def make_tower() -> AudioTower:
    torch.manual_seed(0)
    return AudioTower(tower_config(8, (1, 2, 1, 1), (1, 2, 4, 8)))


def make_lm(family: str = "qwen2", *, tied: bool = True) -> PreTrainedModel:
    """An LM with padded rows: 310, of which the tokenizer has 300."""
    torch.manual_seed(1)
    config_class, model_class = FAMILIES[family]
    config = config_class(
        vocab_size=LM_ROWS,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        tie_word_embeddings=tied,
        eos_token_id=0,
        bos_token_id=None,
        initializer_range=0.3,
    )
    return model_class(config).eval()


def make_model(
    family: str = "qwen2",
    *,
    tied: bool = True,
    open_gates: bool = True,
    every: int = 2,
    fusion: str = "xattn",
    features: str = "dense",
    time_features: int = 0,
    moments: int = 0,
) -> Model:
    lm, tower = make_lm(family, tied=tied), make_tower()
    config = AudioFlamingo2Config(
        text_config=lm.config,
        audio_config=tower.config,
        audio_token_id=AUDIO,
        fusion=fusion,
        audio_features=features,
        cross_attn_every=every,
        cross_attn_heads=2,
        cross_attn_head_dim=16,
        transform_layers=2,
        transform_heads=2,
        transform_inner_size=64,
        transform_time_features=time_features,
        transform_moments=moments,
    )
    torch.manual_seed(2)
    model = Model.from_parts(config, lm, tower).eval()
    if open_gates:
        for name, parameter in model.named_parameters():
            if name.endswith(("attn_gate", "ff_gate")):
                parameter.data.normal_(std=2.0)
    return model


def make_windows(count: int, seed: int = 0) -> torch.Tensor:
    """Noise of a different colour and level in each window, so that clips can be told apart."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 160_000, generator=generator)
    smooth = noise.cumsum(dim=1) / 50
    mix = torch.rand(count, 1, generator=generator)
    return ((mix * noise + (1 - mix) * smooth).clamp(-5, 5) * 5000).to(torch.int16)


def make_ids(rows: int, length: int = 8, markers: int = 1, seed: int = 0) -> torch.Tensor:
    """Prompts [B, T]: markers first, `<SEP>` last."""
    ids = torch.randint(1, AUDIO, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, :markers] = AUDIO
    ids[:, -1] = SEP
    return ids
