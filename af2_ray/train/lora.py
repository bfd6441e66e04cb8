"""Low-rank adapters on the LM for one stage, by peft: `trainable: [lora, ...]` with a `lora` block.

They start as nothing (B is 0), train in place of the LM's matrices, and are merged into them on export: the next stage,
evaluation and the server see an ordinary folder. The price is that a merged adapter cannot be taken out again.
"""

from __future__ import annotations

from torch import nn

from af2_ray.config import Lora


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


def merge_lora(model: nn.Module) -> None:
    """Add every adapter to its matrix and take it out; nothing happens to a model without any."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "lora_A"):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
