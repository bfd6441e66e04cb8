"""What DeepSpeed shards or moves to the CPU changes memory, not the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cuts
import numpy as np
import pytest
import ranks

from af2_ray.config import DeepSpeedSettings

NUM_STEPS = 20
pytestmark = pytest.mark.slow


def curve(folder: Path, **settings: Any) -> list[float]:
    """Losses of two ranks that train everything but the LM on the same eight questions."""
    folder.mkdir()
    ranks.run(cuts.run_curve, 2, str(folder), DeepSpeedSettings(**settings), NUM_STEPS)
    losses: list[float] = json.loads((folder / "losses.json").read_text())
    return losses


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    losses = curve(tmp_path_factory.mktemp("zero") / "0", zero_stage=0, precision="fp32")
    assert losses[-1] < 0.9 * losses[0], "it trains at all"
    return losses


@pytest.mark.parametrize(
    "settings",
    [
        {"zero_stage": 1},
        {"zero_stage": 2},
        {"zero_stage": 3},
        {"zero_stage": 2, "offload_optimizer": True},
    ],
)
def test_every_zero_stage_gives_one_loss_curve(tmp_path: Path, plain: list[float], settings: dict[str, Any]) -> None:
    np.testing.assert_allclose(curve(tmp_path / "run", precision="fp32", **settings), plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_bf16_trains(tmp_path: Path, plain: list[float], zero_stage: int) -> None:
    losses = curve(tmp_path / "run", precision="bf16", zero_stage=zero_stage)
    assert losses[-1] < 0.9 * losses[0]
    np.testing.assert_allclose(losses[0], plain[0], rtol=0.02)
