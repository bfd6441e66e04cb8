"""Numbers of the host on the device, without waiting for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def upload(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Nested lists as a tensor on `device`.

    A copy from ordinary memory to a GPU waits until the GPU has done all that was asked before; one from pinned memory
    takes its place in the queue, and PyTorch keeps that memory until the copy is over.
    """
    return send(torch.tensor(values, dtype=dtype), device)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`, as `upload`."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
