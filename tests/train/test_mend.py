"""A job goes on from its newest whole checkpoint, whatever has happened to the others and to Ray's list of them."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.train import Result
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _CheckpointManagerState, _TrainingResultState

from af2_ray.config import load_recipe
from af2_ray.data.quarantine import Failure
from af2_ray.runs.run import Run, read_metrics
from af2_ray.runs.tracking import ReportCallback
from af2_ray.storage.files import digest, read_rows, sealed_json, write_whole
from af2_ray.train.checkpoint import read_saved
from af2_ray.train.feed_start import last_step
from af2_ray.train.mend import SNAPSHOT, Newest, mend

STEPS = (4, 6, 8)
LARGEST = "engine/zero.pt"


@pytest.fixture
def storage(tmp_path: Path) -> str:
    """A job's storage with two ranks' checkpoints of three steps, the second the best, and Ray's list of them."""
    results = []
    for step in STEPS:
        folder = tmp_path / "train" / f"step_{step:06d}"
        (folder / "engine").mkdir(parents=True)
        (folder / LARGEST).write_bytes(bytes([step]) * 100_000)
        for rank, names in enumerate([(LARGEST, "random_0.pt"), ("random_1.pt",)]):
            (folder / f"random_{rank}.pt").write_bytes(bytes([step + rank]) * 100)
            part = {"files": {name: digest(folder / name) for name in names}, "failures": [f"of rank {rank}"]}
            (folder / f"part_{rank}.json").write_text(sealed_json(part))
        keep = step + (10**12 if step == 6 else 0)
        history = [{"step": number, "clips": 3} for number in (step - 1, step)]
        told = {"recipe": "r", "world_size": 2, "parts": 2, "step": step, "best": 0.5, "keep": keep}
        told["accounts"] = {"history": history, "failures": [], "validation": {}, "is_best": False}
        (folder / "checkpoint.json").write_text(sealed_json(told))
        metrics = {"step": step, "best": 0.5, "keep": keep, "history": history}
        results.append(_TrainingResultState(checkpoint_dir_name=folder.name, metrics=metrics))
    state = _CheckpointManagerState(
        checkpoint_results=[results[0], results[2], results[1]],
        checkpoint_report_indices=[3, 7, 5],
        latest_checkpoint_result=results[-1],
        pending_training_results=[],
        pending_validation_specs=[],
        current_report_index=8,
        validated_checkpoint_dir_names=[],
        timed_out_validation_checkpoint_dir_names=[],
        failed_validation_checkpoint_dir_names=[],
    )
    (tmp_path / "train" / SNAPSHOT).write_text(state.json())
    return str(tmp_path)


def truncate(folder: Path) -> None:
    path = folder / LARGEST
    path.write_bytes(path.read_bytes()[:50_000])


def flip_block(folder: Path) -> None:
    data = bytearray((folder / LARGEST).read_bytes())
    data[8192:12288] = bytes(255 - byte for byte in data[8192:12288])
    (folder / LARGEST).write_bytes(data)


def flip_bit(folder: Path, name: str = LARGEST) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "largest file truncated": truncate,
    "4 KiB flipped": flip_block,
    "one bit flipped": flip_bit,
    "one bit of a small file": lambda folder: flip_bit(folder, "random_0.pt"),
    "one bit of checkpoint.json": lambda folder: flip_bit(folder, "checkpoint.json"),
    "checkpoint.json missing": lambda folder: (folder / "checkpoint.json").unlink(),
    "checkpoint.json empty": lambda folder: (folder / "checkpoint.json").write_text(""),
    "a file missing": lambda folder: (folder / LARGEST).unlink(),
    "one bit of a part": lambda folder: flip_bit(folder, "part_1.json"),
    "a part missing": lambda folder: (folder / "part_1.json").unlink(),
    "a part without its digest": lambda folder: (folder / "part_1.json").write_text('{"files": {}, "failures": []}'),
    "removed": shutil.rmtree,
    "snapshot empty": lambda folder: (folder.parent / SNAPSHOT).write_text(""),
    "snapshot cut": lambda folder: (folder.parent / SNAPSHOT).write_text('{"checkpoint_results": ['),
    "snapshot missing": lambda folder: (folder.parent / SNAPSHOT).unlink(missing_ok=True),
    "snapshot tells another step": lambda folder: (folder.parent / SNAPSHOT).write_text(
        (folder.parent / SNAPSHOT).read_text().replace('"step": 8', '"step": 9')
    ),
}


@pytest.mark.parametrize("num", [1, 2, 3])
@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_whole_one_is_taken(storage: str, damage: str, num: int, caplog: pytest.LogCaptureFixture) -> None:
    root = Path(storage) / "train"
    for step in STEPS[-num:]:
        DAMAGES[damage](root / f"step_{step:06d}")
    of_snapshot = damage.startswith("snapshot")
    whole = STEPS if of_snapshot else STEPS[:-num]
    with caplog.at_level(logging.WARNING):
        found = mend(storage)
    assert (found.step if found else None) == (whole[-1] if whole else None)
    assert last_step(storage) == (whole[-1] if whole else 0)
    aside = {path.name for path in (root / "damaged").glob("*")}
    assert aside == (set() if of_snapshot or damage == "removed" else {f"step_{step:06d}" for step in STEPS[-num:]})
    for name in aside:
        assert name in caplog.text  # it is named, with what is wrong with it
    if whole:
        result = Result.from_path(str(root))  # Ray reads its list again, and finds every folder of it
        kept = {Path(checkpoint.path).name for checkpoint, _ in result.best_checkpoints}
        assert kept == {f"step_{step:06d}" for step in whole}
        assert result.checkpoint is not None
        assert Path(result.checkpoint.path).name == f"step_{whole[-1]:06d}"
        assert read_saved(Path(result.checkpoint.path), "r").world_size == 2
        assert found is not None
        assert found.accounts["failures"] == ["of rank 0", "of rank 1"]
    caplog.clear()
    before = (root / SNAPSHOT).read_bytes() if whole else b""
    assert mend(storage) == found  # nothing is left to mend
    assert caplog.text == ""
    assert not whole or (root / SNAPSHOT).read_bytes() == before


@pytest.mark.parametrize("state", ["whole", "half uploaded", "without digests"])
def test_one_that_ray_has_not_listed_yet_is_taken_if_it_is_whole(
    storage: str, state: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The job was killed between the upload and Ray's list."""
    root = Path(storage) / "train"
    snapshot = _CheckpointManagerState.parse_obj(json.loads((root / SNAPSHOT).read_text()))
    results = [result for result in snapshot.checkpoint_results if result.checkpoint_dir_name != "step_000008"]
    listed = {result.checkpoint_dir_name: result for result in results}
    kept = {"checkpoint_results": results, "checkpoint_report_indices": [3, 5], "current_report_index": 6}
    latest = {"latest_checkpoint_result": listed["step_000006"]}
    (root / SNAPSHOT).write_text(snapshot.copy(update=kept | latest).json())
    newest = root / "step_000008"
    if state == "half uploaded":
        (newest / LARGEST).unlink()
    elif state == "without digests":
        (newest / "checkpoint.json").write_text('{"recipe": "r", "world_size": 1, "step": 8, "best": null}')
    found = mend(storage)
    assert found is not None
    assert found.step == last_step(storage) == (8 if state == "whole" else 6)
    assert not (root / "damaged").exists()
    assert "set aside" not in caplog.text


def test_what_is_whole_is_left_as_it_is(storage: str) -> None:
    snapshot = Path(storage) / "train" / SNAPSHOT
    before = snapshot.read_bytes()
    found = mend(storage)
    assert found is not None
    assert (found.step, snapshot.read_bytes()) == (8, before)
    assert mend(storage + "/elsewhere") is None


def test_every_bit_of_a_checkpoint_counts(storage: str) -> None:
    """A bit in each of 200 places of each file."""
    folder = Path(storage) / "train" / "step_000008"
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        data = path.read_bytes()
        for place in range(0, len(data), max(1, len(data) // 200)):
            path.write_bytes(data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :])
            with pytest.raises(RuntimeError, match=f"{path.name}|not of|saved by"):
                read_saved(folder, "r")
        path.write_bytes(data)
    read_saved(folder, "r")


def test_one_with_all_digests_in_one_place_is_checked_too(storage: str) -> None:
    """An earlier version gathered them into `checkpoint.json`."""
    folder = Path(storage) / "train" / "step_000008"
    files = {name: digest(folder / name) for name in (LARGEST, "random_0.pt", "random_1.pt")}
    told = {"recipe": "r", "world_size": 2, "step": 8, "best": 0.5, "keep": 8, "accounts": {"failures": ["a"]}}
    (folder / "checkpoint.json").write_text(sealed_json(told | {"files": files}))
    for rank in range(2):
        (folder / f"part_{rank}.json").unlink()
    found = mend(storage)
    assert found is not None
    assert (found.step, found.accounts) == (8, {"failures": ["a"]})
    flip_bit(folder, "random_1.pt")
    found = mend(storage)
    assert found is not None
    assert found.step == 6


def test_one_without_digests_is_taken_with_a_warning(storage: str, caplog: pytest.LogCaptureFixture) -> None:
    path = Path(storage) / "train" / "step_000008" / "checkpoint.json"
    path.write_text(json.dumps({"recipe": "r", "world_size": 1, "step": 8, "best": None}))
    with caplog.at_level(logging.WARNING):
        assert mend(storage) == Newest(8, {})
    assert "without digests" in caplog.text


def test_what_a_checkpoint_was_told_is_written_where_it_is_missing(tmp_path: Path) -> None:
    """The driver was killed after Ray had listed the checkpoint, and before its lines were written."""
    run = Run.open(load_recipe("tiny", ["clap=null"]), tmp_path / "run")
    folder = run.stage_dir("pretrain")
    write_whole(folder / "metrics.jsonl", '{"step": 1, "clips": 2}\n{"step": 2, "cl')
    bad = {"uri": "a.wav", "reason": "missing", "offset_s": 0.0, "detail": "", "row": 1, "num_samples": 1}
    history = [{"step": number, "clips": 2} for number in (1, 2, 3)]
    accounts = {"history": history, "failures": [bad], "validation": {"val/own": 1.5}, "is_best": True}
    for _ in range(2):
        ReportCallback(run, folder, "").catch_up(3, accounts)
        assert [row["step"] for row in read_metrics(folder)] == [1, 2, 3]
        assert read_rows(folder / "validation.jsonl") == [{"step": 3, "val/own": 1.5, "val/is_best": 1.0}]
        assert read_rows(run.root / "quarantine.jsonl") == [bad]
    assert Failure(**bad).reason == "missing"


def test_bad_items_of_a_whole_checkpoint_are_judged_over_all_of_its_clips(tmp_path: Path) -> None:
    """32 of 3200, of whose steps the last ten were not written yet: 1 %, not 5."""
    run = Run.open(load_recipe("tiny", ["faults.max_bad_share=0.02"]), tmp_path / "run")
    folder = run.stage_dir("pretrain")
    history = [{"step": number, "clips": 64} for number in range(1, 51)]
    write_whole(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history[:40]))
    bad = [
        {"uri": f"{n}.wav", "reason": "missing", "offset_s": 0.0, "detail": "", "row": n, "num_samples": 1}
        for n in range(32)
    ]
    accounts = {"history": history, "failures": bad, "validation": {}, "is_best": False}
    ReportCallback(run, folder, "").catch_up(50, accounts)
    assert len(read_rows(run.root / "quarantine.jsonl")) == 32


def test_a_disk_that_cannot_read_a_file_is_damage(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(fs: Any, path: str) -> str:
        if "step_000008" in path:
            raise OSError(errno.EIO, "Input/output error")
        return digest(Path(path))

    monkeypatch.setattr("af2_ray.train.mend._digest", broken)
    monkeypatch.setattr("af2_ray.storage.stores.time.sleep", lambda seconds: None)
    found = mend(storage)
    assert found is not None
    assert found.step == 6
