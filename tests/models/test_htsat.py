"""The tower: equal to transformers' own forward, never in training mode while frozen, calibrated exactly."""

import pytest
import torch
from small import make_tower, make_windows
from transformers import ClapAudioModel

from af2_ray.models import htsat
from af2_ray.models.htsat import AudioTower, tower_config


@pytest.mark.parametrize(
    ("num_heads", "patch_size"), [((1, 2, 4, 8), 4), ((2, 4, 8, 16), 4), ((1, 2, 4), 8), ((2, 4), 16)]
)
def test_features_are_those_of_clap_audio_model(num_heads: tuple[int, ...], patch_size: int) -> None:
    torch.manual_seed(0)
    tower = AudioTower(tower_config(16, [2] * len(num_heads), num_heads, patch_size=patch_size)).eval()
    assert tower.window_shape == (2, 32)
    for parameter in tower.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    windows = make_windows(2)
    with torch.no_grad():
        tower.calibrate(windows)
        reference: ClapAudioModel = tower.model
        expected = reference(tower.log_mel(windows)[:, None]).last_hidden_state.flatten(2).transpose(1, 2)
        torch.testing.assert_close(tower(windows), expected, atol=1e-4, rtol=0)


def test_gradients_are_those_of_clap_audio_model() -> None:
    tower, windows = make_tower(), make_windows(1)
    tower.calibrate(windows)
    mel = tower.log_mel(windows)
    weights = torch.randn(1, 64, tower.output_size)
    grads = []
    for features in (tower.encode(mel), tower.model(mel[:, None]).last_hidden_state.flatten(2).transpose(1, 2)):
        tower.zero_grad()
        (features * weights).sum().backward()
        grads.append({name: parameter.grad.clone() for name, parameter in tower.named_parameters()})
    for name, expected in grads[1].items():
        assert (grads[0][name] - expected).norm() <= 1e-4 * expected.norm() + 1e-5, name


def test_a_frozen_tower_stays_in_eval_mode_without_gradients() -> None:
    tower = make_tower().train()
    assert tower.model.training
    tower.requires_grad_(False)
    assert not tower(make_windows(1)).requires_grad
    assert not tower.model.training
    assert not tower.train().model.training


def test_batch_norm_never_trains_and_a_window_does_not_depend_on_its_batch() -> None:
    tower = make_tower().train()
    windows = make_windows(3)
    norm = tower.model.audio_encoder.batch_norm
    before = norm.running_mean.clone(), norm.running_var.clone()
    torch.testing.assert_close(tower(windows)[2:], tower(windows[2:]), atol=1e-5, rtol=1e-4)
    assert not norm.training
    assert torch.equal(before[0], norm.running_mean)
    assert torch.equal(before[1], norm.running_var)


def test_calibration_in_several_calls_is_that_of_one() -> None:
    windows = make_windows(5)
    tower, parts = make_tower(), make_tower()
    tower.calibrate(windows)
    for part in windows.split(2):
        parts.calibrate(part)
    mel = tower.log_mel(windows)
    for candidate in (tower, parts):
        norm = candidate.model.audio_encoder.batch_norm
        torch.testing.assert_close(norm.running_mean, mel.mean(dim=(0, 1)), atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(norm.running_var, mel.var(dim=(0, 1), correction=0), atol=1e-3, rtol=1e-5)


def test_silence_gives_finite_features() -> None:
    tower = make_tower()
    tower.calibrate(torch.zeros(1, 160_000, dtype=torch.int16))
    assert tower(torch.zeros(1, 160_000, dtype=torch.int16)).isfinite().all()


def test_sizes_that_do_not_match_are_an_error() -> None:
    with pytest.raises(ValueError, match="one number a stage"):
        tower_config(8, (1, 1), (1, 2, 4))


def deep_tower() -> AudioTower:
    """Two blocks a stage, so that windows are shifted where there are several."""
    torch.manual_seed(0)
    tower = AudioTower(tower_config(16, [2] * 4, (1, 2, 4, 8))).eval()
    for parameter in tower.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return tower


@pytest.mark.parametrize("turned", [False, True])
def test_fused_kernels_of_a_gpu_take_every_block(turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def look(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, dropout: float) -> torch.Tensor:
        fits = mask.stride(-1) == 1 and mask.dtype == q.dtype == k.dtype == v.dtype
        taken.append(fits and all(t.dim() == 4 and t.stride(-1) == 1 for t in (q, k, v, mask)))
        return attend(q, k, v, mask, dropout)

    attend = htsat.attend
    monkeypatch.setattr(htsat, "attend", look)
    monkeypatch.setattr(htsat, "turns_windows", lambda device: turned)
    deep_tower()(make_windows(1))
    assert taken == [True] * 8


def test_a_tower_that_answered_may_learn() -> None:
    tower, windows = deep_tower(), make_windows(1)
    with torch.inference_mode():
        tower(windows)
    tower.train()(windows).sum().backward()


def test_windows_turned_for_a_gpu_give_the_same_features_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    tower = deep_tower().double()
    mel = tower.log_mel(make_windows(2))
    found = []
    for turned in (False, True):
        monkeypatch.setattr(htsat, "turns_windows", lambda device, turned=turned: turned)
        tower.zero_grad()
        features = tower.encode(mel)
        features.square().sum().backward()
        found.append([features.detach(), *(p.grad.clone() for p in tower.parameters() if p.grad is not None)])
    for plain, turned_ in zip(*found, strict=True):
        torch.testing.assert_close(turned_, plain, atol=1e-9, rtol=1e-9)


def test_what_a_frozen_tower_keeps_follows_its_weights() -> None:
    tower, windows = deep_tower().requires_grad_(False), make_windows(1)
    names = set(tower.state_dict())
    seen = [tower(windows)]
    assert torch.equal(tower(windows), seen[0])

    def check() -> None:
        fresh = deep_tower().requires_grad_(False)
        fresh.load_state_dict(tower.state_dict())
        seen.append(tower(windows))
        assert torch.equal(seen[-1], fresh(windows))
        assert not torch.equal(seen[-1], seen[-2])

    inner = tower.model.audio_encoder.layers[0].blocks[1].attention.self
    inner.query.weight.mul_(2)
    check()
    inner.relative_position_bias_table.add_(torch.rand(inner.relative_position_bias_table.shape))
    check()
    inner.key.weight.data = inner.key.weight * 2
    check()
    tower.load_state_dict({n: t * 1.01 if t.is_floating_point() else t for n, t in tower.state_dict().items()})
    check()
    inner.value.weight.data.mul_(2)  # as an optimizer of flat copies does; `eval` or `train` stands between
    tower.eval()
    check()
    assert set(tower.state_dict()) == names
    assert tower.to(torch.bfloat16)(windows).dtype == torch.bfloat16
