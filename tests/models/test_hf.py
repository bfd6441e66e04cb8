"""Hugging Face manner: save and load to the bit, Auto classes, sharding, types, the processor."""

from pathlib import Path

import numpy as np
import pytest
import torch
from small import make_ids, make_lm, make_model, make_windows
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, ClapAudioConfig, PreTrainedTokenizerFast

from af2_ray.config import load_recipe
from af2_ray.models.configuration_af2 import AudioFlamingo2Config
from af2_ray.models.htsat import AudioTower
from af2_ray.models.modeling_af2 import AudioFlamingo2ForConditionalGeneration as Model
from af2_ray.models.processing_af2 import AudioFlamingo2FeatureExtractor, AudioFlamingo2Processor
from af2_ray.text import add_special_tokens, train_tokenizer


@pytest.mark.parametrize(("family", "tied"), [("qwen2", True), ("qwen2", False), ("llama", False)])
@pytest.mark.parametrize("shard", ["5GB", "50KB"])
@torch.no_grad()
def test_round_trip_is_bit_equal(tmp_path: Path, family: str, tied: bool, shard: str) -> None:
    model = make_model(family, tied=tied)
    model.audio_tower.calibrate(make_windows(1))
    model.save_pretrained(tmp_path, max_shard_size=shard)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, Model)
    state, again = model.state_dict(), loaded.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert AutoConfig.from_pretrained(tmp_path).text_config.hidden_size == model.config.text_config.hidden_size
    assert loaded.generation_config.eos_token_id == [301, 0]
    audio = {"waveforms": make_windows(1), "windows_per_clip": [1]}
    assert torch.equal(model(make_ids(1), **audio).logits, loaded.eval()(make_ids(1), **audio).logits)


@torch.no_grad()
def test_attention_implementations_agree(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    audio = {"waveforms": make_windows(1), "windows_per_clip": [1]}
    logits = [
        Model.from_pretrained(tmp_path, attn_implementation=name).eval()(make_ids(1), **audio).logits
        for name in ("eager", "sdpa")
    ]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_device_map_places_the_model(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    placed = Model.from_pretrained(tmp_path, device_map="cpu").eval()
    audio = {"waveforms": make_windows(1), "windows_per_clip": [1]}
    assert torch.equal(placed(make_ids(1), **audio).logits, model(make_ids(1), **audio).logits)


@torch.no_grad()
def test_bfloat16_runs_and_keeps_the_mel_statistics(tmp_path: Path) -> None:
    model = make_model()
    model.audio_tower.calibrate(make_windows(1))
    model.save_pretrained(tmp_path)
    half = Model.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert half.added_embeddings.dtype == torch.bfloat16
    norms = [m.audio_tower.model.audio_encoder.batch_norm for m in (model, half)]
    assert torch.equal(norms[0].running_mean, norms[1].running_mean)
    out = half(make_ids(1), waveforms=make_windows(1), windows_per_clip=[1])
    assert out.logits.isfinite().all()


LARGE_TOWER = {"patch_embeds_hidden_size": 256, "depths": [2, 2, 12, 2], "num_attention_heads": [4, 8, 16, 32]}


@pytest.mark.parametrize(
    ("size", "billions", "width", "layers", "heads", "inner"),
    [("0.5b", 1.0, 896, 24, 14, 4864), ("1.5b", 2.5, 1536, 28, 12, 8960), ("3b", 4.7, 2048, 36, 16, 11_008)],
)
def test_full_sizes_build_on_the_meta_device(
    size: str, billions: float, width: int, layers: int, heads: int, inner: int
) -> None:
    """Parameters in all, with Qwen2.5 of each size and HTSAT-large (docs/paper.md, "Cross-attention")."""
    text = {"model_type": "qwen2", "vocab_size": 151_936, "hidden_size": width, "num_hidden_layers": layers}
    text |= {"num_attention_heads": heads, "num_key_value_heads": 2, "intermediate_size": inner}
    recipe = load_recipe(f"af2-{size}").model
    with torch.device("meta"):
        model = Model(
            AudioFlamingo2Config(
                text_config=text | {"tie_word_embeddings": True},
                audio_config=LARGE_TOWER,
                fusion=recipe.fusion,
                cross_attn_every=recipe.cross_attention.every,
                cross_attn_heads=recipe.cross_attention.num_heads,
                cross_attn_head_dim=recipe.cross_attention.head_dim,
                cross_attn_ff_mult=recipe.cross_attention.ff_mult,
            )
        )
    counted = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    assert counted == pytest.approx(billions, rel=0.08)


def test_the_full_size_tower_hears_a_real_window() -> None:
    tower = AudioTower(ClapAudioConfig(hidden_size=2048, **LARGE_TOWER)).requires_grad_(False)
    features = tower(make_windows(1))
    assert features.shape == (1, 64, 2048)
    assert features.isfinite().all()


def test_from_parts_copies() -> None:
    lm = make_lm()
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    with torch.no_grad():
        make_model().language_model.model.norm.weight.zero_()
    assert all(torch.equal(before[name], value) for name, value in lm.state_dict().items())


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer(["what is heard? a dog barks"] * 5, 300)
    add_special_tokens(tokenizer)
    return tokenizer


@pytest.fixture
def processor(tokenizer: PreTrainedTokenizerFast) -> AudioFlamingo2Processor:
    return AudioFlamingo2Processor(AudioFlamingo2FeatureExtractor(max_windows=3), tokenizer)


NOISE = np.random.default_rng(0).uniform(-1, 1, 170_000).astype(np.float32)


def test_processor_gives_what_generate_takes(processor: AudioFlamingo2Processor) -> None:
    model = make_model()
    audio = [[NOISE, NOISE[:9]], NOISE, []]
    batch = processor(["What?", "Which one is it?", "hello"], audio, sampling_rate=16_000)
    assert batch["windows_per_clip"].tolist() == [2, 1, 2]
    assert batch["audio_index"].tolist() == [[0, 1], [2, -1], [-1, -1]]
    batch["input_ids"] = batch["input_ids"] - len(processor.tokenizer) + model.config.num_tokens
    out = model.generate(**batch, max_new_tokens=2)
    assert out.shape[0] == 3


def test_truncation_is_asked_for_and_reported(
    processor: AudioFlamingo2Processor, caplog: pytest.LogCaptureFixture
) -> None:
    batch = processor(["What?"], np.tile(NOISE, 3), sampling_rate=16_000, truncate=True)
    assert batch["windows_per_clip"].tolist() == [3]
    assert "over the limit of 3" in caplog.text


def test_processor_for_training_gives_labels(processor: AudioFlamingo2Processor) -> None:
    batch = processor(["What?"], NOISE, sampling_rate=16_000, answers=["A dog"])
    kept = batch["labels"][batch["labels"] != -100]
    assert processor.tokenizer.decode(kept) == "a dog<|endofchunk|><|endoftext|>"


def test_processor_saves_and_loads(processor: AudioFlamingo2Processor, tmp_path: Path) -> None:
    make_model().config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, AudioFlamingo2Processor)
    assert loaded.feature_extractor.max_windows == 3
    ours, again = (p(["What?"], NOISE, sampling_rate=16_000) for p in (processor, loaded))
    assert all(torch.equal(ours[name], again[name]) for name in ours)


def test_chat_template_is_the_training_format(processor: AudioFlamingo2Processor) -> None:
    question = {"role": "user", "content": [{"type": "text", "text": "What is it? "}, {"type": "audio"}]}
    prompt = processor.apply_chat_template([question], tokenize=False)
    assert prompt == "<audio>what is it?<SEP>"
    answer = {"role": "assistant", "content": "A dog"}
    both = processor.apply_chat_template([question, answer], tokenize=False)
    assert both == prompt + "a dog<|endofchunk|><|endoftext|>"


def test_what_the_chat_template_writes_is_read_as_it_is(processor: AudioFlamingo2Processor) -> None:
    """The usual two ways to a prompt and the processor's own are one input; an earlier turn's `<SEP>` stays one."""
    heard = {"type": "audio", "audio": NOISE}
    question = {"role": "user", "content": [heard, {"type": "text", "text": "What is it?"}]}
    written = processor.apply_chat_template([question], tokenize=False)
    wanted = processor("What is it?", NOISE, sampling_rate=16_000)
    found = processor(written, NOISE, sampling_rate=16_000, return_tensors="pt", padding=True)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    whole = processor.apply_chat_template([[question], [question]], tokenize=True, return_dict=True)
    assert torch.equal(whole["input_ids"], wanted["input_ids"].repeat(2, 1))
    assert whole["audio_index"].tolist() == [[0], [1]]

    turns = [question, {"role": "assistant", "content": "A dog"}, {"role": "user", "content": "How many?"}]
    ids = processor(processor.apply_chat_template(turns, tokenize=False), NOISE, sampling_rate=16_000)["input_ids"][0]
    assert ids.tolist().count(processor.tokenizer.convert_tokens_to_ids("<SEP>")) == 2
    with pytest.raises(ValueError, match="1 <audio> markers for 2 audios"):
        processor(written, [NOISE, NOISE], sampling_rate=16_000)


@pytest.mark.parametrize(
    ("audio", "settings", "message"),
    [
        (NOISE, {}, "sampling_rate=None"),
        (NOISE, {"sampling_rate": 44_100}, "resample"),
        (NOISE[:0], {"sampling_rate": 16_000}, "audio 0"),
        (NOISE * np.nan, {"sampling_rate": 16_000}, "NaN"),
        ((NOISE * 9).astype(np.int16), {"sampling_rate": 16_000}, "floats"),
        (np.tile(NOISE, 3), {"sampling_rate": 16_000}, "over the limit of 3"),
        (NOISE, {"sampling_rate": 16_000, "max_tokens": 3}, "no room for an answer"),
        ([NOISE, NOISE], {"sampling_rate": 16_000}, "audio for 2"),
    ],
)
def test_bad_input_says_what_to_do(
    processor: AudioFlamingo2Processor, audio: object, settings: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        processor(["what?"], audio, **settings)
