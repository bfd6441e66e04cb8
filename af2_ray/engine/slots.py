"""Keys and values of the text of running answers: one slot an answer, each with a length of its own.

transformers' static cache has one length for the whole batch, so answers could only begin together. Here every layer
has one tensor [S, H, L, d], made anew, twice as long, where a text does not fit; running answers fill its first rows
without gaps, so one view of them is all that attention needs and nothing is gathered. An answer that ends gives its row
to the last one: a copy of one row, once an answer. Text is short (a few hundred tokens, 20 kB each in a 3B model), so
padding to the longest running answer costs less than parting rows by length; the long part, the audio, is not padded
at all (`audio_memory`).

Shapes: S slots, B running answers, R answers that begin, H heads, L longest text of a slot, T tokens, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class SlotLayer(CacheLayerMixin):
    """One LM layer's text keys and values, [S, H, L, d]; the cache says what an update does."""

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the slots, at the first prefill."""
        shape = (self._cache.num_slots, key_states.shape[1], self._cache.length, key_states.shape[3])
        self.keys = key_states.new_zeros(shape)
        self.values = value_states.new_zeros(shape)
        self.is_initialized = True

    def lengthen(self, length: int) -> None:
        """Make room for rows of `length` tokens."""
        if self.is_initialized:
            more = (0, 0, 0, length - self.keys.shape[2])
            self.keys, self.values = nnf.pad(self.keys, more), nnf.pad(self.values, more)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write [R, H, T, d] to new rows, or [B, H, 1, d] to each running row's own place; return what is attended."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache = self._cache
        if cache.prefilling:
            rows = slice(cache.num_rows, cache.num_rows + key_states.shape[0])
            self.keys[rows, :, : key_states.shape[2]] = key_states
            self.values[rows, :, : key_states.shape[2]] = value_states
            return key_states, value_states
        self.keys[cache.rows, :, cache.places] = key_states[:, :, 0]
        self.values[cache.rows, :, cache.places] = value_states[:, :, 0]
        seen = (slice(len(cache.places)), slice(None), slice(cache.longest))
        return self.keys[seen], self.values[seen]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a row's first `length` places over another row."""
        self.keys[target, :, :length] = self.keys[source, :, :length]
        self.values[target, :, :length] = self.values[source, :, :length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Never called by the engine, which gives masks in full."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """The longest row's length."""
        return max(self._cache.lengths, default=0)

    def get_max_length(self) -> int:
        """How long a row may become."""
        return self._cache.length


class SlotCache(Cache):
    """The slots of all layers.

    Args:
        length: text tokens that a row has room for at first.

    Attributes:
        lengths: text tokens of each running row, without gaps from row 0 on.
        prefilling: whether the next forward pass begins rows or goes on with all running ones.
        rows, places, longest: those of the decoding step at hand (`before_decode`).
    """

    def __init__(self, num_layers: int, num_slots: int, length: int, device: torch.device) -> None:
        self.num_slots, self.length, self.device = num_slots, length, device
        self.lengths: list[int] = []
        self.prefilling = False
        self.longest = 0
        self.rows = self.places = torch.zeros(0, dtype=torch.long, device=device)
        super().__init__(layers=[SlotLayer(self) for _ in range(num_layers)])

    @property
    def num_rows(self) -> int:
        """How many answers are running."""
        return len(self.lengths)

    def make_room(self, length: int) -> bool:
        """Let a row take `length` tokens; whether the slots had to move: to twice their length at least."""
        if length <= self.length:
            return False
        length = max(length, 2 * self.length)
        for layer in self.layers:
            layer.lengthen(length)
        self.length = length
        return True

    def before_prefill(self, lengths: list[int], dtype: torch.dtype) -> Tensor:
        """Get ready for new rows padded on the right; the additive causal mask [1, 1, T, T]."""
        if self.num_rows + len(lengths) > self.num_slots or max(lengths) > self.length:
            raise ValueError(f"{len(lengths)} rows of up to {max(lengths)} tokens do not fit {self!r}")
        self.prefilling = True
        return torch.full((max(lengths),) * 2, torch.finfo(dtype).min, dtype=dtype, device=self.device).triu(1)[
            None, None
        ]

    def after_prefill(self, lengths: list[int]) -> None:
        """The new rows run from now on; what lies behind their lengths is overwritten or masked."""
        self.prefilling = False
        self.lengths += lengths

    def before_decode(self, places: Tensor, longest: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Get ready for one more token of every row; positions [B, 1] and the additive mask [B, 1, 1, longest].

        Args:
            places: place of each row's token, [B]: `lengths`, on the device. There may be more of them than running
                rows, up to the number of slots: what is written to free slots is written over when they are taken.
            longest: number of places that are attended to, more than any row has tokens; those behind a row's own are
                masked.
        """
        self.prefilling = False
        self.rows = torch.arange(len(places), device=self.device)
        self.places, self.longest = places, longest
        behind = torch.arange(self.longest, device=self.device) > self.places[:, None]
        mask = torch.zeros(behind.shape, dtype=dtype, device=self.device).masked_fill_(behind, torch.finfo(dtype).min)
        return self.places[:, None], mask[:, None, None]

    def after_decode(self) -> None:
        """Count one more token of every row."""
        self.lengths = [length + 1 for length in self.lengths]

    def remove(self, row: int) -> None:
        """End a row; the last row takes its place."""
        last = self.num_rows - 1
        if row != last:
            for layer in self.layers:
                layer.move(last, row, self.lengths[last])
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def clear(self) -> None:
        """End all rows."""
        self.lengths.clear()
        self.prefilling = False

    def __repr__(self) -> str:
        return f"SlotCache({self.num_rows} of {self.num_slots} slots of {self.length} tokens)"
