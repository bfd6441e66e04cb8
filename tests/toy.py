"""A corpus that a test can make in a second: tones and noises with questions and caption sets in the real formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from af2_ray.config import Clap, Dataset, Stage

RATE = 16_000
SOUNDS = {"low tone": 220.0, "high tone": 1760.0, "noise": 0.0, "chirp": -1.0}


def sound(label: str, num_samples: int, rng: np.random.Generator) -> np.ndarray:
    time = np.arange(num_samples) / RATE
    frequency = SOUNDS[label]
    if frequency == 0:
        return rng.normal(0, 0.2, num_samples)
    if frequency < 0:
        return 0.5 * np.sin(2 * np.pi * (300 + 400 * time) * time)
    return 0.5 * np.sin(2 * np.pi * frequency * time)


def make(folder: Path, *, num_clips: int = 24, min_s: float = 2.0, max_s: float = 14.0, seed: int = 0) -> Path:
    """Write `<folder>/toy/train.json`, `train.captions.jsonl` and audio; returns `<folder>/toy`."""
    rng = np.random.default_rng(seed)
    root = folder / "toy"
    (root / "train").mkdir(parents=True)
    labels = list(SOUNDS)
    data, captions = {}, []
    for number in range(num_clips):
        first, second = rng.permutation(labels)[:2]
        duration_s = float(np.round(rng.uniform(min_s, max_s), 2))
        half = int(duration_s * RATE / 2)
        audio = np.concatenate([sound(first, half, rng), sound(second, half, rng)])
        name = f"{number:05d}.flac"
        soundfile.write(root / "train" / name, audio.astype(np.float32), RATE)
        common = {"name": name, "duration": len(audio) / RATE}
        for prompt, answer, options in (
            (f"Which comes first? (A) {first} (B) {second}", first, [first, second]),
            ("Describe the sound.", f"a {first} followed by a {second}", []),
        ):
            data[str(len(data))] = {**common, "prompt": prompt, "output": answer, "options": options, "skill": "order"}
        captions.append(
            {
                "name": f"train/{name}",
                "duration": len(audio) / RATE,
                "caption": f"a {first} followed by a {second}",
                "positives": [f"a {first}, then a {second}", f"a {second} preceded by a {first}"],
                "negatives": [[f"a {second} followed by a {first}"] * 3] * 3,
                "relations": ["order"],
            }
        )
    manifest = {
        "split": "train",
        "split_path": "train",
        "flamingo_task": "toy-QA",
        "total_num": len(data),
        "data": data,
    }
    (root / "train.json").write_text(json.dumps(manifest))
    readings = ({"prompt": f"a tone. {row['prompt']}", "answer": row["output"]} for row in data.values())
    (root / "train.reading.jsonl").write_text("".join(json.dumps(line) + "\n" for line in readings))
    (root / "train.captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in captions))
    return root


def stage(**settings: Any) -> Stage:
    """A stage's settings; its manifest is nowhere."""
    given = {"trainable": ["transform", "xattn", "tokens"], "data": [Dataset(manifest="none.json")], "max_windows": 1}
    return Stage(name="toy", steps=1, **(given | settings))


def clap(**settings: Any) -> Clap:
    """Settings of AF-CLAP; its captions are nowhere."""
    return Clap(steps=1, captions=[Dataset(manifest="none.captions.jsonl")], **settings)


def overrides(root: Path | str, storage: Path | str) -> list[str]:
    """What makes recipe `tiny` run on the toy corpus, wherever that is, in seconds."""
    manifest, captions, reading = (f"{root}/train.{end}" for end in ("json", "captions.jsonl", "reading.jsonl"))
    return [
        "corpus=null",
        f"storage={storage}",
        "model.audio.embed_dim=8",
        "model.audio.depths=[1, 1, 1, 1]",
        "model.audio.num_heads=[1, 2, 2, 2]",
        "model.lm.hidden_size=32",
        "model.lm.num_layers=2",
        "model.lm.num_heads=2",
        "model.lm.num_kv_heads=1",
        "model.lm.intermediate_size=64",
        "model.lm.pretrain.steps=4",
        "model.lm.pretrain.batch_size=8",
        f"model.lm.pretrain.reading=[{reading}]",
        f"model.lm.pretrain.drills=[{reading}]",
        "model.lm.pretrain.drill_steps=1",
        "model.transform.num_heads=2",
        "model.transform.inner_size=64",
        "model.cross_attention.num_heads=2",
        "model.cross_attention.head_dim=16",
        "clap.text.hidden_size=32",
        "clap.text.inner_size=32",
        "clap.joint_dim=16",
        "clap.batch_size=8",
        "clap.steps=3",
        "clap.checkpoint_every=2",
        "clap.mel_statistics_clips=4",
        f"clap.captions=[{{manifest: {captions}}}]",
        f"clap.warmup_captions=[{{manifest: {captions}}}]",
        "clap.warmup_steps=1",
        *(f"stages.{name}.data=[{{manifest: {manifest}}}]" for name in ("pretrain", "finetune", "long")),
        *(f"stages.{name}.steps=4" for name in ("pretrain", "finetune", "long")),
        *(f"stages.{name}.checkpoint_every=2" for name in ("pretrain", "finetune", "long")),
        "evaluation.manifests=[]",
        "evaluation.seen_manifests=[]",
        "evaluation.captions=null",
    ]
