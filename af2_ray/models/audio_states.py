"""Encoded clips, and which rows of text hear them: what both fusions start from.

Shapes: C clips, A audio tokens of the longest, N audio tokens of all clips, B rows of text, K audios a row, T text
tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class AudioStates:
    """Encoded clips: `hidden` [C, A, D] and bool `mask` [C, A] of real tokens. Keep them for further questions."""

    hidden: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.hidden)

    @classmethod
    def of_packed(cls, packed: Tensor, lengths: Sequence[int]) -> AudioStates:
        """States from the tokens of all clips end to end, [N, D], `lengths` of them a clip."""
        counts = torch.tensor(lengths, device=packed.device)
        mask = torch.arange(max(lengths), device=packed.device) < counts[:, None]
        return cls(to_rectangle(packed, lengths), mask)

    def pack(self) -> tuple[Tensor, list[int]]:
        """The real tokens of all clips end to end, [N, D], and how many each clip has."""
        return self.hidden[self.mask], self.mask.sum(dim=1).tolist()

    def select(self, clips: Tensor | Sequence[int]) -> AudioStates:
        """The states of these clips, without the padding that none of them needs."""
        index = torch.as_tensor(clips, device=self.hidden.device)
        hidden, mask = self.hidden[index], self.mask[index]
        length = int(mask.sum(dim=1).max()) if len(mask) else 0
        return AudioStates(hidden[:, :length], mask[:, :length])

    @staticmethod
    def concat(states: Sequence[AudioStates]) -> AudioStates:
        """All clips of several states, padded to the longest."""
        length = max(part.hidden.shape[1] for part in states)
        return AudioStates(
            torch.cat([nnf.pad(part.hidden, (0, 0, 0, length - part.hidden.shape[1])) for part in states]),
            torch.cat([nnf.pad(part.mask, (0, length - part.mask.shape[1])) for part in states]),
        )


def to_rectangle(packed: Tensor, lengths: Sequence[int]) -> Tensor:
    """What clips have end to end, [N, ...], as [C, A, ...] with zeros behind each clip's own tokens."""
    return pad_sequence(packed.split(list(lengths)), batch_first=True)


@dataclass(frozen=True)
class Heard:
    """What a batch of text hears, whatever the fusion.

    Attributes:
        states: the clips; none when the cache holds what is made of them already.
        audio_index: clip of each audio of each row, [B, K] (-1: none); none: row b hears clip b.
        tokens: mask of the real audio tokens, bool [B, K, A].
        markers: number of `<audio>` markers at or before each text token, [B, T].
        first: whether the cache, if any, has seen none of this text yet.
    """

    states: AudioStates | None
    audio_index: Tensor | None
    tokens: Tensor
    markers: Tensor
    first: bool
