"""The mel front end: shape, type, silence, independence of the batch, and agreement with torchaudio's own."""

import torch
import torchaudio

from af2_ray.audio.mel import LogMel, fixed_size


def noise(num_windows: int) -> torch.Tensor:
    return torch.rand(num_windows, 160_000, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_shape_type_and_silence() -> None:
    mel = LogMel()(torch.zeros(2, 160_000, dtype=torch.int16))
    assert mel.shape == (2, 1001, 64)
    assert mel.dtype == torch.float32
    assert (mel == -100).all()


def test_agrees_with_torchaudio() -> None:
    x = noise(2)
    transform = torchaudio.transforms.MelSpectrogram(
        16_000, n_fft=1024, hop_length=160, f_min=50, f_max=8000, n_mels=64, norm=None, mel_scale="htk"
    )
    expected = torchaudio.transforms.AmplitudeToDB("power")(transform(x)).transpose(1, 2)
    torch.testing.assert_close(LogMel()(x), expected, atol=1e-3, rtol=0)


def test_int16_is_the_float_times_32767() -> None:
    integers = (noise(1) * 32767).to(torch.int16)
    torch.testing.assert_close(LogMel()(integers), LogMel()(integers.float() / 32767))


def test_a_window_does_not_depend_on_its_batch() -> None:
    x = noise(6)
    torch.testing.assert_close(LogMel()(x)[5:], LogMel()(x[5:]), atol=1e-5, rtol=0)


def test_a_cast_of_the_model_does_not_touch_it() -> None:
    x = noise(1)
    assert torch.equal(LogMel().to(torch.bfloat16)(x), LogMel()(x))


def test_few_sizes_and_silence_beside_a_window_change_nothing() -> None:
    assert sorted({fixed_size(num) for num in range(1, 65)}) == [1, 2, 4, 8, 16, 32, 64]
    windows = torch.randint(-20_000, 20_000, (3, 160_000), dtype=torch.int16)
    padded = torch.nn.functional.pad(windows, (0, 0, 0, 1))
    assert torch.equal(LogMel()._log_mel(padded)[:3], LogMel()._log_mel(windows))
