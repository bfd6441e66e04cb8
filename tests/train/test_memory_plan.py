"""What a stage keeps on a GPU: the formula against what autograd keeps, and what fits where."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from transformers import Qwen2Config

from af2_ray.config import DeepSpeedSettings, Lora, Recipe, Stage, load_recipe
from af2_ray.models.configuration_af2 import AudioFlamingo2Config
from af2_ray.models.from_recipe import recipe_config
from af2_ray.models.htsat import tower_config
from af2_ray.models.lora import add_lora
from af2_ray.models.modeling_af2 import AudioFlamingo2ForConditionalGeneration as Model
from af2_ray.train import costs
from af2_ray.train.deepspeed import checkpoint_activations
from af2_ray.train.memory_plan import CARD_GIB, StageMemory, ways, with_deepspeed
from af2_ray.train.memory_probe import made_up_row
from af2_ray.train.optim import freeze_except
from af2_ray.train.task import LmTask

SCALE = 16  # of the widths: the shape of 3B (2048 wide, 11008 inside, 16 heads over 2, audio 2048 wide) in small
WINDOWS, TOKENS, LENGTH = 4, 128, 32
GROUPS = ["transform", "xattn", "tokens", "lora"]
FIRST = 300


def make_model(num_layers: int) -> Model:
    """A model of 3B's proportions with adapters."""
    text = Qwen2Config(
        vocab_size=FIRST + 4,
        hidden_size=2048 // SCALE,
        intermediate_size=11008 // SCALE,
        num_hidden_layers=num_layers,
        num_attention_heads=16,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    config = AudioFlamingo2Config(
        audio_config=tower_config(256 // SCALE, (1, 1, 1, 1), (1, 1, 1, 1)),
        text_config=text,
        audio_token_id=FIRST,
        transform_layers=3,
        transform_heads=8,
        transform_inner_size=2048 // SCALE,
        cross_attn_heads=8,
        cross_attn_head_dim=64 // SCALE,
        max_windows=WINDOWS,
    )
    torch.manual_seed(0)
    model = Model(config)
    add_lora(model.language_model, Lora(rank=1))
    freeze_except(model, GROUPS)
    return model.train()


def make_stage() -> Stage:
    budget = {"windows_per_row": WINDOWS, "text_tokens_per_row": TOKENS}
    return Stage.model_validate(
        {
            "name": "small",
            "max_windows": 1,
            "trainable": GROUPS,
            "lora": {"rank": 1},
            "features": "cached",
            "data": [{"manifest": "m"}],
            "steps": 1,
            "budget": budget,
        }
    )


def kept_values(num_layers: int, *, layers: bool) -> tuple[int, dict[str, torch.Tensor]]:
    """Numbers that autograd keeps of a row between forward and backward pass, and the gradients."""
    model, stage = make_model(num_layers), make_stage()
    checkpoint_activations(model, layers=layers, tower=False)
    row = made_up_row(stage, "longest", WINDOWS, TOKENS, LENGTH, FIRST)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(WINDOWS, costs.TOKENS_PER_WINDOW, model.audio_tower.output_size, generator=generator)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, tuple[Any, int]] = {}  # by storage, which is held so that its address stays its own

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.is_floating_point():
            before = kept.get(storage.data_ptr(), (None, 0))[1]
            kept[storage.data_ptr()] = storage, max(before, tensor.numel())
        return tensor

    task = LmTask("", stage)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        batch = type(row)(**{**vars(row), "waveforms": features})
        loss = task.loss(model, batch, task.count(row))
    total = sum(num for _, num in kept.values())
    loss.backward()
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def layer_values() -> tuple[dict[str, float], dict[str, float]]:
    """Of the formula: values of a layer by kind, and those of its input."""
    work = costs.Work(WINDOWS, TOKENS, 1, LENGTH, TOKENS / 2)
    _, values, inputs = costs._layer_values(make_model(1), work)
    return values, inputs


def test_a_recomputed_layer_keeps_two_hidden_states_of_a_row() -> None:
    _, inputs = layer_values()
    two, three, six = (kept_values(num, layers=True)[0] for num in (2, 3, 6))
    assert three - two == inputs["lm"] + inputs["xattn"] == 2 * TOKENS * 2048 // SCALE
    assert six - two == 4 * (three - two), "layers are alike"


def test_a_layer_keeps_no_more_than_the_formula_says() -> None:
    values, _ = layer_values()
    two, three, six = (kept_values(num, layers=False)[0] for num in (2, 3, 6))
    assert six - two == 4 * (three - two), "layers are alike"
    assert 0.5 < (three - two) / (values["lm"] + values["xattn"]) <= 1


def test_recomputed_layers_have_the_same_gradients() -> None:
    (_, kept), (_, recomputed) = (kept_values(3, layers=layers) for layers in (False, True))
    assert kept.keys() == recomputed.keys()
    assert any(".lora_B." in name for name in kept)
    for name, gradient in kept.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=partial("{}: {}".format, name))


# --- The plan --------------------------------------------------------------------------------------------------------


def lora_recipe(**changes: Any) -> Recipe:
    """3B with adapters, fusion and transform, its features cached."""
    stage = {
        "name": "tune",
        "max_windows": 9,
        "trainable": GROUPS,
        "lora": {"rank": 16},
        "features": "cached",
        "data": [{"manifest": "m"}],
        "steps": 100,
    }
    recipe = load_recipe("af2-3b")
    settings = DeepSpeedSettings(zero_stage=2, **changes)
    return recipe.model_copy(update={"stages": [Stage.model_validate(stage)], "deepspeed": settings})


def memory_of(recipe: Recipe) -> StageMemory:
    """Its one stage on one GPU."""
    return StageMemory(recipe, recipe.stages[0], recipe_config(recipe), gpus=1)


def test_adapters_with_fusion_and_transform_fit_24_gb_with_the_optimiser_on_the_host() -> None:
    recipe = lora_recipe(activation_checkpointing=True, offload_optimizer=True)
    found = memory_of(recipe)
    assert found.counts["lora"] > 5e6
    parts = found.parts()
    assert parts["optimizer"] == 0
    assert parts["weights"] == pytest.approx(2 * sum(found.counts.values()) / 2**30)
    trained = sum(found.counts[group] for group in GROUPS)
    assert parts["gradients"] == pytest.approx(4 * trained / 2**30), "sums in fp32 stay on the GPU"
    assert parts["total"] < CARD_GIB[24]
    assert parts["total"] == pytest.approx(sum(value for name, value in parts.items() if name != "total"))
    rounded = with_deepspeed(recipe, raw={"data_types": {"grad_accum_dtype": "bf16"}})
    assert found.parts(rounded)["gradients"] == 0
    assert found.parts(rounded)["total"] < CARD_GIB[16]
    small = with_deepspeed(recipe, raw={"zero_optimization": {"reduce_bucket_size": 10}})
    assert parts["working"] - found.parts(small)["working"] == pytest.approx(1e9 / 2**30, rel=1e-3)


def test_what_fits_grows_with_the_card_and_with_what_is_given_up() -> None:
    table = [[rows or 0 for rows in row.values()] for row in memory_of(lora_recipe()).fitting().values()]
    assert len(table) == 4
    for row in (*table, *zip(*table, strict=True)):
        assert list(row) == sorted(row)
    assert table[0][0] == 0, "a card of 16 GB does not hold it as it is"
    assert table[2][1] >= 64
    assert table[3][0] >= 9


def test_ways_that_a_recipe_goes_already_are_not_offered() -> None:
    recipe = lora_recipe(activation_checkpointing=True, offload_optimizer=True)
    names = [name for name, _ in ways(recipe, recipe.stages[0])]
    assert names == ["as the recipe has it", "+ gradients add up in bf16"]
    plain = load_recipe("af2-3b")
    assert [len(list(ways(plain, stage))) for stage in plain.stages] == [4, 5, 4], "the tower, too, where it trains"


def test_cached_features_are_the_rows_input() -> None:
    model = memory_of(lora_recipe()).model
    work = costs.Work(64, 2048, 3, 32, 512)
    cached = costs.activation_gib(model, work, GROUPS, cached=True)
    assert cached["inputs"] == pytest.approx(64 * 64 * 2048 * 2 / 2**30)
    heard = costs.activation_gib(model, work, GROUPS)
    assert heard["inputs"] == pytest.approx(64 * 160_000 * 2 / 2**30)
    assert heard["clap"] == cached["clap"] == 0
