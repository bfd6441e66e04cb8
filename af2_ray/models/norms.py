"""The LM's norms in one kernel on a GPU, where transformers has them as eight."""

from __future__ import annotations

import functools
from typing import Any

import torch.nn.functional as nnf
from torch import Tensor, nn

FUSED = ("Qwen2RMSNorm", "Qwen3RMSNorm", "LlamaRMSNorm", "MistralRMSNorm")
"""Classes that are x / sqrt(mean(x^2) + eps) * weight over the last dimension; others are left as they are."""


def fuse_norms(model: nn.Module) -> None:
    """Let a model's norms run as one kernel on a GPU. On a CPU, and by name and weights, they stay what they are."""
    for module in model.modules():
        if type(module).__name__ in FUSED and not isinstance(module, _OneKernel):
            norm: Any = type(module)
            module.__class__ = _fused(norm)


class _OneKernel(nn.Module):
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.device.type == "cpu" or hidden_states.dtype != self.weight.dtype:
            separate: Tensor = super().forward(hidden_states)
            return separate
        return nnf.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


@functools.cache
def _fused(norm: Any) -> Any:
    return type(norm.__name__, (_OneKernel, norm), {"__module__": norm.__module__, "__qualname__": norm.__qualname__})
