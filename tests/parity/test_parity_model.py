"""The converted model against the reference: features, every layer, logits, loss, labels, gradients, greedy tokens."""

import pytest
import torch
from golden import FOLDER, Case, case, facts, needs_golden
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from af2_ray.models.convert import af2_to_reference
from af2_ray.text import add_special_tokens, encode

pytestmark = needs_golden


@pytest.fixture(params=["n1", "n2"])
def golden(request: pytest.FixtureRequest) -> Case:
    return case(request.param)


def close(ours: Tensor, theirs: Tensor, atol: float) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def test_tokens_and_labels(golden: Case) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(FOLDER / "tokenizer.json"), eos_token="<|endoftext|>")
    assert add_special_tokens(tokenizer) == facts()["tokenizer"]["audio"]
    batch = encode(tokenizer, facts()["prompts"], facts()["outputs_text"])
    assert torch.equal(torch.from_numpy(batch.input_ids), golden.io["input_ids"])
    assert torch.equal(torch.from_numpy(batch.labels), golden.io["labels"])
    assert torch.equal(torch.from_numpy(batch.attention_mask).bool(), golden.io["attention_mask"].bool())


@torch.no_grad()
def test_dense_features_and_audio_transformer(golden: Case) -> None:
    features = golden.model.audio_tower(golden.waveforms)
    states = golden.model.encode_audio(golden.waveforms, golden.counts)
    for clip, (part, count) in enumerate(zip(features.split(golden.counts), golden.counts, strict=True)):
        close(part, golden.io["clap"][clip, :count], 1e-4)
        close(states.hidden[clip, : count * 64], golden.io["audio_transformer"][clip, : count * 64], 1e-4)
        assert golden.io["audio_embed_mask"][clip].sum() == count


@torch.no_grad()
def test_every_layer_logits_and_loss(golden: Case) -> None:
    seen: dict[str, Tensor] = {}
    hooks = []
    for index, layer in enumerate(golden.model.language_model.model.layers):
        modules = {f"hf.layer.{index}": layer, f"hf.xattn.{index}": layer.cross_attention}
        for name, module in modules.items():
            if module is not None:
                hooks.append(module.register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, out)))
    io = golden.io
    out = golden.model(
        io["input_ids"],
        attention_mask=io["attention_mask"].long(),
        waveforms=golden.waveforms,
        windows_per_clip=golden.counts,
        labels=io["labels"],
    )
    for hook in hooks:
        hook.remove()
    real = io["attention_mask"].bool()
    assert seen.keys() == {name for name in io if name.startswith(("hf.layer", "hf.xattn"))}
    for name, hidden in seen.items():
        close(hidden[real], io[name][real], 1e-3)
    close(out.logits[real], io["hf.logits"][real], 1e-3)
    close(out.loss, torch.tensor(facts()[golden.name]["loss_hf"]), 1e-4)


def test_gradients(golden: Case) -> None:
    model, io = golden.model, golden.io
    model.zero_grad()
    model(
        io["input_ids"],
        attention_mask=io["attention_mask"].long(),
        waveforms=golden.waveforms,
        windows_per_clip=golden.counts,
        labels=io["labels"],
    ).loss.backward()
    ours = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    grads = af2_to_reference(ours, model.config, {})
    whole = [name for name in io if name.startswith("hf.grad.")]
    assert whole
    for name in whole:
        assert (grads[name.removeprefix("hf.grad.")] - io[name]).norm() <= 1e-3 * io[name].norm(), name
    for name, expected in facts()[golden.name]["grad_l2_hf"].items():
        assert float(grads[name].norm()) == pytest.approx(expected, rel=1e-3), name
    model.zero_grad()


@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_greedy_tokens(golden: Case, use_cache: bool) -> None:
    sep = facts()["tokenizer"]["sep"]
    num_tokens = facts()["args"]["gen_tokens"]
    for clip, waveforms in enumerate(golden.waveforms.split(golden.counts)):
        ids = golden.io["input_ids"][clip]
        prompt = ids[None, : int((ids == sep).nonzero()[0]) + 1]
        out = golden.model.generate(
            prompt,
            waveforms=waveforms,
            windows_per_clip=[len(waveforms)],
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            use_cache=use_cache,
        )
        expected = golden.io["hf.generated"][clip]
        assert out[0].tolist() == expected[expected >= 0].tolist()
