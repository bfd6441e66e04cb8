"""The wheel: whole, importable in an environment of its own, and public as docs/api.md says."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import af2_ray

ROOT = Path(__file__).resolve().parents[1]
_LOOK = """
import importlib, pkgutil, sys
import af2_ray, serve_apps
assert "site-packages" in af2_ray.__file__ and "checkout" not in af2_ray.__file__, af2_ray.__file__
assert not {"torch", "ray", "transformers"} & set(sys.modules), "import af2_ray is light"
for package in (af2_ray, serve_apps):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
from af2_ray import load_recipe
from af2_ray.config import load_sweep, recipe_names, sweep_names
assert {"tiny", "af2-3b"} <= set(recipe_names()) and "frequency" in sweep_names()
[load_recipe(name) for name in recipe_names()], [load_sweep(name) for name in sweep_names()]
print(af2_ray.__version__)
"""
_AUTO = """
import af2_ray.models
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor
config = AutoConfig.for_model(af2_ray.AudioFlamingo2Config.model_type)
assert type(config) is af2_ray.AudioFlamingo2Config
assert AutoModelForCausalLM._model_mapping[type(config)] is af2_ray.AudioFlamingo2ForConditionalGeneration
assert AutoModel._model_mapping[af2_ray.AfClapConfig] is af2_ray.AfClapModel
"""


def test_what_is_public_is_there_and_documented() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    for name in af2_ray.__all__:
        assert getattr(af2_ray, name) is not None
        assert name.startswith("__") or re.search(rf"`{name}\b", page), f"docs/api.md does not name {name}"
    with pytest.raises(AttributeError, match=r"docs/api\.md names what is public"):
        _ = af2_ray.no_such_name


def test_importing_the_models_registers_them() -> None:
    subprocess.run([sys.executable, "-c", _AUTO], check=True, timeout=120, cwd=ROOT)


@pytest.mark.slow
def test_the_wheel_works_alone(tmp_path: Path) -> None:
    """Built, put into an empty environment beside what it depends on, and imported module by module."""
    source = tmp_path / "source"  # setuptools leaves `build/` where it builds, and takes what it finds there
    source.mkdir()
    for name in ("af2_ray", "serve_apps", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(build, check=True, timeout=300, capture_output=True)
    (wheel,) = tmp_path.glob("af2_ray-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name.split("-")[1] == af2_ray.__version__
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"af2_ray", "serve_apps"}
    for kept in ("recipes/tiny.yaml", "recipes/sweeps/frequency.yaml", "evaluate/report/run.html"):
        assert f"af2_ray/{kept}" in names
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)], check=True, timeout=120)
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    ).stdout.strip()
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # where this Python has them
    done = subprocess.run([python, "-c", _LOOK], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == af2_ray.__version__
