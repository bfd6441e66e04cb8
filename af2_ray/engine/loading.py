"""From a folder to a model and its tokenizer: of a whole export, or of a small part on the model that it belongs to."""

from __future__ import annotations

import logging

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from af2_ray.models.modeling_af2 import AudioFlamingo2ForConditionalGeneration
from af2_ray.models.parts import Base, opened, own_bytes
from af2_ray.storage.parts import is_part
from af2_ray.storage.stores import local_model

logger = logging.getLogger(__name__)


def load(
    folder: str, device: str, base: Base | None
) -> tuple[AudioFlamingo2ForConditionalGeneration, PreTrainedTokenizerBase]:
    """The model and the tokenizer of a folder.

    Args:
        folder: export, or small part of `base`, on this machine or in object storage.
        device: where an export goes; `auto`: a GPU in bf16 if there is one, else CPU. A part is where its base is.

    Raises:
        ValueError: no model is there, a part without its base or of another, or a file is damaged.
    """
    if base is not None and is_part(folder):
        with opened(folder, base) as (model, files):
            tokenizer = AutoTokenizer.from_pretrained(files)
        logger.info("loaded %s with %d bytes of its own, on %s", folder, own_bytes(model, base), base.folder)
        return model, tokenizer
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    local = local_model(folder)
    model = AudioFlamingo2ForConditionalGeneration.from_pretrained(local, dtype=dtype).to(device)
    tokenizer = AutoTokenizer.from_pretrained(local)
    logger.info("loaded %s on %s as %s", folder, device, dtype)
    return model, tokenizer
