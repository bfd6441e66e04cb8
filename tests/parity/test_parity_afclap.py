"""AF-CLAP's two towers against the reference: mel, embedding, both features; conversion there and back."""

import pytest
import torch
from golden import load, load_strictly, needs_golden
from torch import Tensor

from af2_ray.audio.windows import WINDOW_SAMPLES
from af2_ray.models.afclap import AfClapModel
from af2_ray.models.convert import afclap_from_reference, afclap_to_reference, clean_names, infer_afclap_config

pytestmark = needs_golden


@pytest.fixture(scope="module")
def model() -> AfClapModel:
    weights = clean_names(load("afclap_weights"))
    model = AfClapModel(infer_afclap_config(weights)).eval()
    load_strictly(model, afclap_from_reference(weights)[0])
    return model


def window() -> Tensor:
    """The clip, repeated as often as it fits whole into 10 s and zero-padded, through int16."""
    pcm = load("afclap_io")["pcm"].double() / 32768
    repeated = pcm.repeat(WINDOW_SAMPLES // len(pcm))
    padded = torch.nn.functional.pad(repeated, (0, WINDOW_SAMPLES - len(repeated)))
    return (padded * 32767).to(torch.int16)[None]


@torch.no_grad()
def test_audio(model: AfClapModel) -> None:
    io = load("afclap_io")
    mel = model.audio_tower.log_mel(window())
    torch.testing.assert_close(mel[0], io["mel"], atol=1e-3, rtol=0)
    torch.testing.assert_close(model.audio_tower(window()).mean(dim=1), io["embedding"], atol=1e-4, rtol=0)
    torch.testing.assert_close(model.get_audio_features(window(), [1]), io["audio_embed"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_text_is_pooled_over_padding_too(model: AfClapModel) -> None:
    io = load("afclap_io")
    features = model.get_text_features(io["ids"], io["mask"])
    torch.testing.assert_close(features, io["text_embed"], atol=1e-5, rtol=0)


def test_there_and_back_is_equal_to_the_bit(model: AfClapModel) -> None:
    weights = clean_names(load("afclap_weights"))
    back = afclap_to_reference(model.state_dict(), afclap_from_reference(weights)[1])
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], value) for name, value in weights.items())
