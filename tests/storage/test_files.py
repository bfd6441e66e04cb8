"""Files that survive kills, full disks and flipped bits."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from af2_ray.config import load_recipe
from af2_ray.runs.run import Run, finished, mark_finished, read_metrics
from af2_ray.storage import files
from af2_ray.storage.files import Damaged, append_lines, check_digests, check_seal, read_rows, sealed_json, sealed_yaml
from af2_ray.storage.stores import local_model, replacing

FACTS = {"steps": 3, "loss": 1.5e-07, "name": "é", "nested": {"a": [1, 2]}}


def flipped(data: bytes, place: int, bit: int) -> bytes:
    return data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :]


@pytest.mark.parametrize("text", [sealed_json(FACTS), sealed_json({}), sealed_yaml("a: 1\nb: c\n")])
def test_every_flipped_bit_of_a_sealed_text_is_found(text: str) -> None:
    data = text.encode()
    assert check_seal("x", data)
    for place in range(len(data)):
        for bit in range(8):
            with pytest.raises(Damaged, match="x is damaged"):
                check_seal("x", flipped(data, place, bit))


def test_a_sealed_text_is_still_json_and_yaml(tmp_path: Path) -> None:
    assert files.unsealed("x", sealed_json(FACTS).encode()) == (FACTS, True)
    assert {**json.loads(sealed_json(FACTS)), "seal": ""} == {**FACTS, "seal": ""}
    for unsealed in (
        {"sha256": "0" * 64},
        {"error": "its sha256 is wrong"},
        {"seal": 1, "sha256": "0" * 64, "x": "y" * 99},
    ):
        data = json.dumps(unsealed, indent=1).encode() + b"\n"
        assert files.unsealed("x", data) == (unsealed, False)  # what has no seal is not judged
    recipe = load_recipe("tiny")
    (tmp_path / "r.yaml").write_text(sealed_yaml(recipe.to_yaml()))
    assert load_recipe(tmp_path / "r.yaml") == recipe
    assert files.unsealed("x", b'{"steps": 3}') == ({"steps": 3}, False)  # of an older version


@pytest.mark.parametrize("damage", [b"", b"  \n", b'{"steps": 3', b"[1]", b"\0" * 40])
def test_a_broken_mark_is_named_and_the_step_not_finished(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: bytes
) -> None:
    mark_finished(tmp_path, {"steps": 3})
    assert finished(tmp_path) == {"steps": 3}
    (tmp_path / "done.json").write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        assert finished(tmp_path) is None
    assert str(tmp_path / "done.json") in caplog.text


def test_a_damaged_recipe_is_named_with_what_mends_it(tmp_path: Path) -> None:
    Run.open(load_recipe("tiny"), tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_bytes(flipped(path.read_bytes(), 100, 0))
    for use in (lambda: Run.open(load_recipe("tiny"), tmp_path), lambda: Run.load(tmp_path)):
        with pytest.raises(Damaged, match=r"recipe\.yaml is damaged.*put back a copy, or remove it"):
            use()


@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "digests.json", "tokenizer/vocab.txt"])
def test_a_flipped_bit_of_an_export_is_found_and_named(tmp_path: Path, name: str, place: str) -> None:
    with replacing(tmp_path / "model") as folder:
        (folder / "tokenizer").mkdir()
        for each in ("model.safetensors", "config.json", "tokenizer/vocab.txt", "README.md"):
            (folder / each).write_bytes(os.urandom(1000))
    assert local_model(tmp_path / "model") == tmp_path / "model"
    (tmp_path / "model" / "README.md").write_text("anybody may edit this")
    check_digests(tmp_path / "model")
    path = tmp_path / "model" / name
    data = path.read_bytes()
    path.write_bytes(flipped(data, {"first": 0, "middle": len(data) // 2, "last": len(data) - 1}[place], 3))
    with pytest.raises(Damaged, match=name):
        local_model(tmp_path / "model")


def test_a_missing_file_of_an_export_is_named(tmp_path: Path) -> None:
    with replacing(tmp_path / "model") as folder:
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_text("weights")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(Damaged, match=r"model\.safetensors is missing"):
        local_model(tmp_path / "model")


def test_a_torn_line_costs_itself_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_lines(path, [json.dumps({"step": 1})])
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    append_lines(path, [json.dumps({"step": 3}), json.dumps({"step": 4})])
    append_lines(path, ["5", "[]", '{"loss": 1}', "\x00"])
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 3, 4]
    assert len(read_rows(path)) == 4


def test_a_refused_second_driver_changes_nothing(tmp_path: Path) -> None:
    run = Run.open(load_recipe("tiny"), tmp_path)
    with run.lock():
        before = (tmp_path / "recipe.yaml").read_bytes()
        for overrides in (["faults.max_bad_share=0.9"], ["seed=1"], []):
            with pytest.raises(RuntimeError, match="another process"):
                Run.open(load_recipe("tiny", overrides), tmp_path)
        assert (tmp_path / "recipe.yaml").read_bytes() == before
    other = Run.open(load_recipe("tiny", ["faults.max_bad_share=0.9"]), tmp_path)
    with run.lock():  # the first one comes back: the run's recipe is that of who works in it
        assert Run.load(tmp_path).recipe.faults.max_bad_share == run.recipe.faults.max_bad_share
    with other.lock():
        assert Run.load(tmp_path).recipe.faults.max_bad_share == 0.9


def test_what_a_killed_writer_left_is_removed_or_put_back(tmp_path: Path) -> None:
    run = Run.open(load_recipe("tiny"), tmp_path)
    for name in (".model.4711", ".model.af2-old", ".other.af2-old", ".other.af2-12", ".git", ".env.2024", ".notes.old"):
        (tmp_path / "stages" / "a" / name).mkdir(parents=True)
    (tmp_path / "stages" / "a" / ".model.af2-old" / "config.json").write_text("the only one there is")
    (tmp_path / "stages" / "a" / "other").mkdir()
    (tmp_path / ".recipe.yaml.af2-4711").write_text("half")
    with run.lock():
        pass
    assert {path.name for path in (tmp_path / "stages" / "a").iterdir()} == {
        *("model", "other", ".git", ".env.2024", ".notes.old")
    }
    assert (tmp_path / "stages" / "a" / "model" / "config.json").is_file()
    assert not (tmp_path / ".recipe.yaml.af2-4711").exists()


@pytest.mark.parametrize("first", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (25, 50, 75))])
def test_a_run_survives_kills_and_full_disks_at_any_operation(tmp_path: Path, first: int) -> None:
    """At each write, rename and flush: no finished step, metric or quarantine line is lost (failpoints.py)."""
    script = Path(__file__).parents[1] / "failpoints.py"
    command = [sys.executable, str(script), str(tmp_path), str(first), "25"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["failures"] > 100
