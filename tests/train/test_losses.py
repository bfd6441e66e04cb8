"""Both losses against loops written from the paper's formula, and what they do with nothing to learn."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf

from af2_ray.train import losses
from af2_ray.train.losses import MAX_SCALE, MIN_SCALE, afclap_loss_sum, clamp_scale, token_loss_sum


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return nnf.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def captions(clips: int, m: int, n: int, width: int = 8) -> tuple[torch.Tensor, ...]:
    return (
        unit(clips, width, seed=1).requires_grad_(),
        unit(clips, m, width, seed=2),
        unit(clips, m, n, width, seed=3),
        torch.ones(clips, m, dtype=torch.bool),
        torch.ones(clips, m, n, dtype=torch.bool),
    )


def afclap_loss(
    audio: torch.Tensor,
    positives: torch.Tensor,
    negatives: torch.Tensor,
    positive_mask: torch.Tensor,
    *more: Any,
    **options: Any,
) -> torch.Tensor:
    """The mean over the clips that count."""
    loss = afclap_loss_sum(audio, positives, negatives, positive_mask, *more, **options)
    return loss / positive_mask.any(dim=1).sum().clamp(min=1)


def test_lm_loss_sums_over_shifted_answer_tokens() -> None:
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[-100, -100, 3, 4, -100], [-100, 1, 2, 3, 4]])
    chosen = labels[:, 1:] != -100
    total = token_loss_sum(logits[:, :-1][chosen], labels[:, 1:][chosen])
    expected = sum(
        nnf.cross_entropy(logits[b, t - 1], labels[b, t]) for b in range(2) for t in range(1, 5) if labels[b, t] != -100
    )
    torch.testing.assert_close(total, expected)


def test_lm_loss_without_labels_is_zero_with_zero_gradients() -> None:
    logits = torch.randn(2, 5, 7, requires_grad=True)
    total = token_loss_sum(logits[:0, 0], torch.zeros(0, dtype=torch.long))
    total.backward()
    assert total == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def double_loop(
    audio: torch.Tensor, positives: torch.Tensor, negatives: torch.Tensor, masks: tuple[torch.Tensor, ...], scale: float
) -> torch.Tensor:
    """The paper's formula (docs/paper.md, "AF-CLAP"), caption by caption, in float64."""
    positive_mask, negative_mask = masks
    s = lambda u, v: torch.exp(scale * (u.double() * v.double()).sum())  # noqa: E731
    total, counted = torch.zeros((), dtype=torch.float64), 0
    for i in range(len(audio)):
        if not positive_mask[i].any():
            continue
        sums = [
            sum((s(positives[j, m], audio[i]) for m in positive_mask[j].nonzero().flatten()), torch.tensor(0.0))
            for j in range(len(audio))
        ]
        harder = sum((s(negatives[i, m, n], audio[i]) for m, n in negative_mask[i].nonzero()), torch.tensor(0.0))
        total, counted = total - torch.log(sums[i] / (harder + sum(sums))), counted + 1
    return total / counted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "n"), [(3, 3), (3, 0), (1, 3), (1, 0)])
def test_afclap_loss_is_the_papers_formula(m: int, n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    clips, scale = 7, 14.0
    audio, positives, negatives, *_ = (t.detach().to(dtype) for t in captions(clips, m, n))
    generator = torch.Generator().manual_seed(9)
    positive_mask = torch.rand(clips, m, generator=generator) < 0.8
    negative_mask = torch.rand(clips, m, n, generator=generator) < 0.8
    positive_mask[0], positive_mask[1:, 0] = False, True
    masks = (positive_mask, negative_mask)
    expected = double_loop(audio, positives, negatives, masks, scale)
    for part in (2**21, 1, 2 * clips * m):  # all clips at once, one at a time, two at a time
        monkeypatch.setattr(losses, "PART", part)
        loss = afclap_loss(audio, positives, negatives, *masks, torch.tensor(scale, dtype=dtype))
        assert loss.dtype == dtype
        assert abs(loss.double() - expected) < 1e-6


def test_gradients_are_those_of_the_formula_whatever_the_part(monkeypatch: pytest.MonkeyPatch) -> None:
    audio, positives, negatives, positive_mask, negative_mask = captions(6, 3, 2)
    positive_mask[1, 2] = negative_mask[1, 2] = False
    leaves = [t.detach().double().requires_grad_() for t in (audio, positives, negatives, torch.tensor([9.0]))]

    def formula() -> torch.Tensor:
        return double_loop(*leaves[:3], (positive_mask, negative_mask), leaves[3])  # type: ignore[arg-type]

    expected = torch.autograd.grad(formula(), leaves)
    for part in (2**21, 1):
        monkeypatch.setattr(losses, "PART", part)
        loss = afclap_loss(*leaves[:3], positive_mask, negative_mask, leaves[3])
        for mine, theirs in zip(torch.autograd.grad(3 * loss, leaves), expected, strict=True):
            torch.testing.assert_close(mine, 3 * theirs, rtol=1e-10, atol=1e-12)


def test_no_table_of_similarities_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between forward and backward there is nothing larger than the features themselves."""
    monkeypatch.setattr(losses, "PART", 256)
    args = [t.requires_grad_() if t.dtype.is_floating_point else t for t in captions(64, 3, 0, width=4)]
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        afclap_loss(*args, torch.tensor(3.0))
    assert max(kept) <= 64 * 3 * 4  # the table would have 64 * 192


def test_every_positive_is_a_mean_of_logs_over_the_positives_that_exist() -> None:
    audio, positives, negatives, positive_mask, negative_mask = captions(4, 3, 2)
    positive_mask[1, 1:] = positive_mask[3] = False
    args = (audio, positives, negatives, positive_mask, negative_mask, torch.tensor(3.0))
    terms = [3 * positives[i][positive_mask[i]] @ audio[i] for i in range(3)]
    more = torch.stack([term.logsumexp(0) - term.mean() for term in terms]).mean()
    torch.testing.assert_close(afclap_loss(*args, every_positive=True), afclap_loss(*args) + more)
    alone = (audio, positives[:, :1], negatives[:, :1], positive_mask[:, :1], negative_mask[:, :1], args[-1])
    torch.testing.assert_close(afclap_loss(*alone, every_positive=True), afclap_loss(*alone))


def test_the_papers_sum_lets_a_far_paraphrase_be_and_every_positive_does_not() -> None:
    """What the option is for: of a clip's two positives one is near, one opposite; who pulls the far one?"""
    audio = torch.eye(2, 4)
    positives = torch.stack([audio, -audio], dim=1).requires_grad_()
    args = (torch.zeros(2, 2, 0, 4), torch.ones(2, 2, dtype=torch.bool), torch.ones(2, 2, 0, dtype=torch.bool))
    pull = []
    for every_positive in (False, True):
        loss = afclap_loss(audio, positives, *args, torch.tensor(10.0), every_positive=every_positive)
        (gradient,) = torch.autograd.grad(loss, positives)
        pull.append(-gradient[0, 1, 0].item())
    assert pull[0] < 1e-6
    assert pull[1] > 1


def test_symmetric_vanilla_is_clips_loss() -> None:
    audio, positives, negatives, positive_mask, negative_mask = captions(5, 1, 0)
    loss = afclap_loss(audio, positives, negatives, positive_mask, negative_mask, torch.tensor(3.0), symmetric=True)
    logits, own = 3 * audio @ positives[:, 0].T, torch.arange(5)
    torch.testing.assert_close(loss, (nnf.cross_entropy(logits, own) + nnf.cross_entropy(logits.T, own)) / 2)


def test_symmetric_paraphrases_share_their_clips_weight() -> None:
    audio, positives, negatives, positive_mask, negative_mask = captions(4, 3, 2)
    positive_mask[1, 1:] = positive_mask[3] = False
    args = (positive_mask, negative_mask, torch.tensor(3.0))
    audio = audio.detach()
    there = afclap_loss(audio, positives, negatives, *args)
    both = afclap_loss(audio, positives, negatives, *args, symmetric=True)
    back = 0.0
    for i in range(3):
        losses_ = [nnf.cross_entropy(3 * positives[i, m] @ audio[:3].T, torch.tensor(i)) for m in range(3)]
        back += float(torch.stack([x for x, exists in zip(losses_, positive_mask[i], strict=True) if exists]).mean())
    torch.testing.assert_close(both, (there + back / 3) / 2)


def test_the_temperature_stays_in_its_range_and_can_come_back() -> None:
    logs = torch.tensor([-1.0, 0.0, 2.0, math.log(100), 6.0], requires_grad=True)
    scale = clamp_scale(logs)
    torch.testing.assert_close(scale, torch.tensor([MIN_SCALE, MIN_SCALE, math.exp(2), MAX_SCALE, MAX_SCALE]))
    for sign in (1.0, -1.0):  # descent goes against the gradient: 1 makes the factor smaller
        (gradient,) = torch.autograd.grad(sign * scale.sum(), logs, retain_graph=True)
        moves = gradient != 0
        assert moves.tolist() == [sign < 0, sign < 0, True, sign > 0, sign > 0]


def test_one_positive_and_no_negative_is_the_plain_contrastive_loss() -> None:
    audio, positives, negatives, positive_mask, negative_mask = captions(5, 1, 0)
    loss = afclap_loss(audio, positives, negatives, positive_mask, negative_mask, torch.tensor(3.0))
    torch.testing.assert_close(loss, nnf.cross_entropy(3 * audio @ positives[:, 0].T, torch.arange(5)))


def test_masked_captions_take_no_part() -> None:
    audio, positives, negatives, positive_mask, negative_mask = captions(4, 3, 2)
    positive_mask[1, 2] = negative_mask[1, 2] = False
    positive_mask[3] = negative_mask[3] = False
    args = (positive_mask, negative_mask, torch.tensor(3.0))
    loss = afclap_loss(audio, positives, negatives, *args)
    changed, changed_negatives = positives.clone(), negatives.clone()
    changed[1, 2], changed[3], changed_negatives[1, 2] = unit(8, seed=7), unit(3, 8, seed=8), unit(2, 8, seed=9)
    assert torch.equal(afclap_loss(audio, changed, changed_negatives, *args), loss)
    (gradient,) = torch.autograd.grad(loss, audio)
    assert gradient.isfinite().all()
    assert not gradient[3].any()


def test_afclap_loss_without_captions_is_zero_with_zero_gradients() -> None:
    audio, positives, negatives, positive_mask, negative_mask = captions(2, 3, 3)
    none = (torch.zeros_like(positive_mask), torch.zeros_like(negative_mask))
    loss = afclap_loss(audio, positives, negatives, *none, torch.tensor(3.0))
    (gradient,) = torch.autograd.grad(loss, audio)
    assert loss == 0
    assert not gradient.any()


def test_label_smoothing_and_z_loss_are_what_they_say():
    torch.manual_seed(0)
    logits, targets = torch.randn(4, 7, dtype=torch.float64), torch.tensor([0, 3, 6, 2])
    logp = logits.log_softmax(-1)
    right = -logp[torch.arange(4), targets].sum()
    assert torch.allclose(token_loss_sum(logits, targets), right)
    smooth = 0.9 * right - 0.1 * logp.mean(-1).sum()
    assert torch.allclose(token_loss_sum(logits, targets, label_smoothing=0.1), smooth)
    drift = 0.01 * logits.logsumexp(-1).square().sum()
    assert torch.allclose(token_loss_sum(logits, targets, z_loss=0.01), right + drift)
