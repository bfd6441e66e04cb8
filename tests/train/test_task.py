"""What goes between a row and its loss; AF-CLAP's captions find their places, and its chunks change nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cuts
import numpy as np
import pytest
import small
import torch
import toy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import T5Config

from af2_ray.audio.windows import WINDOW_SAMPLES
from af2_ray.data.collate import ClapBatch
from af2_ray.models.afclap import AfClapConfig, AfClapModel
from af2_ray.models.htsat import tower_config
from af2_ray.text import IGNORE
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


class Counted(TorchDispatchMode):
    """Counts calls of operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_the_task_reads_nothing_back_from_the_device() -> None:
    """Tensors of the meta device have no values: what looks at one fails."""
    row = cuts.my_rows((2, 2), 1, with_fault=False)[0]
    given: dict[str, Any] = {}

    def model(**inputs: Any) -> Any:
        given.update(inputs)
        return SimpleNamespace(logits=torch.zeros(cuts.TASK.count(row), small.AUDIO + 4, device="meta"))

    moved = row.to("meta")
    assert cuts.TASK.loss(model, moved, 7).is_meta
    assert given["windows_per_clip"].tolist() == row.windows_per_clip.tolist()  # on the host


def test_answers_are_found_before_a_row_leaves_the_host() -> None:
    row = cuts.my_rows((2, 2), 1, with_fault=False)[0].to("cpu")
    is_answer = row.labels[:, 1:] != IGNORE
    hidden = torch.arange(row.labels.numel()).view(row.labels.shape)
    assert torch.equal(hidden[:, :-1][is_answer], hidden.flatten()[row.answer_places])
    assert torch.equal(row.labels[:, 1:][is_answer], row.answer_ids)


def test_a_row_hears_its_own_clip_without_an_index() -> None:
    given: list[Any] = []

    def model(**inputs: Any) -> Any:
        given.append(inputs["audio_index"])
        return SimpleNamespace(logits=torch.zeros(1, 8))

    labels = torch.tensor([[IGNORE, 3], [IGNORE, IGNORE]])
    row = cuts.row_of(0, [0, 1], with_fault=False)
    row = replace(row, labels=labels, input_ids=labels, attention_mask=torch.ones(2, 2))
    for index in ([[0], [1]], [[1], [0]], [[0], [-1]]):
        cuts.TASK.loss(model, replace(row, audio_index=torch.tensor(index)), 1)
    assert given[0] is None
    assert [index.tolist() for index in given[1:]] == [[[1], [0]], [[0], [-1]]]


def test_a_row_s_loss_is_computed_once() -> None:
    row = cuts.my_rows((2, 2), 1, with_fault=False)[0]
    with Counted() as counted:
        cuts.TASK.loss(cuts.make_model(torch.float32), row, 7).backward()
    assert counted.calls["_log_softmax"] == counted.calls["_log_softmax_backward_data"] == 1


def test_nothing_is_read_back_between_the_row_and_its_loss() -> None:
    row = cuts.my_rows((2, 2), 1, with_fault=False)[0]
    cuts.TASK.loss(cuts.make_model(torch.float32).to("meta"), row.to("meta"), 7).backward()
