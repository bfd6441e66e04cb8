"""The two losses: next-token loss on answer tokens, and AF-CLAP's composition-aware contrastive loss.

Both return finite values with zero gradients for batches without any label: a batch of broken files must keep its
place in a distributed step without harm.

AF-CLAP's loss compares every clip with every caption of the global batch, but never holds that table: it takes the
rows of a part of the clips, and their share of all gradients, before it goes on to the next part. As much arithmetic
as the plain formula, a fraction of its memory (`benchmarks/clap_loss.py`); the price: no second derivatives.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as nnf
from torch import Tensor
from torch.autograd.function import once_differentiable

PART = 2**21
"""Similarities held at a time (8 MiB in float32)."""
MIN_SCALE, MAX_SCALE = 1.0, 100.0
"""The usual clamp of contrastive training: temperatures from 0.01 to 1."""


def token_loss_sum(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    """Sum of cross-entropies over answer tokens.

    A sum, not a mean: the caller divides by the count over all ranks and micro-batches of the step, so that every
    answer token weighs the same.

    Args:
        logits: logits [N, V] of the positions before the answer tokens (N may be 0).
        targets: ids of those tokens, [N].
        label_smoothing: share of a target that goes to all tokens alike.
        z_loss: factor on the square of log-sum-exp, which keeps logits from drifting (a bf16 remedy).
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    loss = nnf.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)
    if z_loss:
        loss = loss + z_loss * logits.logsumexp(dim=-1).square().sum()
    return loss


def afclap_loss_sum(
    audio: Tensor,
    positives: Tensor,
    negatives: Tensor,
    positive_mask: Tensor,
    negative_mask: Tensor,
    scale: Tensor,
    *,
    every_positive: bool = False,
    symmetric: bool = False,
    gather: bool = False,
) -> Tensor:
    """AF-CLAP's loss (docs/paper.md, "AF-CLAP"), from audio to text, in log-sum-exp form: its sum over clips.

    With s(u, v) = exp(scale * u.v): numerator of clip i is the sum of s over its own positives; the denominator adds
    the positives of every other clip and clip i's own negatives. M = 1 with N = 0 is the plain contrastive loss.

    Args:
        audio: unit vectors [C, J] of the clips.
        positives: unit vectors [C, M, J] of each caption and its paraphrases.
        negatives: unit vectors [C, M, N, J] of captions with another order or binding, for each positive.
        positive_mask, negative_mask: masks of the captions that exist, bool [C, M] and [C, M, N].
        scale: the factor on dot products (`clamp_scale`), one element.
        every_positive: whether the mean of log s over a clip's positives stands for the log of their sum (L_out and
            L_in of supervised contrastive learning, arXiv 2004.11362). The paper's sum is as large as its largest term:
            one caption near its clip is enough, and where paraphrases end up hardly counts. Here each must be near.
        symmetric: whether half of the loss is from text to audio, where each positive must find its clip among all
            clips; the positives of a clip share its weight.
        gather: whether the clips are one rank's of a process group: they meet the captions of all ranks, and
            gradients go back to the rank that owns each. Every rank must call; ranks may hold different numbers of
            clips.

    Returns:
        This rank's sum over clips with a positive; the ranks' sums add up to that of one process.
    """
    audio, positives, negatives = (_at_least_float32(t) for t in (audio, positives, negatives))
    scale = _at_least_float32(scale)
    all_positives, all_masks, all_audio = positives, positive_mask, audio
    if gather:
        together = torch.cat([positives, audio[:, None]], dim=1) if symmetric else positives
        gathered, all_masks = gather_clips(together, positive_mask)
        all_positives = gathered[:, : positives.shape[1]]
        all_audio = gathered[:, -1]
    # Of its own captions a clip has a handful: those similarities are [C, M] and [C, M * N].
    own = scale * torch.einsum("cj,cmj->cm", audio, positives)
    harder = scale * torch.einsum("cj,cmnj->cmn", audio, negatives).flatten(1)
    harder = _masked(harder, negative_mask.flatten(1))
    lowest = own.new_full((len(own), 1), _lowest(own))  # for a clip without any
    harder = torch.cat([harder, lowest], dim=1).logsumexp(dim=1)
    weight = positive_mask.any(dim=1).to(audio.dtype)
    denominators = sum_logsumexp(audio, all_positives.flatten(0, 1), all_masks.flatten(), harder, weight, scale)
    share = positive_mask / positive_mask.sum(dim=1, keepdim=True).clamp(min=1).to(audio.dtype)
    numerators = (share * own).sum(dim=1) if every_positive else weight * _masked(own, positive_mask).logsumexp(dim=1)
    loss = denominators - numerators.sum(dtype=torch.float64)
    if symmetric:
        floor, has_text = lowest.expand_as(own).flatten(), all_masks.any(dim=1)
        back = sum_logsumexp(positives.flatten(0, 1), all_audio, has_text, floor, share.flatten(), scale)
        loss = (loss + back - (share * own).sum(dtype=torch.float64)) / 2
    return loss.to(audio.dtype)


def clamp_scale(log_scale: Tensor) -> Tensor:
    """exp(`log_scale`), held between MIN_SCALE and MAX_SCALE; beyond them only gradients that lead back get through.

    A plain clamp would have no gradient there: a temperature that once left its range could never return.
    """
    return _ClampedExp.apply(log_scale)


def sum_logsumexp(
    rows: Tensor, columns: Tensor, column_mask: Tensor, extra: Tensor, weight: Tensor, scale: Tensor
) -> Tensor:
    """sum_r weight_r log(exp(extra_r) + sum_k exp(scale rows_r . columns_k)), in memory linear in rows and columns.

    Args:
        rows, columns: vectors [R, J] and [K, J].
        column_mask: mask of the columns that exist, bool [K].
        extra: one more logarithm for each row, [R]; the lowest finite value stands for none.
        weight: weight of each row, [R], without gradient; 0 for a row that has nothing to be compared with.
        scale: factor on the products, one element.

    Returns:
        A float64 scalar: what is subtracted from it is about as large.
    """
    return _SumLogSumExp.apply(rows, columns, column_mask, extra, weight, scale)


class _SumLogSumExp(torch.autograd.Function):
    """The sum is a scalar, so its gradients are known up to one factor while the similarities are still there."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, column_mask: Tensor, extra: Tensor, weight: Tensor, scale: Tensor
    ) -> Tensor:
        total = rows.new_zeros((), dtype=torch.float64)
        grad_rows, grad_extra = torch.zeros_like(rows), torch.zeros_like(extra)
        grad_columns = torch.zeros_like(columns)
        absent = ~column_mask
        size = max(1, PART // max(1, len(columns)))
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            scores = rows[part] @ columns.T  # [r, K]
            scores.mul_(scale).masked_fill_(absent, _lowest(scores))
            logs = torch.logaddexp(scores.logsumexp(dim=1), extra[part])
            total += (weight[part] * logs).sum(dtype=torch.float64)
            if any(ctx.needs_input_grad):
                share = scores.sub_(logs[:, None]).exp_().mul_(weight[part, None])
                grad_rows[part] = share @ columns
                grad_columns.addmm_(share.T, rows[part])
                grad_extra[part] = (extra[part] - logs).exp() * weight[part]
        grad_scale = (grad_rows * rows).sum().reshape(scale.shape)
        ctx.save_for_backward(grad_rows.mul_(scale), grad_columns.mul_(scale), grad_extra, grad_scale)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_rows, grad_columns, grad_extra, grad_scale = (grad * saved for saved in ctx.saved_tensors)
        return grad_rows, grad_columns, None, grad_extra, None, grad_scale


class _ClampedExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_scale: Tensor) -> Tensor:
        scale = log_scale.exp().clamp(MIN_SCALE, MAX_SCALE)
        ctx.save_for_backward(log_scale, scale)
        return scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        log_scale, scale = ctx.saved_tensors
        inside = ((log_scale > math.log(MIN_SCALE)) | (grad < 0)) & ((log_scale < math.log(MAX_SCALE)) | (grad > 0))
        return torch.where(inside, grad * scale, 0.0)


def gather_clips(features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What all ranks have of their clips, [G, ...] with gradients to its owners, and the masks [G, M].

    Ranks may hold different numbers of clips (a broken file is left out), so they are padded to the largest with
    masked-out clips. Without a process group, or in one of a single rank, nothing changes.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return features, mask
    longest = torch.tensor([len(features)], device=features.device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    missing = int(longest) - len(features)
    features = torch.cat([features, features.new_zeros(missing, *features.shape[1:])])
    mask = torch.cat([mask, mask.new_zeros(missing, mask.shape[1])])
    masks = [torch.empty_like(mask, dtype=torch.uint8) for _ in range(dist.get_world_size())]
    dist.all_gather(masks, mask.to(torch.uint8))
    return _AllGather.apply(features), torch.cat(masks).bool()


class _AllGather(torch.autograd.Function):
    """Concatenation over ranks whose backward sums the gradients of all ranks for the rows each one owns."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)  # autograd may yet use what it handed over
        dist.all_reduce(grad)
        size = len(grad) // dist.get_world_size()
        return grad[dist.get_rank() * size : (dist.get_rank() + 1) * size]


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _lowest(scores: Tensor) -> float:
    return torch.finfo(scores.dtype).min


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    """What `mask` excludes at the lowest finite value: -inf would give NaN gradients."""
    return scores.masked_fill(~mask, _lowest(scores))
