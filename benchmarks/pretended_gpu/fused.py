"""Kernels that PyTorch chooses on a GPU alone, as one launch each; CUDA graphs and events by name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

HALF = (torch.float16, torch.bfloat16)


def refusal(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, enable_gqa: bool) -> str:
    """Why CUDA's fused attention would not take these; empty: it does.

    Flash attention takes half precision without a mask, the memory-efficient kernel a mask whose last stride is 1.
    """
    if any(t.dim() != 4 for t in (q, k, v)):
        return "queries, keys and values are not [B, H, T, d]"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (*HALF, torch.float32):
        return f"types {q.dtype}, {k.dtype}, {v.dtype}"
    if any(t.stride(-1) != 1 for t in (q, k, v)):
        return "last stride of queries, keys or values"
    if mask is not None and mask.stride(-1) != 1:
        return "last stride of the mask"
    if mask is not None and mask.dtype not in (torch.bool, q.dtype):
        return f"mask of {mask.dtype} for {q.dtype}"
    by_flash = mask is None and q.dtype in HALF and q.shape[-1] == v.shape[-1] <= 256
    if not by_flash and not q.shape[:2] == k.shape[:2] == v.shape[:2]:
        return "heads of queries and keys differ, with a mask"
    if q.shape[1] != k.shape[1] and not enable_gqa:
        return "heads of queries and keys differ"
    return ""


class _Attention(torch.autograd.Function):
    """Keeps queries, keys, values, result and log-sum-exp, as the fused kernels do. Tensors come first (`backward`)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, gpu: Any) -> Tensor:
        rows, heads, length, _ = q.shape
        out = q.new_empty(rows, length, heads, v.shape[-1]).transpose(1, 2)  # laid out as the kernels do
        logsumexp = q.new_empty(rows, heads, length, dtype=torch.float32)
        kept = (q, k, v, out, logsumexp, *([] if mask is None else [mask]))
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*kept)
            ctx.gpu = gpu
        gpu.launch("attention", _bytes(*kept[:4], *kept[5:]))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, _, *mask = ctx.saved_tensors
        grads = [torch.empty_like(t) for t in (q, k, v)]
        if ctx.needs_input_grad[3]:
            grads.append(torch.empty_like(mask[0]))
        ctx.gpu.launch("attention backward", _bytes(q, k, v, out, grad, *mask, *grads))
        return (*grads, *([None] * (5 - len(grads))))


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, gpu: Any) -> Tensor:
        out, rstd = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x, rstd, *([] if weight is None else [weight]))
            ctx.gpu = gpu
        gpu.launch("rms_norm", _bytes(x, out))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, _, *weight = ctx.saved_tensors
        ctx.gpu.launch("rms_norm backward", _bytes(x, grad, grad), 2 if ctx.needs_input_grad[1] else 1)
        return torch.empty_like(x), torch.empty_like(weight[0]) if ctx.needs_input_grad[1] else None, None


def attend(
    gpu: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """PyTorch's attention: a fused kernel, or where that refuses, the formula in full."""
    if not refusal(query, key, value, attn_mask, enable_gqa):
        gpu.fused += 1
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            gpu.launch("mask to numbers", _bytes(attn_mask) * (1 + query.element_size()))
            attn_mask = query.new_empty(1).expand(attn_mask.shape)
        return _Attention.apply(query, key, value, attn_mask, gpu)
    gpu.unfused += 1
    wide = [t.float() if t.dtype in HALF else t for t in (query, key, value)]
    if enable_gqa:
        wide[1:] = [t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in wide[1:]]
    factor = (scale or query.shape[-1] ** -0.5) ** 0.5
    scores = (wide[0] * factor) @ (wide[1] * factor).transpose(-1, -2)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        scores = scores + (torch.where(attn_mask, 0.0, -torch.inf) if attn_mask.dtype == torch.bool else attn_mask)
    weights = torch.dropout(scores.softmax(dim=-1), dropout_p, dropout_p > 0)
    return (weights @ wide[2]).to(query.dtype)


def rms_norm(
    gpu: Any, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """PyTorch's `rms_norm`, which is one kernel on a GPU."""
    return _RmsNorm.apply(input, weight, gpu)


def _bytes(*tensors: Tensor) -> int:
    from pretended_gpu import tensor_bytes

    return sum(map(tensor_bytes, tensors))


# --- CUDA's own names ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def graphs(gpu: Any) -> Iterator[None]:
    """`torch.cuda`'s graphs, streams and events, which do nothing but count."""

    class Graph:
        def __init__(self, *args: Any, **kwargs: Any) -> None: ...
        def capture_begin(self, *args: Any, **kwargs: Any) -> None: ...
        def reset(self) -> None: ...

        def capture_end(self) -> None:
            gpu.recorded += 1

        def replay(self) -> None:
            gpu.replayed += 1

    class Waitable:
        def __init__(self, *args: Any, **kwargs: Any) -> None: ...
        def wait_stream(self, *args: Any) -> None: ...
        def wait_event(self, *args: Any) -> None: ...
        def record(self, *args: Any) -> None: ...
        def wait(self, *args: Any) -> None: ...

        def record_event(self, *args: Any) -> Waitable:
            return Waitable()

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            gpu.wait("synchronize")

    @contextlib.contextmanager
    def graph(recorded: Graph, *args: Any, **kwargs: Any) -> Iterator[None]:
        yield
        recorded.capture_end()

    @contextlib.contextmanager
    def stream(*args: Any, **kwargs: Any) -> Iterator[None]:
        yield

    stand_ins = {
        "CUDAGraph": Graph,
        "Stream": Waitable,
        "Event": Waitable,
        "graph": graph,
        "stream": stream,
        "current_stream": lambda *args: Waitable(),
        "graph_pool_handle": lambda *args: (0, 0),
        "synchronize": lambda *args: gpu.wait("synchronize"),
        "is_current_stream_capturing": lambda: False,
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(FakeTensor, "tolist", lambda tensor: gpu.listed(tensor)))
        for name, stand_in in stand_ins.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        yield
