"""Freezing, optimiser groups, schedule, the derived DeepSpeed configuration."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from af2_ray.config import DeepSpeedSettings, Optimizer
from af2_ray.train.engine import deepspeed_config, freeze_except, group_of, optimizer_groups, schedule


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.audio_tower = nn.Linear(2, 2)
        self.audio_transform = nn.Linear(2, 2)
        self.language_model = nn.Module()
        self.language_model.head = nn.Linear(2, 2)
        self.language_model.cross_attention = nn.Module()
        self.language_model.cross_attention.to_q = nn.Linear(2, 2, bias=False)
        self.language_model.cross_attention.attn_gate = nn.Parameter(torch.zeros(1))
        self.added_embeddings = nn.Parameter(torch.zeros(4, 2))


def test_every_parameter_has_its_group():
    groups = {name: group_of(name) for name, _ in Small().named_parameters()}
    assert groups["audio_tower.weight"] == "clap"
    assert groups["audio_transform.bias"] == "transform"
    assert groups["language_model.cross_attention.attn_gate"] == "xattn"
    assert groups["language_model.head.weight"] == "lm"
    assert groups["added_embeddings"] == "tokens"
    assert group_of("audio_tower.model.audio_encoder.batch_norm.weight") == "mel"  # in no recipe: never trains


def test_only_the_named_groups_train():
    model = Small()
    assert freeze_except(model, ["transform", "tokens"]) == [
        "added_embeddings",
        "audio_transform.weight",
        "audio_transform.bias",
    ]
    assert not model.audio_tower.weight.requires_grad
    with pytest.raises(ValueError, match="nothing to train"):
        freeze_except(model, [])


def test_vectors_gates_and_added_tokens_do_not_decay_and_gates_have_their_own_rate():
    model = Small()
    freeze_except(model, ["xattn", "tokens"])
    groups = optimizer_groups(model, Optimizer(lr=0.1, weight_decay=0.5, lr_scale={"gates": 10.0}))
    found = {(group["lr"], group["weight_decay"]): [list(p.shape) for p in group["params"]] for group in groups}
    assert found == {(0.1, 0.0): [[4, 2]], (1.0, 0.0): [[1]], (0.1, 0.5): [[2, 2]]}


def test_the_schedule_warms_up_then_holds_or_falls():
    constant = Optimizer(warmup_steps=4)
    assert [schedule(constant, 10, step) for step in (0, 3, 4, 9)] == [0.2, 0.8, 1.0, 1.0]
    cosine = Optimizer(warmup_steps=0, schedule="cosine")
    assert schedule(cosine, 10, 0) == 1.0
    assert schedule(cosine, 10, 5) == pytest.approx(0.5)
    assert schedule(cosine, 10, 10) == pytest.approx(0.0)


def test_raw_deepspeed_settings_are_merged_last():
    settings = DeepSpeedSettings(zero_stage=2, raw={"zero_optimization": {"overlap_comm": True}, "wall_clock": 1})
    config = deepspeed_config(settings, Optimizer(grad_clip=0.5), accumulation=3, bf16=False)
    assert config["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert (config["gradient_accumulation_steps"], config["gradient_clipping"], config["wall_clock"]) == (3, 0.5, 1)
