"""Clips on their way through the audio tower, a few windows at a time, so that running answers do not wait for them.

The shortest clip goes first: a question about five seconds does not wait for a recording of five minutes. Owners take
turns: the shortest clip of each comes before the second of any. Every fourth turn belongs to the clip that has waited
longest, so that none waits for ever.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from af2_ray.engine.transfer import send
from af2_ray.models.modeling_af2 import AudioFlamingo2ForConditionalGeneration

logger = logging.getLogger(__name__)

_OLDEST_EVERY = 4


@dataclass
class _Coming:
    """A clip of which `features` windows are through the tower."""

    windows: NDArray[np.int16]
    owner: str
    num_done: int = 0
    features: list[Tensor] = field(default_factory=list)

    @property
    def num_left(self) -> int:
        return len(self.windows) - self.num_done


class Encoder:
    """The clips that wait to be encoded.

    Args:
        budget: number of windows a turn.
    """

    def __init__(self, model: AudioFlamingo2ForConditionalGeneration, budget: int) -> None:
        self._model, self.budget = model, budget
        self._clips: dict[str, _Coming] = {}
        self._turn = 0
        self.num_encoded = 0
        """Windows since the start."""

    def __contains__(self, key: str) -> bool:
        return key in self._clips

    @property
    def num_waiting(self) -> int:
        """Windows still to be encoded."""
        return sum(clip.num_left for clip in self._clips.values())

    def add(self, key: str, windows: NDArray[np.int16], owner: str) -> None:
        """Encode a clip in the turns to come."""
        self._clips.setdefault(key, _Coming(windows, owner))

    def drop(self, key: str) -> None:
        """Drop a clip that nobody waits for any more."""
        self._clips.pop(key, None)

    def step(self) -> dict[str, Tensor | Exception]:
        """One turn; audio states [A, D] of the clips that are through, or what the model raised on them."""
        taken = self._take()
        try:
            return dict(self._finish(self._encode(taken)))
        except Exception as error:  # whatever the model raises: those who wait for these clips learn of it
            logger.exception("encoding failed")
            for key in taken:
                self.drop(key)
            return dict.fromkeys(taken, error)

    def encode_one(self, windows: NDArray[np.int16]) -> Tensor:
        """Audio states [A, D] of a clip, out of turn."""
        ((_, states),) = self._finish({"": _Coming(windows, "", features=[self._embed(windows)])}).items()
        return states

    def _take(self) -> dict[str, int]:
        """Clips of this turn and how many of their windows."""
        self._turn += 1
        shortest, ranks, turns = sorted(self._clips, key=lambda key: self._clips[key].num_left), Counter[str](), {}
        for key in shortest:
            owner = self._clips[key].owner
            turns[key] = ranks[owner]
            ranks[owner] += 1
        order = sorted(shortest, key=turns.__getitem__)
        if self._turn % _OLDEST_EVERY == 0 and order:
            oldest = next(iter(self._clips))
            order.remove(oldest)
            order.insert(0, oldest)
        left, taken = self.budget, {}
        for key in order:
            if left == 0:
                break
            taken[key] = min(left, self._clips[key].num_left)
            left -= taken[key]
        return taken

    def _encode(self, taken: dict[str, int]) -> dict[str, _Coming]:
        """Send windows through the tower; return the clips that have none left."""
        parts = []
        for key, num in taken.items():
            clip = self._clips[key]
            parts.append(clip.windows[clip.num_done : clip.num_done + num])
        if not parts:
            return {}
        features = self._embed(np.concatenate(parts))
        for (key, num), part in zip(taken.items(), features.split(list(taken.values())), strict=True):
            self._clips[key].features.append(part)
            self._clips[key].num_done += num
        self.num_encoded += sum(taken.values())
        return {key: self._clips.pop(key) for key in taken if not self._clips[key].num_left}

    def _embed(self, windows: NDArray[np.int16]) -> Tensor:
        return self._model.embed_windows(send(torch.from_numpy(windows), self._model.device))

    def _finish(self, done: dict[str, _Coming]) -> dict[str, Tensor]:
        """The audio transformer over whole clips."""
        if not done:
            return {}
        packed = [torch.cat(clip.features).flatten(0, 1) for clip in done.values()]
        lengths = [len(part) for part in packed]
        states = self._model.audio_transform(torch.cat(packed), lengths)
        return {key: part.clone() for key, part in zip(done, states.split(lengths), strict=True)}
