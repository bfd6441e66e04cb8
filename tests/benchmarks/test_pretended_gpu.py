"""The counts that stand for a GPU's: on code whose launches and waits are known."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from pretended_gpu import CUDA, PretendedGpu, backward


@pytest.fixture
def gpu() -> PretendedGpu:
    return PretendedGpu()


WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda t: t[1].item(),
    "item ": lambda t: bool(t[1] > 0),
    "tolist": lambda t: t.tolist(),
    "boolean indexing": lambda t: t[t > 1],
    "masked assignment": lambda t: t.index_put_((t > 1,), torch.zeros(2, dtype=t.dtype, device=CUDA)),
    "pageable copy": lambda t: torch.tensor([1, 2], device=CUDA),
    "pageable copy ": lambda t: torch.ones(3).to(CUDA, non_blocking=True),
    "copy to the host": lambda t: t.to("cpu", non_blocking=True),
    "synchronize": lambda t: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("kind", WAITS)
def test_a_wait_is_counted_by_name(gpu: PretendedGpu, kind: str) -> None:
    with gpu.running():
        values = torch.arange(4, device=CUDA)
        gpu.reset()
        WAITS[kind](values)
    assert [name.split(" at ")[0] for name in gpu.waits.elements()] == [kind.strip()]


def test_what_does_not_wait(gpu: PretendedGpu) -> None:
    with gpu.running():
        values = torch.arange(4, device=CUDA)
        torch.tensor([1, 2]).pin_memory().to(CUDA, non_blocking=True)
        values[torch.tensor([1]).pin_memory().to(CUDA, non_blocking=True)]
        torch.where(values > 1, values, 0).masked_fill_(values > 2, 0)
        values[values > 1] = 0  # a number: PyTorch fills by the mask
    assert not gpu.waits


def test_what_the_host_looks_at_is_true(gpu: PretendedGpu) -> None:
    with gpu.running():
        values = torch.arange(6, device=CUDA).view(2, 3) * 2
        values[1, 0] = 7
        assert values.tolist() == [[0, 2, 4], [7, 8, 10]]
        assert int(values.sum()) == 31
        assert values[values > 4].shape == (3,)
        assert (values > 4).nonzero().tolist() == [[1, 0], [1, 1], [1, 2]]
        assert torch.repeat_interleave(torch.tensor([2, 1]).to(CUDA)).tolist() == [0, 0, 1]
        assert torch.rand(3, device=CUDA).tolist() == [0, 0, 0]  # not known


@pytest.mark.parametrize(
    ("reason", "fused"), [("", 1), ("rank", 0), ("type", 0), ("stride of the mask", 0), ("heads", 0), ("gqa", 1)]
)
def test_attention_is_fused_where_cuda_fuses_it(gpu: PretendedGpu, reason: str, fused: int) -> None:
    with gpu.running():
        q, k = (torch.zeros(2, 4, 8, 16, dtype=torch.bfloat16, device=CUDA) for _ in range(2))
        mask: Tensor | None = torch.zeros(8, 8, 4, dtype=torch.bfloat16, device=CUDA).permute(2, 0, 1)[None]
        if reason == "rank":
            q, k, mask = q[0], k[0], None
        elif reason == "type":
            mask = torch.zeros(8, 8, dtype=torch.float32, device=CUDA)
        elif reason in ("heads", "gqa"):
            k, mask = k[:, :2], mask.contiguous() if reason == "heads" else None
        elif not reason:
            mask = mask.contiguous()
        gpu.reset()
        out = nnf.scaled_dot_product_attention(q, k, k, attn_mask=mask, enable_gqa=k.shape[1] != q.shape[1])
    assert out.shape == q.shape
    assert (gpu.fused, gpu.unfused) == (fused, 1 - fused)
    assert (gpu.launches.total() == 1) == bool(fused)


def test_launches_and_bytes_of_a_layer(gpu: PretendedGpu) -> None:
    layer = nn.Sequential(nn.Linear(8, 16, device="meta"), nn.GELU(), nn.LayerNorm(16, device="meta"))
    gpu.place(layer)
    with gpu.running():
        x = torch.zeros(4, 8, device=CUDA)
        gpu.reset()
        y = layer(x)[:, :8].transpose(0, 1)  # views are free
        assert dict(gpu.launches) == {"addmm": 1, "gelu": 1, "native_layer_norm": 1}
        product, gelu = 4 * (32 + 8 * 16 + 16 + 64), 4 * (64 + 64)
        assert gpu.moved_bytes == product + gelu + 4 * (64 + 16 + 16 + 64 + 4 + 4)
        backward(y.square().sum(), gpu)
    assert gpu.launches["mm"] == 1  # of the weight: the input has no gradient
    assert gpu.launches["native_layer_norm_backward"] == 1


def test_graphs_are_counted(gpu: PretendedGpu) -> None:
    with gpu.running():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            torch.zeros(3, device=CUDA)
        graph.replay()
        graph.replay()
    assert (gpu.recorded, gpu.replayed) == (1, 2)
