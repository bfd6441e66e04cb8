"""Low-rank adapters on the LM, by peft: `trainable: [lora, ...]` with a `lora` block; added, kept, read and merged.

They start as nothing (B is 0), train in place of the LM's matrices, and are merged into them on export: the next stage,
evaluation and the server see an ordinary folder. A merged adapter cannot be taken out again, so it is kept beside the
export as peft writes it (`parts`).

The sum of a merged matrix is taken rank by rank, each product and each sum rounded to fp32: it has the same bits on
any device, where a matrix product adds up in an order of its own. That is 16 passes over a matrix at rank 16, some ten
seconds of one CPU core for the attention of a 3B LM.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from af2_ray.config import Lora
from af2_ray.storage.files import Damaged

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_NAME = "default"  # of the adapter in peft's modules
_PREFIX, _WRAPPED = "base_model.model.", ".decoder_layer."  # of names in peft's files; of the bare LM's layers here


def add_lora(lm: nn.Module, settings: Lora) -> None:
    """Put adapters beside the LM's linear layers named in `settings.targets`; `ValueError` for a name no layer has."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=list(settings.targets))
    try:
        inject_adapter_in_model(config, lm)
    except ValueError as error:
        names = sorted(
            {name.rsplit(".", 1)[-1] for name, module in lm.named_modules() if isinstance(module, nn.Linear)}
        )
        raise ValueError(f"lora.targets={settings.targets}: the LM's linear layers are {names}") from error


def adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The names and modules of a model's layers that have an adapter."""
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "lora_A"))


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add every adapter to its matrix and take it out; nothing happens to a model without any."""
    for name, module in list(adapted(model)):
        layer = module.get_base_layer()
        a, b = (part[_NAME].weight.float() for part in (module.lora_A, module.lora_B))
        delta, product = (torch.zeros_like(layer.weight, dtype=torch.float32) for _ in range(2))
        for rank in range(len(a)):
            delta += torch.mul(b[:, rank, None], a[rank], out=product)
        layer.weight.data.copy_(layer.weight.float() + delta * module.scaling[_NAME])
        model.set_submodule(name, layer)


def save_adapter(lm: nn.Module, folder: Path) -> None:
    """Write an LM's adapters as peft does, by the names of the bare LM: `PeftModel.from_pretrained` puts them on it."""
    from peft import LoraConfig

    tensors, modules = {}, dict(adapted(lm))
    for name, module in modules.items():
        for part in ("lora_A", "lora_B"):
            weight: Tensor = getattr(module, part)[_NAME].weight
            tensors[f"{_PREFIX}{name.replace(_WRAPPED, '.')}.{part}.weight"] = weight.detach().cpu().contiguous()
    first = next(iter(modules.values()))
    config = LoraConfig(
        r=first.r[_NAME],
        lora_alpha=first.lora_alpha[_NAME],
        target_modules=sorted({name.rsplit(".", 1)[-1] for name in modules}),
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config.to_dict(), indent=2, sort_keys=True, default=sorted))


def load_adapter(lm: nn.Module, folder: Path) -> None:
    """Put adapters that `save_adapter` wrote on an LM, unmerged, with its matrices' device and type.

    Raises:
        ValueError: a file is missing or damaged, or the adapters are of another kind or of another LM.
    """
    from peft import inject_adapter_in_model

    tensors = read_tensors(folder / ADAPTER)
    inject_adapter_in_model(_config(folder / ADAPTER_CONFIG), lm, low_cpu_mem_usage=True)
    for name, module in adapted(lm):
        like = module.get_base_layer().weight
        for part in ("lora_A", "lora_B"):
            layer = getattr(module, part)[_NAME]
            value = tensors.pop(f"{_PREFIX}{name.replace(_WRAPPED, '.')}.{part}.weight", None)
            if value is None or value.shape != layer.weight.shape:
                raise ValueError(f"{folder / ADAPTER} has no {part} of the LM's {name}: it is of another LM")
            layer.weight = nn.Parameter(value.to(like), requires_grad=False)
    if tensors:
        raise ValueError(f"{folder / ADAPTER} has {next(iter(tensors))}, a layer that the LM has not: it is of another")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; `files.Damaged` where it is missing or cannot be read."""
    try:
        return load_file(_there(path))
    except (SafetensorError, OSError) as error:
        raise Damaged(f"{path} is damaged: {error}; put back a copy") from error


def _config(path: Path) -> Any:
    """The peft configuration of a file, of which size and layers are taken."""
    from peft import LoraConfig

    try:
        given = json.loads(_there(path).read_bytes())
        targets = [str(name) for name in given["target_modules"]]
        config = LoraConfig(
            r=int(given["r"]), lora_alpha=given["lora_alpha"], target_modules=targets, inference_mode=True
        )
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise Damaged(f"{path} is damaged: no configuration of adapters: {error!r}; put back a copy") from error
    for key in ("peft_type", "bias", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save"):
        if given.get(key, value := getattr(config, key)) != value:
            raise ValueError(f"{path}: {key}={given[key]!r} is not supported: only LoRA of one rank and scale is")
    return config


def _there(path: Path) -> Path:
    if not path.is_file():
        raise Damaged(f"{path} is missing: it was written with the other files of its folder; put back a copy")
    return path
