"""`jobs/convert.py` there and back, as a user runs it."""

import json
from pathlib import Path

import pytest
import torch
from golden import FOLDER, facts, load, needs_golden
from job_runner import run_job
from safetensors.torch import load_file
from transformers import AutoConfig, AutoProcessor

from af2_ray.models.convert import clean_names, infer_af2_config
from af2_ray.models.modeling_af2 import AudioFlamingo2ForConditionalGeneration
from af2_ray.models.processing_af2 import AudioFlamingo2Processor
from af2_ray.text import train_tokenizer

pytestmark = needs_golden


@pytest.mark.parametrize("name", ["n1", "n2", "afclap"])
def test_there_and_back(name: str, tmp_path: Path) -> None:
    source, settings = FOLDER / f"{name}_weights.safetensors", tmp_path / "settings.json"
    arguments = [str(source), str(tmp_path / "ours")]
    if name != "afclap":
        heads = facts()[name]["audio_transformer"]["n_head"]
        settings.write_text(json.dumps({"text_config": facts()["lm_config"], "transform_heads": heads}))
        arguments += ["--config", str(settings)]
    assert run_job("convert", *arguments) == 0
    assert run_job("convert", str(tmp_path / "ours"), str(tmp_path / "back.safetensors"), "--back") == 0
    back, expected = load_file(tmp_path / "back.safetensors"), clean_names(load(f"{name}_weights"))
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[key], value) for key, value in expected.items())


def test_what_the_weights_cannot_tell_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_job("convert", str(FOLDER / "n1_weights.safetensors"), str(tmp_path / "ours")) == 2
    assert "--lm DIR" in capsys.readouterr().err
    assert run_job("convert", str(tmp_path), str(tmp_path / "ours")) == 2


def test_with_its_lm_a_converted_checkpoint_is_ready_to_be_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tokenizer travels along, and one that numbers the model's own tokens otherwise is refused."""
    source, lm, out = FOLDER / "n1_weights.safetensors", tmp_path / "lm", tmp_path / "ours"
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"transform_heads": facts()["n1"]["audio_transformer"]["n_head"]}))
    AutoConfig.for_model(**facts()["lm_config"]).save_pretrained(lm)
    tokenizer = train_tokenizer(["a bell and a dog"], 300)
    tokenizer.save_pretrained(lm)
    arguments = [str(source), str(out), "--lm", str(lm), "--config", str(settings)]
    assert run_job("convert", *arguments) == 2
    assert "the LM that the checkpoint was trained with" in capsys.readouterr().err
    first = infer_af2_config(clean_names(load("n1_weights")), AutoConfig.from_pretrained(lm)).audio_token_id
    tokenizer.add_tokens([f"word{number}" for number in range(first - len(tokenizer))])
    tokenizer.save_pretrained(lm)
    assert run_job("convert", *arguments) == 0
    processor = AutoProcessor.from_pretrained(out)
    assert isinstance(processor, AudioFlamingo2Processor)
    model = AudioFlamingo2ForConditionalGeneration.from_pretrained(out)
    assert processor.tokenizer.convert_tokens_to_ids("<audio>") == model.config.audio_token_id
