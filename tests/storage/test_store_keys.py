"""Keys of a store that would lead out of the folder they are fetched into, and copies that somebody else planted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import boto3
import fsspec
import pytest
from moto.server import ThreadedMotoServer

from af2_ray.runs.run import Run
from af2_ray.storage.files import Damaged
from af2_ray.storage.places import inner_name
from af2_ray.storage.stores import fetch, local_model, replacing, scratch

KEYS = {
    "model/../../../escaped_1.txt": "..",
    "model/../escaped_2.txt": "..",
    "model/sub/../../../../escaped_3.txt": "..",
    "model//tmp/escaped_4.txt": "",
    "model//escaped_5.txt": "",
    "model/a//b.txt": "",
    "model/./b.txt": ".",
    "model/..\\..\\escaped_6.txt": "\\",
    "model/" + "a" * 1000: "a" * 1000,
    "model/" + "/".join(["b" * 99] * 10) + "/" + "c" * 10: None,  # long, but a name
}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """A bucket with a whole model in `model/`, and TMPDIR three folders deep in the test's own."""
    for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret"), ("ENDPOINT_URL", url)):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    (tmp_path / "a" / "b" / "tmp").mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "a" / "b" / "tmp"))
    name = f"keys-{abs(hash(request.node.name))}"
    client = boto3.client("s3", endpoint_url=url)
    client.create_bucket(Bucket=name)
    for file in ("config.json", "model.safetensors", "recipe.yaml"):
        client.put_object(Bucket=name, Key=f"model/{file}", Body=b"{}")
    return name


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("key", KEYS, ids=range(len(KEYS)))
def test_a_key_leads_nowhere_outside(bucket: str, url: str, key: str, tmp_path: Path) -> None:
    boto3.client("s3", endpoint_url=url).put_object(Bucket=bucket, Key=key, Body=b"evil")
    place = f"s3://{bucket}/model"
    calls = (lambda: local_model(place), lambda: fetch(place, tmp_path / "run"), lambda: Run.load(place))
    if KEYS[key] is None:
        local_model(place)
        return
    for call in calls:
        with pytest.raises(ValueError, match=r"is no name of a file below a folder|is too long for a file") as caught:
            call()
        shown = key.removeprefix("model/")[:20].replace("\n", "?").strip("/")
        assert shown.split("/")[0] in str(caught.value).replace("\\\\", "\\")
    left = {name for name in files_below(tmp_path) if not name.endswith(".lock")}
    assert left == set()


def test_a_whole_model_is_fetched(bucket: str) -> None:
    assert files_below(local_model(f"s3://{bucket}/model")) == {"config.json", "model.safetensors", "recipe.yaml"}


def test_a_damaged_copy_is_fetched_again_and_a_damaged_original_named(bucket: str, url: str, tmp_path: Path) -> None:
    with replacing(tmp_path / "export") as folder:
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_text(f"{{}} {name}")
    client = boto3.client("s3", endpoint_url=url)
    for path in (tmp_path / "export").iterdir():
        client.upload_file(str(path), bucket, f"export/{path.name}")
    place = f"s3://{bucket}/export"
    copy = local_model(place)
    (copy / "model.safetensors").write_text("half")
    assert (local_model(place) / "model.safetensors").read_text() == "{} model.safetensors"
    client.put_object(Bucket=bucket, Key="export/model.safetensors", Body=b"other")
    with pytest.raises(Damaged, match=r"model\.safetensors"):
        local_model(place)


@pytest.mark.parametrize("name", ["a", "a/b.c", "..a/b..", "a b", "é/ü", "-rf", "~", "%2e%2e"])
def test_plain_names_are_taken(name: str) -> None:
    assert inner_name(name) == name


@pytest.mark.parametrize("planted", ["open to all", "link", "file"])
def test_copies_that_others_could_have_planted_are_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, planted: str
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert scratch("copies").stat().st_mode & 0o777 == 0o700
    folder = tmp_path / f"af2_ray_copies_{os.getuid()}"
    if planted == "open to all":
        folder.chmod(0o777)
    else:
        folder.rmdir()
        (tmp_path / "theirs").mkdir()
        folder.symlink_to(tmp_path / "theirs") if planted == "link" else folder.touch()
    with pytest.raises((PermissionError, FileExistsError), match=r"remove it, or set TMPDIR|exists"):
        scratch("copies")


def test_copies_of_another_user_are_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("os.getuid", lambda: 4711)
    (tmp_path / "af2_ray_copies_4711").mkdir(mode=0o700)
    with pytest.raises(PermissionError, match="belongs to another user"):
        scratch("copies")
