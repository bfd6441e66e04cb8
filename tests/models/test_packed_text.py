"""Questions end to end in a row give what each gives alone, to the loss and its gradients."""

import pytest
import torch
from small import AUDIO, PAD, SEP, make_model, make_windows

from af2_ray.models import audio_states
from af2_ray.models.packed_text import count_markers

IGNORE = -100


def make_texts() -> list[torch.Tensor]:
    """Five texts of unlike length, the third with its marker in the middle."""
    generator = torch.Generator().manual_seed(4)
    texts = [torch.randint(1, AUDIO, (length,), generator=generator) for length in (9, 5, 7, 12, 6)]
    for text, place in zip(texts, (0, 0, 2, 0, 0), strict=True):
        text[place], text[-3] = AUDIO, SEP
    return texts


def rows_of(texts: list[torch.Tensor], sizes: list[int]) -> dict[str, torch.Tensor]:
    """Ids, numbers and labels (the last two tokens of each text) of the texts by so many a row, padded on the right."""
    rows, place = [], 0
    for size in sizes:
        own = texts[place : place + size]
        numbers = torch.cat([torch.full_like(text, n) for n, text in enumerate(own, 1)])
        labels = torch.cat([torch.cat((torch.full_like(text[:-2], IGNORE), text[-2:])) for text in own])
        rows.append((torch.cat(own), numbers, labels))
        place += size
    columns = zip(*rows, strict=True)
    padded = [
        torch.nn.utils.rnn.pad_sequence(list(column), batch_first=True, padding_value=value)
        for column, value in zip(columns, (PAD, 0, IGNORE), strict=True)
    ]
    return dict(zip(("input_ids", "attention_mask", "labels"), padded, strict=True))


@pytest.mark.parametrize("fusion", ["xattn", "prefix"])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_as_if_alone(fusion: str, family: str) -> None:
    model, texts = make_model(family, fusion=fusion), make_texts()
    audio = {"waveforms": make_windows(3), "windows_per_clip": [1, 2]}
    grads, logits = [], []
    for sizes, clips in (([1] * 5, [0, 0, 0, 1, 1]), ([3, 2], [0, 1])):
        model.zero_grad()
        given = rows_of(texts, sizes)
        output = model(**given, **audio, audio_index=torch.tensor(clips)[:, None], answers_only=True)
        output.loss.backward()
        logits.append(output.logits.detach())
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(logits[1], logits[0], atol=2e-4, rtol=1e-4)
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=2e-4 + 1e-3 * float(grad.abs().max()), rtol=0)


def test_flash_attention_is_refused() -> None:
    model = make_model()
    model.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="use attn_implementation='sdpa'"):
        model(**rows_of(make_texts(), [3, 2]))


@pytest.mark.parametrize("on_host", [True, False], ids=["end to end", "as any index"])
@pytest.mark.parametrize("fusion", ["xattn", "prefix"])
def test_several_recordings_are_heard_as_if_alone(fusion: str, on_host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two texts about two recordings of unlike length, and three about one, which share a batch."""
    if not on_host:  # the way that an index on a GPU takes
        monkeypatch.setattr(audio_states, "end_to_end", lambda *_: None)
    model, texts = make_model(fusion=fusion), make_texts()
    texts[0][4] = AUDIO  # its second recording comes with a later question
    texts[1][1] = AUDIO
    audio = {"waveforms": make_windows(5), "windows_per_clip": [1, 3, 1]}
    grads, logits = [], []
    for sizes, clips in (
        ([1] * 5, [[0, 1], [0, 1], [2, -1], [2, -1], [2, -1]]),
        ([2, 3], [[0, 1], [2, -1]]),
    ):
        model.zero_grad()
        given = rows_of(texts, sizes)
        output = model(**given, **audio, audio_index=torch.tensor(clips), answers_only=True)
        output.loss.backward()
        logits.append(output.logits.detach())
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(logits[1], logits[0], atol=2e-4, rtol=1e-4)
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=2e-4 + 1e-3 * float(grad.abs().max()), rtol=0)

    alone = []
    for text, clips in zip(texts, [[0, 1], [0, 1], [2], [2], [2]], strict=True):
        windows = [audio["waveforms"][:1], audio["waveforms"][1:4], audio["waveforms"][4:]]
        own = {
            "waveforms": torch.cat([windows[n] for n in clips]),
            "windows_per_clip": [len(windows[n]) for n in clips],
        }
        index = torch.arange(len(clips))[None]
        alone.append(model(text[None], **own, audio_index=index).logits[0, -3:-1].detach())
    torch.testing.assert_close(logits[1], torch.cat(alone), atol=2e-4, rtol=1e-4)


def test_an_early_question_does_not_hear_a_later_recording() -> None:
    model, (text, *_) = make_model(), make_texts()
    text[4] = AUDIO
    windows, index = make_windows(3), torch.tensor([[0, 1]])
    numbers = torch.cat([torch.full_like(text, number) for number in (1, 2)])[None]
    ids = torch.cat([text, text])[None]

    def heard(windows: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(ids, numbers, windows, [1, 2], index, texts_per_row=2).logits[0].view(2, len(text), -1)

    one, two = heard(windows), heard(torch.cat([windows[:1], windows[1:].flip(0)]))
    torch.testing.assert_close(one[:, :4], two[:, :4])
    assert (one[:, 4:] - two[:, 4:]).abs().amin(dim=1).max() > 1e-3
    torch.testing.assert_close(one[0], one[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        (None, [1, 1, 2, 3, 3, 4, 4]),
        ([1, 1, 1, 2, 2, 3, 3], [1, 1, 2, 1, 1, 1, 1]),
        ([1, 1, 1, 2, 2, 2, 0], [1, 1, 2, 1, 1, 2, 2]),
        ([0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 2, 2, 3, 3]),
    ],
)
def test_markers_are_counted_from_a_text_s_own_beginning(numbers: list[int] | None, expected: list[int]) -> None:
    is_marker = torch.tensor([[1, 0, 1, 1, 0, 1, 0]]).bool()
    found = count_markers(is_marker, None if numbers is None else torch.tensor([numbers]))
    assert found[0].tolist() == expected
