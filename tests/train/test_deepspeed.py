"""DeepSpeed's configuration: what it accumulates in, which optimiser it makes of it, that older checkpoints load."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import nn

from af2_ray.config import DeepSpeedSettings, Optimizer
from af2_ray.train.deepspeed import deepspeed_config, start_engine

ROWS = 65
SMALL = 2.0**-10  # beside 1 it is nothing in bf16
OLD = {"data_types": {"grad_accum_dtype": "bf16"}}


class Weight(nn.Module):
    """One trained matrix; the gradient of its output is what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.transform = nn.Linear(4, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.transform.weight * x.to(self.transform.weight.dtype)).sum().float()


def engine_of(settings: dict[str, Any], raw: dict[str, Any] | None = None) -> Any:
    torch.manual_seed(0)
    chosen = DeepSpeedSettings(precision="bf16", raw=raw or {}, **settings)
    optimizer = Optimizer(lr=1e-2, warmup_steps=0, grad_clip=1e9)
    return start_engine(Weight(), chosen, optimizer, num_steps=9, accumulation=ROWS)


def step_of(engine: Any) -> torch.Tensor:
    """The gradient of a step of one large row and many small ones, just before its update."""
    from deepspeed.utils import safe_get_full_grad

    for row in range(ROWS):
        engine.backward(engine(torch.full((4, 4), 1.0 if row == 0 else SMALL)) * ROWS)
        if row == ROWS - 1:
            gradient: torch.Tensor = safe_get_full_grad(engine.module.transform.weight).float().clone()
        engine.step()
    return gradient


def in_one_process(rank: int, check: str, settings: dict[str, Any], folder: str) -> None:
    """Runs a check of this file in a process of its own: DeepSpeed keeps the process group of its first engine."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("gloo", rank=rank, world_size=1, store=dist.FileStore(f"{folder}/store", 1))
    globals()[check](settings, Path(folder))
    dist.destroy_process_group()


def check_small_rows(settings: dict[str, Any], folder: Path) -> None:
    exact = torch.full((4, 4), 1 + (ROWS - 1) * SMALL)
    torch.testing.assert_close(step_of(engine_of(settings)), exact, rtol=1e-6, atol=0)
    assert step_of(engine_of(settings, OLD)).unique().tolist() == [1.0], "as it was"


def check_checkpoint(settings: dict[str, Any], folder: Path) -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    old, new = engine_of(settings, OLD), engine_of(settings)
    assert type(new.optimizer) is DeepSpeedZeroOptimizer
    step_of(old)
    old.save_checkpoint(str(folder / "saved"), tag="engine")
    new.load_checkpoint(str(folder / "saved"), tag="engine")
    kept = [next(iter(engine.basic_optimizer.state.values())) for engine in (old, new)]
    for name in ("exp_avg", "exp_avg_sq", "step"):
        assert torch.equal(kept[0][name], kept[1][name]), name
    assert torch.equal(old.module.transform.weight, new.module.transform.weight)
    step_of(new)
    assert not torch.equal(old.module.transform.weight, new.module.transform.weight)


@pytest.mark.parametrize("settings", [{"zero_stage": 2}, {"zero_stage": 3}])
def test_the_small_rows_of_a_step_count_beside_a_large_one(tmp_path: Path, settings: dict[str, Any]) -> None:
    ranks.run(in_one_process, 1, "check_small_rows", settings, str(tmp_path))


@pytest.mark.parametrize(
    "settings", [{"zero_stage": 1}, {"zero_stage": 2}, {"zero_stage": 2, "offload_optimizer": True}]
)
def test_the_optimiser_stays_zero_s_and_takes_a_checkpoint_of_bf16_sums(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    ranks.run(in_one_process, 1, "check_checkpoint", settings, str(tmp_path))


@pytest.mark.parametrize(
    ("zero_stage", "precision", "wanted"),
    [(0, "bf16", None), (1, "bf16", None), (2, "bf16", "fp32"), (3, "bf16", "fp32"), (2, "fp32", None)],
)
def test_gradients_add_up_in_fp32_where_zero_partitions_them(
    zero_stage: int, precision: Any, wanted: str | None
) -> None:
    settings = DeepSpeedSettings(zero_stage=zero_stage)  # type: ignore[arg-type]
    config = deepspeed_config(settings, Optimizer(), accumulation=2, precision=precision)
    assert config.get("data_types", {}).get("grad_accum_dtype") == wanted
    assert config["timers"] == {"throughput": {"enabled": False}}
    assert not config["bf16"]["check_grad_overflow"]


def test_a_stage_set_by_raw_decides_too() -> None:
    settings = DeepSpeedSettings(zero_stage=2, raw={"zero_optimization": {"stage": 1}})
    assert "data_types" not in deepspeed_config(settings, Optimizer(), accumulation=2, precision="bf16")
