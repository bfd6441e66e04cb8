"""The one map between NVIDIA's tensor names and ours, strict and both ways.

Every tensor of a reference checkpoint is mapped, known to be redundant (constants and aliases, which are checked), or
kept aside as an `extra` (heads that we do not compute, but that the way back needs). Anything else is an error that
names it: a weight that goes missing silently costs weeks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import ClapAudioConfig, PreTrainedConfig, T5Config

from af2_ray.models.afclap import AfClapConfig
from af2_ray.models.configuration_af2 import AudioFlamingo2Config
from af2_ray.models.htsat import tower_config
from af2_ray.models.transform import rotary_frequencies
from af2_ray.text import SPECIAL_TOKENS

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Rule:
    """A reference name and ours; `{n}` is a number, `{rest}` any ending. Several of ours split its rows."""

    reference: str
    ours: tuple[str, ...]

    def to_ours(self, name: str) -> list[str] | None:
        """Our names of reference `name`, if the rule is about it."""
        found = re.fullmatch(_pattern(self.reference), name)
        return None if found is None else [_fill(ours, found.groups()) for ours in self.ours]

    def to_reference(self, name: str) -> tuple[str, int] | None:
        """The reference name of our `name` and which part of it that is, if the rule is about it."""
        for part, ours in enumerate(self.ours):
            if found := re.fullmatch(_pattern(ours), name):
                return _fill(self.reference, found.groups()), part
        return None


def _pattern(template: str) -> str:
    return re.escape(template).replace(r"\{n\}", r"(\d+)").replace(r"\{rest\}", "(.+)")


def _fill(template: str, values: Iterable[str]) -> str:
    remaining = iter(values)
    return re.sub(r"\{n\}|\{rest\}", lambda _: next(remaining), template)


def _rules(reference: str, ours: str, pairs: Mapping[str, str | tuple[str, ...]]) -> list[Rule]:
    return [
        Rule(reference + key, tuple(ours + name for name in ((names,) if isinstance(names, str) else names)))
        for key, names in pairs.items()
    ]


_BLOCK = "layers.{n}.blocks.{n}."
_TOWER: dict[str, str | tuple[str, ...]] = {
    "bn0.{rest}": "batch_norm.{rest}",
    "patch_embed.{rest}": "patch_embed.{rest}",
    _BLOCK + "norm1.{rest}": _BLOCK + "layernorm_before.{rest}",
    _BLOCK + "attn.relative_position_bias_table": _BLOCK + "attention.self.relative_position_bias_table",
    _BLOCK + "attn.qkv.{rest}": tuple(_BLOCK + f"attention.self.{part}.{{rest}}" for part in ("query", "key", "value")),
    _BLOCK + "attn.proj.{rest}": _BLOCK + "attention.output.dense.{rest}",
    _BLOCK + "norm2.{rest}": _BLOCK + "layernorm_after.{rest}",
    _BLOCK + "mlp.fc1.{rest}": _BLOCK + "intermediate.dense.{rest}",
    _BLOCK + "mlp.fc2.{rest}": _BLOCK + "output.dense.{rest}",
    "layers.{n}.downsample.{rest}": "layers.{n}.downsample.{rest}",
    "norm.{rest}": "norm.{rest}",
}
_TRANSFORM: dict[str, str | tuple[str, ...]] = {
    "layer_norm.{rest}": "input_norm.{rest}",
    "layer_stack.{n}.slf_attn.w_qs.weight": "layers.{n}.q_proj.weight",
    "layer_stack.{n}.slf_attn.w_ks.weight": "layers.{n}.k_proj.weight",
    "layer_stack.{n}.slf_attn.w_vs.weight": "layers.{n}.v_proj.weight",
    "layer_stack.{n}.slf_attn.fc.weight": "layers.{n}.out_proj.weight",
    "layer_stack.{n}.slf_attn.layer_norm.{rest}": "layers.{n}.attention_norm.{rest}",
    "layer_stack.{n}.pos_ffn.w_1.{rest}": "layers.{n}.fc1.{rest}",
    "layer_stack.{n}.pos_ffn.w_2.{rest}": "layers.{n}.fc2.{rest}",
    "layer_stack.{n}.pos_ffn.layer_norm.{rest}": "layers.{n}.ff_norm.{rest}",
}
_XATTN: dict[str, str | tuple[str, ...]] = {
    "attn_gate": "attn_gate",
    "ff_gate": "ff_gate",
    "attn.norm.{rest}": "norm.{rest}",
    "attn.to_q.weight": "to_q.weight",
    "attn.to_kv.weight": "to_kv.weight",
    "attn.to_out.weight": "to_out.weight",
    "ff.0.{rest}": "ff_norm.{rest}",
    "ff.1.weight": "fc1.weight",
    "ff.3.weight": "fc2.weight",
}
_LAYER = "model.layers.{n}."
OUR_TOWER = "audio_tower.model.audio_encoder."
AF2_RULES = [
    *_rules("clap.afclap.", OUR_TOWER, _TOWER),
    *_rules("audio_transformer_clap.", "audio_transform.", _TRANSFORM),
    *_rules(f"lang_encoder.{_LAYER}gated_cross_attn_layer_sound.", f"language_model.{_LAYER}cross_attention.", _XATTN),
    Rule(f"lang_encoder.{_LAYER}decoder_layer.{{rest}}", (f"language_model.{_LAYER}decoder_layer.{{rest}}",)),
    Rule("lang_encoder.model.norm.{rest}", ("language_model.model.norm.{rest}",)),
]
AFCLAP_RULES = [
    *_rules("audio_branch.", OUR_TOWER, _TOWER),
    Rule("text_branch.{rest}", ("text_tower.{rest}",)),
    Rule("audio_projection.{rest}", ("audio_projection.{rest}",)),
    Rule("text_projection.{rest}", ("text_projection.{rest}",)),
    Rule("logit_scale_a", ("logit_scale",)),
]
EXTRAS = re.compile(r"(clap\.afclap\.|audio_branch\.)(tscam_conv|head)\..+|(audio|text)_transform\..+|logit_scale_t")
"""Classification heads and MLPs that our forward passes never compute."""
REDUNDANT = re.compile(r".+\.(attn_mask|attn\.relative_position_index)|.*(spectrogram_extractor|logmel_extractor)\..+")
"""Constants that follow from the sizes."""
INV_FREQ = "audio_transformer_clap.position_enc.inv_freq"
EMBED, HEAD = "lang_encoder.model.embed_tokens.weight", "lang_encoder.lm_head.weight"
OUR_EMBED, OUR_HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
OURS_REDUNDANT = re.compile(r".+\.relative_position_index")


# --- Audio Flamingo 2 --------------------------------------------------------------------------------------------


def clean_names(weights: Mapping[str, Tensor]) -> Weights:
    """Reference names without `module.`, with `clap.afclap.`, and each aliased tensor once, under its main name."""
    cleaned: Weights = {}
    for name, value in weights.items():
        main = name.removeprefix("module.").replace("clap.nvclap.", "clap.afclap.")
        main = re.sub(
            r"^lang_encoder\.old_decoder_blocks\.(\d+)\.", r"lang_encoder.model.layers.\1.decoder_layer.", main
        )
        main = re.sub(
            r"^lang_encoder\.gated_cross_attn_layers_sound\.(\d+)\.",
            r"lang_encoder.model.layers.\1.gated_cross_attn_layer_sound.",
            main,
        )
        if main in cleaned and not torch.equal(cleaned[main], value):
            raise ValueError(f"{name} is an alias of {main}, but their values differ: the checkpoint is damaged")
        cleaned[main] = value
    return cleaned


def infer_af2_config(
    weights: Mapping[str, Tensor],
    text_config: PreTrainedConfig,
    *,
    transform_heads: int = 8,
    cross_attn_head_dim: int = 64,
    **settings: Any,
) -> AudioFlamingo2Config:
    """The configuration of a reference checkpoint (names already clean): sizes from the weights.

    Args:
        text_config: the LM's own configuration; its number of rows is set to what the checkpoint keeps.
        transform_heads, cross_attn_head_dim: number and width of heads, which the weights do not show (the reference's
            are 8 and 64).
    """
    rows, width = weights[EMBED].shape
    layers = "lang_encoder.model.layers."
    hearing = _numbers(weights, re.escape(layers) + r"(\d+)\.gated_cross_attn_layer_sound\.attn_gate")
    xattn = f"{layers}{hearing[0]}.gated_cross_attn_layer_sound."
    num_layers = len(_numbers(weights, r"audio_transformer_clap\.layer_stack\.(\d+)\.slf_attn\.fc\.weight"))
    inner = weights["audio_transformer_clap.layer_stack.0.pos_ffn.w_1.weight"].shape[0] if num_layers else 1
    text = type(text_config).from_dict({**text_config.to_dict(), "vocab_size": rows - len(SPECIAL_TOKENS)})
    config = AudioFlamingo2Config(
        text_config=text,
        audio_config=infer_tower_config(weights, "clap.afclap."),
        audio_token_id=rows - len(SPECIAL_TOKENS),
        cross_attn_every=hearing[0] + 1,
        cross_attn_head_dim=cross_attn_head_dim,
        cross_attn_heads=weights[xattn + "attn.to_q.weight"].shape[0] // cross_attn_head_dim,
        cross_attn_ff_mult=weights[xattn + "ff.1.weight"].shape[0] // width,
        transform_layers=num_layers,
        transform_heads=transform_heads,
        transform_inner_size=inner,
        transform_rope_base=_rope_base(weights.get(INV_FREQ)),
        **settings,
    )
    expected = [i for i in range(text.num_hidden_layers) if (i + 1) % config.cross_attn_every == 0]
    if hearing != expected:
        raise ValueError(f"cross-attention stands before layers {hearing}, not evenly spaced: expected {expected}")
    return config


def af2_from_reference(weights: Mapping[str, Tensor], config: AudioFlamingo2Config) -> tuple[Weights, Weights]:
    """Our state dict of a reference checkpoint (names already clean), and the extras for the way back."""
    rest = dict(weights)
    first = config.audio_token_id
    embed, head = rest.pop(EMBED), rest.pop(HEAD, None)
    ours: Weights = {OUR_EMBED: embed[:first], "added_embeddings": embed[first:]}
    if config.text_config.tie_word_embeddings:
        if head is not None and not torch.equal(head, embed):
            raise ValueError(f"{HEAD} differs from {EMBED}, but the LM's configuration ties them: correct it")
        ours[OUR_HEAD] = ours[OUR_EMBED]
    elif head is None:
        raise ValueError(f"{HEAD} is missing and the LM's configuration does not tie it to {EMBED}")
    else:
        ours |= {OUR_HEAD: head[:first], "added_embeddings_out": head[first:]}
    mapped, extras = _from_reference(rest, AF2_RULES, keep={INV_FREQ})
    return ours | mapped, extras


def af2_to_reference(
    state: Mapping[str, Tensor], config: AudioFlamingo2Config, extras: Mapping[str, Tensor]
) -> Weights:
    """A reference checkpoint of our state dict: the way back of `af2_from_reference`, to the bit."""
    rest, first = dict(state), config.audio_token_id
    embed = torch.cat([rest.pop(OUR_EMBED)[:first], rest.pop("added_embeddings")])
    head = rest.pop(OUR_HEAD, None)
    if not config.text_config.tie_word_embeddings:
        if head is None:
            raise ValueError(f"{OUR_HEAD} is missing and the LM's configuration does not tie it to {OUR_EMBED}")
        head = torch.cat([head[:first], rest.pop("added_embeddings_out")])
    else:
        head = embed
    return {EMBED: embed, HEAD: head, **_to_reference(rest, AF2_RULES), **extras}


# --- AF-CLAP -----------------------------------------------------------------------------------------------------


def infer_afclap_config(weights: Mapping[str, Tensor], **text_settings: Any) -> AfClapConfig:
    """The configuration of an AF-CLAP checkpoint (names already clean); text is pooled over padding too, as it was."""
    block = "text_branch.encoder.block."
    attention = block + "0.layer.0.SelfAttention."
    buckets, heads = weights[attention + "relative_attention_bias.weight"].shape
    gated = block + "0.layer.1.DenseReluDense.wi_0.weight" in weights
    up = weights[block + "0.layer.1.DenseReluDense." + ("wi_0.weight" if gated else "wi.weight")]
    text = T5Config(
        vocab_size=weights["text_branch.shared.weight"].shape[0],
        d_model=up.shape[1],
        d_ff=up.shape[0],
        d_kv=weights[attention + "q.weight"].shape[0] // heads,
        num_heads=heads,
        num_layers=len(_numbers(weights, re.escape(block) + r"(\d+)\.layer\.0\.layer_norm\.weight")),
        relative_attention_num_buckets=buckets,
        **{"feed_forward_proj": "gated-gelu" if gated else "relu", **text_settings},
    )
    return AfClapConfig(
        text_config=text,
        audio_config=infer_tower_config(weights, "audio_branch."),
        projection_dim=weights["audio_projection.0.weight"].shape[0],
        text_pooling="mean",
        short_clips="repeat",
    )


def afclap_from_reference(weights: Mapping[str, Tensor]) -> tuple[Weights, Weights]:
    """Our state dict of an AF-CLAP checkpoint (names already clean), and the extras for the way back."""
    ours, extras = _from_reference(weights, AFCLAP_RULES)
    return ours | {"logit_scale": ours["logit_scale"].reshape(1)}, extras


def afclap_to_reference(state: Mapping[str, Tensor], extras: Mapping[str, Tensor]) -> Weights:
    """An AF-CLAP checkpoint of our state dict: the way back of `afclap_from_reference`, to the bit."""
    weights = _to_reference(state, AFCLAP_RULES)
    return weights | {"logit_scale_a": weights["logit_scale_a"].reshape(())} | dict(extras)


# --- Shared ------------------------------------------------------------------------------------------------------


def infer_tower_config(weights: Mapping[str, Tensor], prefix: str) -> ClapAudioConfig:
    """The tower's configuration from its weights: width, depths, heads, window, fusion branch."""
    embed_dim, channels, patch, _ = weights[prefix + "patch_embed.proj.weight"].shape
    blocks = re.escape(prefix) + r"layers\.{}\.blocks\.(\d+)\.norm1\.weight"
    stages = _numbers(weights, re.escape(prefix) + r"layers\.(\d+)\.blocks\.0\.norm1\.weight")
    tables = [weights[f"{prefix}layers.{i}.blocks.0.attn.relative_position_bias_table"] for i in stages]
    fusion = prefix + "patch_embed.fusion_model.local_att.0.weight"
    settings: dict[str, Any] = {}
    if fusion in weights:
        settings = {"enable_fusion": True, "fusion_type": None, "aff_block_r": embed_dim // weights[fusion].shape[0]}
    return tower_config(
        embed_dim,
        [len(_numbers(weights, blocks.format(stage))) for stage in stages],
        [table.shape[1] for table in tables],
        window_size=(int(tables[0].shape[0] ** 0.5) + 1) // 2,
        num_mel_bins=weights[prefix + "bn0.weight"].shape[0],
        patch_size=patch,
        patch_embed_input_channels=channels,
        mlp_ratio=weights[prefix + "layers.0.blocks.0.mlp.fc1.weight"].shape[0] / embed_dim,
        **settings,
    )


def _from_reference(
    weights: Mapping[str, Tensor], rules: Sequence[Rule], keep: Iterable[str] = ()
) -> tuple[Weights, Weights]:
    ours: Weights = {}
    extras: Weights = {}
    unknown = []
    for name, value in weights.items():
        names = next((found for rule in rules if (found := rule.to_ours(name)) is not None), None)
        if names is not None:
            ours.update(zip(names, value.chunk(len(names)) if len(names) > 1 else [value], strict=True))
        elif EXTRAS.fullmatch(name) or name in keep:
            extras[name] = value
        elif not REDUNDANT.fullmatch(name):
            unknown.append(name)
    if unknown:
        raise ValueError(f"the reference checkpoint has tensors that no rule maps: {', '.join(sorted(unknown))}")
    return ours, extras


def _to_reference(state: Mapping[str, Tensor], rules: Sequence[Rule]) -> Weights:
    parts: dict[str, dict[int, Tensor]] = {}
    unknown = []
    for name, value in state.items():
        found = next((found for rule in rules if (found := rule.to_reference(name)) is not None), None)
        if found is not None:
            parts.setdefault(found[0], {})[found[1]] = value
        elif not OURS_REDUNDANT.fullmatch(name):
            unknown.append(name)
    if unknown:
        raise ValueError(f"our state dict has tensors that no rule maps: {', '.join(sorted(unknown))}")
    return {
        name: torch.cat([pieces[i] for i in sorted(pieces)]) if len(pieces) > 1 else pieces[0]
        for name, pieces in parts.items()
    }


def _numbers(names: Iterable[str], pattern: str) -> list[int]:
    return sorted({int(found[1]) for name in names if (found := re.fullmatch(pattern, name))})


def _rope_base(inv_freq: Tensor | None) -> float | None:
    """The base that made these frequencies; none if there are none."""
    if inv_freq is None:
        return None
    base = float(round(float(inv_freq[1].double() ** -len(inv_freq))))
    if not torch.allclose(inv_freq.float(), rotary_frequencies(2 * len(inv_freq), base, inv_freq.device), rtol=1e-4):
        raise ValueError(f"{INV_FREQ} is not a geometric series of one base: this rotary scheme is not known")
    return base
