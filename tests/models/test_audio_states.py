"""Clips end to end and in a rectangle, and what a training row costs whatever the number of its clips."""

from collections import Counter
from typing import Any

import pytest
import torch
from small import make_ids, make_model, make_windows
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from af2_ray.models import modeling_af2
from af2_ray.models.audio_states import AudioStates, Rectangle, end_to_end
from af2_ray.models.cross_attention import AudioContext, GatedCrossAttention


@pytest.mark.parametrize("lengths", [[2, 2, 2], [3, 1, 2, 5], [4]])
def test_a_rectangle_and_back(lengths: list[int]) -> None:
    packed = torch.randn(sum(lengths), 3, dtype=torch.float64, requires_grad=True)
    expected = pad_sequence(packed.split(lengths), batch_first=True)
    states = AudioStates.of_packed(packed, lengths)
    assert len(states) == len(lengths)
    assert states.mask.sum(dim=1).tolist() == lengths
    assert torch.equal(states.hidden, expected)
    again, rectangle = AudioStates(states.hidden, states.mask).pack()
    assert torch.equal(again, packed)
    weights = torch.randn_like(expected) * states.mask[..., None]
    (theirs,) = torch.autograd.grad((expected * weights).sum(), packed)
    (mine,) = torch.autograd.grad((rectangle.fill(packed) * weights).sum(), packed)
    assert torch.equal(mine, theirs)


def test_clips_of_one_length_are_not_copied() -> None:
    packed = torch.randn(6, 3)
    assert Rectangle([2, 2, 2], packed.device).fill(packed).data_ptr() == packed.data_ptr()


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("ragged", [False, True])
def test_the_number_of_clips_adds_no_operation_to_cross_attention(ragged: bool) -> None:
    model = make_model().train()
    layer = next(m for m in model.modules() if isinstance(m, GatedCrossAttention))

    def count(num_clips: int) -> Counter[str]:
        lengths = [3 + (number % 2 if ragged else 0) for number in range(num_clips)]
        packed = torch.randn(sum(lengths), model.audio_tower.output_size, requires_grad=True)
        rectangle = Rectangle(lengths, packed.device)
        x = torch.randn(num_clips, 5, 32, requires_grad=True)
        context = model_context(packed, rectangle, x)
        layer.zero_grad()  # where there is a gradient, one more is added to it
        with _Count() as mode:
            layer(x, context).sum().backward()
        return mode.found

    assert count(2) == count(16)


def model_context(packed: torch.Tensor, rectangle: Rectangle, x: torch.Tensor) -> Any:
    penalty = torch.zeros(rectangle.mask.shape).masked_fill_(~rectangle.mask, torch.finfo(torch.float32).min)
    mask = penalty[:, None, None].expand(-1, 1, x.shape[1], -1)
    return AudioContext(packed, rectangle, None, mask, torch.ones(len(x), 1, 1, dtype=torch.bool), None)


def test_a_row_whose_facts_are_known_reads_nothing_from_its_device() -> None:
    """On the meta device there is nothing to be read: whatever reads a value is an error."""
    model, ids = make_model(time_features=4, moments=2).train(), make_ids(3, 12)
    places = torch.tensor([8, 9, 20, 33])
    given = {
        "attention_mask": torch.ones_like(ids),
        "windows_per_clip": torch.tensor([1, 2, 1]),
        "texts_per_row": 1,
        "audio_index": torch.tensor([[0], [2], [1]]),
    }
    features = model.audio_tower(make_windows(4)).detach()
    here = model(ids, **given, tower_features=features, answer_places=places)
    assert here.loss is None
    whole = model(ids, **given, tower_features=features).logits
    assert torch.equal(here.logits, whole.flatten(0, 1)[places])
    meta = {name: value.to("meta") for name, value in (("input_ids", ids), ("tower_features", features))}
    given["attention_mask"] = given["attention_mask"].to("meta")
    out = model.to("meta")(**meta, **given, answer_places=places.to("meta"))
    assert out.logits.shape == here.logits.shape
    out.logits.sum().backward()


def test_a_mask_of_single_texts_that_is_known_gives_what_transformers_makes_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a GPU does, done on the CPU: rows padded on the right, the additive mask in place of transformers'."""
    model, ids = make_model().eval(), make_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    given = {"waveforms": make_windows(2), "windows_per_clip": [1, 1], "attention_mask": mask}
    expected = model(ids, **given).logits
    monkeypatch.setattr(modeling_af2, "text_numbers", lambda mask, *args: mask)
    torch.testing.assert_close(model(ids, **given).logits[mask == 1], expected[mask == 1], atol=1e-5, rtol=1e-5)


def test_audios_of_a_row_stand_end_to_end_where_each_is_heard_once_in_order() -> None:
    packed = torch.arange(6.0)[:, None]
    states = AudioStates.of_packed(packed, [1, 3, 2])
    rows, ordinals = end_to_end(states, torch.tensor([[0, 1], [2, -1]])) or pytest.fail("they are in order")
    assert rows.hidden[..., 0].tolist() == [[0, 1, 2, 3], [4, 5, 0, 0]]
    assert rows.mask.sum(dim=1).tolist() == [4, 2]
    assert ordinals.tolist() == [[1, 2, 2, 2], [1, 1, 0, 0]]
    for index in ([[0], [1], [2]], [[1, 0], [2, -1]], [[0, 1], [0, 2]], [[0, 1]]):
        assert end_to_end(states, torch.tensor(index)) is None
