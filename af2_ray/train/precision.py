"""The numbers that a training computes in: a recipe's `deepspeed.precision` on this process' device.

`mixed` keeps weights, gradients and optimiser in fp32 and multiplies matrices in bf16 (PyTorch's autocast). A CPU with
instructions for that takes three quarters of the time over a step of recipe `tiny`; one without would take several
times as long, and computes in fp32 throughout.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal

import torch

Precision = Literal["fp32", "bf16", "mixed"]


def resolve(wanted: Literal["auto", "fp32", "bf16", "mixed"], *, on_gpu: bool | None = None) -> Precision:
    """The numbers that a setting stands for. `on_gpu`: whether training is on a GPU; none: if this process has one."""
    on_gpu = torch.cuda.is_available() if on_gpu is None else on_gpu
    if wanted == "auto":
        return "bf16" if on_gpu else "fp32"
    return "fp32" if wanted == "mixed" and not (on_gpu or multiplies_bf16()) else wanted


def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products of bf16."""
    known = torch.cpu.get_capabilities()
    return any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def autocast(device: str, precision: Precision) -> AbstractContextManager[object]:
    """A context with matrix products in bf16, if the precision is `mixed`."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "mixed")
