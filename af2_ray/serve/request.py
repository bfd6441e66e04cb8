"""What goes into the engine and what comes out, apart from it: whoever checks requests need not load torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """One question of any number of clips, decoded and checked."""

    prompt: str
    clips: tuple[NDArray[np.int16], ...] = ()
    """int16 [W, 160000] a clip (`audio.windows.to_windows`)."""
    audio_s: float = 0.0
    max_new_tokens: int = 256
    temperature: float = 0.0
    """0: greedy."""
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    id: str = ""


@dataclass(frozen=True)
class Answer:
    """What the model wrote; `stop`: it ended by itself or at a stop string, `length`: it was cut off."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Failure:
    """A request that got no answer; `by_caller` says whose fault it is."""

    message: str
    by_caller: bool
