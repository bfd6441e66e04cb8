"""What every settings block has in common."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Group = Literal["clap", "transform", "xattn", "tokens", "lm", "lora"]
Split = Literal["train", "val", "test", "seen"]


class Strict(BaseModel):
    """A settings block: no unknown keys, no silent conversion, no change after it is read."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def later(default: Any, **options: Any) -> Any:
    """A `Field` for a key that is added while runs without it are kept: they go on, as long as it has its default.

    Fingerprints (`Recipe.fingerprint`) leave it out while it has its default; `default` must mean what was done before.
    """
    return Field(default, json_schema_extra={"later": True}, **options)


def without_neutral(block: BaseModel, dump: dict[str, Any]) -> dict[str, Any]:
    """The dump of a block without `later` keys that have their default, in the blocks within it too."""
    kept: dict[str, Any] = {}
    for name, value in dump.items():
        field, given = type(block).model_fields[name], getattr(block, name)
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("later") and given == field.get_default(call_default_factory=True):
            continue
        if isinstance(given, BaseModel):
            value = without_neutral(given, value)
        elif isinstance(given, list) and given and all(isinstance(item, BaseModel) for item in given):
            value = [without_neutral(item, inner) for item, inner in zip(given, value, strict=True)]
        kept[name] = value
    return kept
