"""The plan on paper against what the models really are and do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import small
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from af2_ray.models.audio_states import AudioStates
from af2_ray.train.costs import Work, forward_flops, meta_model, parameters, state_gib, step_flops


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Counts matrix products; attention is done as such, for a fused kernel of the CPU is not counted."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def test_operations_are_those_that_torch_counts() -> None:
    model = small.make_model()
    clips, windows, rows, length = 3, 2, 3, 24
    work = Work(clips * windows, rows * length, windows, length, rows * length)
    wanted = forward_flops(model, work)
    waveforms = small.make_windows(clips * windows)
    ids = small.make_ids(rows, length)
    with torch.no_grad():
        mel = model.audio_tower.log_mel(waveforms)
    with counting() as tower:
        features = model.audio_tower.encode(mel)
    assert abs(tower.get_total_flops() / wanted["clap"] - 1) < 0.03
    with counting() as transform:
        states: AudioStates = model.encode_audio(None, [windows] * clips, tower_features=features)
    assert abs(transform.get_total_flops() / wanted["transform"] - 1) < 0.03
    with counting() as text:
        model(input_ids=ids, audio_states=states)
    assert abs(text.get_total_flops() / (wanted["lm"] + wanted["xattn"]) - 1) < 0.05


def test_a_frozen_tower_costs_its_forward_a_cached_one_nothing() -> None:
    model, work = small.make_model(), Work(6, 72, 2, 24, 24)
    forward = forward_flops(model, work)
    rest = 3 * (forward["transform"] + forward["xattn"]) + 2 * forward["lm"]
    groups = ("transform", "xattn", "tokens")
    assert step_flops(model, work, groups, cached=True) == rest
    assert step_flops(model, work, groups) == rest + forward["clap"]
    assert step_flops(model, work, (*groups, "clap")) == rest + 3 * forward["clap"]


def test_parameters_without_memory_and_what_zero_shares_out() -> None:
    real = small.make_model()
    counts = parameters(meta_model(real.config))
    assert counts == parameters(real)
    trained = counts["xattn"] + counts["tokens"]
    unit = 2.0**30
    plain = state_gib(counts, ("xattn", "tokens"), zero_stage=0, gpus=4)
    assert plain == {
        "weights": 2 * sum(counts.values()) / unit,
        "gradients": 2 * trained / unit,
        "optimizer": 12 * trained / unit,
    }
    shared = [state_gib(counts, ("xattn", "tokens"), zero_stage=stage, gpus=4) for stage in (1, 2, 3)]
    assert [part["optimizer"] for part in shared] == [plain["optimizer"] / 4] * 3
    assert [part["gradients"] / plain["gradients"] for part in shared] == [1, 0.5, 0.5]  # in fp32 once shared out
    assert [part["weights"] / plain["weights"] for part in shared] == [1, 1, 0.25]
