"""Recordings for the engine, and what transformers' `generate` answers about them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from af2_ray.audio.windows import to_windows
from af2_ray.engine.engine import Engine
from af2_ray.engine.request import Clip, Request
from af2_ray.text import format_prompt


def clip(duration_s: float, hz: float) -> Clip:
    """A tone that dies away."""
    seconds = np.arange(round(duration_s * 16_000)) / 16_000
    return Clip.of(to_windows(np.sin(2 * np.pi * hz * seconds) * np.exp(-seconds)))


def generated(engine: Engine, request: Request) -> tuple[str, int]:
    """Text and number of tokens of transformers' own `generate`, greedy, on this request alone."""
    text = format_prompt(request.prompt, len(request.clips))
    ids = torch.tensor([engine.tokenizer(text, add_special_tokens=False)["input_ids"]])
    audio: dict[str, Any] = {}
    if request.clips:
        audio = {
            "waveforms": torch.from_numpy(np.concatenate([clip.windows for clip in request.clips])),
            "windows_per_clip": [clip.num_windows for clip in request.clips],
            "audio_index": torch.arange(len(request.clips))[None],
        }
    limits = {"max_new_tokens": request.max_new_tokens, "min_new_tokens": request.min_new_tokens or None}
    new = engine.model.generate(ids, **audio, **limits, do_sample=False)[0, ids.shape[1] :]
    return str(engine.tokenizer.decode(new, skip_special_tokens=True)), len(new)
