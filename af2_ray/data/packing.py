"""How rows are filled and dealt into steps, with numpy alone: 8 million samples take seconds, not an hour.

Three decisions, each on whole arrays. Which questions of a clip share one encoding: as many as may, drawn at random;
they stand in one row of text, end to end, so unlike lengths among them are no padding. Which encodings share a row:
neighbours by windows and then by the length of all their text, as many as the budget holds. Which rows share a step:
rows of like cost, whatever their lengths.

The trade-off: a row ends where a clip would come twice, instead of looking further for one that fits. In return where
a row ends depends on nothing but where it starts, so all ends are found at once; a clip's encodings lie far apart in
the order, and rows cut short so are few.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from af2_ray.config import Budget

Index = NDArray[np.int64]

_AUDIO_TOKENS = 64  # that a window gives
_TEXT_BUCKET = 1.1  # texts within this ratio count as alike
_COST_JITTER = 0.004  # rows within this share of cost, up and down, count as alike
_TRIM_SHARE, _TRIM_FROM = 0.12, 16  # a row of this many clips gives up to this share of them to the next
_CHUNK = 2**20  # positions whose row ends are found together: bounds the memory


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of encodings of entries, as arrays.

    Attributes:
        entries: int64 [Q], indices of samples, row by row and encoding by encoding.
        clip_starts: int64 [C+1], where each encoding's entries start.
        row_starts: int64 [R+1], where each row's encodings start.
    """

    entries: Index
    clip_starts: Index
    row_starts: Index

    def __len__(self) -> int:
        return len(self.row_starts) - 1

    @classmethod
    def empty(cls, num_rows: int = 0) -> Rows:
        """Rows without clips."""
        return cls(np.empty(0, np.int64), np.zeros(1, np.int64), np.zeros(num_rows + 1, np.int64))

    @classmethod
    def join(cls, parts: Sequence[Rows]) -> Rows:
        """Rows of several parts, one after the other."""
        parts = [part for part in parts if len(part)] or [cls.empty()]
        return cls(
            np.concatenate([part.entries for part in parts]),
            join_starts([part.clip_starts for part in parts]),
            join_starts([part.row_starts for part in parts]),
        )

    def take(self, order: Index) -> Rows:
        """The rows at `order`."""
        clips, row_starts = ragged(self.row_starts, order)
        places, clip_starts = ragged(self.clip_starts, clips)
        return Rows(self.entries[places], clip_starts, row_starts)

    def text_tokens(self, texts: NDArray[Any]) -> Index:
        """Text tokens of each encoding, all its questions together, [C]."""
        return sum_by(texts[self.entries], self.clip_starts)

    def cost(self, windows: NDArray[Any], texts: NDArray[Any], budget: Budget) -> NDArray[np.float64]:
        """Predicted cost of each row in text tokens, [R]: its windows, and its rectangle of clips x text tokens.

        Args:
            windows, texts: windows and text tokens of each sample.
            budget: weights of a window and of attention.
        """
        heard = audio_cost(windows[self.entries[self.clip_starts[:-1]]], budget)
        longest = max_by(self.text_tokens(texts), self.row_starts)
        audio = np.append(0.0, np.cumsum(heard))[self.row_starts]
        cost = np.diff(audio) + text_cost(np.diff(self.row_starts), longest, budget)
        return np.where(np.diff(self.row_starts) > 0, cost, float(budget.tokens_per_window))  # or one silent window


def audio_cost(windows: NDArray[Any], budget: Budget) -> NDArray[np.float64]:
    """Predicted cost of hearing clips of these windows, in text tokens."""
    cost = windows.astype(float) * budget.tokens_per_window
    return cost * (1 + windows * _AUDIO_TOKENS / budget.attention_tokens) if budget.attention_tokens else cost


def text_cost(num_texts: Any, longest: NDArray[Any], budget: Budget) -> NDArray[np.float64]:
    """Predicted cost of rectangles of texts, in text tokens."""
    cost = longest.astype(float) * num_texts
    return cost * (1 + longest / budget.attention_tokens) if budget.attention_tokens else cost


# --- Arrays of runs ----------------------------------------------------------------------------------------------


def ragged(starts: Index, order: NDArray[Any]) -> tuple[Index, Index]:
    """Positions of the runs at `order`, run after run, and where each run then starts."""
    lengths = starts[order + 1] - starts[order]
    new_starts = np.append(0, np.cumsum(lengths))
    return np.repeat(starts[order] - new_starts[:-1], lengths) + np.arange(new_starts[-1]), new_starts


def join_starts(parts: Sequence[Index]) -> Index:
    """The starts of several arrays of runs laid end to end."""
    ends = np.cumsum([0, *(part[-1] for part in parts)])
    return np.concatenate([np.zeros(1, np.int64), *(part[1:] + end for part, end in zip(parts, ends[:-1]))])


def sum_by(values: NDArray[Any], starts: Index) -> Index:
    """Sum of each run; 0 of an empty one."""
    return np.diff(np.append(0, np.cumsum(values, dtype=np.int64))[starts])


def max_by(values: NDArray[Any], starts: Index) -> Index:
    """Largest of each run; 0 of an empty one."""
    result = np.zeros(len(starts) - 1, np.int64)
    filled = np.flatnonzero(np.diff(starts))
    if len(filled):
        result[filled] = np.maximum.reduceat(values, starts[:-1][filled])
    return result


def occurrence(values: NDArray[Any]) -> NDArray[np.int32]:
    """For each position, how often its value (0 or above) came before: [3, 5, 3] -> [0, 0, 1]."""
    result = np.zeros(len(values), np.int32)
    if len(values) == 0 or _all_differ(values):
        return result
    order = np.argsort(values, kind="stable")
    sorted_values = values[order]
    position = np.arange(len(values), dtype=np.int32)
    first = np.maximum.accumulate(np.where(np.diff(sorted_values, prepend=-1) != 0, position, 0))
    result[order] = position - first
    return result


def _all_differ(values: NDArray[Any]) -> bool:
    highest = int(values.max())
    if highest > 16 * len(values) + 1024:
        return len(np.unique(values)) == len(values)
    seen = np.zeros(highest + 1, bool)
    seen[values] = True
    return int(np.count_nonzero(seen)) == len(values)


# --- Which questions share an encoding ---------------------------------------------------------------------------


def share_clips(
    index: Index, clips: NDArray[Any], texts: NDArray[Any], budget: Budget, rng: np.random.Generator
) -> tuple[Index, Index]:
    """Group the questions about a clip into encodings: up to `questions_per_clip`, as many as the text budget holds.

    Args:
        index: the samples to group, [N]; one that comes twice is in two encodings.
        clips, texts: clip number and text tokens of each sample.

    Returns:
        The entries, encoding by encoding [N], and where each encoding starts [C+1].
    """
    clip = clips[index]
    if budget.questions_per_clip == 1 or len(index) == 0 or _all_differ(clip):
        return index, np.arange(len(index) + 1)
    draw = occurrence(index)
    order = np.lexsort((rng.random(len(index)), draw, clip))  # who shares is drawn
    clip, draw, entries = clip[order], draw[order], index[order]
    is_first = (np.diff(clip, prepend=-1) != 0) | (np.diff(draw, prepend=-1) != 0)
    cut = _cuts(texts[entries], np.append(np.flatnonzero(is_first), len(entries)), budget)
    return entries, np.append(np.flatnonzero(cut), len(entries))


def _cuts(texts: NDArray[Any], starts: Index, budget: Budget) -> NDArray[np.bool_]:
    """Where encodings start in the runs of questions of one clip each, bool [N]; of all clips at once.

    The k-th question of every clip in round k joins the encoding before it, or starts one.
    """
    lengths = np.diff(starts)
    cut = np.zeros(len(texts), bool)
    clip = np.arange(len(lengths))
    size, tokens = np.zeros(len(clip), np.int32), np.zeros(len(clip), np.int64)
    for number in range(int(lengths.max())):
        clip = clip[lengths[clip] > number]
        at = starts[clip] + number
        new = (size[clip] == budget.questions_per_clip) | (tokens[clip] + texts[at] > budget.text_tokens_per_row)
        new |= number == 0
        cut[at] = new
        size[clip] = np.where(new, 1, size[clip] + 1)
        tokens[clip] = np.where(new, texts[at], tokens[clip] + texts[at])
    return cut


# --- Which encodings share a row ---------------------------------------------------------------------------------


def fill_rows(
    entries: Index,
    clip_starts: Index,
    clips: NDArray[Any],
    windows: NDArray[Any],
    texts: NDArray[Any],
    budget: Budget,
    rng: np.random.Generator,
) -> Rows:
    """Pack encodings into rows under the budget; which ones of like length share a row is drawn at random."""
    if len(entries) == 0:
        return Rows.empty()
    first = entries[clip_starts[:-1]]
    wide = windows[first]
    tokens = sum_by(texts[entries], clip_starts).astype(np.int32)
    order = _order(wide, tokens, clips[first], rng)
    clip = clips[first][order]
    del first
    ends = _row_ends(wide[order], tokens[order], _last_place(clip), budget)
    ends -= _trimmed(ends, rng)
    steps, place, row_starts = memoryview(ends.data), 0, [0]
    while place < len(ends):
        place = steps[place]
        row_starts.append(place)
    del ends, steps
    places, new_starts = ragged(clip_starts, order)
    return Rows(entries[places], new_starts, np.array(row_starts, np.int64))


def _trimmed(ends: Index, rng: np.random.Generator) -> Index:
    """How many of its last clips each row leaves to the next.

    Full rows of short clips come in few sizes, and so in few costs, between which there would be steps of long clips
    alone. Rows of many clips are cheap to vary in cost: a step then finds short clips at every cost.
    """
    sizes = ends - np.arange(len(ends))
    return np.floor(rng.random(len(ends)) * (_TRIM_SHARE * sizes + 1)).astype(np.int64) * (sizes >= _TRIM_FROM)


def _order(wide: NDArray[Any], tokens: NDArray[Any], clip: NDArray[Any], rng: np.random.Generator) -> Index:
    """Encodings by windows, then by text (up and down in turn, so that neighbours are alike there too), then at random.

    Of several encodings of a clip in one bucket, all clips' first ones come before all second ones.
    """
    bucket = np.log(np.maximum(tokens, 1)) / math.log(_TEXT_BUCKET) + rng.random()
    number = bucket.astype(np.int64)
    num_buckets = int(number.max()) + 1
    number = np.where(wide % 2 == 1, number, num_buckets - 1 - number)
    key = wide.astype(np.int64) * num_buckets + number
    del bucket, number
    rank = 0 if _all_differ(clip) else occurrence(key * (int(clip.max()) + 1) + clip).astype(np.int64)
    key = (key << 14) + np.minimum(rank, (1 << 14) - 1)
    key <<= 32
    key += rng.integers(0, 1 << 32, len(key), np.int64)
    return np.argsort(key)


def _last_place(clip: NDArray[Any]) -> NDArray[np.int32] | None:
    """For each place, where the same clip came last before it (-1: nowhere): int32 [C]; none if no clip comes twice."""
    if _all_differ(clip):
        return None
    order = np.argsort(clip, kind="stable")
    same = np.flatnonzero(np.diff(clip[order]) == 0)
    last = np.full(len(clip), -1, np.int32)
    last[order[same + 1]] = order[same]
    return last


def _row_ends(wide: NDArray[Any], tokens: NDArray[Any], last: NDArray[np.int32] | None, budget: Budget) -> Index:
    """For each place, where a row that starts there ends: int64 [C].

    By doubling: the largest text of 1, 2, 4 ... places from each place on is found from two halves, and the end by
    trying these lengths from the largest down. `wide` rises, so the last place of a row is its widest.
    """
    num = len(wide)
    depth = max(0, int(budget.windows_per_row).bit_length() - 1)  # a row has no more clips than windows
    ends = np.empty(num, np.int64)
    for start in range(0, num, _CHUNK):
        stop = min(start + _CHUNK, num)
        reach = slice(start, min(stop + 2 ** (depth + 1), num))
        text_tables = _doubling(tokens[reach], depth)
        last_tables = _doubling(last[reach], depth) if last is not None else None
        end = np.arange(start, stop)
        text = np.zeros(stop - start, np.int64)
        for level in range(depth, -1, -1):
            inside = np.minimum(end, num - 1) - start
            text_then = np.maximum(text, text_tables[level][inside])
            end_then = np.minimum(end + 2**level, num)
            fits = end + 2**level <= num
            size = end_then - np.arange(start, stop)
            fits &= size * wide[end_then - 1] <= budget.windows_per_row
            fits &= size * text_then <= budget.text_tokens_per_row
            if last_tables is not None:
                fits &= last_tables[level][inside] < np.arange(start, stop)
            end = np.where(fits, end_then, end)
            text = np.where(fits, text_then, text)
        ends[start:stop] = end
    return ends


def _doubling(values: NDArray[Any], depth: int) -> list[NDArray[Any]]:
    """Largest of the 1, 2, 4 ... 2**depth values from each place on (of fewer at the end)."""
    tables = [values]
    for level in range(depth):
        table = tables[-1].copy()
        half = 2**level
        np.maximum(table[:-half], tables[-1][half:], out=table[:-half])
        tables.append(table)
    return tables


# --- Which rows share a step -------------------------------------------------------------------------------------


def deal_steps(cost: NDArray[np.float64], size: int, rng: np.random.Generator) -> Index:
    """Order rows (a multiple of `size`) so that each run of `size` is of like cost and the runs come at random.

    Within a run the costliest comes first. The order of the runs is shuffled in layers: runs ranked by cost are
    cut into layers of like cost, and every stretch of the plan gets one run of each layer, so that no part of the
    training is all long or all short.

    Returns:
        The rows in their new order, [R].
    """
    blurred = cost * rng.uniform(1 - _COST_JITTER, 1 + _COST_JITTER, len(cost))
    groups = np.argsort(-blurred, kind="stable").reshape(-1, size)
    groups = np.take_along_axis(groups, np.argsort(-cost[groups], axis=1, kind="stable"), axis=1)
    return groups[_layered_shuffle(len(groups), rng)].reshape(-1)


def _layered_shuffle(num: int, rng: np.random.Generator) -> Index:
    """A random order of `num` ranked things in which each stretch of about sqrt(num) has one of each of its layers."""
    width = max(1, math.isqrt(num))  # things of one layer
    key = np.empty(num)
    for start in range(0, num, width):
        count = min(width, num - start)
        stretches = rng.permutation(width)[:count]
        key[start : start + count] = stretches + rng.random(count)
    return np.argsort(key)
