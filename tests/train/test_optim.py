"""Freezing, optimiser groups, schedule, the derived DeepSpeed configuration."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import T5Config

from af2_ray.config import DeepSpeedSettings, Optimizer
from af2_ray.models.afclap import AfClapConfig, AfClapModel
from af2_ray.models.groups import group_of
from af2_ray.models.htsat import tower_config
from af2_ray.train.deepspeed import deepspeed_config, start_engine
from af2_ray.train.optim import (
    MuonAdamW,
    freeze_except,
    make_optimizer,
    optimizer_groups,
    schedule,
    set_fused,
)


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
    config = deepspeed_config(settings, Optimizer(grad_clip=0.5), accumulation=3, precision="fp32")
    assert config["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert (config["gradient_accumulation_steps"], config["gradient_clipping"], config["wall_clock"]) == (3, 0.5, 1)


MUON = Optimizer(lr=0.1, muon_lr=0.02, weight_decay=0.0, lr_scale={"transform": 0.5})


def test_muon_takes_the_matrices_of_the_fusion_and_adamw_the_rest():
    model = Small()
    freeze_except(model, ["clap", "transform", "xattn", "tokens"])
    optimizer = make_optimizer(model, MUON)
    assert isinstance(optimizer, MuonAdamW)
    *others, muon = optimizer.param_groups  # last: what is told as the rate is AdamW's
    assert (muon["muon"], muon["lr"], len(muon["params"])) == (True, 0.02, 2)
    assert not any(group["muon"] for group in others)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    moved = {name: float((p - before[name]).detach().abs().mean()) for name, p in model.named_parameters()}
    assert moved["audio_tower.weight"] == pytest.approx(0.1, rel=1e-4)  # AdamW: the rate
    assert moved["audio_transform.bias"] == pytest.approx(0.05, rel=1e-4)  # the rate of its group
    assert 0 < moved["audio_transform.weight"] < 0.02  # Muon: its own rate, as large as an AdamW update usually is
    assert moved["language_model.head.weight"] == 0


def test_muon_takes_the_matrices_of_af_clap_but_no_table():
    text = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    audio = tower_config(8, [1, 1, 1, 1], [1, 2, 4, 8])
    model = AfClapModel(AfClapConfig(text_config=text, audio_config=audio, projection_dim=16))
    settings = Optimizer(muon_lr=0.02, muon_groups=["clap", "lm"])
    *others, muon = optimizer_groups(model, settings)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    taken = {names[id(parameter)] for parameter in muon["params"]}
    left = {names[id(parameter)] for group in others for parameter in group["params"] if parameter.ndim == 2}
    tables = ("relative_position_bias_table", "relative_attention_bias.weight", "shared.weight")
    assert left
    assert all(name.endswith(tables) for name in left)
    parts = {"audio_tower", "text_tower", "audio_projection", "text_projection"}
    assert {name.split(".")[0] for name in taken} == parts
    only = optimizer_groups(model, settings.model_copy(update={"muon_groups": ["clap"]}))[-1]["params"]
    assert {names[id(parameter)].split(".")[0] for parameter in only} == {"audio_tower"}


def test_muon_goes_on_from_a_saved_state_to_the_bit():
    def steps(model, optimizer, num):
        for number in range(num):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, number + 1.0) * parameter.detach()
            optimizer.step()

    torch.manual_seed(0)
    whole = Small()
    cut = Small()
    cut.load_state_dict(whole.state_dict())
    optimizer = make_optimizer(whole, MUON)
    steps(whole, optimizer, 2)
    first = make_optimizer(cut, MUON)
    steps(cut, first, 2)
    second = make_optimizer(cut, MUON)
    second.load_state_dict(first.state_dict())
    steps(whole, optimizer, 2)
    steps(cut, second, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True))


def test_muon_under_zero_is_an_error_that_says_so():
    with pytest.raises(ValueError, match="zero_stage=0"):
        start_engine(Small(), DeepSpeedSettings(zero_stage=1), MUON, num_steps=1, accumulation=1)


def _five_steps(fused: bool, saved: dict | None = None):
    torch.manual_seed(0)
    model = Small()
    optimizer = make_optimizer(model, Optimizer(lr=1e-2, weight_decay=0.1), fused=fused)
    if saved is not None:
        optimizer.load_state_dict(copy.deepcopy(saved))
        set_fused(optimizer, fused)
    for number in range(5):
        generator = torch.Generator().manual_seed(number)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return model, optimizer


def test_one_kernel_updates_as_many_do():
    for one, many in zip(_five_steps(True)[0].parameters(), _five_steps(False)[0].parameters(), strict=True):
        torch.testing.assert_close(one, many, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("before", [True, False])
def test_a_loaded_state_keeps_the_kernel_of_this_device(before):
    saved = _five_steps(before)[1].state_dict()
    for fused in (True, False):
        model, optimizer = _five_steps(fused, saved)
        assert {group["fused"] for group in optimizer.param_groups} == {fused or None}
        steps = [optimizer.state[parameter]["step"] for parameter in model.parameters()]
        assert all(torch.equal(step, torch.tensor(10.0)) for step in steps)
