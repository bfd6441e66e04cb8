"""What trains and how: freezing by group, optimiser groups, the schedule and the DeepSpeed engine.

The DeepSpeed configuration is derived at every start (micro-batch 1 row, accumulation = step rows / workers), so a
recipe says nothing of the worker count and means the same after it changes.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from af2_ray.config import DeepSpeedSettings, Optimizer
from af2_ray.models.htsat import AudioTower
from af2_ray.train.precision import Precision, resolve

NO_DECAY_GROUPS = {"tokens"}
MUON_MOMENTUM = 0.95


def group_of(name: str) -> str:
    """The trainable group of a parameter name of `AudioFlamingo2ForConditionalGeneration` (config.Group), or `mel`.

    `mel`, the scale of the mel BatchNorm, is in no recipe and never trains: its gradient alone would go back through
    the image of the spectrogram (a sixth of the tower's time), for what the first convolution can learn as well.
    """
    if ".audio_encoder.batch_norm." in name:
        return "mel"
    if ".lora_" in name:
        return "lora"
    if name.startswith("audio_tower."):
        return "clap"
    if name.startswith("audio_transform."):
        return "transform"
    if name.startswith("added_embeddings"):
        return "tokens"
    return "xattn" if ".cross_attention." in name or name.startswith("prefix.") else "lm"


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

    def __init__(self, groups: list[dict[str, Any]], *, betas: tuple[float, float]) -> None:
        super().__init__([{"muon": False, **group} for group in groups], {})
        self._parts: dict[bool, torch.optim.Optimizer] = {}
        if matrices := self._groups(muon=True):
            self._parts[True] = torch.optim.Muon(matrices, momentum=MUON_MOMENTUM, adjust_lr_fn="match_rms_adamw")
        if others := self._groups(muon=False):
            self._parts[False] = torch.optim.AdamW(others, betas=betas)

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


def make_optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """AdamW over `optimizer_groups`, with `muon_lr` Muon beside it."""
    groups = optimizer_groups(model, settings)
    if settings.muon_lr is None:
        return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas)
    return MuonAdamW(groups, betas=settings.betas)


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


def deepspeed_config(
    settings: DeepSpeedSettings, optimizer: Optimizer, *, accumulation: int, precision: Precision
) -> dict[str, Any]:
    """The DeepSpeed JSON of a start. `settings.raw` is merged last, key by key."""
    zero: dict[str, Any] = {"stage": settings.zero_stage}
    if settings.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optimizer.grad_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": precision == "bf16"},
        "steps_per_print": 10**9,
    }
    if precision == "mixed":  # no module's gradients travel in bf16
        cast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        config["torch_autocast"] = cast
    return _merge(config, settings.raw)


def start_engine(
    model: nn.Module,
    settings: DeepSpeedSettings,
    optimizer: Optimizer,
    *,
    num_steps: int,
    accumulation: int,
    universal: bool = False,
) -> Any:
    """Wrap a model whose `requires_grad` flags are set in a DeepSpeed engine, on this worker's device.

    Args:
        universal: it will be given a checkpoint in DeepSpeed's universal form, of another number of workers.
    """
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # after DS_ACCELERATOR is set: DeepSpeed picks its device at import

    precision = resolve(settings.precision)
    if precision == "mixed" and not on_gpu and hasattr(model, "language_model"):
        model.language_model.set_attn_implementation("eager")  # by products, as `models.attention` does
    if settings.zero_stage == 3:
        # The tower takes windows in parts, of which ranks have unlike numbers, and uses some weights outside their own
        # module's forward: it is gathered as a whole, once a call.
        for tower in deepspeed.utils.set_z3_leaf_modules(model, [AudioTower], raise_if_not_found=False):
            tower.register_forward_pre_hook(_anchored)
    if optimizer.muon_lr is not None and (precision == "bf16" or settings.zero_stage):
        raise ValueError(
            "optimizer.muon_lr works on whole fp32 matrices, which ZeRO and bf16 flatten: set deepspeed.zero_stage=0 "
            f"(it is {settings.zero_stage}) and deepspeed.precision=fp32 (or mixed), or leave muon_lr out"
        )
    made = make_optimizer(model, optimizer)
    lr_schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda step: schedule(optimizer, num_steps, step))
    config = deepspeed_config(settings, optimizer, accumulation=accumulation, precision=precision)
    if universal and config["zero_optimization"]["stage"]:
        config = _merge(config, {"checkpoint": {"load_universal": True}})
    # DeepSpeed would compile this op at its start and end the worker without a compiler. It serves tensor-parallel
    # inference alone (`inference_all_reduce`): gradients go over the process group with it or without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=made,
        lr_scheduler=lr_schedule,
        config=config,
        dist_init_required=False,
    )
    return engine


def _anchored(tower: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """A tower's inputs, and a zero with a gradient.

    DeepSpeed releases the weights of a module that is gathered as a whole once its inputs have their gradients. Where
    no input has any, PyTorch tells it so before the module's backward pass has begun.
    """
    grad = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in tower.parameters())
    return (*args, torch.zeros((), device=args[0].device, requires_grad=grad))


def checkpoint_activations(model: nn.Module, *, layers: bool, tower: bool) -> None:
    """Recompute activations in the backward pass: of every transformer layer, of the tower's blocks.

    Only the layers' own flags are set, not the mode of what is in them: nothing starts to drop out. Non-reentrant, for
    the audio reaches cross-attention by keyword, where the other kind would lose its gradient.
    """
    for module in model.modules():
        is_layer = layers and isinstance(module, GradientCheckpointingLayer)
        if is_layer or (tower and isinstance(module, AudioTower) and module.trains):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
            module.training = True


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
