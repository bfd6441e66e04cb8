"""What a small part of a model says of itself, and the model that it belongs to.

A fine-tuning changes a tenth of a model or less, and a folder of the whole costs as much as the model. So a stage that
starts from a model leaves a small part beside its export: what is not as in that model, its base, whose weights the
part names by their digest (`weights`). In `part.json`:

    format: version of this layout
    base, base_name: digest of the base's weights, and where the training found it
    dtype: type of the whole's numbers, to which the base's are rounded
    groups: groups of parameters that the part has (`models.groups`); `lora` stands for adapters
    files: names of all small files of the whole; those that the part has not are the base's
    trained: what it was trained as (run, stage, steps, fingerprint of the recipe)

Beside it are `trained.safetensors` with whole tensors, `adapter_model.safetensors` with `adapter_config.json` (peft's
layout), those small files that differ from the base's, and the digests of all of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from af2_ray.storage.files import Damaged, sealed_json, unsealed
from af2_ray.storage.places import check_name, inner_name, locate, shown
from af2_ray.storage.stores import PART, retried
from af2_ray.storage.weights import weights_digest

FORMAT = 1
GROUPS = ("lora", "transform", "xattn", "tokens", "clap", "mel", "lm")
"""Groups that a part may have, those of recipes and `mel`, which a change of numbers' type may touch."""
TYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class PartFacts:
    """The contents of a `part.json`."""

    base: str
    base_name: str
    dtype: str
    groups: tuple[str, ...]
    files: tuple[str, ...]
    trained: Mapping[str, Any]

    def to_json(self) -> str:
        """The file's text, with its seal."""
        return sealed_json({"format": FORMAT, **vars(self)})


def is_part(folder: str | Path) -> bool:
    """Whether a folder, or an address in object storage, is a small part."""
    check_name(str(folder))
    fs, path = locate(f"{str(folder).rstrip('/')}/{PART}")
    return bool(retried(lambda: fs.exists(path)))


def read_facts(folder: str | Path) -> PartFacts:
    """What a part says of itself; nothing else of it is read, or fetched.

    Raises:
        ValueError: it is no part, of a later version, or (`files.Damaged`) not as it was written.
    """
    check_name(str(folder))
    name = f"{str(folder).rstrip('/')}/{PART}"
    fs, path = locate(name)
    try:
        found, _ = unsealed(shown(name), retried(lambda: fs.cat_file(path)))
    except FileNotFoundError as error:
        raise ValueError(
            f"no small part in {shown(str(folder))}: name the folder `part` beside a stage's model, with {PART}"
        ) from error
    except Damaged as error:
        raise Damaged(f"{error}; put back a copy") from error
    if found.get("format") != FORMAT:
        raise ValueError(
            f"{shown(name)} has format {found.get('format')!r}, and this version knows {FORMAT}: use the version of "
            "af2_ray that wrote it"
        )
    try:
        facts = PartFacts(
            base=str(found["base"]),
            base_name=str(found["base_name"]),
            dtype=str(found["dtype"]),
            groups=tuple(map(str, found["groups"])),
            files=tuple(inner_name(str(file)) for file in found["files"]),
            trained=dict(found["trained"]),
        )
    except (KeyError, TypeError) as error:
        raise Damaged(f"{shown(name)} is damaged: {error!r} is missing or no such value; put back a copy") from error
    if unknown := set(facts.groups) - set(GROUPS):
        raise ValueError(
            f"{shown(name)} has the groups {sorted(unknown)}, and this version knows {', '.join(GROUPS)}: use the "
            "version of af2_ray that wrote it"
        )
    if facts.dtype not in TYPES:
        raise Damaged(f"{shown(name)} is damaged: dtype={facts.dtype!r} is none of {TYPES}; put back a copy")
    return facts


def check_base(part: str | Path, facts: PartFacts, base: str | Path) -> None:
    """See that a part belongs to a model, by the digest of its weights.

    Raises:
        ValueError: it belongs to another one; the message names both.
    """
    if (found := weights_digest(base)) != facts.base:
        raise ValueError(
            f"{shown(str(part))} is a part of {shown(facts.base_name)}, whose weights have the digest "
            f"{facts.base[:12]}, and {shown(str(base))} has {found[:12]}: name the model that the part was trained from"
        )
