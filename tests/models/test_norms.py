"""The LM's norms as one kernel: the same numbers, class, weights and copies."""

import copy

import pytest
import torch
import torch.nn.functional as nnf
from small import make_lm, make_model

from af2_ray.models import norms


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_one_kernel_gives_the_same_to_rounding(family: str) -> None:
    lm = make_lm(family)
    names, norm = set(lm.state_dict()), lm.model.norm
    norm.weight.data.uniform_(0.5, 2)
    x, written = torch.randn(3, 5, 32, requires_grad=True), type(norm).__name__
    expected = norm(x)
    norms.fuse_norms(lm)
    assert torch.equal(norm(x), expected)  # a CPU keeps transformers' own steps
    one = nnf.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)
    torch.testing.assert_close(one, expected, atol=1e-6, rtol=1e-6)
    for mine, theirs in zip(*(torch.autograd.grad(y.square().sum(), (x, norm.weight)) for y in (one, expected))):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-5)
    assert set(lm.state_dict()) == names
    assert type(norm).__name__ == written
    assert torch.equal(copy.deepcopy(norm)(x), expected)


def test_a_device_that_is_no_cpu_takes_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(norms.nnf, "rms_norm", lambda x, *args: calls.append(args) or x)
    model = make_model().to("meta")
    ids = torch.ones(1, 4, dtype=torch.long, device="meta")
    model(ids, attention_mask=ids, texts_per_row=1)
    assert len(calls) == 2 * 4 + 1
