"""Generation: with and without cache, batched and single, beams, sampling, streaming, kept states."""

from threading import Thread

import pytest
import torch
from small import PAD, make_ids, make_model, make_windows
from transformers import TextIteratorStreamer

from af2_ray.models.cross_attention import AudioCache
from af2_ray.models.modeling_af2 import AudioFlamingo2ForConditionalGeneration as Model
from af2_ray.text import add_special_tokens, train_tokenizer

GREEDY = {"do_sample": False, "max_new_tokens": 10, "eos_token_id": None}


@pytest.fixture(scope="module", params=["xattn", "prefix"])
def model(request: pytest.FixtureRequest) -> Model:
    return make_model(fusion=request.param)


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([torch.full((width - len(row),), PAD), row]) for row in rows])
    return ids, (ids != PAD).long()


def test_cached_equals_uncached(model: Model) -> None:
    ids, audio = make_ids(2), {"waveforms": make_windows(3), "windows_per_clip": [1, 2]}
    cached = model.generate(ids, **audio, **GREEDY)
    assert torch.equal(cached, model.generate(ids, **audio, **GREEDY, use_cache=False))
    assert len(set(cached[:, 8:].flatten().tolist())) > 3  # not one token again and again


def test_audio_is_encoded_and_projected_once(model: Model) -> None:
    calls: list[str] = []
    hooks = [model.audio_tower.register_forward_hook(lambda *_: calls.append("tower"))]
    layers = [layer for layer in model.language_model.model.layers if layer.cross_attention is not None]
    projections = [layer.cross_attention.to_kv for layer in layers] or [model.prefix.fc1]
    hooks += [projection.register_forward_hook(lambda *_: calls.append("kv")) for projection in projections]
    model.generate(make_ids(1), waveforms=make_windows(1), windows_per_clip=[1], **GREEDY)
    for hook in hooks:
        hook.remove()
    assert calls == ["tower"] + ["kv"] * len(projections)


def test_left_padded_batch_equals_single(model: Model) -> None:
    prompts = [make_ids(1, length, seed=length)[0] for length in (5, 9, 7)]
    windows, counts = make_windows(6), [3, 1, 2]
    ids, mask = left_padded(prompts)
    batched = model.generate(ids, attention_mask=mask, waveforms=windows, windows_per_clip=counts, **GREEDY)
    for row, (prompt, clip) in enumerate(zip(prompts, windows.split(counts), strict=True)):
        single = model.generate(prompt[None], waveforms=clip, windows_per_clip=[len(clip)], **GREEDY)
        assert batched[row, -10:].tolist() == single[0, -10:].tolist()


def test_kept_states_answer_a_second_question(model: Model) -> None:
    windows, question = make_windows(2), make_ids(1, seed=3)
    states = model.encode_audio(windows, [2])
    again = model.generate(question, audio_states=states, **GREEDY)
    assert torch.equal(again, model.generate(question, waveforms=windows, windows_per_clip=[2], **GREEDY))


def test_a_clip_beyond_thirty_windows_needs_only_the_configuration() -> None:
    model, windows, question = make_model(), make_windows(33), make_ids(1)
    with pytest.raises(ValueError, match="over the limit of 30"):
        model.generate(question, waveforms=windows, windows_per_clip=[33], **GREEDY)
    model.config.max_windows = 60
    heard = model.encode_audio(windows, [33])
    assert heard.mask.sum() == 33 * 64
    cached = model.generate(question, audio_states=heard, **GREEDY)
    assert torch.equal(cached, model.generate(question, audio_states=heard, **GREEDY, use_cache=False))


@pytest.mark.parametrize("beams", [2, 3])
def test_beams_of_a_batch_equal_single(model: Model, beams: int) -> None:
    ids, windows = make_ids(2), make_windows(3)
    settings = GREEDY | {"num_beams": beams}
    both = model.generate(ids, waveforms=windows, windows_per_clip=[1, 2], **settings)
    second = model.generate(ids[1:], waveforms=windows[1:], windows_per_clip=[2], **settings)
    assert torch.equal(both[1:], second)


def test_sampling_several_answers_a_row(model: Model) -> None:
    torch.manual_seed(0)
    out = model.generate(
        make_ids(2),
        waveforms=make_windows(2),
        windows_per_clip=[1, 1],
        do_sample=True,
        num_return_sequences=3,
        max_new_tokens=4,
        eos_token_id=None,
    )
    assert out.shape == (6, 12)


def test_without_audio(model: Model) -> None:
    ids = make_ids(2, markers=0)
    out = model.generate(ids, **GREEDY)
    assert out.shape == (2, 18)
    assert torch.equal(out, model.generate(ids, **GREEDY, use_cache=False))


def test_streaming(model: Model) -> None:
    tokenizer = train_tokenizer(["a dog"], 300)
    add_special_tokens(tokenizer)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    arguments = {"waveforms": make_windows(1), "windows_per_clip": [1], "streamer": streamer, **GREEDY}
    thread = Thread(target=model.generate, args=(make_ids(1),), kwargs=arguments)
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == tokenizer.decode(
        model.generate(make_ids(1), waveforms=make_windows(1), windows_per_clip=[1], **GREEDY)[0, 8:]
    )


@torch.no_grad()
def test_cache_rows_move_with_their_audio_and_crop_leaves_it(model: Model) -> None:
    ids, windows = make_ids(2), make_windows(2)
    cache = AudioCache(config=model.config.text_config)
    model(ids, waveforms=windows, windows_per_clip=[1, 1], past_key_values=cache, use_cache=True)
    before = [keys.clone() for keys, _ in cache.audio.values()]  # none where the audio is a prefix

    def holds(expected: list[torch.Tensor]) -> bool:
        return all(torch.equal(keys, e) for (keys, _), e in zip(cache.audio.values(), expected, strict=True))

    cache.reorder_cache(torch.tensor([1, 0]))
    assert holds([keys.flip(0) for keys in before])
    cache.batch_repeat_interleave(2)
    assert holds([keys.flip(0).repeat_interleave(2, dim=0) for keys in before])
    cache.batch_select_indices(torch.tensor([0, 2]))
    cache.crop(-1)
    assert holds([keys.flip(0) for keys in before])
    step = model(ids.flip(0)[:, -1:], past_key_values=cache, use_cache=True).logits
    whole = model(ids.flip(0), waveforms=windows.flip(0), windows_per_clip=[1, 1]).logits[:, -1:]
    torch.testing.assert_close(step, whole, atol=1e-4, rtol=0)
    cache.reset()
    assert not cache.audio
    assert cache.get_seq_length() == 0
