"""What goes into the engine and what comes out, apart from it: whoever checks requests need not load torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from af2_ray.audio.windows import WINDOW_S, WINDOW_SAMPLES
from af2_ray.text import Message

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Clip:
    """One recording, known by what it was made of.

    Attributes:
        key: SHA-256 of the bytes it came in; the engine keeps what it has heard under it.
        num_windows: length in windows of 10 s.
        windows: int16 [W, 160000] (`audio.windows.to_windows`); none: the engine is believed to have heard it.
        duration_s: length in seconds.
    """

    key: str
    num_windows: int
    windows: NDArray[np.int16] | None = field(default=None, repr=False, compare=False)
    duration_s: float = 0.0

    @classmethod
    def of(cls, windows: NDArray[np.int16], key: str = "", duration_s: float = 0.0) -> Clip:
        """A clip of windows; without a key, that of the samples themselves."""
        key = key or hashlib.sha256(windows.tobytes()).hexdigest()
        return cls(key, len(windows), windows, duration_s)

    def fault(self, max_windows: int) -> str:
        """What is wrong with it for a model that hears `max_windows`; empty: nothing."""
        if not 1 <= self.num_windows <= max_windows:
            return f"a recording must be of 1 to {max_windows * WINDOW_S} s: send a shorter stretch"
        windows = self.windows
        if windows is not None and (windows.shape != (self.num_windows, WINDOW_SAMPLES) or windows.dtype != np.int16):
            wanted = f"int16 ({self.num_windows}, {WINDOW_SAMPLES})"
            return f"a clip must be {wanted}, got {windows.dtype} {windows.shape}"
        return ""


@dataclass(frozen=True)
class Request:
    """One question of any number of clips, checked; the last of a conversation where it has a history."""

    prompt: str
    clips: tuple[Clip, ...] = ()
    """All recordings, those of earlier messages first."""
    history: tuple[Message, ...] = ()
    """Messages before the prompt, in order; how many of the clips came with each, they say."""
    truncated: bool = False
    """Whether only the beginning of a recording is here, as asked for."""
    max_new_tokens: int = 256
    min_new_tokens: int = 0
    """The answer does not end by itself before so many tokens."""
    temperature: float = 0.0
    """0: greedy."""
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    """Number of likely tokens that an answer lists at each place, beside the chosen one; none: no probabilities."""
    id: str = ""
    owner: str = ""
    """Who asks, by whom the engine takes turns; empty: anybody."""

    @property
    def messages(self) -> tuple[Message, ...]:
        """The whole conversation, the prompt as its last message."""
        num_before = sum(message.num_audios for message in self.history)
        return (*self.history, Message("user", self.prompt, len(self.clips) - num_before))

    @property
    def audio_s(self) -> float:
        """Seconds of audio, all clips."""
        return sum(clip.duration_s for clip in self.clips)


@dataclass(frozen=True)
class TokenLogprob:
    """A token as it is written, its log probability before temperature, and the likeliest at its place."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What one or more tokens add to an answer."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What the model wrote; `stop`: it ended by itself or at a stop string, `length`: it was cut off."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()
    encoded_windows: int = field(default=0, compare=False)
    """Windows of the request that the encoder had to hear; 0 where all its audio was kept."""
    first_token_s: float = field(default=0.0, compare=False)
    """From its submission to its first token."""


@dataclass(frozen=True)
class RequestFailure:
    """A request that got no answer; `by_caller` says whose fault it is."""

    message: str
    by_caller: bool
    missing: tuple[str, ...] = ()
    """Keys of clips that came without windows and are not kept here (any more): send them again, with windows."""


@dataclass(frozen=True)
class Embedded:
    """Unit vectors float32 [N, J] of a request's texts and clips, and the factor on their dot products in training."""

    vectors: NDArray[np.float32]
    scale: float
    prompt_tokens: int = 0


Event = Piece | Answer | RequestFailure
"""What a request gives: pieces, and at last an answer or a failure."""
