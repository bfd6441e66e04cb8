"""AF-CLAP: unit vectors, ragged clips, both ways of pooling text, save and load."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import make_tower, make_windows
from transformers import (
    AutoFeatureExtractor,
    AutoModel,
    AutoProcessor,
    BartConfig,
    BartModel,
    BertConfig,
    PreTrainedConfig,
    T5Config,
    T5EncoderModel,
    pipeline,
)

from af2_ray.models.afclap import AfClapConfig, AfClapModel, load_text_encoder, pool
from af2_ray.models.processing_afclap import AfClapFeatureExtractor, AfClapProcessor

T5 = T5Config(vocab_size=90, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
BERT = BertConfig(vocab_size=90, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)


def make_clap(text_config: PreTrainedConfig = T5, **settings: object) -> AfClapModel:
    torch.manual_seed(0)
    return AfClapModel(
        AfClapConfig(text_config=text_config, audio_config=make_tower().config, projection_dim=12, **settings)
    ).eval()


def test_a_clip_is_the_mean_over_its_windows_whatever_its_batch() -> None:
    model, windows = make_clap(), make_windows(4)
    together = model.get_audio_features(windows, [1, 3])
    alone = model.get_audio_features(windows[1:], torch.tensor([3]))
    torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(2))


@pytest.mark.parametrize("text_config", [T5, BERT])
def test_masked_mean_does_not_see_padding_and_mean_does(text_config: PreTrainedConfig) -> None:
    ids = torch.randint(1, 90, (1, 5))
    padded = torch.cat([ids, torch.zeros(1, 4, dtype=torch.long)], dim=1)
    mask = torch.ones_like(ids), (torch.arange(9) < 5).long()[None]
    for pooling, equal in (("masked_mean", True), ("mean", False)):
        model = make_clap(text_config, text_pooling=pooling)
        short, long = model.get_text_features(ids, mask[0]), model.get_text_features(padded, mask[1])
        assert torch.allclose(short, long, atol=1e-5) is equal


def test_moments_tell_two_orders_apart_where_a_mean_cannot() -> None:
    tokens = torch.randn(1, 6, 4)
    share, weights = torch.arange(6).add(0.5).div(6)[None], torch.full((1, 6), 1 / 6)
    forward, backward = pool(tokens, weights, share, 2), pool(tokens.flip(1), weights, share, 2)
    mean, first, second = forward.chunk(3, dim=1)
    torch.testing.assert_close(mean, tokens.mean(dim=1))
    torch.testing.assert_close(backward, torch.cat([mean, -first, second], dim=1), atol=1e-6, rtol=1e-6)
    assert pool(tokens, weights, share, 0).shape == (1, 4)


def test_the_tower_learns_from_the_mean_alone() -> None:
    model = make_clap(moments=1)
    weight = model.audio_projection[0].weight
    with torch.no_grad():
        weight[:, : weight.shape[1] // 2] = 0  # what the head takes of the mean
    model.get_audio_features(make_windows(1), [1])[0, 0].backward()
    gradients = [p.grad for p in model.audio_tower.parameters() if p.grad is not None]
    assert all(not gradient.any() for gradient in gradients)
    assert weight.grad is not None
    assert weight.grad.any()


@pytest.mark.parametrize("text_config", [T5, BERT])
def test_moments_do_not_depend_on_padding_or_the_batch(text_config: PreTrainedConfig) -> None:
    model, windows = make_clap(text_config, moments=2), make_windows(4)
    together = model.get_audio_features(windows, [1, 3])
    torch.testing.assert_close(together[1:], model.get_audio_features(windows[1:], [3]), atol=1e-5, rtol=0)
    ids = torch.randint(1, 90, (1, 5))
    padded, mask = torch.cat([ids, torch.zeros(1, 4, dtype=torch.long)], dim=1), (torch.arange(9) < 5).long()[None]
    short, long = model.get_text_features(ids, torch.ones_like(ids)), model.get_text_features(padded, mask)
    torch.testing.assert_close(short, long, atol=1e-5, rtol=0)


def test_round_trip_is_bit_equal(tmp_path: Path) -> None:
    model = make_clap()
    model.audio_tower.calibrate(make_windows(2))
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, AfClapModel)
    state, again = model.state_dict(), loaded.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[name], again[name]) for name in state)


def test_windows_must_add_up() -> None:
    with pytest.raises(ValueError, match="windows_per_clip"):
        make_clap().get_audio_features(make_windows(2), [1, 2])


def test_directed_heads_make_both_towers_hear_the_order() -> None:
    """Swapping halves of a clip, or words of a caption, moves the embedding further than with undirected heads."""
    halves = make_windows(2)[:, :80_000]
    clips = torch.stack([torch.cat([halves[0], halves[1]]), torch.cat([halves[1], halves[0]])])
    ids = torch.tensor([[5, 6, 7, 8], [7, 8, 5, 6]])
    apart = []
    for strength in (0.0, 3.0):
        model = make_clap()
        for module in model.audio_tower.modules():  # larger weights, so that attention weighs in at all
            if isinstance(module, torch.nn.Linear):
                module.weight.data *= 4
        model.direct_heads(strength)
        audio, text = model.get_audio_features(clips, [1, 1]), model.get_text_features(ids, torch.ones_like(ids))
        apart.append([float((pair[0] - pair[1]).norm()) for pair in (audio, text)])
    assert apart[1][0] > 1.5 * apart[0][0]
    assert apart[1][1] > 1.5 * apart[0][1]


def test_features_and_logits_as_transformers_clap_has_them() -> None:
    model, windows, ids = make_clap(), make_windows(3), torch.randint(1, 90, (2, 5))
    inputs = {
        "waveforms": windows,
        "windows_per_clip": [1, 2],
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
    }
    out = model(**inputs)
    torch.testing.assert_close(out.audio_embeds, model.get_audio_features(windows, [1, 2]))
    torch.testing.assert_close(out.text_embeds, model.get_text_features(ids, torch.ones_like(ids)))
    torch.testing.assert_close(out.logits_per_audio, out.audio_embeds @ out.text_embeds.T / 0.07)
    assert torch.equal(out.logits_per_text, out.logits_per_audio.T)
    audio, text, log_scale = model(**inputs, logits=False)
    assert torch.equal(audio, out.audio_embeds)
    assert torch.equal(text, out.text_embeds)
    assert float(log_scale.detach().exp()) == pytest.approx(1 / 0.07)


@torch.no_grad()
def test_chunks_give_the_same_features() -> None:
    model, windows, ids = make_clap(), make_windows(3), torch.randint(1, 90, (5, 4))
    mask = torch.ones_like(ids)
    torch.testing.assert_close(
        model.get_audio_features(windows, [1, 2], windows_per_chunk=2), model.get_audio_features(windows, [1, 2])
    )
    torch.testing.assert_close(
        model.get_text_features(ids, mask, captions_per_chunk=2), model.get_text_features(ids, mask)
    )


def test_zero_shot_pipeline_from_a_folder(tmp_path: Path, tiny_tokenizer: Any) -> None:
    model = make_clap(T5Config(**{**T5.to_dict(), "vocab_size": len(tiny_tokenizer)}))
    model.save_pretrained(tmp_path)
    AfClapProcessor.of(model.config, tiny_tokenizer).save_pretrained(tmp_path)
    classify = pipeline("zero-shot-audio-classification", model=str(tmp_path))
    clip = np.random.default_rng(0).normal(size=30_000).astype(np.float32) * 0.1
    found = classify(clip, candidate_labels=["dog", "bell"], hypothesis_template="the sound of a {}")
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(processor, AfClapProcessor)
    inputs = processor(["the sound of a dog", "the sound of a bell"], clip, sampling_rate=16_000)
    with torch.no_grad():
        scores = model(**inputs).logits_per_audio.softmax(dim=-1)[0]
    expected = dict(zip(["dog", "bell"], scores.tolist(), strict=True))
    assert {row["label"]: pytest.approx(row["score"], abs=1e-5) for row in found} == expected


def test_processor_pads_and_repeats_as_the_config_says(tmp_path: Path, tiny_tokenizer: Any) -> None:
    config = make_clap(text_pooling="mean", short_clips="repeat", text_length=20).config
    AfClapProcessor.of(config, tiny_tokenizer, max_windows=2).save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    text = processor(["a dog barks", "dog " * 40])
    assert text["input_ids"].shape == (2, 20)
    assert 0 < text["attention_mask"][0].sum() < 20
    clip = np.linspace(-0.5, 0.5, 70_000).astype(np.float32)
    audio = processor(audio=[clip, np.tile(clip, 6)], sampling_rate=16_000)
    assert audio["windows_per_clip"].tolist() == [1, 2]
    assert torch.equal(audio["waveforms"][0, :70_000], audio["waveforms"][0, 70_000:140_000])
    assert not audio["waveforms"][0, 140_000:].any()
    assert isinstance(AutoFeatureExtractor.from_pretrained(tmp_path), AfClapFeatureExtractor)
    with pytest.raises(ValueError, match="text, audio"):
        processor()


def test_any_encoder_serves_as_text_tower(tmp_path: Path) -> None:
    bart = BartConfig(
        vocab_size=90, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
    )  # fmt: skip
    ids = torch.randint(3, 90, (2, 5))
    for number, (config, build) in enumerate(((bart, BartModel), (T5, T5EncoderModel))):
        folder = tmp_path / str(number)
        torch.manual_seed(1)
        whole = build(config)
        whole.save_pretrained(folder)
        model = make_clap(config)
        model.text_tower = load_text_encoder(folder)
        assert not any("decoder" in name for name, _ in model.text_tower.named_parameters())
        assert torch.equal(
            model.text_tower.get_input_embeddings().weight, whole.get_encoder().get_input_embeddings().weight
        )
        model.save_pretrained(folder / "clap")
        loaded = AfClapModel.from_pretrained(folder / "clap").eval()
        mask = torch.ones_like(ids)
        torch.testing.assert_close(loaded.get_text_features(ids, mask), model.eval().get_text_features(ids, mask))
