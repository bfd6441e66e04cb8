"""Entries in another order and back, with gradients."""

import torch

from af2_ray.models.reorder import reorder


def test_gradients_are_those_of_a_selection() -> None:
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    index, inverse = torch.tensor([3, 0, 4, 1, 2, 0]), torch.tensor([1, 3, 4, 0, 2])  # the last entry is padding
    weights = torch.randn(2, 6, 3, dtype=torch.float64)
    weights[:, -1] = 0
    moved = reorder(x, index, inverse, 1)
    assert torch.equal(moved, x.index_select(1, index))
    (mine,) = torch.autograd.grad((moved * weights).sum(), x)
    (theirs,) = torch.autograd.grad((x.index_select(1, index) * weights).sum(), x)
    assert torch.equal(mine, theirs)
    assert torch.autograd.gradcheck(lambda t: reorder(t, index[:5], inverse, 1), x)
