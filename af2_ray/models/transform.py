"""The audio transformer: self-attention over all dense features of a clip (docs/paper.md, "Audio transformer").

Post-norm layers with rotary positions over the whole clip, so a window knows where in the clip it lies. Without it the
paper loses 10 MMAU points.

Clips are ragged all the way through: one call of every linear layer and norm over the tokens of all clips, end to end,
and only attention, which has no parameters, clip by clip. Of clips of 10, 30, 60 and 300 s a rectangle would be two
thirds padding. All ranks call every module equally often whatever their clips, as ZeRO-3 needs.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from af2_ray.models.attention import attend
from af2_ray.models.configuration_af2 import AudioFlamingo2Config
from af2_ray.models.reorder import to_device

LAYER_NORM_EPS = 1e-6
MIN_ROTARY_DIMS = 32
MOMENT_GAIN = 4.0
"""Moments are means over many tokens, and so smaller than a token: this makes them about as loud."""


@functools.cache
def rotary_frequencies(num_dims: int, base: float, device: torch.device) -> Tensor:
    """Inverse frequencies [num_dims / 2], float32; not a buffer, so a cast of the model does not round them."""
    return 1.0 / (base ** (torch.arange(0, num_dims, 2, device=device).float() / num_dims))


def rotary_table(num_positions: int, num_dims: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [A, num_dims] for positions 0..A-1, rotate-half layout, in the type of `like`."""
    positions = torch.arange(num_positions, device=like.device).float()
    angles = torch.outer(positions, rotary_frequencies(num_dims, base, like.device)).repeat(1, 2)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first dims of each head of `x` [N, H, d] by its position; the remaining dims pass through.

    Args:
        table: cosines and sines of each token, [N, 1, num_dims].
    """
    cos, sin = table
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat((turned * cos + torch.cat((-second, first), dim=-1) * sin, rest), dim=-1)


def attend_within(q: Tensor, k: Tensor, v: Tensor, groups: Sequence[tuple[int, int]]) -> Tensor:
    """Self-attention of each clip's tokens [N, H, d] among themselves; [N, H * d].

    Args:
        groups: numbers of clips of one length and that length, in the order of the tokens; one kernel a group.
    """
    parts = []
    for (num, length), *qkv in zip(groups, *(t.split([num * length for num, length in groups]) for t in (q, k, v))):
        q, k, v = (t.view(num, length, *t.shape[1:]).transpose(1, 2) for t in qkv)
        parts.append(attend(q, k, v).transpose(1, 2).reshape(num * length, -1))
    return torch.cat(parts)


def time_table(times: Tensor, length: Tensor, num_features: int) -> Tensor:
    """Where in its clip each token lies, [N, 3 * num_features]: as a share of the clip, and on the clock.

    Cosines of 1, 2 ... half turns over the whole clip tell beginning from end whatever its length; sines and cosines
    of half a window, one, two, four ... tell apart what is near. Every token has its own value, which attention with
    rotary positions alone has to infer from what lies on either side.

    Args:
        times, length: time of each token and length of its clip, in windows, [N].
    """
    number = torch.arange(num_features, device=times.device)
    share = math.pi * (times / length)[:, None] * (number + 1)
    clock = 4 * math.pi * times[:, None] / 2.0**number
    return torch.cat((share.cos(), clock.sin(), clock.cos()), dim=1)


def time_moments(share: Tensor, num: int) -> Tensor:
    """Weights [..., num] of tokens at `share` [...] of the way from beginning (0) to end (1): cosines of m half turns.

    A mean is blind to order unless attention has written into each token what came before it. The first moment is what
    the beginning has more of than the end, the second what both have more of than the middle, and so on.
    """
    return (share[..., None] * math.pi * torch.arange(1, num + 1, device=share.device)).cos() * 2**0.5


class AudioTransformLayer(GradientCheckpointingLayer):
    """Self-attention without biases, then a ReLU feed-forward, each followed by residual and LayerNorm."""

    def __init__(self, width: int, num_heads: int, inner_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        self.attention_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.fc1 = nn.Linear(width, inner_size)
        self.fc2 = nn.Linear(inner_size, width)
        self.ff_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

    def forward(
        self, x: Tensor, groups: Sequence[tuple[int, int]], table: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """`x` [N, D], the tokens of all clips; `groups` as `attend_within` takes them, `table` as `rotate` does."""
        q, k, v = (proj(x).unflatten(1, (self.num_heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if table is not None:
            q, k = rotate(q, table), rotate(k, table)
        x = self.attention_norm(x + self.out_proj(attend_within(q, k, v, groups)))
        return self.ff_norm(x + self.fc2(self.fc1(x).relu()))


class AudioTransform(nn.Module):
    """Dense features to audio states: times sqrt(D), LayerNorm, `num_layers` layers (0: only the first two).

    `transform_time_features` adds an embedding of each token's time after the first LayerNorm (`time_table`): a small
    model learns order and place from it in a fraction of the examples. `transform_moments` adds moments of time of the
    token's clip (`time_moments`).

    Args:
        config: configuration, of which the keys `transform_*` are read.
        width: width of the audio features, D.
        window_shape: frequency bands and time steps of a window's tokens, bands first.
    """

    def __init__(self, config: AudioFlamingo2Config, width: int, window_shape: tuple[int, int] = (2, 32)) -> None:
        super().__init__()
        num_heads = config.transform_heads
        if width % num_heads:
            raise ValueError(f"transform heads {num_heads} do not divide the audio width {width}: change one of them")
        head_dim = width // num_heads
        self.rotary_dims = min(max(head_dim // 2, MIN_ROTARY_DIMS), head_dim - head_dim % 2)
        self.rope_base = config.transform_rope_base
        self.input_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.time_features, self.window_shape = config.transform_time_features, window_shape
        if self.time_features:
            self.time_embedding = nn.Linear(3 * self.time_features, width, bias=False)
        self.moments = config.transform_moments
        if self.moments:
            self.moment_embedding = nn.Linear(self.moments * width, width, bias=False)
        self.layers = nn.ModuleList(
            [AudioTransformLayer(width, num_heads, config.transform_inner_size) for _ in range(config.transform_layers)]
        )

    def forward(self, features: Tensor, lengths: Sequence[int]) -> Tensor:
        """Audio states [N, D] of features [N, D]: clips end to end, `lengths` tokens each. No clip hears another."""
        order = sorted(range(len(lengths)), key=lengths.__getitem__)  # clips of one length side by side
        ordered = order != list(range(len(lengths)))
        clips = features.split(list(lengths))
        x = torch.cat([clips[index] for index in order]) if ordered else features
        x = self.input_norm(x * x.shape[-1] ** 0.5)
        groups = [(num, length) for length, num in sorted(Counter(lengths).items())]
        positions = to_device(torch.cat([torch.arange(length).repeat(num) for num, length in groups]), x.device)
        if self.time_features or self.moments:
            x = x + self._embed_time(x, positions, [lengths[index] for index in order]).to(x.dtype)
        table = None
        if self.rope_base is not None:
            rows = rotary_table(max(lengths), self.rotary_dims, self.rope_base, x)
            table = rows[0][positions, None], rows[1][positions, None]
        for layer in self.layers:
            x = layer(x, groups, table)
        if not ordered:
            return x
        back = dict(zip(order, x.split([lengths[index] for index in order]), strict=True))
        return torch.cat([back[index] for index in range(len(lengths))])

    def _embed_time(self, x: Tensor, positions: Tensor, lengths: Sequence[int]) -> Tensor:
        """What is added to tokens [N, D]: the time of each, from its position [N], and the moments of its clip."""
        bands, steps = self.window_shape
        counts = torch.tensor(lengths)
        owner = to_device(torch.arange(len(lengths)).repeat_interleave(counts), x.device)
        sizes = to_device(counts, x.device)
        times = positions // (bands * steps) + (positions % steps) / steps
        length = sizes[owner] / (bands * steps)
        embedded = torch.zeros_like(x)
        if self.time_features:
            table = time_table(times, length, self.time_features)
            embedded = embedded + self.time_embedding(table.to(self.time_embedding.weight.dtype))
        if self.moments:
            weights = (time_moments(times / length, self.moments) / sizes[owner, None]).to(x.dtype)  # [N, P]
            sums = x.new_zeros(len(lengths), self.moments, x.shape[1])
            sums = sums.index_add(0, owner, weights[..., None] * x[:, None])
            embedded = embedded + MOMENT_GAIN * self.moment_embedding(sums.flatten(1))[owner]
        return embedded
