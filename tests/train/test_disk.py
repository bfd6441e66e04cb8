"""What a run takes of the disk, and what of it may go."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path

import pytest

from af2_ray.config import load_recipe
from af2_ray.runs.run import Run, finished, mark_finished
from af2_ray.train.disk import Need, amount, forecast, remove, shortages, spare


def test_a_forecast_tells_every_part_and_follows_what_decides_it(tmp_path: Path) -> None:
    sizes = {need.what: need.size for need in forecast(load_recipe("tiny"), str(tmp_path))}
    assert {"exports", "checkpoints", "corpus"} <= {*sizes}
    more = {need.what: need.size for need in forecast(load_recipe("tiny", ["checkpoints.keep=5"]), str(tmp_path))}
    assert more["checkpoints"] == 2 * sizes["checkpoints"]
    cached = ["stages.pretrain.features=cached", "stages.pretrain.trainable=[transform,xattn]"]
    with_features = {need.what: need.size for need in forecast(load_recipe("tiny", cached), str(tmp_path))}
    assert with_features["features"] > sizes.get("features", 0)


def test_too_little_is_told_for_each_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: Usage(10 * 2**30, 7 * 2**30, 3 * 2**30))
    needs = [Need("exports", str(tmp_path / "not" / "there"), 2 * 2**30), Need("corpus", str(tmp_path), 2 * 2**30)]
    (line,) = shortages(needs)
    assert "3.0 GiB free, and about 4.0 GiB are wanted" in line
    with (tmp_path / "there").open("wb") as file:
        file.truncate(2 * 2**30)
    assert shortages(needs) == []  # the corpus is there already
    assert shortages([Need("exports", "s3://bucket/runs", 2**40)]) == []


@pytest.mark.parametrize(("size", "text"), [(0, "0 KiB"), (5 * 2**20, "5 MiB"), (3 * 2**30, "3.0 GiB")])
def test_amounts(size: int, text: str) -> None:
    assert amount(size) == text


def test_what_no_step_reads_any_more_may_go(tmp_path: Path) -> None:
    run = Run.open(load_recipe("tiny"), tmp_path / "run")
    first, second = run.stage_dir("pretrain"), run.stage_dir("finetune")
    for folder in (first, second, run.clap_dir):
        for name in ("train/step_000004/zero.pt", "train/damaged/step_000002/zero.pt", "model/config.json"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"x" * 1000)
    for folder in (first, run.clap_dir):
        mark_finished(folder, {"steps": 4})
    (run.root / "stages" / ".model.af2-4711").mkdir()
    found = spare(run)
    assert {Path(one.path).relative_to(run.root).as_posix(): one.size for one in found} == {
        "stages/pretrain/train": 2000,
        "clap/train": 2000,
        "stages/finetune/train/damaged": 1000,
        "stages/.model.af2-4711": 0,
    }
    with run.lock():  # which removes what the kill has left by itself
        remove(found)
    assert spare(run) == []
    assert finished(first) == {"steps": 4}
    assert (second / "train" / "step_000004" / "zero.pt").is_file()
    assert (first / "model" / "config.json").is_file()
