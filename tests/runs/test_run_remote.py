"""A run in object storage: what its driver sends and fetches, with fsspec's store in memory."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator

import fsspec
import pytest
from botocore.exceptions import NoCredentialsError

from af2_ray.config import load_recipe
from af2_ray.runs import run as run_module
from af2_ray.runs.run import Run, finished
from af2_ray.storage import stores
from af2_ray.storage.stores import local_model, replacing

URI = "memory://bucket/runs/tiny"


@pytest.fixture
def store() -> Iterator[dict[str, bytes]]:
    """The store's files, by path."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs.store
    fs.store.clear()


def opened() -> Run:
    return Run.open(load_recipe("tiny", ["storage=memory://bucket/runs"]))


def names(store: dict[str, bytes]) -> set[str]:
    return {name.removeprefix("/bucket/runs/tiny/") for name in store}


def test_finished_steps_are_kept_and_found_again_without_their_weights(store):
    run = opened()
    assert run.uri == URI
    assert run.root.name == "tiny"
    with replacing(run.lm_dir / "model") as folder:
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_text("weights")
    (run.clap_dir / "train").mkdir(parents=True)
    (run.clap_dir / "train" / "checkpoint").write_text("of Ray's own")
    run.finish(run.lm_dir, {"steps": 3})
    model = {f"lm/model/{name}" for name in ("config.json", "model.safetensors", "digests.json")}
    assert names(store) == {"recipe.yaml", "lm/done.json", *model}

    again = opened()
    assert again.root != run.root
    assert finished(again.lm_dir) == {"steps": 3}
    assert not (again.lm_dir / "model" / "model.safetensors").exists()
    assert (again.fetched(again.lm_dir / "model") / "model.safetensors").read_text() == "weights"
    assert Run.load(URI).recipe == run.recipe
    with pytest.raises(ValueError, match=r"(?s)tiny holds a run of another recipe.*-seed: 0"):
        Run.open(load_recipe("tiny", ["seed=1"]), URI)
    with pytest.raises(ValueError, match=r"memory://bucket/none is not a run directory"):
        Run.load("memory://bucket/none")


def test_only_what_has_changed_is_sent_and_done_is_sent_last(store, monkeypatch):
    run = opened()
    sent: list[str] = []
    put = fsspec.get_filesystem_class("memory").put
    monkeypatch.setattr(
        fsspec.get_filesystem_class("memory"), "put", lambda fs, here, there: sent.extend(here) or put(fs, here, there)
    )
    for name in ("metrics.jsonl", "model/config.json", "model/tokenizer_config.json"):
        (run.clap_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (run.clap_dir / name).write_text(name)
    run.finish(run.clap_dir, {})
    order = [path.removeprefix(f"{run.clap_dir}/") for path in sent]
    assert order == ["metrics.jsonl", "model/tokenizer_config.json", "model/config.json", "done.json"]
    sent.clear()
    (run.clap_dir / "metrics.jsonl").write_text("one line more")
    run.keep()
    assert sent == [f"{run.clap_dir}/metrics.jsonl"]


def test_whatever_ends_a_run_the_store_gets_its_log(store):
    run = opened()
    (run.root / "logs").mkdir()
    (run.root / "logs" / "train.log").write_text("why")
    with pytest.raises(RuntimeError, match="broken"), run.lock():
        raise RuntimeError("broken")
    assert "logs/train.log" in names(store)


def test_a_store_that_is_gone_at_the_end_leaves_what_it_lacks_here(store, monkeypatch, caplog):
    run = opened()
    monkeypatch.setattr(run_module, "send", lambda *_: (_ for _ in ()).throw(OSError("gone")))
    with run.lock():
        (run.root / "metrics.jsonl").write_text("a line")
    run_module._remove_scratch()
    assert f"what it lacks stays in {run.root}" in caplog.text
    assert (run.root / "metrics.jsonl").is_file()
    shutil.rmtree(run.root.parent)


def test_a_stage_may_have_any_name(store):
    run = opened()
    for name in ("train", "features"):
        run.finish(run.stage_dir(name), {"steps": 1})
        (run.stage_dir(name) / "train").mkdir()
        (run.stage_dir(name) / "train" / "checkpoint").write_text("of Ray's own")
    run.keep()
    assert {"stages/train/done.json", "stages/features/done.json"} <= names(store)
    assert not any("checkpoint" in name for name in names(store))


@pytest.mark.parametrize("folder", [None, "s3://bucket/features"])
def test_cached_features_need_a_file_system(store, folder):
    recipe = load_recipe("mini", [f"feature_cache.dir={folder or 'null'}"])
    with pytest.raises(ValueError, match=r"stages\.pretrain\.features=cached in memory://bucket/mini"):
        Run.open(recipe, "memory://bucket/mini")
    assert not store


def test_an_export_goes_to_its_address_and_machines_share_one_copy(store, tmp_path, monkeypatch):
    monkeypatch.setattr(stores.tempfile, "tempdir", str(tmp_path))
    place = f"{URI}/stages/long/model"
    with pytest.raises(ValueError, match="no model in memory://"):
        local_model(place)
    with replacing(place) as folder:
        (folder / "config.json").write_text("{}")
        (folder / "weights").write_text("old")
    first = local_model(place)
    assert (first / "weights").read_text() == "old"
    assert local_model(f"{place}/") == first
    with replacing(place) as folder:
        (folder / "config.json").write_text("{}")
        (folder / "weights").write_text("newer")
    assert (local_model(place) / "weights").read_text() == "newer"


def test_a_store_that_fails_is_tried_again_and_then_named(monkeypatch):
    calls: list[int] = []
    monkeypatch.setattr(stores.time, "sleep", lambda seconds: None)

    def fail() -> None:
        calls.append(1)
        raise ConnectionError("gone")

    with pytest.raises(OSError, match="ConnectionError: gone"):
        stores.retried(fail, 3)
    assert len(calls) == 4
    for fault, wanted in (
        (PermissionError("no"), PermissionError),
        (NoCredentialsError(), PermissionError),
        (OSError(errno.ENOSPC, "disk is full"), OSError),
    ):
        calls.clear()
        with pytest.raises(wanted):
            stores.retried(lambda fault=fault: calls.append(1) or (_ for _ in ()).throw(fault))
        assert len(calls) == 1, "trying again does not help"
