"""The audio transformer: self-attention over all dense features of a clip (GOLDEN: Audio transformer).

Post-norm layers with rotary positions over the whole clip, so a window knows where in the clip it lies. Without it the
paper loses 10 MMAU points (PAPER 2).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_layers import GradientCheckpointingLayer

LAYER_NORM_EPS = 1e-6
MIN_ROTARY_DIMS = 32


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
    """Rotate the first dims of each head of `x` [..., A, d] by its position; the remaining dims pass through."""
    cos, sin = table
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat((turned * cos + torch.cat((-second, first), dim=-1) * sin, rest), dim=-1)


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

    def forward(self, x: Tensor, mask: Tensor | None, table: tuple[Tensor, Tensor] | None) -> Tensor:
        """`x` [C, A, D]; `mask` bool [C, 1, 1, A] of real tokens, or none if all are."""
        num, length, width = x.shape
        q, k, v = (
            proj(x).view(num, length, self.num_heads, -1).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if table is not None:
            q, k = rotate(q, table), rotate(k, table)
        y = nnf.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = self.attention_norm(x + self.out_proj(y.transpose(1, 2).reshape(num, length, width)))
        return self.ff_norm(x + self.fc2(self.fc1(x).relu()))


class AudioTransform(nn.Module):
    """Dense features to audio states: times sqrt(D), LayerNorm, `num_layers` layers (0: only the first two).

    Args:
        rope_base: base of the rotary frequencies; none leaves positions out.
    """

    def __init__(
        self, width: int, num_layers: int, num_heads: int, inner_size: int, rope_base: float | None = 4096.0
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"transform heads {num_heads} do not divide the audio width {width}: change one of them")
        head_dim = width // num_heads
        self.rotary_dims = min(max(head_dim // 2, MIN_ROTARY_DIMS), head_dim - head_dim % 2)
        self.rope_base = rope_base
        self.input_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.layers = nn.ModuleList([AudioTransformLayer(width, num_heads, inner_size) for _ in range(num_layers)])

    def encode_ragged(self, clips: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Audio states [C, A, D] and their bool mask [C, A] of clips [A_c, D] of unlike length, padded to the longest.

        Without gradients, clips of one length go together and nothing is padded before the end. With them there is one
        call whatever the lengths: under ZeRO-3 all ranks must make equally many.
        """
        lengths = torch.tensor([len(clip) for clip in clips], device=clips[0].device)
        mask = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]
        if torch.is_grad_enabled():
            return self(pad_sequence(list(clips), batch_first=True), mask), mask
        hidden: dict[int, Tensor] = {}
        for length in {len(clip) for clip in clips}:
            alike = [index for index, clip in enumerate(clips) if len(clip) == length]
            hidden |= zip(alike, self(torch.stack([clips[index] for index in alike]), None), strict=True)
        return pad_sequence([hidden[index] for index in range(len(clips))], batch_first=True), mask

    def forward(self, features: Tensor, mask: Tensor | None) -> Tensor:
        """Audio states [C, A, D] of features [C, A, D], padded at the end where bool `mask` [C, A] is false.

        A clip's states do not depend on the padding. Padded positions hold finite values of no meaning.
        """
        x = self.input_norm(features * features.shape[-1] ** 0.5)
        table = None
        if self.rope_base is not None:
            table = rotary_table(x.shape[1], self.rotary_dims, self.rope_base, x)
        for layer in self.layers:
            x = layer(x, None if mask is None else mask[:, None, None, :], table)
        return x
