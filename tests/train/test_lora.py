"""Adapters: nothing at the start, trained alone, merged to an ordinary model."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from af2_ray.config import Lora, Stage
from af2_ray.models.groups import group_of
from af2_ray.models.lora import add_lora, merge_lora
from af2_ray.train.optim import freeze_except

IDS = torch.arange(6)[None]


def make_lm() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=50,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            tie_word_embeddings=True,
        )
    ).eval()


def test_adapters_start_as_nothing_train_alone_and_merge() -> None:
    lm = make_lm()
    names, before = lm.state_dict().keys(), lm(IDS).logits.detach()
    add_lora(lm, Lora(rank=4))
    assert torch.equal(lm(IDS).logits, before)
    trained = freeze_except(lm, ["lora"])
    assert trained
    assert all("lora_" in name for name in trained)
    lm(input_ids=IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.grad is not None:
                parameter -= parameter.grad.sign() * 0.1
    adapted = lm(IDS).logits.detach()
    assert not torch.allclose(adapted, before)
    merge_lora(lm)
    assert lm.state_dict().keys() == names
    torch.testing.assert_close(lm(IDS).logits, adapted, atol=1e-4, rtol=0)


def test_a_target_that_is_none_names_those_that_are() -> None:
    with pytest.raises(ValueError, match="q_proj"):
        add_lora(make_lm(), Lora(targets=["query"]))


@pytest.mark.parametrize("extra", [{"trainable": ["lora"]}, {"trainable": ["xattn"], "lora": {"rank": 4}}])
def test_the_group_and_its_block_belong_together(extra: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="lora"):
        Stage.model_validate({"name": "s", "max_windows": 1, "data": [{"manifest": "m"}], "steps": 1, **extra})


def test_groups() -> None:
    assert group_of("language_model.model.layers.0.decoder_layer.self_attn.q_proj.lora_A.default.weight") == "lora"
    assert group_of("language_model.model.layers.0.decoder_layer.self_attn.q_proj.base_layer.weight") == "lm"
