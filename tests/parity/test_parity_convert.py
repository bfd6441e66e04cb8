"""Conversion is strict and, there and back, equal to the bit."""

from collections.abc import Mapping

import pytest
import torch
from golden import case, facts, load, needs_golden
from torch import Tensor

from af2_ray.models.convert import af2_from_reference, af2_to_reference, clean_names

pytestmark = needs_golden


def same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def aliased(name: str) -> dict[str, Tensor]:
    """A file as FSDP writes it: aliases of layers, and constants."""
    weights = dict(load(f"{name}_weights"))
    for alias in facts()[name]["keys_of_a_real_file"]["fsdp_checkpoint_adds_aliases"]:
        kind, index, rest = alias.removeprefix("lang_encoder.").split(".", 2)
        part = "decoder_layer" if kind == "old_decoder_blocks" else "gated_cross_attn_layer_sound"
        weights[alias] = weights[f"lang_encoder.model.layers.{index}.{part}.{rest}"]
    for constant, (shape, _) in facts()[name]["keys_of_a_real_file"]["omitted_here_deterministic"].items():
        weights[constant] = torch.zeros(shape)
    return weights


@pytest.mark.parametrize("name", ["n1", "n2"])
def test_there_and_back_is_equal_to_the_bit(name: str) -> None:
    golden = case(name)
    same(af2_to_reference(golden.model.state_dict(), golden.model.config, golden.extras), golden.weights)


@pytest.mark.parametrize("name", ["n1", "n2"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("clap", ["clap.afclap.", "clap.nvclap."])
def test_names_of_real_files(name: str, prefix: str, clap: str) -> None:
    golden = case(name)
    real = {prefix + key.replace("clap.afclap.", clap): value for key, value in aliased(name).items()}
    state, extras = af2_from_reference(clean_names(real), golden.model.config)
    same(extras, golden.extras)
    same(state, af2_from_reference(golden.weights, golden.model.config)[0])


def test_unknown_and_damaged_tensors_are_errors_that_name_them() -> None:
    golden = case("n1")
    with pytest.raises(ValueError, match=r"lang_encoder\.novelty\.weight"):
        af2_from_reference({**golden.weights, "lang_encoder.novelty.weight": torch.zeros(1)}, golden.model.config)
    with pytest.raises(ValueError, match=r"novelty"):
        af2_to_reference({**golden.model.state_dict(), "novelty": torch.zeros(1)}, golden.model.config, {})
    damaged = aliased("n1")
    damaged["lang_encoder.old_decoder_blocks.0.mlp.up_proj.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"old_decoder_blocks\.0\.mlp\.up_proj\.weight"):
        clean_names(damaged)
    untied = {**golden.weights, "lang_encoder.lm_head.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"lm_head"):
        af2_from_reference(untied, golden.model.config)
