"""Gates of an answering model on a GPU: taken once, and anew when a weight changes."""

import torch
from small import make_model

from af2_ray.models.cross_attention import GatedCrossAttention


@torch.no_grad()
def test_a_gate_is_taken_once_and_follows_its_weight() -> None:
    layer = next(m for m in make_model().modules() if isinstance(m, GatedCrossAttention))
    gate = layer.attn_gate

    def opened() -> torch.Tensor:
        return layer.keep(gate, [gate], gate.tanh)

    assert opened() is opened()
    gate.add_(0.5)
    assert torch.equal(opened(), gate.tanh())
    gate.data.add_(0.5)
    assert torch.equal(layer.eval() and opened(), gate.tanh())
    layer.to(torch.float64)
    assert opened().dtype == torch.float64
    with torch.enable_grad():
        assert opened().requires_grad
