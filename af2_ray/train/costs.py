"""What a step costs on paper: parameters, operations, memory. `jobs/plan.py` and the MFU of a run stand on these.

Operations are those of matrix products, 2 a weight and token, and of attention, 4 a pair and channel; element-wise
work is left out. Forward counts once. Backward counts once more where gradients only pass through (the frozen LM),
twice where weights train, and not at all in a frozen tower. Recomputation (activation checkpointing) does not count, so

    MFU = operations of a step / (seconds of a step x GPUs x peak operations a second of one GPU).

Memory of weights, gradients and optimiser follows from DeepSpeed's partitioning. Activations are estimates: values kept
a token and layer, the tower's fitted to what was measured (112 and 288 MiB a window at widths 64 and 128, fp32).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from af2_ray.audio.windows import WINDOW_SAMPLES
from af2_ray.models.groups import group_of
from af2_ray.models.modeling_af2 import AudioFlamingo2ForConditionalGeneration as Model

TOKENS_PER_WINDOW = 64
TOWER_VALUES = 30  # kept a token and channel of a Swin block
LM_VALUES, XATTN_VALUES, TRANSFORM_VALUES = 16, 10, 12  # kept a token and channel of a layer, feed-forward apart
GIB = 2.0**30

PEAK_FLOPS = {"a100": 312e12, "h100": 989e12, "h200": 989e12}
"""Dense bf16 operations a second of one GPU, from its data sheet."""
MEMORY_GIB = {"a100": 80.0, "h100": 80.0, "h200": 141.0}


@dataclass(frozen=True)
class Work:
    """What one step, or one row, holds, without padding.

    Attributes:
        windows: windows of all clips, each heard once.
        text_tokens: tokens of prompts and answers.
        clip_windows: windows of one clip, on average.
        text_length: tokens of one question, on average.
        answer_tokens: tokens that the logits are computed for.
    """

    windows: float
    text_tokens: float
    clip_windows: float
    text_length: float
    answer_tokens: float


def parameters(model: nn.Module) -> dict[str, int]:
    """Parameters of each trainable group (`models.groups.group_of`), `mel` among them."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counts[group_of(name)] += parameter.numel()
    return dict(counts)


def meta_model(config: Any) -> Model:
    """A model of this configuration that takes no memory."""
    with torch.device("meta"):
        return Model(config)


# --- Operations --------------------------------------------------------------------------------------------------


def forward_flops(model: Model, work: Work) -> dict[str, float]:
    """Operations of the forward pass by group."""
    return {
        "clap": work.windows * tower_flops(model),
        "transform": _transform_flops(model, work),
        "xattn": _xattn_flops(model, work),
        "lm": _lm_flops(model, work),
    }


def step_flops(model: Model, work: Work, trainable: Collection[str], *, cached: bool = False) -> float:
    """Operations of forward and backward; `cached`: the tower's features are read, not computed."""
    forward = forward_flops(model, work)
    factor = {group: 3.0 if group in trainable else 2.0 for group in forward}  # gradients pass through frozen parts
    factor["clap"] = 3.0 if "clap" in trainable else 0.0 if cached else 1.0
    if "lora" in trainable:
        factor["lm"] = 2.0  # the adapters are next to nothing
    return sum(factor[group] * flops for group, flops in forward.items())


def tower_flops(model: Model) -> float:
    """Operations of one window's forward pass through the tower."""
    total = 2.0 * _stage_tokens(model)[0] * model.audio_tower.model.audio_encoder.patch_embed.proj.weight.numel()
    area = model.audio_tower.config.window_size**2
    for tokens, stage in zip(_stage_tokens(model), model.audio_tower.model.audio_encoder.layers, strict=True):
        weights = sum(p.numel() for n, p in stage.blocks.named_parameters() if p.ndim == 2 and n.endswith("weight"))
        width = stage.blocks[0].layernorm_before.weight.shape[0]
        total += 2 * tokens * weights + 4 * tokens * min(area, tokens) * width * len(stage.blocks)
        if stage.downsample is not None:
            total += 2 * tokens / 4 * stage.downsample.reduction.weight.numel()
    return total


def _stage_tokens(model: Model) -> list[int]:
    config = model.audio_tower.config
    side = config.spec_size // config.patch_stride[0]
    return [(side // 2**index) ** 2 for index in range(len(config.depths))]


def _matrices(module: nn.Module, *, without: Collection[str] = ()) -> int:
    return sum(p.numel() for n, p in module.named_parameters() if p.ndim == 2 and not any(w in n for w in without))


def _transform_flops(model: Model, work: Work) -> float:
    tokens = work.windows * TOKENS_PER_WINDOW
    pairs = tokens * work.clip_windows * TOKENS_PER_WINDOW
    width = model.audio_tower.output_size
    return 2 * tokens * _matrices(model.audio_transform) + 4 * pairs * width * len(model.audio_transform.layers)


def _xattn_flops(model: Model, work: Work) -> float:
    if model.config.fusion == "prefix":
        return 2 * work.windows * TOKENS_PER_WINDOW * _matrices(model.prefix)
    layers = [layer.cross_attention for layer in model.language_model.model.layers if layer.cross_attention is not None]
    text_side = sum(_matrices(layer, without=("to_kv",)) for layer in layers)
    audio_side = sum(layer.to_kv.weight.numel() for layer in layers)
    inner = model.config.cross_attn_heads * model.config.cross_attn_head_dim
    pairs = work.text_tokens * work.clip_windows * TOKENS_PER_WINDOW
    audio_tokens = work.windows * TOKENS_PER_WINDOW
    return 2 * work.text_tokens * text_side + 2 * audio_tokens * audio_side + 4 * pairs * inner * len(layers)


def _lm_flops(model: Model, work: Work) -> float:
    text = model.config.text_config
    tokens, length = work.text_tokens, work.text_length
    if model.config.fusion == "prefix":  # the audio stands in every layer
        heard = work.clip_windows * TOKENS_PER_WINDOW
        tokens, length = tokens * (1 + heard / length), length + heard
    weights = sum(_matrices(layer.decoder_layer) for layer in model.language_model.model.layers)
    head = 2 * work.answer_tokens * text.hidden_size * text.vocab_size
    return 2 * tokens * weights + 4 * tokens * length * text.hidden_size * text.num_hidden_layers + head


# --- Memory ------------------------------------------------------------------------------------------------------


def state_gib(
    counts: Mapping[str, int],
    trainable: Collection[str],
    *,
    zero_stage: int,
    gpus: int,
    offload: bool = False,
    sums: Literal["fp32", "bf16"] = "fp32",
) -> dict[str, float]:
    """GiB on each GPU of weights, gradients and optimiser state, bf16 with an fp32 master copy.

    ZeRO 1 shares out the optimiser (12 bytes a trained weight: master, two moments), 2 the gradients too, 3 all
    weights too (2). Gradients take 2 bytes, from stage 2 on 4: they add up in fp32 there (`deepspeed_config`), and are
    what the update reads, where a bf16 sum would be copied to fp32 first. What the update takes besides (one kernel,
    no temporary) is less than the activations that are gone by then.

    Args:
        offload: whether the optimiser is on the host. Sums in fp32 stay on the GPU then, those in bf16 go with it.
        sums: numbers that the gradients of a step's rows add up in, from stage 2 on.
    """
    everything = sum(counts.values())
    trained = sum(number for group, number in counts.items() if group in trainable)
    share = {part: gpus if zero_stage >= stage else 1 for part, stage in (("optimizer", 1), ("gradients", 2), ("w", 3))}
    gradient = 4 if zero_stage >= 2 and sums == "fp32" else 0 if zero_stage >= 2 and offload else 2
    return {
        "weights": 2 * everything / share["w"] / GIB,
        "gradients": gradient * trained / share["gradients"] / GIB,
        "optimizer": 0.0 if offload else 12 * trained / share["optimizer"] / GIB,
    }


def activation_gib(
    model: Model,
    row: Work,
    trainable: Collection[str],
    *,
    checkpointing: bool = False,
    layers: bool = False,
    cached: bool = False,
) -> dict[str, float]:
    """GiB of what one row keeps for its backward pass (bf16), by part; estimates.

    Args:
        checkpointing: whether the tower keeps only each block's input, and one block's values while it is recomputed.
        layers: whether every transformer layer does so (`deepspeed.activation_checkpointing`).
        cached: whether the tower's features are the row's input, in place of its windows.
    """
    audio_tokens, width = row.windows * TOKENS_PER_WINDOW, model.audio_tower.output_size
    num, values, inputs = _layer_values(model, row)
    kept = inputs if layers else values
    parts = {
        "inputs": audio_tokens * width if cached else row.windows * WINDOW_SAMPLES,  # bf16; int16
        "clap": _tower_values(model, row, checkpointing) if "clap" in trainable and not cached else 0.0,
        **{name: num[name] * kept[name] for name in num},
        "recomputed": max(values.values()) if layers else 0.0,
        # bf16 twice (the head, and joined with the added tokens), fp32 twice: the loss' own copy and its log-softmax
        "logits": row.answer_tokens * model.config.text_config.vocab_size * 6,
    }
    return {name: 2 * found / GIB for name, found in parts.items()}


def _tower_values(model: Model, row: Work, checkpointing: bool) -> float:
    """Values that the tower keeps of a row."""
    channels = [
        tokens * stage.blocks[0].layernorm_before.weight.shape[0] * len(stage.blocks)
        for tokens, stage in zip(_stage_tokens(model), model.audio_tower.model.audio_encoder.layers, strict=True)
    ]
    kept = sum(channels) + TOWER_VALUES * max(channels) / 2 if checkpointing else TOWER_VALUES * sum(channels)
    return row.windows * kept


def _layer_values(model: Model, row: Work) -> tuple[dict[str, int], dict[str, float], dict[str, float]]:
    """Layers of each kind, the values that one of them keeps of a row, and those of its input alone."""
    config, text = model.config, model.config.text_config
    audio_tokens, width = row.windows * TOKENS_PER_WINDOW, model.audio_tower.output_size
    layers = model.language_model.model.layers
    adapters = sum(parameter.shape[0] for name, parameter in layers[0].named_parameters() if ".lora_A." in name)
    inner, ff = config.cross_attn_heads * config.cross_attn_head_dim, 2 * config.cross_attn_ff_mult
    values = {
        "transform": audio_tokens * (TRANSFORM_VALUES * width + 2 * config.transform_inner_size),
        "lm": row.text_tokens * (LM_VALUES * text.hidden_size + 3 * text.intermediate_size + adapters),
        "xattn": row.text_tokens * (XATTN_VALUES + ff) * text.hidden_size + audio_tokens * 2 * inner,
    }
    inputs = dict.fromkeys(values, row.text_tokens * text.hidden_size) | {"transform": audio_tokens * width}
    heard = sum(layer.cross_attention is not None for layer in layers)
    num = {"transform": len(model.audio_transform.layers), "lm": len(layers), "xattn": heard}
    return num, values, inputs
