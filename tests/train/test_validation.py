"""Bands: a mean over all answer tokens, whatever the rows; the model as it was; the accounts of a step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cuts
import pytest
import torch
import torch.distributed as dist

from af2_ray.config import Optimizer
from af2_ray.train.checkpoint import read_saved
from af2_ray.train.deepspeed import checkpoint_activations
from af2_ray.train.optim import batch_factor
from af2_ray.train.step import Step
from af2_ray.train.task import plain
from af2_ray.train.telemetry import Meter, gates
from af2_ray.train.validation import Band, validate


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(str(tmp_path / "store"), 1))
    yield
    dist.destroy_process_group()


class Rows(list[Any]):
    """A plan and collator of rows that are there."""

    def row(self, number: int) -> Any:
        return self[number]


def band(name: str, rows: list[Any], *, is_own: bool) -> Any:
    return Band(name, Rows(rows), lambda row: row, is_own)  # type: ignore[arg-type]


def test_a_band_s_loss_does_not_depend_on_its_rows(one_rank: None) -> None:
    model = cuts.make_model(torch.float32)
    checkpoint_activations(model, layers=True, tower=True)
    modes = [module.training for module in model.modules()]
    engine = cuts.AveragingEngine(model, 1)
    smoothed = cuts.TASK.stage.model_copy(update={"label_smoothing": 0.1, "z_loss": 0.1})
    task = plain(replace(cuts.TASK, stage=smoothed))
    assert task == cuts.TASK
    whole, cut = cuts.my_rows((1, 1), 0, with_fault=False), cuts.my_rows((1, 4), 0, with_fault=False)
    bands = [band("before", cut, is_own=False), band("now", whole, is_own=True)]
    found = validate(engine, task, bands)
    assert found["val/before"] == pytest.approx(found["val/now"], rel=1e-5)
    assert found["val/own"] == found["val/now"]
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_recomputed_activations_give_the_same_gradients(one_rank: None) -> None:
    found = []
    for recompute in (False, True):
        model = cuts.make_model(torch.float32)
        checkpoint_activations(model, layers=recompute, tower=recompute)
        Step(cuts.AveragingEngine(model, 1), cuts.TASK)([cuts.row_of(0, [0, 1], with_fault=False)])
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-7)


def test_the_accounts_of_a_step() -> None:
    model = cuts.make_model(torch.float32)
    told = gates(SimpleNamespace(module=model))
    assert set(told) == {f"gate/{layer}/{kind}" for layer in (1, 3) for kind in ("attn", "ff")}
    assert told["gate/1/attn"] == pytest.approx(float(_gate(model, 1).tanh()))
    counts = {"windows": 6.0, "tokens": 72.0, "clips": 3.0, "questions": 3.0, "labels": 24.0}
    rates = Meter(cuts.TASK, model, 2)(counts, 2.0, cached=False)
    assert (rates["windows_per_s"], rates["tokens_per_s"]) == (3.0, 36.0)
    assert rates["tflops"] > 0


def _gate(model: Any, layer: int) -> torch.Tensor:
    return model.language_model.model.layers[layer].cross_attention.attn_gate.detach()


def test_the_rate_follows_the_answers_of_a_step() -> None:
    assert batch_factor(Optimizer(), 7) == 1
    assert batch_factor(Optimizer(batch_rule="linear", batch_labels=100), 25) == 0.25
    assert batch_factor(Optimizer(batch_rule="sqrt", batch_labels=100), 25) == 0.5
    with pytest.raises(ValueError, match="belong together"):
        Optimizer(batch_rule="sqrt")


def test_a_checkpoint_of_another_recipe_or_half_of_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="not a whole checkpoint"):
        read_saved(tmp_path, "a")
    (tmp_path / "checkpoint.json").write_text('{"recipe": "a", "world_size": 2, "step": 4, "best": null}')
    assert read_saved(tmp_path, "a").world_size == 2
    with pytest.raises(RuntimeError, match="saved by recipe a, not b"):
        read_saved(tmp_path, "b")
