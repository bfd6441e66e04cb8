"""What a recipe's precision means on a device, and that products in bf16 train as products in fp32 do."""

from __future__ import annotations

import cuts
import pytest
import torch

from af2_ray.config import DeepSpeedSettings, Optimizer
from af2_ray.train import precision
from af2_ray.train.deepspeed import deepspeed_config
from af2_ray.train.precision import autocast, resolve


def test_what_a_setting_means(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (resolve("auto", on_gpu=True), resolve("auto", on_gpu=False)) == ("bf16", "fp32")
    assert (resolve("fp32", on_gpu=True), resolve("bf16", on_gpu=False)) == ("fp32", "bf16")
    monkeypatch.setattr(precision, "multiplies_bf16", lambda: False)
    assert resolve("mixed", on_gpu=True) == "mixed"
    assert resolve("mixed", on_gpu=False) == "fp32", "emulated products would be slower"
    monkeypatch.setattr(precision, "multiplies_bf16", lambda: True)
    assert resolve("mixed", on_gpu=False) == "mixed"


def test_only_mixed_casts_products() -> None:
    settings = DeepSpeedSettings(zero_stage=0)
    for name in ("fp32", "bf16", "mixed"):
        config = deepspeed_config(settings, Optimizer(), accumulation=1, precision=name)  # type: ignore[arg-type]
        assert config["bf16"]["enabled"] == (name == "bf16")
        assert ("torch_autocast" in config) == (name == "mixed")
    assert config["torch_autocast"]["lower_precision_safe_modules"] == [], "gradients travel in fp32"


def test_mixed_gradients_are_nearly_those_of_fp32() -> None:
    """Rows with nothing to hear too: a mask of the lowest float32 is minus infinity in bf16, and their sum NaN."""
    found = {}
    for name in ("fp32", "mixed"):
        model = cuts.make_model(torch.float32)
        row = cuts.row_of(0, [0, 3, 5], with_fault=False)
        row.audio_index[0] = -1
        with autocast("cpu", name):  # type: ignore[arg-type]
            loss = cuts.TASK.loss(model, row, cuts.TASK.count(row))
        loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found[name] = torch.cat([loss.detach()[None], *gradients])
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert found[name].isfinite().all()
    assert found["mixed"][0] == pytest.approx(float(found["fp32"][0]), rel=0.02)
    assert cuts.relative_l2(found["mixed"], found["fp32"]) < 0.1
    assert not torch.equal(found["mixed"], found["fp32"])
