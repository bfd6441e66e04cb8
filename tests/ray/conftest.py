"""An S3 server on this machine, named to everything that reads the environment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import weed


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[weed.Server]:
    if weed.WEED is None:
        pytest.skip("the S3 server comes with the development extra")
    folder = tmp_path / "weed"
    folder.mkdir()
    running = weed.Server(folder)
    monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", weed.KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", weed.SECRET)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    try:
        running.start()
        yield running
    finally:
        running.kill()
        fsspec.get_filesystem_class("s3").clear_instance_cache()
