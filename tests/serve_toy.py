"""A random model of a few thousand weights that answers over HTTP as a trained one does, only nonsense."""

from __future__ import annotations

import base64
import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import soundfile as sf
import torch


def export(folder: Path, tokenizer: Any, *, seed: int = 0) -> Path:
    """Write a random model and its tokenizer; returns `folder`."""
    build(tokenizer, seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def export_clap(folder: Path, tokenizer: Any, **settings: Any) -> Path:
    """Write a random AF-CLAP and its tokenizer; returns `folder`."""
    from transformers import T5Config

    from af2_ray.models.afclap import AfClapConfig, AfClapModel
    from af2_ray.models.htsat import tower_config

    torch.manual_seed(0)
    text = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    audio = tower_config(8, [1, 1, 1, 1], [1, 2, 2, 2])
    AfClapModel(AfClapConfig(text_config=text, audio_config=audio, projection_dim=12, **settings)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


def build(tokenizer: Any, *, seed: int = 0, llama: bool = False, **settings: Any) -> Any:
    """A random model with open gates, so that the audio is heard; `settings` are its configuration's."""
    from transformers import LlamaConfig, Qwen2Config

    from af2_ray.models.configuration_af2 import AudioFlamingo2Config
    from af2_ray.models.htsat import tower_config
    from af2_ray.models.random import random_model

    lm = (LlamaConfig if llama else Qwen2Config)(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        initializer_range=0.5,
        max_position_embeddings=1024,
    )
    config = AudioFlamingo2Config(
        text_config=lm,
        audio_config=tower_config(8, [1, 1, 1, 1], [1, 2, 2, 2]),
        audio_token_id=tokenizer.convert_tokens_to_ids("<audio>"),
        cross_attn_heads=2,
        cross_attn_head_dim=16,
        transform_layers=1,
        transform_heads=2,
        transform_inner_size=32,
        **settings,
    )
    return random_model(config, seed=seed, gate=1.0)


def wav(duration_s: float = 1.0, *, hz: float = 440.0, rate: int = 16_000, subtype: str = "PCM_16") -> bytes:
    """A WAV file of a tone."""
    return encoded(0.5 * np.sin(2 * np.pi * hz * np.arange(round(duration_s * rate)) / rate), rate, subtype)


def encoded(samples: np.ndarray, rate: int = 16_000, subtype: str = "PCM_16") -> bytes:
    """Samples [T] or [T, channels] as a WAV file."""
    file = io.BytesIO()
    sf.write(file, samples, rate, format="WAV", subtype=subtype)
    return file.getvalue()


def audio_part(data: bytes) -> dict[str, Any]:
    """An `input_audio` part."""
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"}}


def chat(*audios: bytes, text: str = "which sound is heard?", model: str = "af2", **more: Any) -> dict[str, Any]:
    """A request body: one user message of recordings and a question."""
    content = [*(audio_part(audio) for audio in audios), {"type": "text", "text": text}]
    return {"model": model, "messages": [{"role": "user", "content": content}], **more}


def processes(actor: str) -> list[psutil.Process]:
    """Living processes below this one of an actor, by a part of its name."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith("ray::") and actor in process.cmdline()[0]:
                found.append(process)
    return found


def pids(actor: str) -> list[int]:
    """Numbers of these processes."""
    return [process.pid for process in processes(actor)]
