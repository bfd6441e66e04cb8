"""AF-CLAP's loss over ranks equals the loss of one process, gradients included."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from af2_ray.config import Optimizer
from af2_ray.data.collate import ClapBatch
from af2_ray.losses import afclap_loss
from af2_ray.train.task import ClapTask, gather_clips

CLIPS, M, N, J = 5, 2, 2, 6


def _tensors() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    unit = lambda *shape: torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)  # noqa: E731
    mask = torch.ones(CLIPS, M, dtype=torch.bool)
    mask[3, 1] = False
    return unit(CLIPS, J), unit(CLIPS, M, J), unit(CLIPS, M, N, J), mask, torch.ones(CLIPS, M, N, dtype=torch.bool)


def _rank(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mine = slice(0, 2) if rank == 0 else slice(2, CLIPS)  # uneven, as after a broken file
    audio, positives, negatives, mask, negative_mask = (tensor[mine] for tensor in _tensors())
    leaves = [tensor.clone().requires_grad_() for tensor in (audio, positives, negatives)]
    from af2_ray.losses import afclap_loss_sum

    everyone, everyone_mask, first = gather_clips(leaves[1], mask)
    loss, _ = afclap_loss_sum(
        leaves[0], everyone, leaves[2], everyone_mask, negative_mask, torch.tensor(10.0), first=first
    )
    (loss / CLIPS).backward()
    torch.save([leaf.grad for leaf in leaves], Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_uneven_ranks_give_the_gradients_of_one(tmp_path):
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_rank, args=(port, str(tmp_path)), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    audio, positives, negatives, mask, negative_mask = _tensors()
    leaves = [tensor.requires_grad_() for tensor in (audio, positives, negatives)]
    afclap_loss(*leaves, mask, negative_mask, torch.tensor(10.0)).backward()
    for index, leaf in enumerate(leaves):
        torch.testing.assert_close(torch.cat([part[index] for part in parts]), leaf.grad, rtol=1e-6, atol=1e-9)


def test_ragged_captions_find_their_places():
    task = ClapTask(Path(), Optimizer(), num_positives=2, num_negatives=1)
    owner, slot, rank = (np.array(column) for column in zip((0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 1, 0), strict=True))
    batch = ClapBatch(
        row=0,
        num_clips=2,
        failures=(),
        sample_ids=("a", "b"),
        num_truncated=0,
        waveforms=np.zeros((2, 4), np.int16),
        windows_per_clip=np.ones(2, np.int64),
        text_ids=np.zeros((4, 1), np.int64),
        text_mask=np.ones((4, 1), np.int64),
        caption_owner=owner,
        caption_kind=(rank > 0).astype(np.int64),
        caption_slot=slot,
        caption_rank=rank,
    ).tensors()
    text = torch.arange(4.0)[:, None] + 1
    positives, positive_mask, negatives, negative_mask = task._arrange(batch, text)
    assert positives.squeeze(-1).tolist() == [[1, 0], [3, 4]]
    assert positive_mask.tolist() == [[True, False], [True, True]]
    assert negatives.flatten().tolist() == [2, 0, 0, 0]
    assert negative_mask.flatten().tolist() == [True, False, False, False]
