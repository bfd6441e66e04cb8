"""Encoded clips, and which rows of text hear them: what both fusions start from.

Shapes: C clips, A audio tokens of the longest, N audio tokens of all clips, B rows of text, K audios a row, T text
tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from af2_ray.models.reorder import reorder, to_device


class Rectangle:
    """Where the tokens of clips, end to end, stand in a rectangle of clips; found on the host, once for all layers.

    Args:
        lengths: number of tokens of each clip.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = tuple(lengths)
        self.shape = len(lengths), max(lengths)
        self._moves: tuple[Tensor, Tensor] | None = None
        if min(lengths) == max(lengths):  # they are a rectangle as they stand
            self.mask = torch.ones(self.shape, dtype=torch.bool, device=device)
            return
        counts = torch.tensor(lengths)
        place = torch.arange(self.shape[1])
        mask = place < counts[:, None]
        index = torch.where(mask, (counts.cumsum(0) - counts)[:, None] + place, 0).flatten()
        self.mask = to_device(mask, device)
        self._moves = to_device(index, device), to_device(mask.flatten().nonzero().flatten(), device)

    def fill(self, packed: Tensor) -> Tensor:
        """What clips have end to end, [N, ...], as [C, A, ...]. Behind a clip's tokens stands anything finite."""
        rows = packed if self._moves is None else reorder(packed, *self._moves, 0)
        return rows.view(*self.shape, *packed.shape[1:])


class AudioStates:
    """Encoded clips: `hidden` [C, A, D] and bool `mask` [C, A] of real tokens. Keep them for further questions."""

    def __init__(self, hidden: Tensor, mask: Tensor) -> None:
        self._hidden: Tensor | None = hidden
        self.mask = mask
        self._packed: tuple[Tensor, Rectangle] | None = None

    def __len__(self) -> int:
        return len(self.mask)

    @classmethod
    def of_packed(cls, packed: Tensor, lengths: Sequence[int]) -> AudioStates:
        """States from the tokens of all clips end to end, [N, D], `lengths` of them a clip."""
        rectangle = Rectangle(lengths, packed.device)
        states = cls(packed, rectangle.mask)
        states._hidden, states._packed = None, (packed, rectangle)
        return states

    @property
    def hidden(self) -> Tensor:
        """Tokens of clips [C, A, D], zeros behind each clip's own."""
        if self._hidden is None:
            packed, rectangle = self.pack()
            self._hidden = rectangle.fill(packed) * self.mask[..., None].to(packed.dtype)
        return self._hidden

    def pack(self) -> tuple[Tensor, Rectangle]:
        """The real tokens of all clips end to end, [N, D], and where they stand in a rectangle."""
        if self._packed is None:
            hidden, mask = self.hidden, self.mask
            self._packed = hidden[mask], Rectangle(mask.sum(dim=1).tolist(), hidden.device)
        return self._packed


@dataclass(frozen=True)
class Heard:
    """What a batch of text hears, whatever the fusion.

    Attributes:
        states: the clips; none when the cache holds what is made of them already.
        audio_index: clip of each audio of each row, [B, K] (-1: none); none: row b hears clip b.
        tokens: mask of the real audio tokens, bool [B, K, A].
        markers: number of `<audio>` markers at or before each text token, [B, T].
        first: whether the cache, if any, has seen none of this text yet.
        ordinals: number, from 1, of the row's audio that a token is of, [B, A], where a row's audios stand end to end
            as one (`end_to_end`); none: the place of the audio, K, says it.
    """

    states: AudioStates | None
    audio_index: Tensor | None
    tokens: Tensor
    markers: Tensor
    first: bool
    ordinals: Tensor | None = None

    @classmethod
    def of(
        cls, states: AudioStates, audio_index: Tensor | None, markers: Tensor, *, is_known: bool, is_kept: bool
    ) -> Heard:
        """What text hears that is read for the first time, and kept in a cache or not.

        `is_known`: `audio_index` is known to fit clips and markers; else a ValueError says what does not.
        """
        joined = None if is_kept or audio_index is None else end_to_end(states, audio_index)
        audio_index = checked_index(audio_index, len(states), markers, is_known=is_known)
        if joined is not None:
            rows, ordinals = joined
            return cls(rows, None, rows.mask[:, None], markers, True, ordinals)
        if audio_index is None:
            return cls(states, None, states.mask[:, None], markers, True)
        tokens = states.mask[audio_index.clamp(min=0)] & (audio_index >= 0)[..., None]
        return cls(states, audio_index, tokens, markers, True)


def end_to_end(states: AudioStates, audio_index: Tensor) -> tuple[AudioStates, Tensor] | None:
    """The audios of each row end to end as one clip, and which of them each token is of, [B, A].

    Rows that hear one audio and rows that hear several then share a rectangle as wide as the row of the most tokens,
    not as the longest audio times the most audios. None where there is one a row, where rows do not hear each clip
    once, in order, and where the index [B, K] is not on the host.
    """
    if audio_index.dim() != 2 or audio_index.shape[1] == 1 or audio_index.device.type != "cpu":
        return None
    is_there = audio_index >= 0
    if not torch.equal(audio_index[is_there], torch.arange(len(states))):
        return None
    packed, rectangle = states.pack()
    lengths = torch.zeros(audio_index.shape, dtype=torch.long)
    lengths[is_there] = torch.tensor(rectangle.lengths)
    rows = AudioStates.of_packed(packed, lengths.sum(dim=1).tolist())
    ordinals = torch.zeros(rows.mask.shape, dtype=torch.long)
    columns = torch.arange(1, audio_index.shape[1] + 1)
    for row, counts in enumerate(lengths):
        ordinals[row, : int(counts.sum())] = columns.repeat_interleave(counts)
    return rows, to_device(ordinals, packed.device)


def checked_index(
    audio_index: Tensor | None, num_clips: int, markers: Tensor, *, is_known: bool = False
) -> Tensor | None:
    """`audio_index` if it fits clips and markers [B, T] (counted so far); else a ValueError that says what does not.

    `is_known`: the caller knows that it fits, and no device is asked.
    """
    rows = markers.shape[0]
    if audio_index is None:
        if num_clips != rows:
            raise ValueError(
                f"{num_clips} clips for {rows} rows of text: say which row hears which by audio_index [B, K]"
            )
        wanted = torch.ones(rows, dtype=torch.long, device=markers.device)
    else:
        if audio_index.dim() != 2 or audio_index.shape[0] != rows:
            raise ValueError(f"audio_index must be [B, K] with B={rows}, got {tuple(audio_index.shape)}")
        audio_index = audio_index if audio_index.device == markers.device else to_device(audio_index, markers.device)
        if is_known:
            return audio_index
        if int(audio_index.max()) >= num_clips or int(audio_index.min()) < -1:
            raise ValueError(f"audio_index must be -1 (none) to {num_clips - 1}, got {audio_index.tolist()}")
        wanted = (audio_index >= 0).sum(dim=1)
    if is_known:
        return audio_index
    if bool((wanted > markers[:, -1]).any()):
        row = int((wanted > markers[:, -1]).nonzero()[0])
        raise ValueError(
            f"row {row} has {int(wanted[row])} audios but {int(markers[row, -1])} <audio> markers: give one each"
        )
    return audio_index
