"""A stage on cached features through Ray Data, Ray Train and DeepSpeed: the losses of the same stage on audio."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import toy

from af2_ray.config import load_recipe
from af2_ray.runs.fork import fork
from af2_ray.runs.run import Run, finished, read_metrics
from af2_ray.train.stages import train_run

STAGE = (
    "{{name: only, max_windows: 2, data: [{{manifest: {corpus}/train.json}}], steps: 4, checkpoint_every: 2, "
    "validation: [{{manifest: {corpus}/train.json}}], "
    "trainable: [xattn, transform, tokens], features: {features}, optimizer: {{lr: 1e-2, warmup_steps: 0}}, "
    "budget: {{windows_per_row: 6, text_tokens_per_row: 512, questions_per_clip: 2, step_batches: 2}}}}"
)


@pytest.mark.slow
def test_losses_are_those_of_audio(ray_cluster: Any, tmp_path: Path) -> None:
    corpus = toy.make(tmp_path)
    (corpus / "train" / "00003.flac").write_bytes(b"")  # set aside either way, from one rank alone
    kept = [item for item in toy.overrides(corpus, tmp_path) if not item.startswith("stages.")]
    recipes = {
        features: load_recipe(
            "tiny",
            [
                *kept,
                "faults.max_bad_share=1",
                "feature_cache.windows_per_shard=8",
                f"stages=[{STAGE.format(corpus=corpus, features=features)}]",
            ],
        )
        for features in ("audio", "cached")
    }
    heard = Run.open(recipes["audio"], tmp_path / "audio")
    train_run(heard)
    cached, taken = fork(recipes["cached"], heard.root, tmp_path / "cached")
    assert taken == ["lm", "clap", "start"]
    train_run(cached)
    histories = [read_metrics(run.stage_dir("only")) for run in (heard, cached)]
    for one, two in zip(*histories, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-4)
        assert [two[key] for key in ("windows", "labels", "set_aside")] == [
            one[key] for key in ("windows", "labels", "set_aside")
        ]
    assert sum(row["set_aside"] for row in histories[1]) > 0
    assert (finished(cached.stage_dir("only")) or {})["features_s"] > 0
    assert len(list((cached.root / "features").glob("*/*.safetensors"))) > 1
    assert (heard.stage_dir("only") / "validation.jsonl").read_text().count('"val/only"') == 2
