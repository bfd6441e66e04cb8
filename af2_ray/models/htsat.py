"""The HTSAT audio tower: 10 s windows in, 64 dense features a window out.

The parameters are transformers' `ClapAudioModel`, so weights in that layout load as they are; the forward pass is our
own, over the same modules: each window once instead of four times, no pooling, heads or fusion branch (our windows are
never "longer" than 10 s), one packed projection and PyTorch's attention, masks built once, checkpointing a block. The
features and gradients are those of `ClapAudioModel.forward`; on one CPU core the time is about the same (width 24,
depths 2-2-6-2: 18 ms a window without gradients, 55 with), on a GPU the attention is fused.

The mel BatchNorm never uses batch statistics, so features do not depend on what else is in the batch: a converted tower
keeps its statistics, a new one gets them from `calibrate`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import ClapAudioConfig, ClapAudioModel

from af2_ray.audio.mel import LogMel
from af2_ray.models.attention import attend
from af2_ray.models.kept import KeepsConstants
from af2_ray.models.reorder import reorder

WINDOWS_PER_PART = {"cpu": 8, "cuda": 128}
"""How many windows are taken at a time without gradients; bounds memory, and stays in a CPU's cache."""
SHIFT_PENALTY = -100.0


def tower_config(
    embed_dim: int,
    depths: Sequence[int],
    num_heads: Sequence[int],
    *,
    patch_size: int = 4,
    window_size: int = 8,
    mlp_ratio: float = 4.0,
    **settings: Any,
) -> ClapAudioConfig:
    """A tower configuration of the given size; dropout and drop-path are 0 unless named in `settings`."""
    if len(depths) != len(num_heads):
        raise ValueError(f"depths {list(depths)} and num_heads {list(num_heads)} need one number a stage each")
    settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "drop_path_rate": 0.0, **settings}
    return ClapAudioConfig(
        patch_embeds_hidden_size=embed_dim,
        hidden_size=embed_dim * 2 ** (len(depths) - 1),
        depths=list(depths),
        num_attention_heads=list(num_heads),
        patch_size=patch_size,
        patch_stride=[patch_size, patch_size],
        window_size=window_size,
        mlp_ratio=float(mlp_ratio),  # transformers checks the type
        **settings,
    )


def turns_windows(device: torch.device) -> bool:
    """Whether shifted windows stand side by side, patch by patch, which saves a copy of queries, keys, values and sums.

    On a CPU they do not: the sums of gradients would be taken in another order, and round otherwise.
    """
    return device.type != "cpu"


class AudioTower(KeepsConstants):
    """Mel front end, mel BatchNorm and Swin encoder; shapes: S windows, R rows = columns of a stage, C channels."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Any = staticmethod(functools.partial(checkpoint, use_reentrant=False))

    def __init__(self, config: ClapAudioConfig) -> None:
        super().__init__()
        self.config = config
        self.log_mel = LogMel()
        config._attn_implementation = "eager"  # of ClapAudioModel's own forward, the only one it knows; ours is below
        self.model = ClapAudioModel(config)
        self._masks: dict[tuple[Any, ...], Tensor] = {}
        self._orders: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    @property
    def output_size(self) -> int:
        """Width of a feature."""
        return int(self.model.audio_encoder.num_features)

    @property
    def window_shape(self) -> tuple[int, int]:
        """Frequency bands and time steps of a window's features, which come band by band."""
        chunks = self.model.audio_encoder.freq_ratio  # stretches of time that are stacked to make a square image
        side = self.config.spec_size // self.config.patch_stride[0] // 2 ** (len(self.config.depths) - 1)
        return side // chunks, side * chunks

    @property
    def trains(self) -> bool:
        """Whether any parameter is to be trained; if none is, the tower runs without gradients, in eval mode."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def train(self, mode: bool = True) -> AudioTower:
        """Eval mode if the tower is frozen, whatever is asked; the BatchNorms stay in eval mode always."""
        super().train(mode and self.trains)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, waveforms: Tensor, anchor: Tensor | None = None) -> Tensor:
        """Dense features [S, 64, D] of windows, int16 or float in [-1, 1], [S, 160000].

        `anchor` is a zero that is added to the spectrograms: whoever must know when the whole backward pass is over
        sees it in the gradient of an input, and waveforms have none (`train.deepspeed`).
        """
        if self.training and not self.trains:
            self.eval()
        parts = waveforms.split(WINDOWS_PER_PART.get(waveforms.device.type, 32))
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains):
            mels = (self.log_mel(part) for part in parts)
            return torch.cat([self.encode(mel if anchor is None else mel + anchor) for mel in mels])

    @torch.no_grad()
    def calibrate(self, waveforms: Tensor) -> None:
        """Take the mel BatchNorm's mean and variance from windows [S, 160000]; further calls add to the same estimate.

        Only for a new tower: its statistics must come from training audio alone, before the first step.
        """
        norm = self.model.audio_encoder.batch_norm
        mel = self.log_mel(waveforms).double()
        old, new = int(norm.num_batches_tracked), waveforms.shape[0]  # counted in windows
        variance, mean = torch.var_mean(mel, dim=(0, 1), correction=0)
        share = new / (old + new)
        shift = mean - norm.running_mean.double()
        merged = torch.lerp(norm.running_var.double(), variance, share) + share * (1 - share) * shift.square()
        norm.running_var.copy_(merged if old else variance)
        norm.running_mean.copy_(norm.running_mean.double() + share * shift)
        norm.num_batches_tracked.fill_(old + new)

    @torch.no_grad()
    def direct_heads(self, strength: float) -> None:
        """Start the last stage's even heads listening back in time and its odd ones ahead, by a bias up to `strength`.

        Only for a new tower. A mean over tokens is blind to order unless tokens know what came before them, and from
        transformers' start (a bias of 0, the same in both directions) attention takes long to find that out.
        """
        encoder = self.model.audio_encoder
        for block in encoder.layers[-1].blocks:
            table = block.attention.self.relative_position_bias_table  # [(2 w - 1)^2, heads], query minus key
            size = (round(table.shape[0] ** 0.5) + 1) // 2
            apart = torch.arange(1 - size, size, dtype=torch.float32)
            bands = max(1, size // encoder.freq_ratio)  # rows that share a stretch of time
            lag = (apart[:, None] / bands * size + apart).flatten()
            sign = 1 - 2 * (torch.arange(table.shape[1]) % 2)
            table.copy_(strength * torch.tanh(lag / 4)[:, None] * sign)

    def encode(self, mel: Tensor) -> Tensor:
        """Features [S, 64, D] of log-mel spectrograms [S, frames, 64]: 2 frequency bands, each of 32 time steps."""
        encoder = self.model.audio_encoder
        x = self._embed_patches(mel)
        for stage in encoder.layers:
            for index, block in enumerate(stage.blocks):
                x = self._run(block, x, shifted=index % 2 == 1)
            if stage.downsample is not None:
                num, rows, columns, _ = x.shape
                merged = stage.downsample(x.flatten(1, 2), (rows, columns)).to(x.dtype)
                x = merged.view(num, rows // 2, columns // 2, -1)
        x = encoder.norm(x)
        num, rows, columns, width = x.shape
        x = x.view(num, encoder.freq_ratio, rows // encoder.freq_ratio, columns, width)  # [S, time, band, step, D]
        return x.transpose(1, 2).reshape(num, rows * columns, width)

    def _embed_patches(self, mel: Tensor) -> Tensor:
        """[S, frames, 64] -> patches [S, R, R, C]: normalise, stretch to 1024 frames, fold to 256 x 256, convolve."""
        encoder = self.model.audio_encoder
        norm, embed = encoder.batch_norm, encoder.patch_embed
        num, frames, bins = mel.shape
        x = nnf.batch_norm(
            mel.reshape(-1, bins),
            norm.running_mean.float(),
            norm.running_var.float(),
            norm.weight.float(),
            norm.bias.float(),
            training=False,
            eps=norm.eps,
        )
        image = encoder.reshape_mel2img(x.view(num, 1, frames, bins)).to(embed.proj.weight.dtype)
        # Under autocast products are bf16; what the blocks add to stays in the weights' type, here and after merging.
        return embed.norm(embed.proj(image).permute(0, 2, 3, 1).to(image.dtype))

    def _run(self, block: Any, x: Tensor, shifted: bool) -> Tensor:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(self._block, block, x, shifted)
        return self._block(block, x, shifted)

    def _block(self, block: Any, x: Tensor, shifted: bool) -> Tensor:
        """One pre-norm Swin block on [S, R, R, C]: attention in windows (odd blocks shift them), then an MLP."""
        rows = x.shape[1]
        size = min(self.config.window_size, rows)
        shift = size // 2 if shifted and rows > size else 0
        y = self._attend(block.attention, block.layernorm_before(x), size, shift)
        x = x + block.drop_path(y)
        return x + block.output(block.intermediate(block.layernorm_after(x)))

    def _attend(self, attention: Any, x: Tensor, size: int, shift: int) -> Tensor:
        """Self-attention within windows of `size` x `size` patches, with relative position bias; [S, R, R, C]."""
        num, rows, _, width = x.shape
        num_windows, area, heads = (rows // size) ** 2, size * size, attention.self.num_attention_heads
        mask, dropout = self._mask(attention.self, rows, size, shift), attention.self.dropout.p if self.training else 0
        x, turned = x.flatten(1, 2), bool(shift) and turns_windows(x.device)
        there, back = self._order(rows, size, shift, turned, x.device)
        if num_windows > 1:
            x = reorder(x, there, back, 1)
        # Windows whose masks differ go beside the heads, those of one mask beside the spectrograms; the mask is
        # broadcast over what comes first.
        if turned:
            inner, shape = attention.self, (num, area, num_windows * heads, width // heads)
            q, k, v = (project(x).view(shape).transpose(1, 2) for project in (inner.query, inner.key, inner.value))
            y = attend(q, k, v, mask, dropout).transpose(1, 2)
        else:
            packed = nnf.linear(x.view(num, num_windows, area, width), *self._packed(attention.self))
            q, k, v = packed.view(num, num_windows, area, 3, heads, width // heads).permute(3, 0, 1, 4, 2, 5)
            q, k, v = (t.flatten(1, 2) if shift else t.flatten(0, 1) for t in (q, k, v))
            y = attend(q, k, v, mask, dropout)
            y = y.reshape(num, num_windows, heads, area, width // heads).transpose(2, 3)
        y = attention.output(y.reshape(num, rows * rows, width), None)
        return (reorder(y, back, there, 1) if num_windows > 1 else y).view(num, rows, rows, width)

    @torch.inference_mode(False)  # a model may answer first, and then learn by the same indices
    def _order(self, rows: int, size: int, shift: int, turned: bool, device: torch.device) -> tuple[Tensor, Tensor]:
        """Patches, after the cyclic shift, window by window and the way back: indices [R * R] each.

        `turned`: the first patch of every window, then the second of every window and so on.
        """
        key = (rows, size, shift, turned, device)
        if key not in self._orders:
            across = rows // size
            patches = torch.arange(rows * rows, device=device).view(rows, rows).roll((-shift, -shift), dims=(0, 1))
            windows = patches.view(across, size, across, size).transpose(1, 2).reshape(across * across, size * size)
            there = (windows.T if turned else windows).flatten()
            self._orders[key] = there, there.argsort()
        return self._orders[key]

    def _packed(self, inner: Any) -> tuple[Tensor, Tensor | None]:
        """Weight [3 C, C] and bias [3 C] of queries, keys and values."""
        parts = inner.query, inner.key, inner.value
        biases = [part.bias for part in parts if part.bias is not None]

        def pack() -> tuple[Tensor, Tensor | None]:
            return torch.cat([part.weight for part in parts]), torch.cat(biases) if biases else None

        return self.keep((inner, "packed"), [*(part.weight for part in parts), *biases], pack)

    def _mask(self, inner: Any, rows: int, size: int, shift: int) -> Tensor:
        """What is added to scores, [1, H, w * w, w * w], or [1, n * n * H, w * w, w * w] where windows are shifted."""
        table, area = inner.relative_position_bias_table, size * size

        def make() -> Tensor:
            mask = table[inner.relative_position_index.flatten()].view(area, area, -1).permute(2, 0, 1)
            if shift:
                mask = (mask + self._shift_mask(rows, size, shift, mask)).flatten(0, 1)
            return mask[None].contiguous()  # fused kernels on a GPU take no other, and are then passed over silently

        return self.keep((inner, rows), [table], make)

    def _shift_mask(self, rows: int, size: int, shift: int, like: Tensor) -> Tensor:
        """[n * n, 1, area, area]: -100 between patches that only the cyclic shift made neighbours, else 0."""
        key = (rows, size, shift, like.dtype, like.device)
        if key not in self._masks:
            line = torch.arange(rows, device=like.device)
            region = (line >= rows - size).long() + (line >= rows - shift).long()
            regions = region[:, None] * 3 + region[None, :]
            across = rows // size
            regions = regions.view(across, size, across, size).transpose(1, 2).reshape(across * across, 1, size * size)
            apart = regions[..., :, None] != regions[..., None, :]
            self._masks[key] = apart.to(like.dtype) * SHIFT_PENALTY
        return self._masks[key]
