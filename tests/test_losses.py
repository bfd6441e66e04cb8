"""Both losses against loops written from the paper's formula, and what they do with nothing to learn."""

import torch
import torch.nn.functional as nnf

from af2_ray.losses import afclap_loss, lm_loss_sum, token_loss_sum


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


def test_lm_loss_sums_over_shifted_answer_tokens() -> None:
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[-100, -100, 3, 4, -100], [-100, 1, 2, 3, 4]])
    total, count = lm_loss_sum(logits, labels)
    expected = sum(
        nnf.cross_entropy(logits[b, t - 1], labels[b, t]) for b in range(2) for t in range(1, 5) if labels[b, t] != -100
    )
    torch.testing.assert_close(total, expected)
    assert count == 6
    chosen = labels[:, 1:] != -100
    torch.testing.assert_close(token_loss_sum(logits[:, :-1][chosen], labels[:, 1:][chosen])[0], total)


def test_lm_loss_without_labels_is_zero_with_zero_gradients() -> None:
    logits = torch.randn(2, 5, 7, requires_grad=True)
    total, count = lm_loss_sum(logits, torch.full((2, 5), -100))
    total.backward()
    assert total == 0
    assert count == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_afclap_loss_is_the_papers_formula() -> None:
    clips, m, n, scale = 4, 3, 2, 5.0
    audio, positives, negatives, positive_mask, negative_mask = captions(clips, m, n)
    loss = afclap_loss(audio, positives, negatives, positive_mask, negative_mask, torch.tensor(scale))
    s = lambda u, v: torch.exp(scale * (u * v).sum())  # noqa: E731
    expected = torch.zeros(())
    for i in range(clips):
        total = [sum(s(positives[j, k], audio[i]) for k in range(m)) for j in range(clips)]
        harder = sum(s(negatives[i, k, o], audio[i]) for k in range(m) for o in range(n))
        expected = expected - torch.log(total[i] / (harder + sum(total))) / clips
    torch.testing.assert_close(loss, expected)


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
    assert torch.allclose(token_loss_sum(logits, targets)[0], right)
    smooth = 0.9 * right - 0.1 * logp.mean(-1).sum()
    assert torch.allclose(token_loss_sum(logits, targets, label_smoothing=0.1)[0], smooth)
    drift = 0.01 * logits.logsumexp(-1).square().sum()
    assert torch.allclose(token_loss_sum(logits, targets, z_loss=0.01)[0], right + drift)
