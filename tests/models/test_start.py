"""A recipe that starts from a model takes its sizes from there, and refuses one that cannot be trained further."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from exports import write_export
from safetensors.torch import load_file
from transformers import AutoProcessor, AutoTokenizer

from af2_ray.config import Recipe, load_recipe
from af2_ray.models.configuration_af2 import AudioFlamingo2Config
from af2_ray.models.from_recipe import recipe_config
from af2_ray.models.modeling_af2 import AudioFlamingo2ForConditionalGeneration as Model
from af2_ray.models.start import settled
from af2_ray.runs.run import Run
from af2_ray.train.stages import assemble


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    return write_export(tmp_path_factory.mktemp("export") / "model", tiny_tokenizer)


def recipe(start: Path | str, *overrides: str) -> Recipe:
    return load_recipe("finetune", [f"model.start={start}", *overrides])


def test_sizes_and_digest_come_from_the_start(export: Path) -> None:
    found = settled(recipe(export)).model
    assert (found.audio.embed_dim, found.audio.depths, found.audio.mlp_ratio) == (8, [1, 1, 1, 1], 2.0)
    assert (found.lm.hidden_size, found.lm.num_layers, found.lm.num_kv_heads) == (32, 2, 1)
    assert (found.transform.num_layers, found.cross_attention.head_dim, found.max_text_tokens) == (1, 16, 96)
    assert len(found.start_digest or "") == 64


def test_the_kept_recipe_goes_on_by_itself_and_from_another_place(export: Path, tmp_path: Path) -> None:
    run = Run.open(recipe(export), tmp_path / "run")
    assert Run.load(tmp_path / "run").recipe == run.recipe
    moved = tmp_path / "moved"
    moved.symlink_to(export)
    assert Run.open(recipe(moved), tmp_path / "run").recipe.fingerprint() == run.recipe.fingerprint()


def test_a_run_of_another_start_is_refused(export: Path, tmp_path: Path, tiny_tokenizer: Any) -> None:
    Run.open(recipe(export), tmp_path / "run")
    other = write_export(tmp_path / "other", tiny_tokenizer, seed=1)
    with pytest.raises(ValueError, match=r"holds a run of another recipe[\s\S]*start_digest"):
        Run.open(recipe(other), tmp_path / "run")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.audio.embed_dim=16", r"model\.audio\.embed_dim=16, and the start has 8"),
        ("model.lm.num_layers=3", r"model\.lm\.num_layers=3, and the start has 2"),
        ("model.fusion=prefix", r"model\.fusion=prefix, and the start has xattn"),
        ("model.max_text_tokens=9999", "512 positions"),
    ],
)
def test_a_key_that_contradicts_the_start_is_named_with_both_values(export: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settled(recipe(export, override))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.lm.path=Qwen/Qwen2.5-0.5B", r"leave out lm\.path"),
        ("model.audio.weights=runs/a/clap/model", r"leave out audio\.weights"),
        ("clap={steps: 1, captions: [{manifest: a.jsonl}]}", "clap: null"),
    ],
)
def test_what_the_start_brings_along_is_not_given_twice(export: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(export, override)


def test_no_such_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"model\.start=nobody/nothing: no such folder, and the hub does not give it"):
        settled(recipe("nobody/nothing"))
    with pytest.raises(ValueError, match="no model in"):
        settled(recipe(tmp_path))


def test_a_model_of_another_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_audio"}))
    with pytest.raises(ValueError, match=r"type 'qwen2_audio'.*jobs/convert\.py"):
        settled(recipe(tmp_path))


def test_an_unknown_lm_family_is_named(export: Path, tmp_path: Path) -> None:
    facts = json.loads((export / "config.json").read_text())
    facts["text_config"]["model_type"] = "gpt2"
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="'gpt2'"):
        settled(recipe(tmp_path))


def test_a_tokenizer_without_the_model_s_tokens_is_named(export: Path, tmp_path: Path) -> None:
    from af2_ray.text import train_tokenizer

    for path in export.iterdir():
        if not path.name.startswith(("tokenizer", "digests")):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"no tokenizer there|the ids"):
        settled(recipe(tmp_path))
    train_tokenizer(["a dog"], 300).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"<audio>, .* the ids"):
        settled(recipe(tmp_path))


def test_the_run_starts_from_its_weights_and_hears_longer_clips(export: Path, tmp_path: Path) -> None:
    (export / "reference_extras.safetensors").write_bytes((export / "model.safetensors").read_bytes())
    run = Run.open(recipe(export, "stages.finetune.max_windows=9"), tmp_path / "run")
    start = assemble(run)
    (export / "reference_extras.safetensors").unlink()
    assert AudioFlamingo2Config.from_pretrained(start).max_windows == 9 == recipe_config(run.recipe).max_windows
    assert AutoProcessor.from_pretrained(start).feature_extractor.max_windows == 9
    assert AutoTokenizer.from_pretrained(start).chat_template
    old, new = (load_file(folder / "model.safetensors") for folder in (export, start))
    assert old.keys() == new.keys()
    assert all(old[name].equal(new[name]) for name in old)
    assert (start / "reference_extras.safetensors").is_file()
    assert Model.from_pretrained(start).config.max_windows == 9
    assert not run.lm_dir.exists()
