"""How running answers hear: cross-attention from many rows of text to the kept keys and values of their clips.

Rows that hear the same clips share one attention call, as so many queries of one row; others have a call each, over
their own real audio tokens. Nothing is padded and nothing copied: clips of 5 s and 5 min side by side cost what they
cost alone, where a rectangle would make every row as dear as the longest. The price is a kernel for each distinct
clip and layer.

Shapes: B rows, T text tokens, K clips a row, A audio tokens, H heads, d head width, X layers that hear.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as nnf
from torch import Tensor

from af2_ray.engine.audio_memory import length_bucket
from af2_ray.engine.transfer import send, upload
from af2_ray.models.cross_attention import GatedCrossAttention
from af2_ray.models.modeling_af2 import AudioFlamingo2ForConditionalGeneration


@dataclass(frozen=True)
class ClipsKV:
    """What one row hears: keys and values [X, 2, H, A, d] of its clips end to end, and each clip's length."""

    keys: tuple[str, ...]
    kv: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, keys: Sequence[str], parts: Sequence[Tensor]) -> Self:
        """The keys and values of one or more kept clips, in order; several are copied end to end."""
        kv = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=3)
        return cls(tuple(keys), kv, tuple(part.shape[3] for part in parts))


@dataclass(frozen=True)
class _Group:
    """Rows that attend to one set of keys and values; `length` of their text tokens are real."""

    rows: Tensor
    kv: Tensor
    length: int
    mask: Tensor | None = None

    def holds(self, q: Tensor) -> bool:
        """Whether all of the queries [B, H, T, d] are this group's."""
        return len(self.rows) == len(q) and self.length == q.shape[2]

    def attend(self, q: Tensor, place: int) -> Tensor:
        """Queries [rows, H, length, d] to the keys and values of a layer."""
        keys, values = self.kv[place, :, None]  # [1, H, A, d] each
        if self.length > 1:
            return nnf.scaled_dot_product_attention(q, keys, values, attn_mask=self.mask)
        # One token of each row: the rows are queries of one.
        states = nnf.scaled_dot_product_attention(q[:, :, 0].transpose(0, 1)[None], keys, values)
        return states[0].transpose(0, 1)[:, :, None]


class RowsAudio:
    """What the rows of one pass hear: the `cross_attention.Audio` of the engine."""

    def __init__(self, groups: Sequence[_Group], hears: Tensor | None, places: Mapping[int, int]) -> None:
        self._groups, self.hears, self._places = groups, hears, places

    @classmethod
    def of_prompts(
        cls,
        rows_kv: Sequence[ClipsKV | None],
        markers: Tensor,
        lengths: Sequence[int],
        places: Mapping[int, int],
        device: torch.device,
    ) -> Self | None:
        """The audio of prompts padded on the right: a text token hears the clips whose `<audio>` is at or before it.

        Args:
            markers: number of `<audio>` markers so far, [B, T], in the host's memory, as nobody waits for that.
            places: place in the keys and values of each LM layer that hears, by the layer's index.
        """
        groups, hears = [], torch.zeros((*markers.shape, 1), dtype=torch.bool)
        for row, (clips, length) in enumerate(zip(rows_kv, lengths, strict=True)):
            if clips is None:
                continue
            visible = markers[row, :length, None] >= torch.arange(1, len(clips.lengths) + 1)  # [T, K]
            hears[row, :length, 0] = visible.any(dim=1)
            mask = None
            if not bool(visible.all()):
                clip_of_token = torch.arange(len(clips.lengths)).repeat_interleave(torch.tensor(clips.lengths))
                shut = ~send(visible, device).index_select(1, send(clip_of_token, device))  # [T, A]
                mask = torch.zeros(shut.shape, dtype=clips.kv.dtype, device=device)
                mask = mask.masked_fill_(shut, torch.finfo(mask.dtype).min)
            groups.append(_Group(upload([row], device), clips.kv, length, mask))
        if not groups:
            return None
        behind = torch.arange(markers.shape[1]) >= torch.tensor(lengths)[:, None]  # [B, T], what nobody asks about
        all_hear = bool((hears[..., 0] | behind).all())
        return cls(groups, None if all_hear else send(hears, device), places)

    @classmethod
    def of_running(
        cls, rows_kv: Sequence[ClipsKV | None], places: Mapping[int, int], device: torch.device
    ) -> Self | None:
        """The audio for one more token of every running row."""
        rows: dict[tuple[str, ...], list[int]] = {}
        kvs: dict[tuple[str, ...], Tensor] = {}
        for row, clips in enumerate(rows_kv):
            if clips is not None:
                rows.setdefault(clips.keys, []).append(row)
                kvs.setdefault(clips.keys, clips.kv)
        if not rows:
            return None
        groups = [_Group(upload(rows[keys], device), kv, 1) for keys, kv in kvs.items()]
        if None not in rows_kv:
            return cls(groups, None, places)
        hears = upload([clips is not None for clips in rows_kv], device)
        return cls(groups, hears[:, None, None], places)

    def attend(self, layer: GatedCrossAttention, q: Tensor) -> Tensor:
        """Queries [B, H, T, d] to what they hear, [B, H, T, d]; zeros where a row hears nothing."""
        place = self._places[layer.layer_idx]
        if len(self._groups) == 1 and self._groups[0].holds(q):
            return self._groups[0].attend(q, place)
        out = torch.zeros_like(q)
        for group in self._groups:
            length = slice(group.length)
            out[group.rows, :, length] = group.attend(q[group.rows, :, length], place)
        return out


class Projection:
    """What the LM hears of audio states, by the model's fusion: keys and values of all layers, or a prefix."""

    def __init__(self, model: AudioFlamingo2ForConditionalGeneration) -> None:
        self._model = model
        self.is_prefix = model.config.fusion == "prefix"
        layers = [layer.cross_attention for layer in model.language_model.model.layers]
        self._layers = [layer for layer in layers if layer is not None]
        self.places = {layer.layer_idx: place for place, layer in enumerate(self._layers)}
        self.tokens_per_window = model.tokens_per_window
        self._token_bytes = model.audio_tower.output_size * model.dtype.itemsize

    def __call__(self, states: Tensor, num_windows: int) -> Tensor:
        """Keys and values [X, 2, H, A, d] of states [A, D], or a prefix [A, D of LM], in memory of a length bucket."""
        if self.is_prefix:
            return self._model.prefix.project(states)
        first, num = self._layers[0], len(states)
        room = length_bucket(num_windows) * self.tokens_per_window
        kv = states.new_empty((len(self._layers), 2, first.num_heads, room, first.head_dim))[:, :, :, :num]
        for place, layer in enumerate(self._layers):
            kv[place] = layer.project(states).permute(1, 2, 0, 3)  # of [A, 2, H, d]
        return kv

    def states_bytes(self, num_windows: int) -> int:
        """Bytes of a clip's audio states."""
        return num_windows * self.tokens_per_window * self._token_bytes

    def projected_bytes(self, num_windows: int) -> int:
        """Bytes of what the LM hears of a clip."""
        itemsize = self._model.dtype.itemsize
        if self.is_prefix:
            return num_windows * self.tokens_per_window * int(self._model.config.text_config.hidden_size) * itemsize
        width = sum(2 * layer.num_heads * layer.head_dim for layer in self._layers)
        return length_bucket(num_windows) * self.tokens_per_window * width * itemsize
