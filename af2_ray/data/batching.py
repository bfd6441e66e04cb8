"""The plan: which samples make up which batch, decided from manifest durations before any audio is read.

A row is one micro-batch under a two-sided budget: clips x longest clip (in windows) and questions x longest text (in
tokens), both as padded rectangles. A clip comes once in a row with up to `questions_per_clip` of its questions, so the
expensive encoder hears it once. Rows are filled from clips of like length, then dealt in groups of `step_batches` rows
of like cost; a group is one optimiser step whatever the number of workers, and its rows go to the ranks in turn.

The trade-off: neighbours in a row are alike in length and so not independent. In return next to nothing is padded; what
is random is which of the alike clips meet (new in every epoch), which rows share a step, and the order of the steps.
A pure function: equal arguments give an equal plan, and its fingerprint covers everything that shaped it.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol

import numpy as np

from af2_ray.audio.windows import num_windows_for
from af2_ray.data.blend import Index, blend, clip_numbers
from af2_ray.data.manifest import CaptionSet, Sample, StretchT, fingerprint
from af2_ray.data.measures import PlanStats, measure

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tail = Literal["empty", "drop"]

TOKENS_PER_WINDOW = 64  # in a row's predicted cost, a window weighs as many text tokens as it gives audio tokens
_FRAME_TOKENS = 4  # <audio>, <SEP>, <|endofchunk|> and the end of sequence around prompt and answer
_TEXT_BUCKET = 1.1  # texts within this ratio count as alike
_COST_JITTER = 0.02  # rows within this share of cost count as alike
_MAX_WAITING = 64  # encodings passed over for one row because it has their clip
_MAX_IDLE_EPOCHS = 10_000


class Budget(Protocol):
    """The recipe's budget of a row and a step (`config.Budget`)."""

    @property
    def windows_per_row(self) -> int: ...
    @property
    def text_tokens_per_row(self) -> int: ...
    @property
    def questions_per_clip(self) -> int: ...
    @property
    def step_batches(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Row(Generic[StretchT]):
    """One batch to be: its number in the plan, and for each clip the samples that ask about it."""

    index: int
    clips: tuple[tuple[StretchT, ...], ...]


@dataclass(frozen=True, eq=False)
class Plan(Generic[StretchT]):
    """An ordered list of rows, held as index arrays over `items`.

    Attributes:
        items: all samples (or caption sets) that the rows draw on.
        entries: int64 [Q], indices into `items`, row by row and clip by clip.
        clip_starts: int64 [C+1], where each clip's entries start.
        row_starts: int64 [R+1], where each row's clips start; R is a multiple of `step_batches`.
        step_batches: rows of one optimiser step.
        stats: its measures.
        fingerprint: of items, arguments and rows; a cursor is valid for one fingerprint.
    """

    items: Sequence[StretchT]
    entries: Index
    clip_starts: Index
    row_starts: Index
    step_batches: int
    stats: PlanStats
    fingerprint: str

    def __len__(self) -> int:
        return len(self.row_starts) - 1

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the plan."""
        return len(self) // self.step_batches

    def row(self, index: int) -> Row[StretchT]:
        """Row `index`, from 0 on."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a plan of {len(self)} rows")
        bounds = self.clip_starts[self.row_starts[index] : self.row_starts[index + 1] + 1].tolist()
        clips = (self.entries[a:b].tolist() for a, b in pairwise(bounds))
        return Row(index, tuple(tuple(self.items[i] for i in clip) for clip in clips))

    def rows(self, start: int = 0) -> Iterator[Row[StretchT]]:
        """The rows in order, from `start` on."""
        return (self.row(index) for index in range(start, len(self)))


# --- Planning ----------------------------------------------------------------------------------------------------


def plan(
    samples: Sequence[Sample],
    *,
    windows: Sequence[int] | Index,
    text_lengths: Sequence[int] | Index,
    budget: Budget,
    seed: int,
    epoch: int = 0,
    index: Index | None = None,
    tail: Tail = "empty",
) -> Plan[Sample]:
    """Plan one epoch.

    Args:
        samples: what there is.
        windows: 10 s windows of each sample, [N].
        text_lengths: text tokens of each sample, [N].
        budget: of a row and a step.
        seed, epoch: of the order.
        index: the epoch's draw from `samples` (`blend`); none: each once.
        tail: rows are a multiple of `step_batches`. `empty` fills the last step up with rows without clips (a silent
            window without labels: nothing is repeated or lost), `drop` leaves out what does not fill a step.

    Raises:
        ValueError: a sample does not fit the budget alone, or there is not a single step.
    """
    pool = _Pool.of(samples, windows, text_lengths, budget)
    rows = pool.rows(np.arange(len(samples)) if index is None else index, np.random.default_rng((seed, epoch)))
    rng = np.random.default_rng((seed, epoch, 1))
    spare = len(rows) % budget.step_batches
    if spare and tail == "drop":
        rows = [rows[i] for i in sorted(rng.permutation(len(rows))[spare:].tolist())]
    elif spare:
        rows += [[] for _ in range(budget.step_batches - spare)]
    return pool.finish(_steps(rows, pool, budget.step_batches, rng), budget, ("plan", seed, epoch, tail))


def plan_steps(
    datasets: Sequence[tuple[Sequence[Sample], float]],
    num_steps: int,
    *,
    max_windows: int,
    text_length: Callable[[Sequence[Sample]], Index],
    budget: Budget,
    seed: int,
) -> Plan[Sample]:
    """Plan exactly `num_steps` optimiser steps over as many epochs of the blend as they need.

    Rows that do not fill a step at the end of an epoch are carried into the next one: nothing is repeated, lost or
    padded between epochs; the last epoch ends where the steps do.

    Args:
        datasets: samples and weight (epochs per epoch) of each dataset.
        num_steps: optimiser steps.
        max_windows: longest clip in windows; the rest of a longer one is not heard.
        text_length: text tokens of each sample, for instance `partial(text_lengths, tokenizer, max_tokens=512)`.
        budget: of a row and a step.
        seed: of blend and order.
    """
    samples = [sample for part, _ in datasets for sample in part]
    if not samples:
        raise ValueError("nothing to plan: the datasets have no usable samples")
    pool = _Pool.of(samples, window_counts(samples, max_windows), text_length(samples), budget)
    size = budget.step_batches
    steps: _Rows = []
    carried: _Rows = []
    epoch = num_idle = 0
    while len(steps) < num_steps * size:
        index = blend(datasets, epoch, seed)
        rng = np.random.default_rng((seed, epoch, 1))
        rows = pool.rows(index, np.random.default_rng((seed, epoch)))
        ready = carried + [rows[i] for i in rng.permutation(len(rows)).tolist()]  # who waits is drawn, not sorted out
        full = len(ready) - len(ready) % size
        steps += _steps(ready[:full], pool, size, rng)
        carried = ready[full:]
        epoch += 1
        num_idle = 0 if rows else num_idle + 1
        if num_idle > _MAX_IDLE_EPOCHS:
            raise ValueError(f"{num_idle} epochs of the blend drew no sample: raise the datasets' weights")
    told = ("plan_steps", seed, num_steps, max_windows, [weight for _, weight in datasets])
    return pool.finish(steps[: num_steps * size], budget, told)


def plan_captions(
    phases: Sequence[tuple[Sequence[CaptionSet], int]],
    *,
    clips_per_row: int,
    step_batches: int,
    max_windows: int,
    seed: int,
) -> Plan[CaptionSet]:
    """Plan AF-CLAP batches: steps of `step_batches` rows of exactly `clips_per_row` different clips.

    Args:
        phases: caption sets and how many steps draw on them, one phase after the other.

    Each epoch is a fresh shuffle. No two clips of a step have the same caption: each would be the other's false
    negative. What does not fill a whole step is left out of that epoch.
    """
    size = clips_per_row * step_batches
    parts: list[Index] = []
    offset = 0
    for number, (sets, num_steps) in enumerate(phases):
        parts.append(_contrastive_steps(sets, num_steps, size, (seed, number)) + offset)
        offset += len(sets)
    items = [item for sets, _ in phases for item in sets]
    entries = np.concatenate(parts)
    rows = entries.reshape(-1, clips_per_row)
    windows = window_counts(items, max_windows)
    stats = measure(list(windows[rows]), [np.ones(clips_per_row, np.int64)] * len(rows), step_batches)
    row_starts = np.arange(0, len(entries) + 1, clips_per_row)
    told = ("plan_captions", seed, [steps for _, steps in phases], clips_per_row, step_batches, max_windows)
    mark = _fingerprint(items, told, entries, row_starts)
    return Plan(items, entries, np.arange(len(entries) + 1), row_starts, step_batches, stats, mark)


def _contrastive_steps(sets: Sequence[CaptionSet], num_steps: int, size: int, seed: tuple[int, ...]) -> Index:
    """Indices of `num_steps` steps of `size` clips with different captions, [num_steps * size]."""
    different = len({item.caption for item in sets})
    if different < size:
        raise ValueError(f"{len(sets)} caption sets with {different} different captions cannot fill a step of {size}")
    done: list[int] = []
    epoch = 0
    while len(done) < num_steps * size:
        open_steps: list[dict[str, int]] = []
        for index in np.random.default_rng((*seed, epoch)).permutation(len(sets)).tolist():
            caption = sets[index].caption
            step = next((step for step in open_steps if caption not in step), None)
            if step is None:
                open_steps.append(step := {})
            step[caption] = index
            if len(step) == size:
                done += step.values()
                open_steps.remove(step)
        epoch += 1
    return np.array(done[: num_steps * size], np.int64)


# --- Lengths -----------------------------------------------------------------------------------------------------


def window_counts(samples: Sequence[Any], max_windows: int) -> Index:
    """10 s windows of each sample by its manifest duration: int64 [N]."""
    return np.fromiter((num_windows_for(s.duration_s, max_windows) for s in samples), np.int64, len(samples))


def text_lengths(tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample], *, max_tokens: int = 512) -> Index:
    """Text tokens of each sample (prompt, answer and the tokens around them), at most `max_tokens`: int64 [N].

    Each distinct text is tokenised once, in one batched call.
    """
    texts = list(dict.fromkeys(text for s in samples for text in (s.prompt, s.answer)))
    ids = tokenizer([t.strip().lower() for t in texts], add_special_tokens=False)["input_ids"] if texts else []
    length = dict(zip(texts, map(len, ids), strict=True))
    lengths = (length[s.prompt] + length[s.answer] + _FRAME_TOKENS for s in samples)
    return np.minimum(np.fromiter(lengths, np.int64, len(samples)), max_tokens)


# --- Inside ------------------------------------------------------------------------------------------------------

_Encoding = Index  # the entries that share one encoding of a clip
_Rows = list[list[_Encoding]]


@dataclass(frozen=True, eq=False)
class _Pool:
    """Samples with their lengths: makes rows of an epoch's draw and, in the end, the plan."""

    items: Sequence[Sample]
    clips: Index
    windows: Index
    texts: Index
    budget: Budget

    @classmethod
    def of(cls, items: Sequence[Sample], windows: Any, texts: Any, budget: Budget) -> _Pool:
        windows, texts = np.asarray(windows, np.int64), np.asarray(texts, np.int64)
        if not len(items) == len(windows) == len(texts):
            raise ValueError(f"{len(items)} samples, {len(windows)} windows, {len(texts)} text lengths: must agree")
        for lengths, limit, key in (
            (windows, budget.windows_per_row, "windows_per_row"),
            (texts, budget.text_tokens_per_row, "text_tokens_per_row"),
        ):
            if len(items) and lengths.max() > limit:
                worst = items[int(lengths.argmax())]
                raise ValueError(f"budget.{key}={limit} is less than sample {worst.id} alone needs ({lengths.max()})")
        return cls(items, clip_numbers(items), windows, texts, budget)

    def rows(self, index: Index, rng: np.random.Generator) -> _Rows:
        """Encodings of the drawn samples, packed into rows under the budget."""
        encodings = self._encodings(index, rng)
        windows = np.array([self.windows[e[0]] for e in encodings], np.int64)
        texts = np.array([self.texts[e].max() for e in encodings], np.int64)
        bucket = np.floor(np.log(np.maximum(texts, 1)) / math.log(_TEXT_BUCKET) + rng.random())
        order = np.lexsort((rng.random(len(encodings)), bucket, windows))
        return self._pack(encodings, order, windows, texts)

    def _encodings(self, index: Index, rng: np.random.Generator) -> list[_Encoding]:
        """Group the questions of a clip by up to `questions_per_clip` of like length, a repeated draw apart."""
        draw = _occurrence(index)
        clip = self.clips[index]
        alike = self.texts[index] * rng.uniform(1 / _TEXT_BUCKET, _TEXT_BUCKET, len(index))
        order = np.lexsort((alike, draw, clip))
        clip, draw, entries = clip[order], draw[order], index[order]
        starts = np.flatnonzero(np.diff(clip, prepend=-1) | np.diff(draw, prepend=-1)).tolist()
        starts.append(len(entries))
        encodings = []
        per_clip = self.budget.questions_per_clip
        per_row = self.budget.text_tokens_per_row
        for a, b in pairwise(starts):
            while a < b:
                stop = min(a + per_clip, b)
                while (stop - a) * self.texts[entries[a:stop]].max() > per_row:
                    stop -= 1
                encodings.append(entries[a:stop])
                a = stop
        return encodings

    def _pack(self, encodings: list[_Encoding], order: Index, windows: Index, texts: Index) -> _Rows:
        """Fill rows in the given order; an encoding of a clip that the row has already waits for the next row."""
        max_windows, max_text = self.budget.windows_per_row, self.budget.text_tokens_per_row
        queue = deque(order.tolist())
        rows: _Rows = []
        while queue:
            row: list[_Encoding] = []
            waiting: list[int] = []
            heard: set[int] = set()
            longest = longest_text = num_questions = 0
            while queue and len(waiting) < _MAX_WAITING:
                number = queue[0]
                encoding = encodings[number]
                clip = int(self.clips[encoding[0]])
                if clip in heard:
                    waiting.append(queue.popleft())
                    continue
                next_longest, next_text = max(longest, int(windows[number])), max(longest_text, int(texts[number]))
                next_questions = num_questions + len(encoding)
                if (len(row) + 1) * next_longest > max_windows or next_questions * next_text > max_text:
                    break
                queue.popleft()
                row.append(encoding)
                heard.add(clip)
                longest, longest_text, num_questions = next_longest, next_text, next_questions
            queue.extendleft(reversed(waiting))
            rows.append(row)
        return rows

    def cost(self, row: list[_Encoding]) -> float:
        """Predicted cost of a row, in text tokens."""
        if not row:
            return float(TOKENS_PER_WINDOW)
        num_windows = sum(int(self.windows[e[0]]) for e in row)
        return TOKENS_PER_WINDOW * num_windows + sum(map(len, row)) * max(int(self.texts[e].max()) for e in row)

    def finish(self, rows: _Rows, budget: Budget, told: tuple[Any, ...]) -> Plan[Sample]:
        """Lay the rows out as arrays, measure them, and put the fingerprint on."""
        if not rows:
            raise ValueError("nothing to plan: no usable samples, or fewer rows than one step takes (tail='drop')")
        encodings = [e for row in rows for e in row]
        entries = np.concatenate(encodings) if encodings else np.empty(0, np.int64)
        clip_starts = np.cumsum([0, *map(len, encodings)])
        row_starts = np.cumsum([0, *map(len, rows)])
        stats = measure(
            [self.windows[[int(e[0]) for e in row]] for row in rows],
            [self.texts[np.concatenate(row)] if row else np.empty(0, np.int64) for row in rows],
            budget.step_batches,
            [self.cost(row) for row in rows],
        )
        sizes = (
            budget.windows_per_row,
            budget.text_tokens_per_row,
            budget.questions_per_clip,
            budget.step_batches,
        )
        mark = _fingerprint(self.items, (*told, sizes), entries, clip_starts, row_starts)
        return Plan(self.items, entries, clip_starts, row_starts, budget.step_batches, stats, mark)


def _steps(rows: _Rows, pool: _Pool, size: int, rng: np.random.Generator) -> _Rows:
    """Order rows so that each run of `size` is of like cost, costliest first within it, and the runs are shuffled."""
    cost = np.array([pool.cost(row) for row in rows])
    blurred = cost * rng.uniform(1 - _COST_JITTER, 1 + _COST_JITTER, len(rows))
    groups = np.argsort(-blurred, kind="stable").reshape(-1, size)
    groups = np.take_along_axis(groups, np.argsort(-cost[groups], axis=1, kind="stable"), axis=1)
    return [rows[i] for i in groups[rng.permutation(len(groups))].reshape(-1).tolist()]


def _occurrence(index: Index) -> Index:
    """For each position, how often its value came before: [3, 5, 3] -> [0, 0, 1]."""
    order = np.argsort(index, kind="stable")
    value = index[order]
    position = np.arange(len(index))
    first = np.maximum.accumulate(np.where(np.diff(value, prepend=-1) != 0, position, 0))
    result = np.empty(len(index), np.int64)
    result[order] = position - first
    return result


def _fingerprint(items: Sequence[Any], told: tuple[Any, ...], *arrays: Index) -> str:
    digest = hashlib.sha256(f"{fingerprint(items)} {told!r}".encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array, np.int64).tobytes())
    return digest.hexdigest()[:16]
