"""A checkout of its own in which the whole chain has run once, as a newcomer has it after `make demo`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = ("af2_ray", "jobs", "serve_apps", "runtime_env.yaml", "pyproject.toml")


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder: the code, `data/demo` and `runs/demo`; made by recipe `chain.yaml` in about three minutes."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in CODE:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    recipe = ROOT / "tests" / "chain" / "chain.yaml"
    no_compiler = dict.fromkeys(("CC", "CXX"), "/nonexistent") | {"TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    done = subprocess.run(
        [sys.executable, "jobs/demo.py", str(recipe), "--run", "runs/demo"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "80", **no_compiler},
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{_tail(folder / 'runs/demo/logs/demo.log')}"
    print(done.stdout)
    return folder


def _tail(path: Path, lines: int = 30) -> str:
    return "\n".join(path.read_text().splitlines()[-lines:]) if path.is_file() else ""
