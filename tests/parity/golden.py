"""The reference's fixtures: where they are, and the model converted from them.

`AF2_GOLDEN` names the folder; the default is `../shared/golden` beside the repository.
"""

import functools
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen2Config

from af2_ray.audio.windows import to_windows
from af2_ray.models.convert import af2_from_reference, clean_names, infer_af2_config
from af2_ray.models.modeling_af2 import AudioFlamingo2ForConditionalGeneration

FOLDER = Path(os.environ.get("AF2_GOLDEN", Path(__file__).parents[3] / "shared" / "golden"))

needs_golden = pytest.mark.skipif(
    not (FOLDER / "golden.json").is_file(),
    reason=f"no reference fixtures in {FOLDER}: set AF2_GOLDEN to the folder that has golden.json",
)


@functools.cache
def facts() -> dict[str, Any]:
    return json.loads((FOLDER / "golden.json").read_text())


@functools.cache
def load(name: str) -> dict[str, Tensor]:
    """A fixture file, weights cast from BF16 to float32."""
    tensors = load_file(FOLDER / f"{name}.safetensors")
    return {key: value.float() if value.dtype == torch.bfloat16 else value for key, value in tensors.items()}


def windows() -> list[Tensor]:
    """The two clips as int16 windows [W, 160000]."""
    common = load("common")
    pcm = [common[name].double().numpy() / 32768 for name in sorted(k for k in common if k.startswith("pcm."))]
    return [torch.from_numpy(to_windows(clip, 30)) for clip in pcm]


def sha256(window: Tensor) -> str:
    return hashlib.sha256(window.numpy().tobytes()).hexdigest()


def load_strictly(model: torch.nn.Module, state: dict[str, Tensor]) -> None:
    """Load all of `state`; only constants may be missing."""
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert all(name.endswith("relative_position_index") for name in result.missing_keys), result.missing_keys


@dataclass
class Case:
    """One fixture of the whole model."""

    name: str
    weights: dict[str, Tensor]
    extras: dict[str, Tensor]
    io: dict[str, Tensor]
    model: AudioFlamingo2ForConditionalGeneration
    waveforms: Tensor
    counts: list[int]


@functools.cache
def case(name: str) -> Case:
    weights = clean_names(load(f"{name}_weights"))
    heads = facts()[name]["audio_transformer"]["n_head"]
    config = infer_af2_config(weights, Qwen2Config.from_dict(facts()["lm_config"]), transform_heads=heads)
    state, extras = af2_from_reference(weights, config)
    model = AudioFlamingo2ForConditionalGeneration(config).eval()
    load_strictly(model, state)
    clips = windows()
    return Case(name, weights, extras, load(f"{name}_io"), model, torch.cat(clips), [len(clip) for clip in clips])
