"""Questions end to end in a row give what each gives alone, to the loss and its gradients."""

import pytest
import torch
from small import AUDIO, PAD, SEP, make_model, make_windows

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
