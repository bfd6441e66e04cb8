"""`jobs/convert.py` there and back, as a user runs it."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from golden import FOLDER, facts, load, needs_golden
from safetensors.torch import load_file

from af2_ray.models.convert import clean_names

pytestmark = needs_golden
main = runpy.run_path(str(Path(__file__).parents[2] / "jobs" / "convert.py"))["main"]


@pytest.mark.parametrize("name", ["n1", "n2", "afclap"])
def test_there_and_back(name: str, tmp_path: Path) -> None:
    source, settings = FOLDER / f"{name}_weights.safetensors", tmp_path / "settings.json"
    arguments = [str(source), str(tmp_path / "ours")]
    if name != "afclap":
        heads = facts()[name]["audio_transformer"]["n_head"]
        settings.write_text(json.dumps({"text_config": facts()["lm_config"], "transform_heads": heads}))
        arguments += ["--config", str(settings)]
    assert main(arguments) == 0
    assert main([str(tmp_path / "ours"), str(tmp_path / "back.safetensors"), "--back"]) == 0
    back, expected = load_file(tmp_path / "back.safetensors"), clean_names(load(f"{name}_weights"))
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[key], value) for key, value in expected.items())


def test_what_the_weights_cannot_tell_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(FOLDER / "n1_weights.safetensors"), str(tmp_path / "ours")]) == 2
    assert "--lm DIR" in capsys.readouterr().err
    assert main([str(tmp_path), str(tmp_path / "ours")]) == 2
