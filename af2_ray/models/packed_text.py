"""Several texts end to end in one row (sequence packing), each as if it had a row of its own.

Questions about one clip (or the same several) share its row: the clip's keys and values are handed to the text once
instead of once a question, and questions of unlike length pad nothing. The price is a mask [B, 1, N, N] in place of
causal attention's short cut, a few per mille of a row's cost at the lengths of questions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor


def text_numbers(attention_mask: Tensor | None, config: Any, texts_per_row: int | None = None) -> Tensor | None:
    """The mask [B, T] if it numbers texts that stand end to end; none if every row is one text.

    `texts_per_row` is the most texts of a row where the caller knows; then the mask's device is not asked, and on a GPU
    the mask serves for single texts too: from it alone transformers would read whether there is padding.

    Raises:
        ValueError: the LM's attention (`config`) takes no mask that could part them.
    """
    if attention_mask is None or attention_mask.dim() != 2:
        return None
    is_flash = "flash" in str(getattr(config, "_attn_implementation", None))
    most = int(attention_mask.max()) if texts_per_row is None else texts_per_row
    if most <= 1 and (texts_per_row is None or is_flash or attention_mask.device.type == "cpu"):
        return None
    if is_flash:
        raise ValueError("flash attention cannot part texts that stand end to end: use attn_implementation='sdpa'")
    return attention_mask


def count_markers(is_marker: Tensor, numbers: Tensor | None) -> Tensor:
    """Number of `<audio>` markers at or before each position, [B, T]; of texts end to end each counts its own.

    Args:
        is_marker: mask of the markers, bool [B, T].
        numbers: numbers of the texts, [B, T], 0 at padding, which goes on with the text before it; none: one a row.
    """
    markers = is_marker.cumsum(dim=1)
    if numbers is None:
        return markers
    begins = (numbers != 0) & (numbers != nnf.pad(numbers[:, :-1], (1, 0)))
    before = (markers - is_marker.long()).masked_fill(~begins, 0).cummax(dim=1).values
    return markers - before


def see_themselves(numbers: Tensor, num_prefix: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What each position attends to: the row's prefix and its own text up to here.

    Args:
        numbers: number of the text at each position, [B, N], 0 at padding.
        num_prefix: leading positions that every text sees, where they are not 0.

    Returns:
        A mask to be added to scores, [B, 1, N, N] (padding sees itself: an empty softmax is NaN), and positions [B, N]
        as each text alone would have them.
    """
    place = torch.arange(numbers.shape[1], device=numbers.device)
    sees = (numbers[:, :, None] == numbers[:, None, :]) | (place < num_prefix)
    sees = sees & (numbers != 0)[:, None, :] & (place <= place[:, None])
    positions = (sees.sum(dim=2) - 1).clamp(min=0)
    sees = sees | torch.eye(len(place), dtype=torch.bool, device=sees.device)
    mask = torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, torch.finfo(dtype).min)
    return mask[:, None], positions
