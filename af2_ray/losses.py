"""The two losses: next-token loss on answer tokens, and AF-CLAP's composition-aware contrastive loss.

Both return finite values with zero gradients for batches without any label: a batch of broken files must keep its
place in a distributed step without harm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

from af2_ray.text import IGNORE


def lm_loss_sum(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of cross-entropies over answer tokens, and how many there are.

    A sum, not a mean: the caller divides by the count over all ranks and micro-batches of the step, so that every
    answer token weighs the same.

    Args:
        logits: [B, T, V]; position t predicts token t+1.
        labels: [B, T]; -100 where nothing is to be learned.
    """
    targets = labels[:, 1:]
    chosen = targets != IGNORE
    return token_loss_sum(logits[:, :-1][chosen], targets[chosen])


def token_loss_sum(
    logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """As `lm_loss_sum`, for chosen positions only: logits [N, V] and their targets [N] (N may be 0).

    Args:
        label_smoothing: share of a target that goes to all tokens alike.
        z_loss: factor on the square of log-sum-exp, which keeps logits from drifting (a bf16 remedy).
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    loss = nnf.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)
    if z_loss:
        loss = loss + z_loss * logits.logsumexp(dim=-1).square().sum()
    return loss, torch.tensor(targets.numel(), device=targets.device)


def afclap_loss(
    audio: Tensor,
    positives: Tensor,
    negatives: Tensor,
    positive_mask: Tensor,
    negative_mask: Tensor,
    scale: Tensor,
) -> Tensor:
    """AF-CLAP's loss (PAPER 1) of one batch in one process: `afclap_loss_sum` over the number of clips in it."""
    loss, count = afclap_loss_sum(audio, positives, negatives, positive_mask, negative_mask, scale)
    return loss / count.clamp(min=1)


def afclap_loss_sum(
    audio: Tensor,
    positives: Tensor,
    negatives: Tensor,
    positive_mask: Tensor,
    negative_mask: Tensor,
    scale: Tensor,
    *,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """AF-CLAP's loss (PAPER 1), from audio to text, in log-sum-exp form: the sum over clips, and how many count.

    With s(u, v) = exp(scale * u.v): numerator of clip i is the sum of s over its own positives; the denominator adds
    the positives of every other clip and clip i's own negatives. M = 1 with N = 0 is the plain contrastive loss.
    Across ranks, each computes the rows of its own clips against the gathered positives of all (G >= C of them).

    Args:
        audio: [C, J] unit vectors.
        positives: [G, M, J] unit vectors: the caption and its paraphrases.
        negatives: [C, M, N, J] unit vectors: for each positive, captions with another order or binding.
        positive_mask: bool [G, M]; negative_mask: bool [C, M, N]: which captions exist.
        scale: the factor on dot products, exp(log scale), already clamped.
        first: where this rank's clips begin among the G.

    Clips without any positive take no part; if none has one, the loss is 0 with zero gradients.
    """
    num_clips = len(audio)
    mine = slice(first, first + num_clips)
    to_positives = scale * torch.einsum("cj,gmj->cgm", audio, positives)
    to_positives = _masked(to_positives, positive_mask.expand(num_clips, -1, -1))
    own_negatives = _masked(scale * torch.einsum("cj,cmnj->cmn", audio, negatives), negative_mask)
    own = to_positives[:, mine].diagonal(dim1=0, dim2=1).T  # [C, M]
    everything = torch.cat([to_positives.flatten(1), own_negatives.flatten(1)], dim=1)
    valid = positive_mask[mine].any(dim=1)
    loss = torch.where(valid, everything.logsumexp(dim=1) - own.logsumexp(dim=1), 0.0)
    return loss.sum(), valid.sum()


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores (float32 or more) with what `mask` excludes at the lowest finite value: -inf would give NaN gradients."""
    scores = scores if scores.dtype == torch.float64 else scores.float()
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
