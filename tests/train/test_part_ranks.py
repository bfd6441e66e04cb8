"""Ranks that share a model's memory leave a part that is as whole as one rank's."""

from __future__ import annotations

import os
from pathlib import Path

import cuts
import pytest
import ranks
import small
import torch
import torch.distributed as dist
import toy
from safetensors.torch import load_file

from af2_ray.config import DeepSpeedSettings, Lora, Optimizer, load_recipe
from af2_ray.models.groups import group_of
from af2_ray.models.modeling_af2 import AudioFlamingo2ForConditionalGeneration as Model
from af2_ray.models.parts import TRAINED, Base, merge, opened
from af2_ray.storage.parts import read_facts
from af2_ray.train.loop import LoopConfig, _export
from af2_ray.train.step import Step
from af2_ray.train.task import LmTask

GROUPS = ["lora", "transform", "tokens"]


def run_stage(rank: int, folder: str, settings: DeepSpeedSettings) -> None:
    """One of two ranks: three steps with adapters, and the export."""
    from af2_ray.train.deepspeed import start_engine

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", rank=rank, world_size=2, store=dist.FileStore(f"{folder}/store", 2))
    optimizer = Optimizer(lr=1e-2, warmup_steps=0)
    task = LmTask(f"{folder}/base", toy.stage(trainable=GROUPS, lora=Lora(rank=4), optimizer=optimizer))
    torch.manual_seed(0)
    rows = cuts.my_rows((2, 2), rank, with_fault=False)
    engine = start_engine(task.build(), settings, optimizer, num_steps=3, accumulation=len(rows))
    step = Step(engine, task)
    for _ in range(3):
        step(rows)
    loop = LoopConfig(
        task=task,
        recipe=load_recipe("tiny"),
        export=f"{folder}/model",
        num_steps=3,
        step_batches=4,
        checkpoint_every=3,
        part=f"{folder}/part",
        base=f"{folder}/base",
    )
    _export(engine, loop, is_first=rank == 0)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_base_and_part_are_what_the_ranks_exported(tmp_path: Path, zero_stage: int, precision: str) -> None:
    small.make_model().save_pretrained(tmp_path / "base")
    settings = DeepSpeedSettings.model_validate({"zero_stage": zero_stage, "precision": precision})
    ranks.run(run_stage, 2, str(tmp_path), settings)
    merge(tmp_path / "base", tmp_path / "part", tmp_path / "merged")
    export = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert export == {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()}
    assert set(read_facts(tmp_path / "part").groups) - {"mel"} == set(GROUPS)  # DeepSpeed leaves `mel` in fp32
    adapters = load_file(tmp_path / "part" / "adapter_model.safetensors")
    assert all(value.count_nonzero() for value in adapters.values()), "B has left 0"
    own = load_file(tmp_path / "part" / TRAINED)
    types = {value.dtype for name, value in own.items() if group_of(name) != "mel"}
    assert types == {torch.bfloat16 if precision == "bf16" else torch.float32}
    shared = Base(str(tmp_path / "base"), Model.from_pretrained(tmp_path / "base").eval())
    with opened(tmp_path / "part", shared) as (model, _):
        assert model.audio_tower is shared.model.audio_tower
