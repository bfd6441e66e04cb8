"""What trains and how: freezing by group, optimiser groups (AdamW, Muon) and the learning-rate schedule."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from af2_ray.config import Optimizer
from af2_ray.models.groups import group_of

NO_DECAY_GROUPS = {"tokens"}
MUON_MOMENTUM = 0.95


def freeze_except(model: nn.Module, trainable: Iterable[str]) -> list[str]:
    """Set `requires_grad` by group and return the names that train. An empty result is a `ValueError`."""
    wanted = set(trainable)
    names = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(group_of(name) in wanted)
        if parameter.requires_grad:
            names.append(name)
    if not names:
        raise ValueError(f"nothing to train: the model has no parameter in the groups {sorted(wanted)}")
    return names


def optimizer_groups(model: nn.Module, settings: Optimizer) -> list[dict[str, Any]]:
    """AdamW parameter groups: one for each (learning rate, decay or not); after them Muon's, if it has a rate.

    Vectors (norms, biases, gates) and the added tokens' embeddings do not decay. `settings.lr_scale` multiplies the
    learning rate of a group; `gates` are the tanh gates of cross-attention, which start at zero.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    matrices: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if settings.muon_lr is not None and _multiplies(name, parameter) and group_of(name) in settings.muon_groups:
            matrices.append(parameter)
            continue
        group = "gates" if name.rsplit(".", 1)[-1].endswith("gate") else group_of(name)
        lr = settings.lr * settings.lr_scale.get(group, 1.0)  # type: ignore[call-overload]
        decays = parameter.ndim > 1 and group not in NO_DECAY_GROUPS
        groups.setdefault((lr, settings.weight_decay if decays else 0.0), []).append(parameter)
    out: list[dict[str, Any]] = [
        {"params": found, "lr": lr, "weight_decay": decay} for (lr, decay), found in groups.items()
    ]
    if matrices:
        decay = settings.weight_decay
        out.append({"params": matrices, "lr": settings.muon_lr, "weight_decay": decay, "muon": True})
    return out


def _multiplies(name: str, parameter: nn.Parameter) -> bool:
    """Whether it is a matrix that vectors are multiplied with: no kernel, no table of embeddings or positions."""
    return parameter.ndim == 2 and not re.search(r"(shared|embed\w*|relative_\w*bias\w*)(\.weight)?$", name)


class MuonAdamW(torch.optim.Optimizer):
    """torch's Muon for the groups marked `muon`, its AdamW for the others, behind one list of groups and one state.

    Muon takes the momentum of a matrix to the nearest orthogonal one. On what starts at random beside trained parts it
    needs fewer steps than AdamW: 240 steps of `tiny`'s first stage on cached features came to a loss of 0.28, not 0.34,
    and to 0.55 of 1200 questions on validation clips, not 0.51 (one seed; a step took 1.3 times as long).
    """

    def __init__(self, groups: list[dict[str, Any]], *, betas: tuple[float, float], fused: bool | None = None) -> None:
        super().__init__([{"muon": False, **group} for group in groups], {})
        self._parts: dict[bool, torch.optim.Optimizer] = {}
        if matrices := self._groups(muon=True):
            self._parts[True] = torch.optim.Muon(matrices, momentum=MUON_MOMENTUM, adjust_lr_fn="match_rms_adamw")
        if others := self._groups(muon=False):
            self._parts[False] = torch.optim.AdamW(others, betas=betas, fused=fused)

    def _groups(self, *, muon: bool) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["muon"] == muon]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One update of all groups; a closure is not taken."""
        if closure is not None:
            raise ValueError("MuonAdamW takes no closure")
        for is_muon, part in self._parts.items():  # a loaded state brings new groups and a new state
            part.param_groups = self._groups(muon=is_muon)
            part.state = self.state
            part.step()


def make_optimizer(model: nn.Module, settings: Optimizer, *, fused: bool = False) -> torch.optim.Optimizer:
    """AdamW over `optimizer_groups`, with `muon_lr` Muon beside it.

    Args:
        fused: whether AdamW is one kernel: on a GPU a third of the memory traffic and no temporary as large as the
            weights. Its rounding differs in the last digits, so a CPU keeps the other.
    """
    groups, one_kernel = optimizer_groups(model, settings), fused or None
    if settings.muon_lr is None:
        return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=one_kernel)
    return MuonAdamW(groups, betas=settings.betas, fused=one_kernel)


def set_fused(optimizer: torch.optim.Optimizer, fused: bool) -> None:
    """Go on with the wanted kernel after a load, which brings that of the optimiser that was saved.

    A fused AdamW counts its steps beside the weights, the other on the CPU.
    """
    for group in optimizer.param_groups:
        if "betas" not in group:  # Muon has no such kernel
            continue
        group["fused"] = fused or None
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if "step" in state:
                device = parameter.device if fused else "cpu"
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=device)


def schedule(settings: Optimizer, num_steps: int, step: int) -> float:
    """Learning-rate factor at optimiser step `step` (from 0): linear warm-up, then constant or cosine to zero."""
    if step < settings.warmup_steps:
        return (step + 1) / (settings.warmup_steps + 1)
    if settings.schedule == "constant":
        return 1.0
    progress = (step - settings.warmup_steps) / max(1, num_steps - settings.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def batch_factor(settings: Optimizer, num_labels: int) -> float:
    """Learning-rate factor of a step with so many answer tokens: their share of `batch_labels`, or its square root."""
    if settings.batch_rule == "none" or settings.batch_labels is None:
        return 1.0
    share = num_labels / settings.batch_labels
    return share if settings.batch_rule == "linear" else math.sqrt(share)
