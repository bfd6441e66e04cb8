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

    Dumps, and so fingerprints (`Recipe.fingerprint`), leave it out while it has its default, which must mean what was
    done before.
    """
    return Field(default, exclude_if=lambda value: value == default, **options)
