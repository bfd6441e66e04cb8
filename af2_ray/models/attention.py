"""Attention of queries to keys, by the kernel that is fastest where it runs.

PyTorch's fused kernel everywhere but in training on a CPU. There it has no path for a mask that itself learns (the
tower's position bias), and its backward pass in bf16 is slower than in fp32; two matrix products and a softmax are
faster: at the lengths of recipe `tiny` 1.3 to 1.6 times in fp32 with such a mask, and in bf16 (autocast) 1.2 to 2
times the fused kernel in fp32, which is kept for everything else. The price is the scores themselves, in memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Values [..., T, d] for queries [..., T, d], keys and values [..., A, d]; heads and batch come before.

    Args:
        mask: numbers to add to the scores, broadcast to [..., T, A]; no row may be -inf alone.
        dropout: share of the attention weights that is dropped.
    """
    on_cpu = q.device.type == "cpu" and torch.is_grad_enabled()
    by_hand = on_cpu and (torch.is_autocast_enabled("cpu") or (mask is not None and mask.requires_grad))
    if not by_hand:
        return nnf.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:  # the lowest float32 is -inf in bf16, and a row of that alone has no softmax
        scores = scores + mask.clamp(min=torch.finfo(scores.dtype).min).to(scores.dtype)
    weights = nnf.dropout(scores.softmax(dim=-1), dropout, training=dropout > 0)
    return weights @ v
