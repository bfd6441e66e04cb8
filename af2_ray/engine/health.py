"""Whether an engine is well: what failed in its steps, and whether the device or only a request was at fault.

A replica that fails at everything answers fastest of all and would draw all traffic, so it has to be found out. Two
things make it unwell: an error that the device does not recover from, at once; and a part of the step that failed so
many steps in a row, if a question of the engine's own then fails too.

That question is what keeps hostile clients out. Failures alone prove nothing: whoever knows a request that the model
fails on could send it again and again and have one replica after the other replaced. So requests only raise the
suspicion, and the engine asks itself something harmless: if it can answer that, the requests were at fault, and the
count begins anew.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from af2_ray.audio.windows import WINDOW_SAMPLES
from af2_ray.engine.audio_attention import Projection
from af2_ray.engine.decoder import Decoder
from af2_ray.engine.encoder import Encoder
from af2_ray.text import encode

_LOST = (  # CUDA's errors after which a process has no device; others, as a wrong argument, end with the call
    *("illegal memory access", "device-side assert", "launch failure", "misaligned address", "illegal instruction"),
    *("illegal address", "invalid program counter", "hardware stack error", "ECC error", "launch timed out"),
    *("context is destroyed", "no CUDA-capable device", "unknown error", "EXECUTION_FAILED"),
)
_QUOTED = 200  # characters of an error's text


class Health:
    """Failed steps in a row, by part of the step.

    Args:
        max_failed_steps: failed steps in a row, of one part, that raise the suspicion.

    Attributes:
        fault: what is wrong with the engine; empty: it is well.
    """

    def __init__(self, max_failed_steps: int) -> None:
        self._max = max_failed_steps
        self._in_row: Counter[str] = Counter()
        self._failed: set[str] = set()
        self._worked: set[str] = set()
        self._lost = False
        self.fault = ""

    def note_work(self, part: str) -> None:
        """A part of the step did something."""
        self._worked.add(part)

    def note_failure(self, part: str, error: Exception) -> None:
        """A part of the step failed, on one request or on all of them."""
        self._failed.add(part)
        if not self._lost and is_lost(error):
            self._lost, self.fault = True, f"the device is lost, in {part}: {_quoted(error)}"

    def end_step(self) -> bool:
        """Count the step; whether the engine is under suspicion, and should ask itself something."""
        for part in self._worked:
            self._in_row.pop(part, None)
        for part in self._failed - self._worked:
            self._in_row[part] += 1
        if self._worked and not self._lost and not self._suspected():
            self.fault = ""
        self._failed.clear()
        self._worked.clear()
        return not self.fault and self._suspected()

    def judge(self, error: Exception | None) -> None:
        """The engine asked itself something: it failed with `error`, or (none) answered."""
        if error is None:
            self._in_row.clear()
            return
        parts = " and ".join(sorted(part for part, num in self._in_row.items() if num >= self._max))
        self.fault = f"{parts} failed {self._max} times in a row, then a question of its own: {_quoted(error)}"
        self._lost = is_lost(error)

    def _suspected(self) -> bool:
        return any(num >= self._max for num in self._in_row.values())


def is_lost(error: Exception) -> bool:
    """Whether an error leaves its process without a device: all further calls fail. Memory that is full does not."""
    text = str(error)
    is_cuda = isinstance(error, torch.AcceleratorError) or "CUDA" in text
    return is_cuda and any(words in text for words in _LOST)


def answer_silence(
    encoder: Encoder, projection: Projection, decoder: Decoder, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Encode ten seconds of silence, read a prompt about it, write a token: what every request needs.

    Raises:
        Exception: one of these fails, or gives no numbers.
    """
    silence = encoder.encode_one(np.zeros((1, WINDOW_SAMPLES), np.int16))
    ids = [int(token) for token in encode(tokenizer, ["?"]).input_ids[0]]
    row = decoder.num_rows
    logits = decoder.prefill([ids], [[("", projection(silence, 1))]], [1])
    try:
        if row == 0:  # else running answers write, and would be given a token that is not theirs
            logits = decoder.decode(ids[:1])
        if not bool(logits.amax().isfinite()):
            raise ArithmeticError("the logits are not numbers")
    finally:
        decoder.remove(row)


def _quoted(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:_QUOTED]
