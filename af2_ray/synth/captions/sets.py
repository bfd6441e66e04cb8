"""What AF-CLAP learns from a clip, and what makes it: an engine is anything that takes a caption and gives its set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from af2_ray.llm.client import Spent


@dataclass(frozen=True)
class Captions:
    """The texts of a clip: `negatives[m]` belong to the m-th of (caption, *paraphrases)."""

    caption: str
    paraphrases: tuple[str, ...]
    negatives: tuple[tuple[str, ...], ...]


class CaptionEngine(Protocol):
    """Makes the set of a caption."""

    @property
    def spent(self) -> Spent:
        """What its requests have cost."""

    def __call__(self, caption: str, number: int) -> Captions:
        """The set of caption `number`; a `ValueError` says why there is none."""
