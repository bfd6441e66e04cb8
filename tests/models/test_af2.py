"""Audio Flamingo 2: starts as the bare LM, hears what it should and nothing else, trains what it should."""

import pytest
import torch
from small import AUDIO, LM_ROWS, PAD, make_ids, make_lm, make_model, make_windows

from af2_ray.train.losses import token_loss_sum


@pytest.mark.parametrize(("family", "tied"), [("qwen2", True), ("llama", False)])
@torch.no_grad()
def test_without_audio_or_with_closed_gates_it_is_the_bare_lm(family: str, tied: bool) -> None:
    lm, closed, opened = (
        make_lm(family, tied=tied),
        *(make_model(family, tied=tied, open_gates=g) for g in (False, True)),
    )
    text = make_ids(2, markers=0)[:, :-1]
    expected = lm(text).logits[..., :AUDIO]
    assert torch.equal(opened(text).logits[..., :AUDIO], expected)
    ids = torch.cat([torch.full((2, 1), AUDIO), text], dim=1)
    heard = closed(ids, waveforms=make_windows(2), windows_per_clip=[1, 1])
    assert torch.equal(heard.logits, closed(ids).logits)
    assert not torch.equal(opened(ids, waveforms=make_windows(2), windows_per_clip=[1, 1]).logits, opened(ids).logits)


def test_lm_rows_are_untouched_and_added_tokens_start_at_their_mean() -> None:
    lm, model = make_lm(), make_model()
    assert torch.equal(model.get_input_embeddings().weight, lm.get_input_embeddings().weight)
    assert model.get_input_embeddings().weight.shape[0] == LM_ROWS
    rows = lm.get_input_embeddings().weight[:AUDIO]
    assert ((model.added_embeddings - rows.mean(dim=0)).abs() < rows.std(dim=0)).all()
    assert model(make_ids(1)).logits.shape[-1] == AUDIO + 4


@torch.no_grad()
def test_ragged_clips_hear_as_if_alone() -> None:
    model, ids, windows = make_model(), make_ids(2), make_windows(4)
    both = model(ids, waveforms=windows, windows_per_clip=torch.tensor([1, 3])).logits
    first = model(ids[:1], waveforms=windows[:1], windows_per_clip=[1]).logits
    second = model(ids[1:], waveforms=windows[1:], windows_per_clip=[3]).logits
    torch.testing.assert_close(both, torch.cat([first, second]), atol=1e-4, rtol=0)


def test_ragged_clips_train_as_if_alone() -> None:
    """Clips in no order of length, two of one length: loss and gradients are the sums of those of each alone."""
    model, ids, windows, counts = make_model().train(), make_ids(4), make_windows(7), [3, 1, 2, 1]

    def gradients(rows: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        parts = windows.split(counts)
        total = torch.zeros(())
        for row in rows or [slice(None)]:
            chosen = slice(row, row + 1) if rows else row
            logits = model(ids[chosen], waveforms=torch.cat(parts[chosen]), windows_per_clip=counts[chosen]).logits
            loss = token_loss_sum(logits[:, :-1].flatten(0, 1), ids[chosen, 1:].flatten())
            loss.backward()
            total += loss.detach()
        return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    (together, grads), (alone, expected) = gradients([]), gradients([0, 1, 2, 3])
    torch.testing.assert_close(together, alone)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert (grad - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-6, name


@torch.no_grad()
def test_several_questions_share_one_encoding() -> None:
    model, ids, windows = make_model(), make_ids(3), make_windows(3)
    calls = []
    model.audio_tower.register_forward_hook(lambda _, args, __: calls.append(len(args[0])))
    index = torch.tensor([[1], [0], [1]])
    shared = model(ids, waveforms=windows, windows_per_clip=[1, 2], audio_index=index)
    assert calls == [3]
    again = model(ids, audio_states=shared.audio_states, audio_index=index)
    assert calls == [3]
    assert torch.equal(again.logits, shared.logits)
    alone = model(ids[2:], waveforms=windows[1:], windows_per_clip=[2])
    torch.testing.assert_close(shared.logits[2:], alone.logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_text_hears_only_audio_whose_marker_came_before() -> None:
    model, windows = make_model(), make_windows(2)
    ids = make_ids(1, 9)
    ids[0, 5] = AUDIO
    index = torch.tensor([[0, 1]])
    out = model(ids, waveforms=windows, windows_per_clip=[1, 1], audio_index=index).logits
    other = make_windows(2, seed=5)
    changed = model(
        ids, waveforms=torch.stack([windows[0], other[1]]), windows_per_clip=[1, 1], audio_index=index
    ).logits
    torch.testing.assert_close(out[:, :5], changed[:, :5], atol=1e-5, rtol=0)
    assert not torch.allclose(out[:, 5:], changed[:, 5:], atol=1e-2)
    one = model(ids[:, :5], waveforms=windows[:1], windows_per_clip=[1]).logits
    torch.testing.assert_close(out[:, :5], one, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_row_without_audio_beside_one_with() -> None:
    model, ids = make_model(), make_ids(2)
    index = torch.tensor([[0], [-1]])
    out = model(ids, waveforms=make_windows(1), windows_per_clip=[1], audio_index=index).logits
    torch.testing.assert_close(out[1:], model(ids[1:]).logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_padding_side_does_not_matter() -> None:
    model, ids, windows = make_model(), make_ids(1, 6), make_windows(1)
    pads = torch.full((1, 3), PAD)
    ones, zeros = torch.ones(1, 6, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long)
    kwargs = {"waveforms": windows, "windows_per_clip": [1]}
    plain = model(ids, **kwargs).logits
    left = model(torch.cat([pads, ids], 1), attention_mask=torch.cat([zeros, ones], 1), **kwargs).logits[:, 3:]
    right = model(torch.cat([ids, pads], 1), attention_mask=torch.cat([ones, zeros], 1), **kwargs).logits[:, :6]
    torch.testing.assert_close(left, plain, atol=1e-4, rtol=0)
    torch.testing.assert_close(right, plain, atol=1e-4, rtol=0)


@pytest.mark.parametrize("change", [{"transform_layers": 0}, {"transform_rope_base": None}])
@torch.no_grad()
def test_ablations_of_the_transform(change: dict[str, int | None]) -> None:
    """Without layers a token of the audio says nothing of the rest; without positions the order of windows is lost."""
    whole = make_model()
    ablated = type(whole)(type(whole.config).from_dict(whole.config.to_dict() | change)).eval()
    ablated.load_state_dict(whole.state_dict(), strict=change != {"transform_layers": 0})
    windows = make_windows(2)
    features = torch.cat([windows, windows[:1]])  # the first window is the last one too
    for model in (whole, ablated):
        hidden = model.encode_audio(features, [3]).hidden[0].unflatten(0, (3, 64))
        alike = torch.allclose(hidden[0], hidden[2], atol=1e-4)
        assert alike is (model is ablated)


def test_silence_and_no_label_give_finite_zero_gradients() -> None:
    model, ids = make_model().train(), make_ids(1)
    silent = torch.zeros(1, 160_000, dtype=torch.int16)
    for answers_only in (False, True):
        model.zero_grad()
        out = model(
            ids,
            waveforms=silent,
            windows_per_clip=[1],
            labels=torch.full_like(ids, -100),
            answers_only=answers_only,
        )
        out.loss.backward()
        assert out.logits.isfinite().all()
        assert out.loss == 0
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_answers_only_gives_the_same_loss_and_gradients() -> None:
    model, ids, windows = make_model(), make_ids(2), make_windows(2)
    labels = ids.clone()
    labels[:, :5] = -100
    states = model.encode_audio(windows, [1, 1])
    whole = model(ids, audio_states=states, labels=labels)
    part = model(ids, audio_states=states, labels=labels, answers_only=True)
    chosen = labels[:, 1:] != -100
    torch.testing.assert_close(part.logits, whole.logits[:, :-1][chosen])
    torch.testing.assert_close(part.loss, whole.loss)
    total = token_loss_sum(part.logits, labels[:, 1:][chosen])
    torch.testing.assert_close(total / chosen.sum(), whole.loss)


def test_only_what_is_trainable_gets_gradients_and_the_frozen_tower_makes_none() -> None:
    model, ids = make_model().train(), make_ids(1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(("audio_transform", "added")) or ".cross_attention." in name
    out = model(ids, waveforms=make_windows(1), windows_per_clip=[1], labels=ids)
    out.loss.backward()
    assert not model.audio_tower.model.training
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) is parameter.requires_grad, name


def test_checkpointing_changes_no_gradient() -> None:
    model, ids, windows = make_model().train(), make_ids(2), make_windows(3)
    grads = []
    for _ in range(2):
        model.zero_grad()
        model(ids, waveforms=windows, windows_per_clip=[1, 2], labels=ids).loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.activation_checkpointing_enable()
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"waveforms": make_windows(2)}, "windows_per_clip is needed"),
        ({"waveforms": make_windows(2), "windows_per_clip": [1]}, r"windows_per_clip \[1\]"),
        ({"waveforms": make_windows(1), "windows_per_clip": [1, 0]}, "1 or more"),
        ({"waveforms": make_windows(2), "windows_per_clip": [1, 1]}, "2 clips for 1 rows"),
        ({"waveforms": make_windows(1), "windows_per_clip": [1], "audio_index": torch.tensor([[1]])}, "-1 .none. to 0"),
        (
            {"waveforms": make_windows(1), "windows_per_clip": [1], "audio_index": torch.tensor([[0, 0]])},
            "2 audios but 1",
        ),
        ({"waveforms": torch.zeros(31, 160_000, dtype=torch.int16), "windows_per_clip": [31]}, "limit of 30"),
        ({"answers_only": True}, "needs labels"),
    ],
)
def test_bad_input_says_what_to_do(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model()(make_ids(1), **kwargs)


def test_unknown_family_and_useless_frequency_are_errors() -> None:
    config = make_model().config
    with pytest.raises(ValueError, match="gpt2"):
        type(config)(text_config={"model_type": "gpt2"})
    with pytest.raises(ValueError, match="cross_attn_every=9"):
        type(config)(text_config=config.text_config, audio_token_id=AUDIO, cross_attn_every=9)
