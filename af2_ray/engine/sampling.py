"""The next token of every running answer, each with settings and a generator of its own.

What is chosen for one row depends on that row's logits, settings and seed alone, never on what shares its batch. All
rows are chosen for together, and what is chosen comes from the device at once: each time that the host waits for a GPU,
the GPU then waits for the host.

Shapes: B rows, N of them by chance, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from af2_ray.engine.request import Request, TokenLogprob
from af2_ray.engine.transfer import upload

_GREEDY = 1e-5  # the temperature below which the likeliest token is as good as sure


class Sampler:
    """One request's way of choosing.

    Attributes:
        generator: chance, on the device of the logits; none: the likeliest token is taken.
    """

    def __init__(self, request: Request, device: torch.device) -> None:
        self.request = request
        self.generator: torch.Generator | None = None
        if request.temperature >= _GREEDY:
            self.generator = torch.Generator(device)
            if request.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(request.seed)


def choose(logits: Tensor, samplers: Sequence[Sampler], held: Sequence[bool], end_ids: Tensor) -> list[int | None]:
    """The next token of each row of logits [B, V]; none where they are not numbers.

    Args:
        held: rows that must not end yet.
        end_ids: tokens that end an answer.
    """
    if any(held):
        logits = logits.clone()  # the caller's are as the model gave them
        closed = upload(held, logits.device)[:, None]
        logits[:, end_ids] = logits[:, end_ids].masked_fill(closed, -torch.inf)
    chosen = logits.argmax(dim=1)
    if by_chance := [row for row, sampler in enumerate(samplers) if sampler.generator is not None]:
        rows = upload(by_chance, logits.device)
        chosen = chosen.index_copy(0, rows, _sample(logits[rows], [samplers[row] for row in by_chance]))
    works = logits.amax(dim=1).isfinite()  # else NaN or infinite, or every token closed
    return [token if token >= 0 else None for token in chosen.where(works, -1).tolist()]


def _sample(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """Tokens [N] of logits [N, V] by chance: each of the fewest whose probabilities reach the row's `top_p`."""
    settings = [[sampler.request.temperature for sampler in samplers], [sampler.request.top_p for sampler in samplers]]
    temperature, top_p = upload(settings, logits.device, torch.float32)[..., None]
    logits = logits.float()
    probs = torch.softmax((logits - logits.amax(dim=1, keepdim=True)) / temperature, dim=1)
    # Stable: the order of equal ones may not hang on what shares the batch.
    probs, order = probs.sort(dim=1, descending=True, stable=True)
    outside = probs.cumsum(dim=1) - probs >= top_p
    outside[:, 0] = False  # the likeliest is there, however small `top_p` is
    # The largest of probabilities over exponential variates is a draw, as in torch.multinomial, which would wait.
    chance = torch.empty_like(probs)
    for row, sampler in zip(chance, samplers, strict=True):
        row.exponential_(generator=sampler.generator)
    draw = (probs.masked_fill(outside, 0.0) / chance).argmax(dim=1, keepdim=True)
    return order.gather(1, draw)[:, 0]


def logprobs_of(
    logits: Tensor, tokens: Mapping[int, int], nums_top: Mapping[int, int], tokenizer: PreTrainedTokenizerBase
) -> dict[int, TokenLogprob]:
    """Log probabilities of tokens by row of logits [B, V], and of the likeliest, before any temperature.

    Args:
        nums_top: how many of the likeliest are wanted, by row; rows that are not there want nothing.
    """
    if not nums_top:
        return {}
    rows, most = list(nums_top), max(nums_top.values())
    logprobs = torch.log_softmax(logits[upload(rows, logits.device)].float(), dim=1)
    of_token = logprobs.gather(1, upload([tokens[row] for row in rows], logits.device)[:, None])
    values, ids = logprobs.topk(most, dim=1)
    found = {}
    numbers = torch.cat((of_token.double(), values.double(), ids.double()), dim=1).tolist()  # at once
    for row, (logprob, *rest) in zip(rows, numbers, strict=True):
        likeliest = list(zip(rest[:most], rest[most:], strict=True))[: nums_top[row]]
        top = tuple((_shown(tokenizer, int(id_)), value) for value, id_ in likeliest)
        found[row] = TokenLogprob(_shown(tokenizer, tokens[row]), logprob, top)
    return found


def _shown(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return str(tokenizer.decode([token]))
