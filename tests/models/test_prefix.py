"""Audio as a prefix of the text: the other fusion, behind the same calls. Generation: `test_generation.py`."""

from pathlib import Path

import torch
from small import AUDIO, PAD, make_ids, make_lm, make_model, make_windows

from af2_ray.models.modeling_af2 import AudioFlamingo2ForConditionalGeneration as Model
from af2_ray.train.optim import freeze_except


@torch.no_grad()
def test_without_audio_it_is_the_bare_lm() -> None:
    text = make_ids(2, markers=0)[:, :-1]
    expected = make_lm()(text).logits[..., :AUDIO]
    assert torch.equal(make_model(fusion="prefix")(text).logits[..., :AUDIO], expected)


@torch.no_grad()
def test_ragged_clips_hear_as_if_alone_and_logits_are_the_texts() -> None:
    model, ids, windows = make_model(fusion="prefix"), make_ids(2), make_windows(4)
    both = model(ids, waveforms=windows, windows_per_clip=[1, 3]).logits
    assert both.shape[:2] == ids.shape
    for row, clip in enumerate(windows.split([1, 3])):
        alone = model(ids[row : row + 1], waveforms=clip, windows_per_clip=[len(clip)]).logits
        torch.testing.assert_close(both[row : row + 1], alone, atol=1e-4, rtol=0)
    assert not torch.allclose(both[0], model(ids[:1], waveforms=windows[1:2], windows_per_clip=[1]).logits[0])


@torch.no_grad()
def test_a_row_without_audio_and_text_padding_change_nothing() -> None:
    model, ids, windows = make_model(fusion="prefix"), make_ids(2), make_windows(1)
    ids[1, 0] = 5  # no marker
    mixed = model(ids, waveforms=windows, windows_per_clip=[1], audio_index=torch.tensor([[0], [-1]])).logits
    torch.testing.assert_close(mixed[1], model(ids[1:]).logits[0], atol=1e-5, rtol=0)
    padded = torch.cat([torch.full((1, 3), PAD), ids[:1]], dim=1)
    shifted = model(padded, attention_mask=(padded != PAD).long(), waveforms=windows, windows_per_clip=[1]).logits
    torch.testing.assert_close(shifted[0, 3:], mixed[0], atol=1e-4, rtol=0)


def test_it_trains_as_the_fusion_group_and_round_trips(tmp_path: Path) -> None:
    model = make_model(fusion="prefix")
    names = freeze_except(model, ["xattn"])
    assert names
    assert all(name.startswith("prefix.") for name in names)
    ids = make_ids(2)
    model(ids, waveforms=make_windows(2), windows_per_clip=[1, 1], labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.prefix.parameters())
    model.save_pretrained(tmp_path)
    again = Model.from_pretrained(tmp_path)
    assert again.config.fusion == "prefix"
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_pooled_features_are_one_token_a_window() -> None:
    dense, pooled = make_model(), make_model(features="pooled")
    windows = make_windows(3)
    assert dense.encode_audio(windows, [1, 2]).mask.sum(dim=1).tolist() == [64, 128]
    assert pooled.encode_audio(windows, [1, 2]).mask.sum(dim=1).tolist() == [1, 2]
