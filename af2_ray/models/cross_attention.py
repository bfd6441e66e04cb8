"""Gated cross-attention from text to audio (XATTN-Dense), and the cache of its keys and values.

Keys and values depend on the audio alone: they are projected once a clip, whatever the number of questions about it,
and while generating they stay in the cache beside the text's, instead of being projected again at every token (69 % of
the reference's decoding time at 5 minutes of audio).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer

from af2_ray.models.attention import attend
from af2_ray.models.audio_states import Heard, Rectangle
from af2_ray.models.configuration_af2 import AudioFlamingo2Config
from af2_ray.models.kept import KeepsConstants


class AudioCache(DynamicCache):
    """The text cache, with each layer's audio keys and values beside it.

    Reordering, selecting and repeating rows take the audio along; cropping the text leaves it alone; a reset drops it.

    Attributes:
        audio: keys and values, each [B, H, K * A, d], by layer index.
        tokens_heard: mask of the real audio tokens, bool [B, K, A]; none before prefill or without audio.
        markers: number of `<audio>` markers of each row so far, int [B].
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.audio: dict[int, tuple[Tensor, Tensor]] = {}
        self.tokens_heard: Tensor | None = None
        self.markers: Tensor | None = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in the order of `beam_idx`, as beam search asks."""
        super().reorder_cache(beam_idx)
        self._map_rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows."""
        super().batch_select_indices(indices)
        self._map_rows(lambda t: t[indices.to(t.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def reset(self) -> None:
        """Forget text and audio."""
        super().reset()
        self.audio, self.tokens_heard, self.markers = {}, None, None

    def _map_rows(self, change: Any) -> None:
        self.audio = {layer: (change(keys), change(values)) for layer, (keys, values) in self.audio.items()}
        self.tokens_heard = None if self.tokens_heard is None else change(self.tokens_heard)
        self.markers = None if self.markers is None else change(self.markers)


class Audio(Protocol):
    """What the text of one forward pass attends to; handed to every layer by keyword."""

    @property
    def hears(self) -> Tensor | None:
        """bool [B, T, 1] (or [B, 1, 1]), false where a text token hears nothing: there a layer changes nothing.

        None: all hear something.
        """

    def attend(self, layer: GatedCrossAttention, q: Tensor) -> Tensor:
        """Queries [B, H, T, d] of a layer to the audio, [B, H, T, d]."""


@dataclass
class AudioContext:
    """`Audio` of whole batches, as in training and `generate`.

    Attributes:
        packed: the real tokens of all clips end to end, [N, D]; none when the cache holds the keys and values.
        rectangle: where they stand in a rectangle of clips.
        clips: clip of each audio of each row, [B, K], 0 where there is none; none: row b hears clip b.
        mask: numbers to add to scores, float [B, 1, T, K * A]: which audio tokens each text token attends to. Rows
            that hear nothing are all shut alike here (an empty softmax is NaN) and blanked by `hears`.
        hears: mask of text tokens that hear something, bool [B, T, 1]; elsewhere the layer changes nothing.
        cache: cache that keeps keys and values; none when training.
    """

    packed: Tensor | None
    rectangle: Rectangle | None
    clips: Tensor | None
    mask: Tensor
    hears: Tensor
    cache: AudioCache | None

    @classmethod
    def of(cls, heard: Heard, dtype: torch.dtype, cache: AudioCache | None) -> AudioContext:
        """Each text token attends to every audio whose `<audio>` marker is at or before it."""
        tokens = heard.tokens
        if heard.ordinals is None:
            ordinals = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
            visible = (heard.markers[..., None] >= ordinals) & tokens.any(dim=2)[:, None, :]  # [B, T, K]
            mask = (visible[..., None] & tokens[:, None]).flatten(2)[:, None]  # [B, 1, T, K * A]
        else:
            visible = (heard.markers[..., None] >= heard.ordinals[:, None]) & tokens  # [B, T, A], of one clip a row
            mask = visible[:, None]
        penalty = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
        packed, rectangle = heard.states.pack() if heard.states is not None and heard.first else (None, None)
        clips = None if heard.audio_index is None else heard.audio_index.clamp(min=0)
        return cls(packed, rectangle, clips, penalty, visible.any(dim=2, keepdim=True), cache)

    def attend(self, layer: GatedCrossAttention, q: Tensor) -> Tensor:
        """Queries [B, H, T, d] of a layer to the audio, [B, H, T, d]."""
        keys, values = layer._keys_values(self)
        return attend(q, keys, values, self.mask)


class GatedCrossAttention(KeepsConstants, GradientCheckpointingLayer):
    """x += tanh(attn_gate) * attention(x, audio); x += tanh(ff_gate) * feed_forward(x). Gates start at 0.

    Heads are `head_dim` wide whatever the widths of text and audio. Queries come from the LayerNorm of the text; keys
    and values from the audio states as they are, by one packed projection (keys first). No biases.
    """

    def __init__(self, config: AudioFlamingo2Config, audio_width: int, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads, self.head_dim = config.cross_attn_heads, config.cross_attn_head_dim
        text_width, ff_mult = config.text_config.hidden_size, config.cross_attn_ff_mult
        inner = self.num_heads * self.head_dim
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.norm = nn.LayerNorm(text_width)
        self.to_q = nn.Linear(text_width, inner, bias=False)
        self.to_kv = nn.Linear(audio_width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, text_width, bias=False)
        self.ff_gate = nn.Parameter(torch.zeros(1))
        self.ff_norm = nn.LayerNorm(text_width)
        self.fc1 = nn.Linear(text_width, ff_mult * text_width, bias=False)
        self.fc2 = nn.Linear(ff_mult * text_width, text_width, bias=False)

    def project(self, states: Tensor) -> Tensor:
        """Keys and values [N, 2, H, d] of audio states [N, D]."""
        return self.to_kv(states).unflatten(-1, (2, self.num_heads, self.head_dim))

    def forward(self, x: Tensor, audio: Audio) -> Tensor:
        """Text states [B, T, D] with what they hear added."""
        rows, length, _ = x.shape
        q = self.to_q(self.norm(x)).view(rows, length, self.num_heads, self.head_dim).transpose(1, 2)
        y = audio.attend(self, q)
        heard = self._add(x, self.to_out(y.transpose(1, 2).reshape(rows, length, -1)), self.attn_gate)
        heard = self._add(heard, self.fc2(nnf.gelu(self.fc1(self.ff_norm(heard)))), self.ff_gate)
        return heard if audio.hears is None else torch.where(audio.hears, heard, x)

    def _add(self, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        """`x` + tanh(`gate`) * `y`; on a GPU that answers one kernel, and the tangent is taken once."""
        if x.device.type == "cpu" or torch.is_grad_enabled():
            return x + y * gate.tanh()
        return torch.addcmul(x, y, self.keep(gate, [gate], gate.tanh))

    def _keys_values(self, audio: AudioContext) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, K * A, d]: from the cache, else projected once a clip and handed to its rows."""
        if audio.cache is not None and self.layer_idx in audio.cache.audio:
            return audio.cache.audio[self.layer_idx]
        if audio.packed is None or audio.rectangle is None:
            raise ValueError("audio states are needed where the cache holds no keys and values")
        # Only real tokens are projected; the rectangle is made of the result, where padding is cheap.
        projected = audio.rectangle.fill(self.project(audio.packed))  # [C, A, 2, H, d]
        if audio.clips is not None:
            projected = projected[audio.clips].flatten(1, 2)
        keys, values = projected.permute(2, 0, 3, 1, 4)
        if audio.cache is not None:
            keys, values = keys.contiguous(), values.contiguous()
            audio.cache.audio[self.layer_idx] = keys, values
        return keys, values


class GatedDecoderLayer(nn.Module):
    """An LM layer, and before it the cross-attention that belongs to it, if any; hands everything else on."""

    def __init__(self, decoder_layer: nn.Module, cross_attention: GatedCrossAttention | None) -> None:
        super().__init__()
        self.cross_attention = cross_attention
        self.decoder_layer = decoder_layer

    def forward(self, hidden_states: Tensor, *args: Any, audio: Audio | None = None, **kwargs: Any) -> Any:
        """As the LM's own layer, with what the text hears as the keyword `audio`."""
        if self.cross_attention is not None and audio is not None:
            hidden_states = self.cross_attention(hidden_states, audio)
        return self.decoder_layer(hidden_states, *args, **kwargs)
