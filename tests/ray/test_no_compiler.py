"""Without a C++ compiler DeepSpeed's op for workers of one machine is left out, and gloo does its work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import toy
from safetensors.torch import load_file
from test_train import ROOT, _environment, _overrides


@pytest.mark.slow
def test_a_run_without_a_compiler_ends_with_the_same_weights(tmp_path: Path) -> None:
    corpus = toy.make(tmp_path)
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), "tiny", *_overrides(tmp_path, 4, corpus)]
    without = {"CXX": "/nonexistent/c++", "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    weights = []
    for name, more in (("with", {}), ("without", without)):
        run = tmp_path / name
        subprocess.run([*command, "--run", str(run)], env=_environment() | more, check=True, timeout=400)
        weights.append(load_file(run / "stages" / "only" / "model" / "model.safetensors"))
        logs = [path.read_text(errors="replace") for path in (run / "logs" / "ray").glob("worker-*.err")]
        logs += [path.read_text(errors="replace") for path in (run / "logs" / "ray" / "train").glob("*.log")]
        assert any("gradients are exchanged by gloo" in text for text in logs) is (name == "without")
    one, other = weights
    assert one.keys() == other.keys()
    assert all(tensor.equal(other[name]) for name, tensor in one.items())
