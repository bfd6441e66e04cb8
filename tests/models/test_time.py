"""The embedding of time: where a token lies in its clip, whatever else is in the batch."""

from pathlib import Path

import pytest
import torch

from af2_ray.models.modeling_af2 import AudioFlamingo2ForConditionalGeneration as Model
from af2_ray.models.transform import time_table
from tests.models.small import make_model, make_tower, make_windows


def test_the_table_tells_every_time_from_every_other() -> None:
    times = torch.arange(0, 30, 1 / 32)
    table = time_table(times, torch.full_like(times, 30.0), 6)
    apart = torch.cdist(table, table) + 1e9 * torch.eye(len(table))
    assert table.shape == (960, 18)
    assert apart.min() > 0.05


def test_a_share_of_the_clip_means_the_same_at_any_length() -> None:
    short, long = (time_table(torch.tensor([n / 4]), torch.tensor([n]), 4) for n in (1.0, 8.0))
    assert torch.allclose(short[:, :4], long[:, :4], atol=1e-6)


def test_the_window_has_the_shape_of_the_towers_features() -> None:
    tower = make_tower()
    bands, steps = tower.window_shape
    assert (bands, steps) == (2, 32)
    assert tower(make_windows(1)).shape[1] == bands * steps


@pytest.mark.parametrize("features", ["dense", "pooled"])
def test_ragged_clips_have_the_states_they_have_alone(features: str) -> None:
    model = make_model(time_features=4, moments=2, features=features)
    windows, counts = make_windows(6), [1, 3, 2]
    together = model.encode_audio(windows, counts)
    for clip, (count, part) in enumerate(zip(counts, windows.split(counts), strict=True)):
        alone = model.encode_audio(part, [count])
        assert torch.allclose(together.hidden[clip][together.mask[clip]], alone.hidden[0], atol=1e-5)


def test_every_token_is_told_what_the_beginning_has_more_of_than_the_end() -> None:
    model = make_model(moments=1).audio_transform
    model.layers = torch.nn.ModuleList()
    features = torch.randn(128, model.input_norm.weight.numel())
    halves = features.split(64)
    told = model(features, [128]) - model.input_norm(features * features.shape[1] ** 0.5)
    swapped = torch.cat([halves[1], halves[0]])
    told_swapped = model(swapped, [128]) - model.input_norm(swapped * features.shape[1] ** 0.5)
    assert torch.allclose(told, told[:1].expand_as(told), atol=1e-5)  # the same for all tokens
    assert torch.nn.functional.cosine_similarity(told[0], told_swapped[0], dim=0) < 0  # the other way round


def test_equal_windows_at_unlike_times_differ_and_the_weights_are_kept(tmp_path: Path) -> None:
    model = make_model(time_features=4)
    window = make_windows(1).repeat(2, 1)
    first, second = model.encode_audio(window, [2]).hidden[0].split(64)
    assert (first - second).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    again = Model.from_pretrained(tmp_path)
    assert torch.equal(again.audio_transform.time_embedding.weight, model.audio_transform.time_embedding.weight)
