"""The plan: which samples make up which batch, decided from manifest durations before any audio is read.

A row is one micro-batch under a two-sided budget: clips x longest clip (in windows) and clips x longest text (in
tokens), both as padded rectangles. A clip comes once in a row with up to `questions_per_clip` of its questions, so the
expensive encoder hears it once; the questions stand in one row of text, end to end (`collate`). Several recordings that
are heard together count as one clip here, of all their windows. Rows are filled from clips of like length, then dealt
in groups of `step_batches` rows of like cost; a group is one optimiser step whatever the number of workers, and its
rows go to the ranks in turn.

The trade-off: neighbours in a row are alike in length and so not independent. In return next to nothing is padded; what
is random is which of the alike clips meet (new in every epoch), which rows share a step, and the order of the steps.
A pure function: equal arguments give an equal plan, and its fingerprint covers everything that shaped it. How rows are
filled and dealt is `packing`'s; here they become a plan.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Generic

import numpy as np
from numpy.typing import NDArray

from af2_ray.audio.windows import SAMPLE_RATE, WINDOW_SAMPLES
from af2_ray.config import Budget
from af2_ray.data.blend import Blend
from af2_ray.data.columns import Joined, SampleTable, clip_numbers, recordings
from af2_ray.data.packing import Index, Rows, deal_steps, fill_rows, share_clips
from af2_ray.data.plan_stats import PlanStats, measure
from af2_ray.data.samples import CaptionSet, Item, ItemT, Sample, fingerprint, messages_of
from af2_ray.text import CHAT_TEMPLATE, encode_conversations, render, template_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FRAME_TOKENS = 4  # <audio>, <SEP>, <|endofchunk|> and the end of sequence around prompt and answer
_MAX_IDLE_EPOCHS = 10_000
_TEXTS = 2**16  # distinct texts tokenised in one call


@dataclass(frozen=True, slots=True)
class Row(Generic[ItemT]):
    """One batch to be: its number in the plan, and for each clip the samples that ask about it.

    Samples of several recordings share all of them.
    """

    index: int
    clips: tuple[tuple[ItemT, ...], ...]


@dataclass(frozen=True, eq=False)
class Plan(Generic[ItemT]):
    """An ordered list of rows, held as index arrays over `items`.

    Attributes:
        items: all samples (or caption sets) that the rows draw on.
        entries: int64 [Q], indices into `items`, row by row and clip by clip.
        clip_starts: int64 [C+1], where each clip's entries start.
        row_starts: int64 [R+1], where each row's clips start; R is a multiple of `step_batches`.
        step_batches: rows of one optimiser step.
        stats: measures of the plan.
        fingerprint: hash of items, arguments and rows; a cursor is valid for one fingerprint.
        origin: hashes of what shaped it, by name (`data`, `seed`, `budget` ...): where fingerprints differ, they
            say what changed.
    """

    items: Sequence[ItemT]
    entries: Index
    clip_starts: Index
    row_starts: Index
    step_batches: int
    stats: PlanStats
    fingerprint: str
    origin: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.row_starts) - 1

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the plan."""
        return len(self) // self.step_batches

    def row(self, index: int) -> Row[ItemT]:
        """Row `index`, from 0 on."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a plan of {len(self)} rows")
        bounds = self.clip_starts[self.row_starts[index] : self.row_starts[index + 1] + 1].tolist()
        clips = (self.entries[a:b].tolist() for a, b in pairwise(bounds))
        return Row(index, tuple(tuple(self.items[i] for i in clip) for clip in clips))

    def rows(self, start: int = 0) -> Iterator[Row[ItemT]]:
        """The rows in order, from `start` on."""
        return (self.row(index) for index in range(start, len(self)))


# --- Planning ----------------------------------------------------------------------------------------------------


def plan_epoch(
    samples: Sequence[Sample],
    *,
    windows: Sequence[int] | Index,
    text_lengths: Sequence[int] | Index,
    budget: Budget,
    seed: int,
    epoch: int = 0,
    index: Index | None = None,
) -> Plan[Sample]:
    """Plan one epoch.

    Args:
        samples: samples to plan.
        windows: 10 s windows of each sample, [N].
        text_lengths: text tokens of each sample, [N].
        budget: limits of a row and a step.
        seed, epoch: seed of the order, and number of the epoch.
        index: indices of the samples that the epoch draws (`blend`), [N]; none: each once.

    The last step is filled up with rows without clips (a silent window without labels): nothing is repeated or lost.

    Raises:
        ValueError: a sample does not fit the budget alone, or there is not a single step.
    """
    pool = _Pool.of(samples, windows, text_lengths, budget)
    rows = pool.rows(np.arange(len(samples)) if index is None else index, np.random.default_rng((seed, epoch)))
    rng = np.random.default_rng((seed, epoch, 1))
    spare = len(rows) % budget.step_batches
    if spare:
        rows = Rows.join([rows, Rows.empty(budget.step_batches - spare)])
    rows = pool.dealt(rows, rng)
    drawn = "all" if index is None else _digest("", np.asarray(index))
    # `tail` was an option once: without it the fingerprints of plans would change.
    return pool.finish(rows, {"seed": str(seed), "epoch": str(epoch), "tail": "empty", "draw": drawn})


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
        num_steps: number of optimiser steps.
        max_windows: windows of the longest clip; the rest of a longer one is not heard.
        text_length: text tokens of each sample, for instance `partial(text_lengths, tokenizer, max_tokens=512)`.
        budget: limits of a row and a step.
        seed: seed of the blend and the order.
    """
    samples = datasets[0][0] if len(datasets) == 1 else Joined([part for part, _ in datasets])
    if not samples:
        raise ValueError("nothing to plan: the datasets have no usable samples")
    pool = _Pool.of(samples, window_counts(samples, max_windows), text_length(samples), budget)
    mix = Blend(datasets, seed)
    size = budget.step_batches
    steps: list[Rows] = []
    carried = Rows.empty()
    num_rows = epoch = num_idle = 0
    while num_rows < num_steps * size:
        rng = np.random.default_rng((seed, epoch, 1))
        rows = pool.rows(mix.epoch(epoch), np.random.default_rng((seed, epoch)))
        ready = Rows.join([carried, rows.take(rng.permutation(len(rows)))])  # who waits is drawn, not sorted out
        full = len(ready) - len(ready) % size
        steps.append(pool.dealt(ready.take(np.arange(full)), rng))
        carried = ready.take(np.arange(full, len(ready)))
        num_rows += full
        epoch += 1
        num_idle = 0 if len(rows) else num_idle + 1
        if num_idle > _MAX_IDLE_EPOCHS:
            raise ValueError(f"{num_idle} epochs of the blend drew no sample: raise the datasets' weights")
    origin = {
        "seed": str(seed),
        "steps": str(num_steps),
        "max_windows": str(max_windows),
        "weights": str([weight for _, weight in datasets]),
    }
    return pool.finish(Rows.join(steps).take(np.arange(num_steps * size)), origin)


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
        phases: caption sets and number of steps that draw on them, one phase after the other.

    Each epoch is a fresh shuffle. No two clips of a step have the same caption: each would be the other's false
    negative. What does not fill a whole step is left out of that epoch.
    """
    size = clips_per_row * step_batches
    items = [item for sets, _ in phases for item in sets]
    starts = np.cumsum([0, *(len(sets) for sets, _ in phases)])
    entries = np.concatenate(
        [
            starts[number] + _contrastive_steps(sets, num_steps, size, (seed, number))
            for number, (sets, num_steps) in enumerate(phases)
        ]
    )
    windows = window_counts(items, max_windows)[entries]
    row_starts = np.arange(0, len(entries) + 1, clips_per_row)
    cost = windows.reshape(-1, clips_per_row).sum(1).astype(float)
    stats = measure(windows, np.ones(len(entries), np.int64), row_starts, len(entries), cost, step_batches)
    origin = {
        "data": fingerprint(items),
        "seed": str(seed),
        "steps": str([steps for _, steps in phases]),
        "budget": f"clips_per_step={size}",  # into how many rows they are divided changes no step
        "max_windows": str(max_windows),
    }
    mark = _digest(f"plan_captions {origin!r}", entries)
    return Plan(items, entries, np.arange(len(entries) + 1), row_starts, step_batches, stats, mark, origin)


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


def window_counts(samples: Sequence[Item], max_windows: int) -> Index:
    """10 s windows of each sample by its manifest durations, of each recording `max_windows` at most: int64 [N]."""
    first, owner, further = recordings(samples)
    counts = _num_windows(first, max_windows)
    np.add.at(counts, owner, _num_windows(further, max_windows))
    return counts


def _num_windows(seconds: NDArray[np.float64], max_windows: int) -> Index:
    num_audio_samples = np.rint(seconds * SAMPLE_RATE)
    return np.clip(np.ceil(num_audio_samples / WINDOW_SAMPLES), 1, max_windows).astype(np.int64)


def text_lengths(tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample], *, max_tokens: int = 512) -> Index:
    """Text tokens of each sample (prompt, answer and the tokens around them), at most `max_tokens`: int64 [N].

    Of single turns about one recording each distinct text is tokenised once; others are rendered, each by itself.

    Raises:
        ValueError: a chat template that cannot be trained with (`text.encode_conversations`).
    """
    if isinstance(samples, Joined):
        parts = [text_lengths(tokenizer, part, max_tokens=max_tokens) for part in samples.parts]
        return np.concatenate(parts or [np.empty(0, np.int64)])
    table = samples if isinstance(samples, SampleTable) else SampleTable.from_samples(samples)
    total = np.full(len(table), _FRAME_TOKENS, np.int64)
    for name in ("prompt", "answer"):
        values, codes = table.texts[name]
        parts = [_num_tokens(tokenizer, values.slice(i, _TEXTS).to_pylist()) for i in range(0, len(values), _TEXTS)]
        total += np.concatenate(parts or [np.empty(0, np.int64)])[codes]
    if template_of(tokenizer) == CHAT_TEMPLATE:
        values, codes = table.texts["conversation"]
        rendered = np.flatnonzero(np.array([bool(text) for text in values.to_pylist()], bool)[codes])
    else:
        rendered = np.arange(len(table))
    for start in range(0, len(rendered), _TEXTS):
        places = rendered[start : start + _TEXTS]
        conversations = [messages_of(sample) for sample in table.take(places)]
        if not start:
            encode_conversations(tokenizer, conversations[:1])  # what is wrong with the template, before anything runs
        ids = tokenizer([render(tokenizer, one) for one in conversations], add_special_tokens=False)["input_ids"]
        total[places] = np.fromiter(map(len, ids), np.int64, len(ids))
    return np.minimum(total, max_tokens)


def _num_tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Index:
    ids = tokenizer([text.strip().lower() for text in texts], add_special_tokens=False)["input_ids"]
    return np.fromiter(map(len, ids), np.int64, len(texts))


# --- Inside ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Pool:
    """Samples with their lengths: makes rows of an epoch's draw and, in the end, the plan."""

    items: Sequence[Sample]
    clips: NDArray[np.int32]
    windows: NDArray[np.int32]
    texts: NDArray[np.int32]
    budget: Budget

    @classmethod
    def of(cls, items: Sequence[Sample], windows: Any, texts: Any, budget: Budget) -> _Pool:
        windows, texts = np.asarray(windows, np.int32), np.asarray(texts, np.int32)
        if not len(items) == len(windows) == len(texts):
            raise ValueError(f"{len(items)} samples, {len(windows)} windows, {len(texts)} text lengths: must agree")
        for lengths, limit, key in (
            (windows, budget.windows_per_row, "windows_per_row"),
            (texts, budget.text_tokens_per_row, "text_tokens_per_row"),
        ):
            if len(items) and lengths.max() > limit:
                worst = items[int(lengths.argmax())]
                raise ValueError(f"budget.{key}={limit} is less than sample {worst.id} alone needs ({lengths.max()})")
        return cls(items, clip_numbers(items).astype(np.int32), windows, texts, budget)

    def rows(self, index: Index, rng: np.random.Generator) -> Rows:
        """The drawn samples, packed into rows under the budget."""
        entries, clip_starts = share_clips(np.asarray(index, np.int64), self.clips, self.texts, self.budget, rng)
        return fill_rows(entries, clip_starts, self.clips, self.windows, self.texts, self.budget, rng)

    def dealt(self, rows: Rows, rng: np.random.Generator) -> Rows:
        """A multiple of `step_batches` rows in the order of training."""
        run = self.budget.balanced_rows or self.budget.step_batches
        return rows.take(deal_steps(rows.cost(self.windows, self.texts, self.budget), run, rng))

    def finish(self, rows: Rows, more: dict[str, str]) -> Plan[Sample]:
        """Measure the rows and put the fingerprint on."""
        budget = self.budget
        if not len(rows):
            raise ValueError("nothing to plan: no usable samples")
        windows = self.windows[rows.entries[rows.clip_starts[:-1]]]
        cost = rows.cost(self.windows, self.texts, self.budget)
        stats = measure(
            windows, rows.text_tokens(self.texts), rows.row_starts, len(rows.entries), cost, budget.step_batches
        )
        origin = {
            "data": fingerprint(self.items),
            "text lengths": _digest("", self.texts),
            "budget": " ".join(f"{name}={value}" for name, value in sorted(budget)),
            **more,
        }
        mark = _digest(repr(origin), rows.entries, rows.clip_starts, rows.row_starts)
        return Plan(
            self.items, rows.entries, rows.clip_starts, rows.row_starts, budget.step_batches, stats, mark, origin
        )


def _digest(text: str, *arrays: NDArray[Any]) -> str:
    digest = hashlib.sha256(text.encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array, np.int64).data)
    return digest.hexdigest()[:16]
