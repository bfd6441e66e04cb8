"""The next token of every running answer, each with settings and a generator of its own.

What is chosen for one row depends on that row's logits, settings and seed alone, never on what shares its batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from af2_ray.engine.request import Request, TokenLogprob

_GREEDY = 1e-5  # the temperature below which the likeliest token is as good as sure


class Sampler:
    """One request's way of choosing."""

    def __init__(self, request: Request, device: torch.device) -> None:
        self.request = request
        self._generator: torch.Generator | None = None
        if request.temperature >= _GREEDY:
            self._generator = torch.Generator(device)
            if request.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(request.seed)

    def sample(self, logits: Tensor) -> int | None:
        """A token of logits [V] by chance: of the fewest whose probabilities reach `top_p`; none: greedy."""
        if self._generator is None:
            return None
        probs, order = torch.softmax((logits - logits.max()) / self.request.temperature, dim=-1).sort(descending=True)
        outside = probs.cumsum(dim=-1) - probs >= self.request.top_p
        outside[0] = False  # the likeliest is there, however small `top_p` is
        return int(order[torch.multinomial(probs.masked_fill(outside, 0.0), 1, generator=self._generator)])


def choose(logits: Tensor, samplers: Sequence[Sampler], held: Sequence[bool], end_ids: Tensor) -> list[int | None]:
    """The next token of each row of logits [B, V]; none where they are not numbers.

    Args:
        held: rows that must not end yet.
        end_ids: tokens that end an answer.
    """
    logits = logits.float()
    if any(held):
        logits = logits.clone()  # the caller's are as the model gave them
        closed = torch.tensor(held, device=logits.device)[:, None]
        logits[:, end_ids] = logits[:, end_ids].masked_fill(closed, -torch.inf)
    broken = (~logits.amax(dim=1).isfinite()).tolist()  # NaN or infinite, or every token closed
    best = logits.argmax(dim=1).tolist()
    chosen: list[int | None] = []
    for row, sampler in enumerate(samplers):
        if broken[row]:
            chosen.append(None)
            continue
        token = sampler.sample(logits[row])
        chosen.append(best[row] if token is None else token)
    return chosen


def logprob_of(logits: Tensor, token: int, num_top: int, tokenizer: PreTrainedTokenizerBase) -> TokenLogprob:
    """Log probability of a chosen token of logits [V], and of the `num_top` likeliest, before any temperature."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    values, ids = logprobs.topk(num_top)
    top = tuple((_shown(tokenizer, id_), value) for id_, value in zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(_shown(tokenizer, token), float(logprobs[token]), top)


def _shown(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return str(tokenizer.decode([token]))
