"""Entries of a tensor in another order, by indices that are made once and used in every layer.

Taking entries one after another is one kernel forward and one backward, however many pieces are moved. PyTorch's own
backward of a selection adds into zeros, since an entry may be taken twice; here none is, and the way back is known.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def reorder(x: Tensor, index: Tensor, inverse: Tensor, dim: int) -> Tensor:
    """Entries `index` [M] of dimension `dim` of `x`, which has N of them.

    Args:
        inverse: where each of the N entries went, [N]. Entries of the result that `inverse` does not name are padding:
            they give no gradient.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _Reorder.apply(x, index, inverse, dim)
    return x.index_select(dim, index)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`; the host does not wait for a GPU's earlier work."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.dim = dim
        return x.index_select(dim, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(ctx.dim, inverse), None, None, None
