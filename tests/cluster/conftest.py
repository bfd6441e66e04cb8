"""The documents of each overlay, rendered once for all tests."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import yaml
from manifests import OVERLAYS, ROOT, Document


@pytest.fixture(scope="session", params=OVERLAYS)
def rendered(request: pytest.FixtureRequest) -> list[Document]:
    """The documents of one overlay."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed: it renders the manifests (`kubectl kustomize`)")
    command = ["kubectl", "kustomize", str(ROOT / "cluster" / "overlays" / request.param)]
    text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    assert "from settings.yaml" not in text, "a setting that nothing writes"
    return list(yaml.safe_load_all(text))
