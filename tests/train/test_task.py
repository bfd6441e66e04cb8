"""AF-CLAP's step: captions find their places, chunks change nothing, what trains is what was asked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from transformers import T5Config

from af2_ray.audio.windows import WINDOW_SAMPLES
from af2_ray.data.collate import ClapBatch
from af2_ray.models.afclap import AfClapConfig, AfClapModel
from af2_ray.models.htsat import tower_config
from af2_ray.train.task import ClapTask


def _clap_and_batch(folder: Path, dropout: float = 0.0) -> ClapBatch:
    """A small AF-CLAP in `folder`, and four clips (one of two windows) with 3 + 3 captions each but the last."""
    torch.manual_seed(0)
    text = T5Config(
        vocab_size=90, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=dropout, pad_token_id=0
    )
    model = AfClapModel(
        AfClapConfig(text_config=text, audio_config=tower_config(8, (1, 1, 1, 1), (1, 2, 2, 2)), projection_dim=12)
    )
    rng = np.random.default_rng(0)
    windows = (rng.normal(size=(5, WINDOW_SAMPLES)) * 3000 * np.arange(1, 6)[:, None]).clip(-32767, 32767)
    model.audio_tower.calibrate(torch.from_numpy(windows.astype(np.int16)))
    model.save_pretrained(folder)
    places = np.array([(owner, slot, rank) for owner in range(4) for slot in range(3) for rank in range(2)][:-3])
    return ClapBatch(
        row=0,
        num_clips=4,
        failures=(),
        sample_ids=tuple("abcd"),
        num_truncated=0,
        waveforms=windows.astype(np.int16),
        windows_per_clip=np.array([1, 2, 1, 1]),
        text_ids=rng.integers(1, 90, (len(places), 6)),
        text_mask=np.tril(np.ones((len(places), 6), np.int64), 3)[:, ::-1].copy()
        | np.eye(len(places), 6, dtype=np.int64),
        caption_owner=places[:, 0],
        caption_slot=places[:, 1],
        caption_rank=places[:, 2],
    ).tensors()


def _step(folder: Path, batch: ClapBatch, **settings: object) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Loss and gradients of one step, and how many numbers autograd kept for the backward pass."""
    task = ClapTask(folder, toy.clap(num_positives=3, num_negatives=1, **settings))
    model = task.build().train()
    torch.manual_seed(1)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = task.loss(model, batch, task.count(batch))
    size = sum(kept.values())
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, size


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_chunks_with_a_gradient_cache_equal_the_direct_step(dropout: float, tmp_path: Path) -> None:
    batch = _clap_and_batch(tmp_path, dropout)
    direct, expected, much = _step(tmp_path, batch)
    cached, gradients, little = _step(tmp_path, batch, windows_per_chunk=2, captions_per_chunk=5)
    assert gradients.keys() == expected.keys()
    assert {"logit_scale", "text_projection.0.weight", "audio_projection.0.weight"} <= gradients.keys()
    if dropout:  # other numbers are drawn for other chunks, but each chunk draws its own twice
        again, same, _ = _step(tmp_path, batch, windows_per_chunk=2, captions_per_chunk=5)
        assert torch.equal(again, cached)
        assert all(torch.equal(same[name], gradients[name]) for name in same)
        return
    torch.testing.assert_close(cached, direct, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-7, name
    assert little < much / 5


def test_a_fixed_temperature_has_no_gradient_and_silence_does_not_count(tmp_path: Path) -> None:
    batch = _clap_and_batch(tmp_path)
    _, gradients, _ = _step(tmp_path, batch, learn_temperature=False)
    assert "logit_scale" not in gradients
    task = ClapTask(tmp_path, toy.clap(num_positives=3, num_negatives=1))
    assert task.count(batch) == 4


def test_ragged_captions_find_their_places():
    task = ClapTask("", toy.clap(num_positives=2, num_negatives=1))
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
        caption_slot=slot,
        caption_rank=rank,
    ).tensors()
    text = torch.arange(4.0)[:, None] + 1
    positives, positive_mask, negatives, negative_mask = task._arrange(batch, text)
    assert positives.squeeze(-1).tolist() == [[1, 0], [3, 4]]
    assert positive_mask.tolist() == [[True, False], [True, True]]
    assert negatives.flatten().tolist() == [2, 0, 0, 0]
    assert negative_mask.flatten().tolist() == [True, False, False, False]
