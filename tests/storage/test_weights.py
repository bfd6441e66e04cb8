"""A model's digest is that of its tensors, however they lie in files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from af2_ray.storage import weights
from af2_ray.storage.files import Damaged
from af2_ray.storage.weights import INDEX, WEIGHTS, weights_digest

TENSORS = {f"layers.{n}.weight": torch.arange(12.0).view(3, 4) + n for n in range(4)} | {"é": torch.ones(())}


def write(folder: Path, *parts: dict[str, Tensor]) -> Path:
    """A model's folder, its tensors in one file or in shards."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    if len(parts) == 1:
        save_file(parts[0], folder / WEIGHTS)
        return folder
    names = {}
    for number, part in enumerate(parts):
        name = f"model-{number:05d}.safetensors"
        save_file(part, folder / name, metadata={"format": "pt", "padding": "x" * number})
        names |= dict.fromkeys(part, name)
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    return folder


def test_shards_and_order_do_not_matter(tmp_path: Path) -> None:
    one = weights_digest(write(tmp_path / "one", TENSORS))
    backwards = dict(reversed(TENSORS.items()))
    assert weights_digest(write(tmp_path / "backwards", backwards)) == one
    halves = [dict(list(backwards.items())[:2]), dict(list(backwards.items())[2:])]
    assert weights_digest(write(tmp_path / "halves", *halves)) == one
    assert len(one) == 64


@pytest.mark.parametrize(
    "change",
    [
        {"layers.0.weight": TENSORS["layers.0.weight"].view(4, 3)},
        {"layers.0.weight": TENSORS["layers.0.weight"].bfloat16()},
        {"layers.0.weight": TENSORS["layers.0.weight"] + torch.eye(3, 4) * 1e-6},
        {"layers.0.weight": TENSORS["layers.1.weight"], "layers.1.weight": TENSORS["layers.0.weight"]},
        {"more": torch.zeros(0)},
    ],
)
def test_names_shapes_types_and_numbers_matter(tmp_path: Path, change: dict[str, Tensor]) -> None:
    assert weights_digest(write(tmp_path / "a", TENSORS)) != weights_digest(write(tmp_path / "b", TENSORS | change))


def test_it_is_kept_until_the_files_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    folder = write(tmp_path / "model", TENSORS)
    before = weights_digest(folder)
    made = []
    monkeypatch.setattr(weights, "tensors_digest", lambda files: made.append(files) or "f" * 64)
    assert weights_digest(folder) == before
    assert not made
    save_file({"x": torch.zeros(1)}, folder / WEIGHTS)
    assert weights_digest(folder) == "f" * 64
    assert made == [[folder / WEIGHTS]]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", TENSORS)
    whole = (folder / WEIGHTS).read_bytes()
    for damaged in (whole[:-1], whole[:50], b"", b"\xff" * 100, whole[:8] + b"[1]" + whole[11:]):
        (folder / WEIGHTS).write_bytes(damaged)
        with pytest.raises(Damaged, match=r"model\.safetensors is damaged"):
            weights_digest(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="no weights in"):
        weights_digest(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(Damaged, match=r"model-1\.safetensors is missing"):
        weights_digest(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../secret"}}))
    with pytest.raises(ValueError, match="no name of a file"):
        weights_digest(folder)
    with pytest.raises(ValueError, match="no model in"):
        weights_digest(tmp_path)
