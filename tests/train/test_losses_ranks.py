"""AF-CLAP's loss over ranks equals the loss of one process, gradients included."""

from __future__ import annotations

import os
import socket
from itertools import product
from pathlib import Path

import pytest
import ranks as ranks_in_processes
import torch
import torch.distributed as dist

from af2_ray.train.losses import afclap_loss_sum, clamp_scale

CLIPS, M, N, J = 7, 2, 2, 6
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
CASES = list(product(TOLERANCE, ({}, {"symmetric": True}, {"every_positive": True})))


def _tensors(dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features (audio, positives, negatives), their masks, and the logarithm of the factor."""
    torch.manual_seed(0)
    unit = lambda *shape: torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)  # noqa: E731
    mask = torch.ones(CLIPS, M, dtype=torch.bool)
    mask[3, 1] = False
    mask[5] = False
    features = [tensor.to(dtype) for tensor in (unit(CLIPS, J), unit(CLIPS, M, J), unit(CLIPS, M, N, J))]
    return features, mask, torch.ones(CLIPS, M, N, dtype=torch.bool), torch.tensor([2.3], dtype=dtype)


def _rank(rank: int, world: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    mine = [slice(0, 2), slice(2, CLIPS if world == 2 else 3), slice(3, CLIPS)][rank]  # uneven, as after a broken file
    found = []
    for dtype, options in CASES:
        features, mask, negative_mask, log_scale = _tensors(dtype)
        leaves = [tensor[mine].clone().requires_grad_() for tensor in features] + [log_scale.requires_grad_()]
        loss = afclap_loss_sum(
            *leaves[:3], mask[mine], negative_mask[mine], clamp_scale(leaves[3]), **options, gather=True
        )
        loss.backward()
        found.append([leaf.grad for leaf in leaves])
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_uneven_ranks_give_the_gradients_of_one(world: int, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks_in_processes.run(_rank, world, world, port, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    for case, (dtype, options) in enumerate(CASES):
        features, mask, negative_mask, log_scale = _tensors(dtype)
        leaves = [tensor.requires_grad_() for tensor in (*features, log_scale)]
        scale = clamp_scale(leaves[3])
        afclap_loss_sum(*leaves[:3], mask, negative_mask, scale, **options).backward()
        parts = [rank[case] for rank in ranks]
        together = [torch.cat([part[index] for part in parts]) for index in range(3)]
        together.append(torch.stack([part[3] for part in parts]).sum(0))
        for gradient, leaf in zip(together, leaves, strict=True):
            assert (gradient - leaf.grad).norm() <= TOLERANCE[dtype] * leaf.grad.norm(), (dtype, options)
