"""The small LM's pre-training loss: answers before prompts, every text alike."""

from __future__ import annotations

import torch
import torch.nn.functional as nnf

from af2_ray.train.stage_lm import text_loss


def test_every_text_weighs_alike_and_prompts_little() -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 6, 11), torch.randint(0, 11, (2, 6))
    real = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    answers = torch.tensor([[0, 0, 0, 1, 0, 0], [0, 0, 1, 1, 1, 1]]).bool()
    each = nnf.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    first = each[0, 2] + 0.1 * each[0, :2].mean()
    second = each[1, 1:].mean() + 0.1 * each[1, 0]
    torch.testing.assert_close(text_loss(logits, ids, real, answers, 0.1), (first + second) / 2)


def test_padding_teaches_nothing() -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(1, 5, 11), torch.randint(0, 11, (1, 5))
    real, answers = torch.tensor([[1, 1, 1, 0, 0]]), torch.tensor([[0, 0, 1, 1, 1]]).bool()
    changed = torch.cat([ids[:, :3], (ids[:, 3:] + 1) % 11], dim=1)
    same = text_loss(logits, ids, real, answers, 0.1)
    torch.testing.assert_close(text_loss(logits, changed, real, answers, 0.1), same)
