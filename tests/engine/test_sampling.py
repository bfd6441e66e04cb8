"""Choosing the next token: what a caller may set never breaks what others have asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from af2_ray.engine.request import Request
from af2_ray.engine.sampling import Sampler, choose, logprobs_of

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


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_what_shares_the_batch_changes_nothing(kind: torch.dtype) -> None:
    """Seeds, temperatures and held ends of their own; in bf16 many tokens are equally likely."""
    settings = [(0.0, 1.0), (1.0, 1.0), (0.7, 0.9), (1.3, 0.5), (1e-5, 1.0), (0.3, 1e-9), (2.0, 0.99)]
    asked = [Request("?", temperature=t, top_p=p, seed=seed) for seed, (t, p) in enumerate(settings)]
    together, alone = ([Sampler(request, torch.device("cpu")) for request in asked] for _ in range(2))
    random, ends = torch.Generator().manual_seed(0), torch.tensor([3, 5])
    for step in range(20):
        logits = (3 * torch.randn((len(asked), 300), generator=random)).to(kind)
        held = [(row + step) % 3 == 0 for row in range(len(asked))]
        found = choose(logits, together, held, ends)
        assert found == [choose(logits[[row]], [alone[row]], [held[row]], ends)[0] for row in range(len(asked))]
        assert not {3, 5} & {token for token, shut in zip(found, held, strict=True) if shut}


def test_a_seed_s_tokens_are_multinomial_s() -> None:
    """Of the likeliest that reach `top_p`, as `torch.multinomial` draws with the same generator."""
    logits = 2 * torch.randn((50, 40), generator=torch.Generator().manual_seed(0))
    sampler, generator = (
        Sampler(Request("?", temperature=0.8, top_p=0.9, seed=3), torch.device("cpu")),
        torch.Generator(),
    )
    generator.manual_seed(3)
    for row in logits:
        probs, order = (row / 0.8).softmax(0).sort(descending=True)
        kept = probs.where(probs.cumsum(0) - probs < 0.9, 0.0)
        expected = int(order[torch.multinomial(kept, 1, generator=generator)])
        assert choose(row[None], [sampler], [False], torch.tensor([39])) == [expected]


def test_log_probabilities_of_many_rows(tiny_tokenizer: Any) -> None:
    logits = torch.randn((4, 30), generator=torch.Generator().manual_seed(0))
    tokens, nums_top = {0: 4, 1: 7, 2: 20, 3: 0}, {2: 3, 0: 0, 1: 1}
    found = logprobs_of(logits, tokens, nums_top, tiny_tokenizer)
    for row, num in nums_top.items():
        logprobs = logits[row].log_softmax(0)
        likeliest = logprobs.topk(num)
        assert found[row].logprob == logprobs[tokens[row]].item()
        assert [value for _, value in found[row].top] == likeliest.values.tolist()
        assert [text for text, _ in found[row].top] == [tiny_tokenizer.decode([i]) for i in likeliest.indices]
    assert logprobs_of(logits, tokens, {}, tiny_tokenizer) == {}
