"""The job that makes a whole model of a base and its part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import job_runner
import pytest
import tuned


def test_merge(tmp_path: Path, tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    base = tuned.export_base(tmp_path / "base", tiny_tokenizer)
    whole, part = tuned.stage(base, tmp_path / "stage")
    out = tmp_path / "merged"
    assert job_runner.run_job("merge", base, part, "--out", out) == 0
    assert str(out) in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in Path(whole).iterdir()
    }
    assert job_runner.run_job("merge", base, part, "--out", out) == 2
    assert "is there already" in capsys.readouterr().err


def test_bad_input_ends_with_2(tmp_path: Path, tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    base = tuned.export_base(tmp_path / "base", tiny_tokenizer)
    other = tuned.export_base(tmp_path / "other", tiny_tokenizer, seed=3)
    _, part = tuned.stage(base, tmp_path / "stage", groups=("lora",))
    for arguments, named in (
        ((other, part), f"{other} has"),
        ((base, other), "no small part in"),
        ((tmp_path, part), "no model in"),
        ((base, tmp_path / "nowhere"), "no small part in"),
        (("", part), "empty name"),
    ):
        assert job_runner.run_job("merge", *arguments, "--out", tmp_path / "out") == 2
        assert named in capsys.readouterr().err
    (Path(part) / "adapter_model.safetensors").unlink()
    assert job_runner.run_job("merge", base, part, "--out", tmp_path / "out") == 2
    assert "adapter_model.safetensors is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
