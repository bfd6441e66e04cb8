"""What every settings block has in common."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Group = Literal["clap", "transform", "xattn", "tokens", "lm", "lora"]
Split = Literal["train", "val", "test", "seen"]


class Strict(BaseModel):
    """A settings block: no unknown keys, no silent conversion, no change after it is read."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
