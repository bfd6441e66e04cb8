"""The model card tells what the run has on disk, and MLflow keeps the model that it is the card of."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import serve_toy
import yaml
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts

from af2_ray.config import load_recipe
from af2_ray.models.processing_af2 import AudioFlamingo2FeatureExtractor, AudioFlamingo2Processor
from af2_ray.runs.card import model_card, write_card
from af2_ray.runs.run import Run, mark_finished
from af2_ray.runs.tracking import Tracker


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run that ends after its second stage, on a corpus of two packages."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "corpus.json").write_text(
        '{"report": {"hours": 1.25, "num_source_clips": 4, "sha256": "0123456789abcdef0123"}}'
    )
    (corpus / "sources.csv").write_text(
        "id,label,package,file,licence,split\n"
        "1,dog,farm,a.ogg,GPL-2,train\n2,dog,farm,b.ogg,GPL-2,train\n"
        "3,bell,church,c.ogg,CC-BY-4.0,train\n4,bell,tower,d.ogg,CC0,test\n"
    )
    overrides = [f"corpus.dir={corpus}", "licences={field: CC-BY-4.0, field/own/train.json: ours}"]
    overrides += [f"stages.pretrain.data=[{{manifest: {corpus}/single/train.json, weight: 2.5}}]"]
    overrides += ["stages.finetune.data=[{manifest: field/rain/train.json}, {manifest: field/own/train.json}]"]
    overrides += ["stages.long.data=[{manifest: elsewhere/train.json}]"]
    made = Run.open(load_recipe("tiny", overrides), tmp_path / "run")
    mark_finished(made.lm_dir, {"steps": 450, "loss_first": 6.2, "loss_last": 0.4})
    for number, stage in enumerate(made.recipe.stages[:2]):
        facts = {
            "steps": 8 + number,
            "loss_first": 0.7,
            "loss_last": 0.4 - number / 10,
            "num_clips": 6989,
            "plan": "f",
        }
        mark_finished(made.stage_dir(stage.name), facts)
    made.model_dir.mkdir(parents=True)
    (made.model_dir / "config.json").write_text("{}")
    return made


def test_the_card_has_steps_data_and_every_licence(run: Run) -> None:
    card = model_card(run)
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "transformers"
    for line in (
        "| language model |  | all | 450 | 6.200 to 0.400 |  | nothing |  |",
        "| pretrain | 3 | transform, xattn, tokens | 8 | 0.700 to 0.400 | 6,989 | AF-CLAP and language model | `f` |",
        "| finetune | 9 | clap, transform, xattn, tokens | 9 | 0.700 to 0.300 | 6,989 | pretrain | `f` |",
        "| `field/rain/train.json` | 1 | finetune | CC-BY-4.0 |",
        "| `field/own/train.json` | 1 | finetune | ours |",
        "| `elsewhere/train.json` | 1 | long | not stated |",
        f"| `{run.recipe.corpus.dir}/single/train.json` | 2.5 | pretrain | that of its recordings, below |",
        "| church | 1 | CC-BY-4.0 |",
        "| farm | 2 | GPL-2 |",
    ):
        assert line in card.splitlines(), line
    assert "1.2 hours composed from 4 recordings (SHA-256 `0123456789abcdef`)" in card
    assert "tower" not in card, "recordings of other splits were not trained on"
    assert "\n| long |" not in card, "not finished"


def test_licences_do_not_make_another_run_of_it() -> None:
    assert load_recipe("tiny", ["licences={a: b}"]).fingerprint() == load_recipe("tiny").fingerprint()


def test_a_run_registers_its_model_once(run: Run) -> None:
    write_card(run)
    tracker = Tracker(run)
    tracker.parent()
    for _ in range(2):
        tracker.register("af2-tiny", run.model_dir)
    (version,) = MlflowClient(tracker.uri).search_model_versions("name = 'af2-tiny'")
    assert version.run_id == tracker.parent()
    fetched = Path(download_artifacts(artifact_uri=version.source, dst_path=str(run.root / "fetched")))
    assert (fetched / "README.md").read_text() == model_card(run)
    assert (fetched / "config.json").is_file()


def test_its_example_loads_the_model_beside_it(run: Run, tiny_tokenizer: Any) -> None:
    """In a fresh process, where nothing has been imported before."""
    model = serve_toy.build(tiny_tokenizer)
    model.save_pretrained(run.model_dir)
    extractor = AudioFlamingo2FeatureExtractor(model.config.max_windows)
    AudioFlamingo2Processor(extractor, tiny_tokenizer).save_pretrained(run.model_dir)
    example = model_card(run).split("```python\n")[1].split("```")[0] + "print(type(model), type(processor))"
    command = [sys.executable, "-c", example]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=run.model_dir, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    assert "AudioFlamingo2ForConditionalGeneration" in done.stdout
    assert "AudioFlamingo2Processor" in done.stdout
