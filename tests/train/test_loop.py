"""The loop on a real DeepSpeed engine in this process, Ray's part stood in for: reports, checkpoints, going on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cuts
import pytest
import ray.train
import torch
import torch.distributed as dist
from test_validation import band

from af2_ray.config import DeepSpeedSettings, load_recipe
from af2_ray.train import checkpoint
from af2_ray.train.checkpoint import Saved, State
from af2_ray.train.deepspeed import start_engine
from af2_ray.train.loop import LoopConfig, _Stage
from af2_ray.train.telemetry import Meter

STEPS = 4
RECIPE = load_recipe("tiny").model_copy(update={"deepspeed": DeepSpeedSettings(zero_stage=1, precision="fp32")})


@pytest.fixture
def reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What is reported, with the folder of a checkpoint as `folder`."""
    told: list[dict[str, Any]] = []

    def report(metrics: dict[str, Any], checkpoint: Any = None, **options: Any) -> None:
        if checkpoint:
            options["checkpoint_upload_fn"](checkpoint, options["checkpoint_dir_name"])
        told.append({**metrics, "folder": checkpoint and Path(checkpoint.path)})

    storage = SimpleNamespace(persist_current_checkpoint=lambda checkpoint, name: checkpoint)
    context = SimpleNamespace(
        get_world_rank=lambda: 0, get_world_size=lambda: 1, get_local_rank=lambda: 0, get_storage=lambda: storage
    )
    monkeypatch.setattr(ray.train, "report", report)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: None)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setitem(os.environ, name, value)
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(str(tmp_path / "store"), 1))
    yield told
    dist.destroy_process_group()


def train(folder: Path, saved: Saved | None) -> tuple[dict[str, torch.Tensor], State]:
    """All steps from a checkpoint, or from the start: the weights, and where the stage then stands."""
    torch.manual_seed(0)
    model = cuts.make_model(torch.float32)
    loop = LoopConfig(
        task=cuts.TASK,
        recipe=RECIPE,
        export=str(folder / "model"),
        num_steps=STEPS,
        step_batches=1,
        checkpoint_every=2,
        bands=(band("own", cuts.my_rows((1, 4), 0, with_fault=False), is_own=True),),
    )
    meter = Meter(loop.task, model, 1)
    engine = start_engine(model, RECIPE.deepspeed, loop.task.optimizer, num_steps=STEPS, accumulation=1)
    state = checkpoint.restore(engine, saved)
    rows = [cuts.row_of(0, [number, number + 1], with_fault=False) for number in range(STEPS)]
    _Stage(engine, loop, state, meter).train(iter(rows[state.step :]), 1)
    return {name: tensor.clone() for name, tensor in engine.module.state_dict().items()}, state


@pytest.mark.slow
def test_a_stage_reports_and_goes_on_to_the_same_weights(tmp_path: Path, reports: list[dict[str, Any]]) -> None:
    whole, state = train(tmp_path, None)
    assert state.step == STEPS
    assert [told["step"] for told in reports] == [2, 4]
    assert [[row["step"] for row in told["history"]] for told in reports] == [[1, 2], [3, 4]]
    last = reports[0]["history"][-1]
    assert {"loss", "grad_norm", "tokens_per_s", "tflops", "wait_s", "report_s", "memory_gib", "gate/1/attn"} <= set(
        last
    )
    assert reports[0]["validation"]["val/own"] == reports[0]["best"]
    assert reports[0]["keep"] == checkpoint.BEST + 2
    folder = reports[0]["folder"]
    assert json.loads((folder / "checkpoint.json").read_text())["world_size"] == 1
    model = torch.load(folder / checkpoint.TAG / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    trained = {name for name, parameter in cuts.make_model(torch.float32).named_parameters() if parameter.requires_grad}
    assert {name for name in model if name.endswith("weight")} <= trained, "frozen weights are not saved"

    again, state = train(tmp_path, checkpoint.read_saved(folder, RECIPE.fingerprint()))
    assert [told["step"] for told in reports] == [2, 4, 4]
    for name, tensor in whole.items():
        assert tensor.equal(again[name]), name
