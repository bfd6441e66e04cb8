"""What an engine counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counts:
    """What an engine has done since it started; `rows` over `decode_steps` is the mean batch."""

    steps: int = 0
    decode_steps: int = 0
    rows: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    answers: int = 0
    failures: int = 0
