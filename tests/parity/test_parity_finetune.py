"""A checkpoint in NVIDIA's layout is fine-tuned and goes back into that layout, what did not train bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import toy
from golden import FOLDER, facts, load, needs_golden
from job_runner import run_job
from safetensors.torch import load_file
from transformers import AutoConfig

from af2_ray.config import load_recipe
from af2_ray.models.convert import clean_names, infer_af2_config
from af2_ray.runs.run import Run
from af2_ray.text import train_tokenizer
from af2_ray.train.stages import train_run

pytestmark = [needs_golden, pytest.mark.slow]

TRAINED = ("gated_cross_attn_layer", "audio_transformer", "embed", "lm_head")


def converted(folder: Path) -> Path:
    """The fixture n1 in our layout, beside a tokenizer of its size."""
    lm, out, settings = folder / "lm", folder / "ours", folder / "settings.json"
    settings.write_text(json.dumps({"transform_heads": facts()["n1"]["audio_transformer"]["n_head"]}))
    AutoConfig.for_model(**facts()["lm_config"]).save_pretrained(lm)
    tokenizer = train_tokenizer(["a bell and a dog"], 300)
    first = infer_af2_config(clean_names(load("n1_weights")), AutoConfig.from_pretrained(lm)).audio_token_id
    tokenizer.add_tokens([f"word{number}" for number in range(first - len(tokenizer))])
    tokenizer.save_pretrained(lm)
    source = FOLDER / "n1_weights.safetensors"
    assert run_job("convert", source, out, "--lm", lm, "--config", settings) == 0
    return out


def test_from_nvidia_s_layout_and_back(ray_cluster: Any, tmp_path: Path) -> None:
    ours, corpus = converted(tmp_path), toy.make(tmp_path, max_s=9.0)
    data = f"[{{manifest: {corpus / 'train.json'}}}]"
    recipe = load_recipe(
        "finetune",
        [
            f"model.start={ours}",
            f"stages.finetune.data={data}",
            f"stages.finetune.validation={data}",
            "stages.finetune.trainable=[transform, xattn, tokens]",
            "stages.finetune.steps=20",
            "stages.finetune.checkpoint_every=10",
            "tracking.register_model=false",
        ],
    )
    run = Run.open(recipe, tmp_path / "run")
    (facts_,) = train_run(run)
    assert facts_["loss_last"] < facts_["loss_first"]
    assert run_job("convert", run.model_dir, tmp_path / "back.safetensors", "--back") == 0
    back, before = load_file(tmp_path / "back.safetensors"), clean_names(load("n1_weights"))
    assert back.keys() == before.keys()
    changed = {name for name, value in back.items() if not value.equal(before[name])}
    assert changed
    assert all(any(part in name for part in TRAINED) for name in changed), sorted(changed)
    assert any("gated_cross_attn" in name for name in changed)
