"""One optimiser step's loss and gradients are the same however it is cut into ranks, rows and accumulation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import cuts
import pytest
import ranks
import torch

from af2_ray.config import DeepSpeedSettings

CUTS = [cut for cut in cuts.CUTS if cut != (1, 1)]
UNSEEN = "attention.self.key.bias"
"""Adds the same to all scores of a query: softmax does not see it, its gradient is rounding alone."""


def step_of(cut: tuple[int, int], folder: Path, *, with_fault: bool, zero_stage: int | None = None) -> dict[str, Any]:
    """Loss, counts and gradients of the step cut this way, from as many processes as it has ranks."""
    folder.mkdir()
    arguments = (cut, str(folder), with_fault, zero_stage)
    if cut[0] == 1 and zero_stage is None:
        cuts.run_rank(0, *arguments)
    else:
        ranks.run(cuts.run_rank, cut[0], *arguments)
    return torch.load(folder / "step.pt", weights_only=True)


def assert_same_step(got: dict[str, Any], wanted: dict[str, Any], tolerance: float | dict[str, float]) -> None:
    """Gradients within `tolerance` (relative L2, of all tensors or by name), the same counts and loss."""
    assert got["gradients"].keys() == wanted["gradients"].keys()
    for name, gradient in wanted["gradients"].items():
        if name.endswith(UNSEEN):
            continue
        most = tolerance[name] if isinstance(tolerance, dict) else tolerance
        assert cuts.relative_l2(got["gradients"][name], gradient) <= most, name
    for name in ("labels", "clips", "set_aside"):  # a row without clips adds a silent window
        assert got["metrics"][name] == wanted["metrics"][name], name
    assert got["metrics"]["loss"] == pytest.approx(wanted["metrics"]["loss"], rel=1e-5)


@pytest.mark.parametrize("with_fault", [False, True], ids=["whole", "a clip set aside"])
def test_every_cut_gives_the_gradients_of_one_batch_in_float64(tmp_path: Path, with_fault: bool) -> None:
    truth = step_of((1, 1), tmp_path / "one", with_fault=with_fault)
    assert truth["metrics"]["labels"] == sum(n for clip, n in cuts.QUESTIONS if not (with_fault and clip == 5))
    moved = {name.split(".")[0] for name, gradient in truth["gradients"].items() if gradient.abs().sum() > 0}
    assert moved == {"audio_tower", "audio_transform", "language_model", "added_embeddings"}
    for cut in CUTS:
        got = step_of(cut, tmp_path / f"{cut[0]}x{cut[1]}", with_fault=with_fault)
        assert_same_step(got, truth, 1e-10)


def test_ranks_differ_tenfold_in_answers_and_the_faulty_clip_is_one_rank_s_alone() -> None:
    """What the equality above is about: means over a rank's own tokens would be far off."""
    counts = [sum(cuts.TASK.count(row) for row in cuts.my_rows((2, 1), rank, with_fault=False)) for rank in (0, 1)]
    assert counts[1] > 10 * counts[0]
    failures = [[len(row.failures) for row in cuts.my_rows((2, 2), rank, with_fault=True)] for rank in (0, 1)]
    assert failures == [[0, 0], [0, 1]]


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_every_cut_gives_the_gradients_of_one_batch_through_deepspeed(tmp_path: Path, zero_stage: int) -> None:
    """fp32, the tower training too: relative L2 of each tensor at most 1e-5 against one float64 batch.

    One or two tensors whose gradients are small sums of large terms (the bias of a norm) are further off by rounding
    alone, in one uncut batch as well (1.2e-5 under ZeRO 3): then the test is an expected failure that names them, and
    only if no cut is off by more than twice what the uncut step is.
    """
    truth = step_of((1, 1), tmp_path / "truth", with_fault=True)
    uncut = step_of((1, 1), tmp_path / "1x1", with_fault=True, zero_stage=zero_stage)
    assert_same_step(uncut, truth, 1.5e-5)
    exact = {name: true for name, true in truth["gradients"].items() if not name.endswith(UNSEEN)}
    rounding = {name: cuts.relative_l2(uncut["gradients"][name], true) for name, true in exact.items()}
    assert sum(error > 1e-5 for error in rounding.values()) <= 2
    over = {name for name, error in rounding.items() if error > 1e-5}
    for cut in CUTS:
        folder = tmp_path / f"{cut[0]}x{cut[1]}"
        got = step_of(cut, folder, with_fault=True, zero_stage=zero_stage)
        assert_same_step(got, truth, {name: max(1e-5, 2 * error) for name, error in rounding.items()})
        over |= {name for name in exact if cuts.relative_l2(got["gradients"][name], exact[name]) > 1e-5}
    if over:
        pytest.xfail(f"over 1e-5 by rounding: {', '.join(sorted(over))}")


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path: Path) -> None:
    import torch.distributed as dist

    from af2_ray.train.step import Step

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(str(tmp_path / "store"), 1))
    try:
        model = cuts.make_model(torch.float32)
        with torch.no_grad():
            model.added_embeddings.fill_(float("nan"))
        engine = cuts.AveragingEngine(model, 1)
        wanted = r"step 1: the loss of row 0 is nan: no update was made; lower optimizer\.lr"
        with pytest.raises(FloatingPointError, match=wanted):
            Step(engine, cuts.TASK)(cuts.my_rows((1, 1), 0, with_fault=False))
        assert engine._calls == 0
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ({"zero_stage": 0, "precision": "fp32"}, math.inf),
        ({"zero_stage": 1, "precision": "fp32"}, math.nan),
        ({"zero_stage": 2, "precision": "bf16"}, math.inf),
        ({"zero_stage": 2, "precision": "bf16", "offload_optimizer": True}, math.inf),
        ({"zero_stage": 3, "precision": "bf16"}, math.nan),
    ],
)
def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(
    tmp_path: Path, settings: dict[str, Any], value: float
) -> None:
    ranks.run(cuts.run_planted, 1, str(tmp_path), DeepSpeedSettings(**settings), value)
