"""Random models in place of fine-tuned ones: what a stage exports, its small part beside it, without a step trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import serve_toy
import torch
import toy

from af2_ray.config import Lora, load_recipe
from af2_ray.models.processing_af2 import AudioFlamingo2FeatureExtractor, AudioFlamingo2Processor
from af2_ray.train.loop import LoopConfig, _write
from af2_ray.train.task import LmTask

GROUPS = ("lora", "transform", "xattn", "tokens")


def export_base(folder: Path, tokenizer: Any, *, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """Write a random model with its processor; returns `folder`."""
    model = serve_toy.build(tokenizer, **settings).to(dtype)
    model.save_pretrained(folder)
    AudioFlamingo2Processor(AudioFlamingo2FeatureExtractor(model.config.max_windows), tokenizer).save_pretrained(folder)
    return folder


def tune(model: Any, *, seed: int = 0, size: float = 0.3) -> Any:
    """Change all that trains by random numbers, adapters from nothing to something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(size * noise.to(parameter) * (parameter.std(correction=0) + 0.1))
    return model


def stage(
    base: Path | str,
    folder: Path | str,
    *,
    groups: tuple[str, ...] = GROUPS,
    start: Path | str | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[str, str]:
    """What a stage leaves in `folder`: the whole export and its part of `base`; both places."""
    lora = Lora(rank=4, targets=["q_proj", "v_proj", "up_proj"]) if "lora" in groups else None
    task = LmTask(str(start or base), toy.stage(trainable=list(groups), lora=lora))
    torch.manual_seed(seed)  # of the adapters' start
    model = tune(task.build(), seed=seed).to(dtype)
    loop = LoopConfig(
        task=task,
        recipe=load_recipe("tiny"),
        export=f"{folder}/model",
        num_steps=4,
        step_batches=1,
        checkpoint_every=2,
        part=f"{folder}/part",
        base=str(base),
    )
    _write(model, loop)
    return loop.export, str(loop.part)
