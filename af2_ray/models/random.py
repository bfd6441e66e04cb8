"""Models of random weights: for trials of memory, benchmarks and tests."""

from __future__ import annotations

import torch

from af2_ray.models.configuration_af2 import AudioFlamingo2Config
from af2_ray.models.modeling_af2 import AudioFlamingo2ForConditionalGeneration


def random_model(
    config: AudioFlamingo2Config, *, seed: int = 0, gate: float = 0.5
) -> AudioFlamingo2ForConditionalGeneration:
    """A model of random weights in evaluation mode, whose text hears the audio.

    Args:
        gate: value of the gates of cross-attention. Training begins with 0, where neither the audio nor any fault in
            how it is heard changes anything.
    """
    torch.manual_seed(seed)
    model = AudioFlamingo2ForConditionalGeneration(config).eval()
    open_gates(model, gate)
    return model


@torch.no_grad()
def open_gates(model: AudioFlamingo2ForConditionalGeneration, value: float = 0.5) -> None:
    """Set the gates of cross-attention."""
    for name, parameter in model.named_parameters():
        if name.endswith(("attn_gate", "ff_gate")):
            parameter.fill_(value)
