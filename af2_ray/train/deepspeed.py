"""The DeepSpeed engine of a stage, and which activations are recomputed.

Its configuration is derived at every start (micro-batch 1 row, accumulation = step rows / workers), so a recipe says
nothing of the worker count and means the same after it changes.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from af2_ray.config import DeepSpeedSettings, Optimizer
from af2_ray.config.read import merge
from af2_ray.models.htsat import AudioTower
from af2_ray.train.optim import make_optimizer, schedule
from af2_ray.train.precision import Precision, resolve


def deepspeed_config(
    settings: DeepSpeedSettings, optimizer: Optimizer, *, accumulation: int, precision: Precision
) -> dict[str, Any]:
    """The DeepSpeed JSON of a start. `settings.raw` is merged last, key by key.

    In bf16 the gradients of a step's rows add up in fp32 where ZeRO partitions them (stages 2 and 3): in bf16, of a
    step of many rows, the last would hardly count. Stage 1 would for that take another optimiser with checkpoints of
    another form, stage 0 none at all; both go on in bf16.

    `overlap_comm` stays DeepSpeed's choice (off below stage 3): with it each micro-batch ends in a wait for the whole
    GPU, for the sake of a reduction that takes some hundredths of it between the GPUs of one machine.
    """
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
        # The norm tells what a pass over all gradients would, and `step.Step` sees it before the update.
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": False},
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the GPU twice a micro-batch
    }
    if precision == "mixed":  # no module's gradients travel in bf16
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    config = merge(config, settings.raw)
    if precision == "bf16" and config["zero_optimization"]["stage"] >= 2:
        config = merge({"data_types": {"grad_accum_dtype": "fp32"}}, config)
    return config


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
        universal: whether a checkpoint of another number of workers follows, in DeepSpeed's universal form.
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
    made = make_optimizer(model, optimizer, fused=on_gpu)
    lr_schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda step: schedule(optimizer, num_steps, step))
    config = deepspeed_config(settings, optimizer, accumulation=accumulation, precision=precision)
    if universal and config["zero_optimization"]["stage"]:
        config = merge(config, {"checkpoint": {"load_universal": True}})
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
