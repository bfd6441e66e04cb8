"""By plain products or by the fused kernel: the same attention, and the same gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as nnf

from af2_ray.models.attention import attend


@pytest.mark.parametrize("learned", [False, True], ids=["mask", "learned mask"])
def test_values_and_gradients_are_the_fused_kernel_s(learned: bool) -> None:
    torch.manual_seed(0)
    shapes = [(2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), (1, 3, 5, 7)]
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    found = []
    for attention in (attend, lambda q, k, v, mask: nnf.scaled_dot_product_attention(q, k, v, attn_mask=mask)):
        q, k, v, mask = (tensor.clone().requires_grad_(learned or number < 3) for number, tensor in enumerate(inputs))
        out = attention(q, k, v, mask)
        out.square().sum().backward()
        grads = [tensor.grad for tensor in (q, k, v, mask) if tensor.grad is not None]
        found.append([out.detach(), *grads])
    assert len(found[0]) == (5 if learned else 4)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_row_that_is_shut_by_the_lowest_number_is_no_nan_in_bf16() -> None:
    q, k, v = (torch.randn(1, 1, 2, 4, requires_grad=True) for _ in range(3))
    mask = torch.zeros(1, 1, 2, 2).fill_(torch.finfo(torch.float32).min)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(q, k, v, mask)
    out.float().sum().backward()
    assert out.isfinite().all()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in (q, k, v))
