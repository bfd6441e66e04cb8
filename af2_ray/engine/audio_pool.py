"""What running answers hear, at addresses that stay: a copy of keys and values for each row of a rectangle.

One attention call a layer serves all rows, and a recorded step (`graph`) outlives the answers that come and go: they
only write into the rectangle. It costs memory, as many rows as run at one time, each as long as the longest, and it
costs reading: where rows are of unlike length all are read as far as the longest, rounded up to a power of two of
windows, and masked. That is bounded: sixteen rows of five minutes are a quarter of what a step of the 3B model reads.
Rows of one length, and so any answer that is alone, are read as far as they go, without a mask. The rectangle grows,
in powers of two of rows and of windows, as far as it was asked for at one time; it does not shrink.

Shapes: X layers that hear, S rows of the rectangle, R rows of a step, H heads, A audio tokens, d head width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Tensor

from af2_ray.models.cross_attention import GatedCrossAttention

_LEAST_TOKENS = 16
"""A row's tokens at least: masks whose rows are not a multiple of that are copied for each layer."""


def power_of_two(num: int) -> int:
    """The smallest power of two that is not below `num`."""
    return 1 << (num - 1).bit_length()


@dataclass(frozen=True)
class Reach:
    """How far the rows of a step hear: so many tokens, `masked` behind each row's own, and whether all rows hear."""

    tokens: int
    masked: bool
    all_hear: bool


class PooledAudio:
    """What the rows of a step hear: a `cross_attention.Audio`.

    Args:
        kv: keys and values [X, 2, R, H, A, d].
        mask: numbers to add to scores, [R, 1, 1, A]; none: all tokens are heard.
        hears: bool [R, 1, 1], false where a row hears nothing; none: all hear.
        places: place in `kv` of each LM layer that hears, by the layer's index.
    """

    def __init__(self, kv: Tensor, mask: Tensor | None, hears: Tensor | None, places: Mapping[int, int]) -> None:
        self._kv, self._mask, self.hears, self._places = kv, mask, hears, places

    def attend(self, layer: GatedCrossAttention, q: Tensor) -> Tensor:
        """Queries [R, H, 1, d] to what they hear, [R, H, 1, d]; any numbers where a row hears nothing."""
        keys, values = self._kv[self._places[layer.layer_idx]]
        return nnf.scaled_dot_product_attention(q, keys, values, attn_mask=self._mask)


class AudioPool:
    """The rectangle.

    Args:
        places: places as of `PooledAudio`.
        tokens_per_window: unit in which rows grow longer.
        num_slots: rows that it has at most.

    Attributes:
        lengths: audio tokens of each running row, without gaps from row 0 on; 0: it hears nothing.
    """

    def __init__(self, places: Mapping[int, int], tokens_per_window: int, num_slots: int) -> None:
        self._places, self._unit, self._num_slots = places, tokens_per_window, num_slots
        self._kv: Tensor | None = None  # [X, 2, S, H, A, d]
        self.lengths: list[int] = []

    @property
    def num_bytes(self) -> int:
        """Bytes that the rectangle takes."""
        return 0 if self._kv is None else self._kv.nbytes

    def num_rows(self, num: int) -> int:
        """Rows of a step for `num` running ones."""
        return min(self._num_slots, power_of_two(num))

    def make_room(self, new: Sequence[Tensor | None]) -> bool:
        """Let rows of these keys and values [X, 2, H, A, d] begin; whether what is there had to move for them."""
        heard, old = [kv for kv in new if kv is not None], self._kv
        if old is None and not heard:
            return False
        like = heard[0] if old is None else old[:, :, 0]  # [X, 2, H, A, d]
        rows, tokens = (0, 0) if old is None else (old.shape[2], old.shape[4])
        size = (
            max(rows, self.num_rows(len(self.lengths) + len(new))),
            max([tokens, *(self._rounded(kv.shape[3]) for kv in heard)]),
        )
        if size == (rows, tokens):
            return False
        layers, pair, heads, _, width = like.shape
        self._kv = like.new_zeros((layers, pair, size[0], heads, size[1], width))
        if old is not None:
            self._kv[:, :, :rows, :, :tokens] = old
        return True

    def add(self, new: Sequence[Tensor | None]) -> None:
        """Begin rows behind the running ones; room was made for them."""
        for kv in new:
            length = 0 if kv is None else kv.shape[3]
            if self._kv is not None:
                row = self._kv[:, :, len(self.lengths)]
                if kv is not None:
                    row[:, :, :, :length] = kv
                row[:, :, :, length:] = 0  # a weight of 0 on what is no number would be no number
            self.lengths.append(length)

    def remove(self, row: int) -> None:
        """End a row; the last row takes its number."""
        last = len(self.lengths) - 1
        if row != last:
            if self._kv is not None:
                self._kv[:, :, row] = self._kv[:, :, last]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def reach(self) -> Reach:
        """How far the running rows hear."""
        heard = {length for length in self.lengths if length}
        masked = len(heard) > 1
        tokens = self._rounded(max(heard)) if masked else max(heard, default=0)
        return Reach(tokens, masked, all_hear=all(self.lengths))

    def audio(self, lengths: Tensor, reach: Reach) -> PooledAudio | None:
        """What the first R rows hear, of audio lengths [R]; none: nothing."""
        if not reach.tokens:
            return None
        assert self._kv is not None
        kv = self._kv[:, :, : len(lengths), :, : reach.tokens]
        mask = None
        if reach.masked:
            behind = torch.arange(reach.tokens, device=kv.device) >= lengths[:, None]
            mask = torch.zeros(behind.shape, dtype=kv.dtype, device=kv.device)
            mask = mask.masked_fill_(behind, torch.finfo(kv.dtype).min)[:, None, None]
        hears = None if reach.all_hear else (lengths > 0)[:, None, None]
        return PooledAudio(kv, mask, hears, self._places)

    def close(self) -> None:
        """Free the rectangle."""
        self._kv = None

    def _rounded(self, tokens: int) -> int:
        return max(_LEAST_TOKENS, self._unit * power_of_two(-(-tokens // self._unit)))
