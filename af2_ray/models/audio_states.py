"""Encoded clips, and which rows of text hear them: what both fusions start from.

Shapes: C clips, A audio tokens of the longest, N audio tokens of all clips, B rows of text, K audios a row, T text
tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
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


def checked_index(audio_index: Tensor | None, num_clips: int, markers: Tensor) -> Tensor | None:
    """`audio_index` if it fits clips and markers [B, T] (counted so far); else a ValueError that says what does not."""
    rows = markers.shape[0]
    if audio_index is None:
        if num_clips != rows:
            raise ValueError(
                f"{num_clips} clips for {rows} rows of text: say which row hears which by audio_index [B, K]"
            )
        wanted = torch.ones(rows, dtype=torch.long, device=markers.device)
    else:
        audio_index = audio_index.to(markers.device)
        if audio_index.dim() != 2 or audio_index.shape[0] != rows:
            raise ValueError(f"audio_index must be [B, K] with B={rows}, got {tuple(audio_index.shape)}")
        if int(audio_index.max()) >= num_clips or int(audio_index.min()) < -1:
            raise ValueError(f"audio_index must be -1 (none) to {num_clips - 1}, got {audio_index.tolist()}")
        wanted = (audio_index >= 0).sum(dim=1)
    if bool((wanted > markers[:, -1]).any()):
        row = int((wanted > markers[:, -1]).nonzero()[0])
        raise ValueError(
            f"row {row} has {int(wanted[row])} audios but {int(markers[row, -1])} <audio> markers: give one each"
        )
    return audio_index
