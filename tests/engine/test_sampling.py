"""Choosing the next token: what a caller may set never breaks what others have asked."""

from __future__ import annotations

import pytest
import torch

from af2_ray.engine.request import Request
from af2_ray.engine.sampling import Sampler, choose

LOGITS = torch.tensor([[0.0, 3.0, 1.0, -1.0]])


def chosen(logits: torch.Tensor, **settings: float) -> int | None:
    sampler = Sampler(Request("?", seed=1, **settings), torch.device("cpu"))  # type: ignore[arg-type]
    return choose(logits, [sampler], [False], torch.tensor([3]))[0]


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 1e-50}, {"temperature": 1e-6}, {"temperature": 1.0, "top_p": 1e-50}, {"temperature": 2e-5}],
)
def test_the_smallest_settings_take_the_likeliest_token(settings: dict[str, float]) -> None:
    assert chosen(LOGITS, **settings) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_no_numbers_fail_their_own_row_alone(value: float) -> None:
    broken = torch.full_like(LOGITS, value)
    if value > 0:
        broken = torch.where(torch.arange(4) == 2, value, LOGITS)
    samplers = [Sampler(Request("?", temperature=1.0, seed=1), torch.device("cpu")) for _ in range(2)]
    found = choose(torch.cat([broken, LOGITS]), samplers, [False, False], torch.tensor([3]))
    assert found[0] is None
    assert found[1] is not None
