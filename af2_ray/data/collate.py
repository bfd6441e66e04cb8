"""Rows of the plan to batches: decode the clips, cut windows, tokenise.

Ragged in windows, each clip once: nothing is padded where it would be expensive. The questions about a clip stand in
one row of text, end to end, and do not see each other: questions of unlike length would otherwise pad a third of the
text away. So do conversations, and what is asked about the same several recordings. A batch is made of numpy arrays in
a decode task, which needs no torch (450 MB and 2.5 s less a worker process), and of torch tensors in the trainer;
`to_row` and `from_row` are the way through Ray's object store. A clip that fails is left out with all that was asked of
it and recorded; nothing takes its place. A row with no clip left keeps its place as one silent window without labels,
so that no rank waits for another.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from af2_ray import text
from af2_ray.audio.decode import AudioError
from af2_ray.audio.hear import Stretch, hear
from af2_ray.audio.windows import WINDOW_SAMPLES
from af2_ray.config import Clap
from af2_ray.data.batching import Row
from af2_ray.data.quarantine import Failure
from af2_ray.data.samples import CaptionSet, ItemT, Sample, messages_of, stretches_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from af2_ray.data.feature_store import FeatureStore

Array = Any  # numpy in a decode task, torch in the trainer
HOST = {"host": True}  # of a field that stays on the host: what is read there would wait for a GPU
CAPTION_TOKENS = 77  # most of a caption
_NOTHING = (text.Message("user", "", 1), text.Message("assistant", ""))  # the text of a row without clips
SILENCE = np.zeros((1, WINDOW_SAMPLES), np.int16)


@dataclass(frozen=True)
class _Batch:
    """The fields that both batches have, and their way through the object store."""

    row: int  # its number in the plan
    num_clips: int  # planned, the failed ones included
    failures: tuple[Failure, ...]
    sample_ids: tuple[str, ...]
    num_truncated: int
    waveforms: Array = field(kw_only=True)  # int16 [S, 160000], or from a `FeatureStore` the tower's features [S, F, D]
    windows_per_clip: Array = field(kw_only=True, metadata=HOST)  # int64 [C]

    def to_row(self) -> dict[str, Any]:
        """A flat dict of 1-D arrays, shapes and one JSON string: what Arrow stores without copies or objects."""
        row: dict[str, Any] = {}
        for name in _array_names(type(self)):
            array = np.asarray(getattr(self, name))
            row[name], row[f"{name}_shape"] = array.reshape(-1), np.array(array.shape, np.int64)
            if array.size == 0:  # Arrow has no tensor without elements: the shape tells that this one is not real
                row[name] = np.zeros(1, array.dtype)
        return row | {
            "row": self.row,
            "num_clips": self.num_clips,
            "num_truncated": self.num_truncated,
            "failures": json.dumps([asdict(failure) for failure in self.failures]),
            "sample_ids": json.dumps(self.sample_ids),
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """Inverse of `to_row`, with torch tensors that share the row's memory (do not write to them)."""
        tensors = {}
        for name in _array_names(cls):
            shape = tuple(np.asarray(row[f"{name}_shape"]).tolist())
            tensors[name] = _tensor(np.asarray(row[name])[: int(np.prod(shape))].reshape(shape))
        return cls(
            row=int(row["row"]),
            num_clips=int(row["num_clips"]),
            num_truncated=int(row["num_truncated"]),
            failures=tuple(Failure(**facts) for facts in json.loads(str(row["failures"]))),
            sample_ids=tuple(json.loads(str(row["sample_ids"]))),
            **tensors,
        )

    def tensors(self) -> Self:
        """The same batch with torch tensors in place of numpy arrays."""
        return replace(self, **{name: _tensor(getattr(self, name)) for name in _array_names(type(self))})

    def arrays(self) -> list[Array]:
        """All arrays, or tensors."""
        return [value for f in fields(self) if hasattr(value := getattr(self, f.name), "shape")]

    def pinned(self) -> Self:
        """The same batch with its tensors in page-locked memory, from which a GPU copies without the host."""
        return replace(self, **{f.name: value.pin_memory() for f, value in self._moving()})

    def to(self, device: Any) -> Self:
        """The same batch with its tensors on `device`, but for those that the host reads."""
        return replace(self, **{f.name: value.to(device, non_blocking=True) for f, value in self._moving()})

    def _moving(self) -> list[tuple[Any, Array]]:
        found = [(f, getattr(self, f.name)) for f in fields(self) if not f.metadata.get("host")]
        return [(f, value) for f, value in found if hasattr(value, "shape")]


@dataclass(frozen=True)
class LmBatch(_Batch):
    """Questions about clips. B rows of text, C clips, S windows of all clips, K audios a row, T text tokens.

    `audio_index` [B, K] names the clips of each row, in order (-1: none). A row holds all samples about its clips,
    numbered in `attention_mask`. `sample_ids` has one entry a sample. Before a batch leaves the host, `located` finds
    its N answer tokens: the positions before them in the flat text, and their ids.
    """

    answer_places: Array | None = None  # int64 [N], b * T + t
    answer_ids: Array | None = None  # int64 [N]
    texts_per_row: int | None = None  # of the row with the most
    audio_index: Array = field(kw_only=True, metadata=HOST)  # int64 [B, K]
    input_ids: Array = field(kw_only=True)  # int64 [B, T]
    attention_mask: Array = field(kw_only=True)  # int64 [B, T], 0 at padding, 1, 2 ... in a row's questions
    labels: Array = field(kw_only=True)  # int64 [B, T], -100 where nothing is learned

    def located(self) -> Self:
        """The same batch with its answer tokens found, where they are not yet."""
        if self.answer_places is not None:
            return self
        following = self.labels[:, 1:]
        row, place = (following != text.IGNORE).nonzero(as_tuple=True)
        return replace(
            self,
            answer_places=row * self.labels.shape[1] + place,
            answer_ids=following[row, place],
            texts_per_row=int(self.attention_mask.max()),
        )

    def pinned(self) -> Self:
        return super(LmBatch, self.located()).pinned()

    def to(self, device: Any) -> Self:
        return super(LmBatch, self.located()).to(device)


@dataclass(frozen=True)
class ClapBatch(_Batch):
    """Clips with their captions. C clips, S windows, N captions of all clips (ragged), T text tokens.

    A caption's place in the loss is (`caption_owner`, `caption_slot`, `caption_rank`): clip, positive m, and 0 for the
    positive itself or n+1 for its negative n. `sample_ids` has one entry a clip.
    """

    text_ids: Array = field(kw_only=True)  # int64 [N, T]
    text_mask: Array = field(kw_only=True)  # int64 [N, T]
    caption_owner: Array = field(kw_only=True)  # int64 [N], clip
    caption_slot: Array = field(kw_only=True)  # int64 [N], m
    caption_rank: Array = field(kw_only=True)  # int64 [N], 0 positive, n+1 negative


def _array_names(batch_type: type[_Batch]) -> list[str]:
    return [f.name for f in fields(batch_type) if f.kw_only]


def _tensor(array: NDArray[Any]) -> Any:
    """A torch tensor over the array's memory; Ray's arrays are read-only, which torch would warn of each time."""
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.as_tensor(array)


# --- Collators ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LmCollator:
    """Turns a row of samples into an `LmBatch` (numpy).

    Attributes:
        tokenizer: the LM's, with the model's special tokens.
        max_windows: windows of a clip that are read at most.
        max_text_tokens: tokens of a question with its answer at most.
        source: store of the features of a frozen tower, to take in place of windows; none: the audio itself.
    """

    tokenizer: PreTrainedTokenizerBase
    max_windows: int
    max_text_tokens: int = 512
    source: FeatureStore | None = None

    def __call__(self, row: Row[Sample]) -> LmBatch:
        """Decode and collate one row."""
        read, silence = (self.source.read, self.source.silence) if self.source else (hear, SILENCE)
        clips, waveforms, failures = _read(row, lambda number, stretch: read(stretch, self.max_windows), silence)
        samples = [sample for clip in clips for sample in clip]
        conversations = [messages_of(sample) for sample in samples] or [_NOTHING]
        encoded = text.encode_conversations(self.tokenizer, conversations, max_tokens=self.max_text_tokens)
        flat = [windows for recordings in waveforms for windows in recordings]
        sizes = [len(clip) for clip in clips] or [1]
        input_ids, attention_mask, labels = _end_to_end(encoded, sizes, int(self.tokenizer.pad_token_id))
        return LmBatch(
            row=row.index,
            num_clips=len(row.clips),
            failures=failures,
            sample_ids=tuple(sample.id for sample in samples),
            num_truncated=encoded.num_truncated if samples else 0,
            waveforms=np.concatenate(flat),
            windows_per_clip=np.array([len(windows) for windows in flat], np.int64),
            audio_index=_audio_index([len(recordings) for recordings in waveforms]),
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=labels if samples else np.full_like(labels, text.IGNORE),
        )


@dataclass(frozen=True)
class ClapCollator:
    """Turns a row of caption sets into a `ClapBatch` (numpy), with at most M positives and N negatives for each.

    A row with no clip left has one silent window and no caption (text tensors [0, 1]).

    Attributes:
        tokenizer: the text tower's.
        clap: settings of AF-CLAP: numbers of texts, windows, augmentation.
        seed: seed of what `augment` draws, together with a clip's place in the plan; the number of workers plays no
            part.
    """

    tokenizer: PreTrainedTokenizerBase
    clap: Clap
    seed: int = 0

    def __call__(self, row: Row[CaptionSet]) -> ClapBatch:
        """Decode and collate one row."""
        first = row.index * len(row.clips)  # place of its first clip in the plan
        clips, waveforms, failures = _read(row, lambda number, clip: self._hear(clip, first + number), SILENCE)
        windows = [part for (part,) in waveforms]
        captions, places = [], []
        for owner, (clip, *_) in enumerate(clips):
            for slot, positive in enumerate((clip.caption, *clip.positives)[: self.clap.num_positives]):
                wrong = clip.negatives[slot][: self.clap.num_negatives] if slot < len(clip.negatives) else ()
                captions += [positive, *wrong]
                places += [(owner, slot, rank) for rank in range(1 + len(wrong))]
        owner_, slot_, rank_ = np.array(places, np.int64).reshape(-1, 3).T
        ids, mask, num_truncated = _tokenise(self.tokenizer, captions, CAPTION_TOKENS)
        return ClapBatch(
            row=row.index,
            num_clips=len(row.clips),
            failures=failures,
            sample_ids=tuple(clip.id for clip, *_ in clips),
            num_truncated=num_truncated,
            waveforms=np.concatenate(windows),
            windows_per_clip=np.array([len(part) for part in windows], np.int64),
            text_ids=ids,
            text_mask=mask,
            caption_owner=owner_,
            caption_slot=slot_,
            caption_rank=rank_,
        )

    def _hear(self, stretch: Stretch, place: int) -> NDArray[np.int16]:
        clap, seed = self.clap, (self.seed, place)
        return hear(stretch, clap.max_windows, short_clips=clap.short_clips, augment=clap.augment, seed=seed)


def _end_to_end(encoded: text.TextBatch, sizes: list[int], pad_id: int) -> tuple[NDArray[np.int64], ...]:
    """Put texts padded on the right end to end, `sizes` of them a row: ids, numbers of the texts and labels, [B, T]."""
    lengths = encoded.attention_mask.sum(1)
    totals = np.add.reduceat(lengths, np.cumsum([0, *sizes[:-1]]))
    real = np.arange(totals.max()) < totals[:, None]
    numbers = np.repeat(np.concatenate([np.arange(1, size + 1) for size in sizes]), lengths)
    kept = encoded.attention_mask.astype(bool)
    rows = []
    for values, padding in ((encoded.input_ids[kept], pad_id), (numbers, 0), (encoded.labels[kept], text.IGNORE)):
        rows.append(np.full(real.shape, padding, np.int64))
        rows[-1][real] = values
    return tuple(rows)


def _audio_index(sizes: Sequence[int]) -> NDArray[np.int64]:
    """The clips of rows that hear so many each, one after another: [B, K], -1 where there is none."""
    index = np.full((len(sizes), max(sizes)), -1, np.int64)
    index[np.arange(max(sizes)) < np.array(sizes)[:, None]] = np.arange(sum(sizes))
    return index


def _read(
    row: Row[ItemT], read: Callable[[int, Stretch], NDArray[Any]], silence: NDArray[Any]
) -> tuple[list[tuple[ItemT, ...]], list[list[NDArray[Any]]], tuple[Failure, ...]]:
    """Read a row: the clips that could be read, windows [W, ...] of each one's recordings, and the failures.

    A recording that fails takes those with it that are heard together with it. With no clip left, one silent window
    stands in the second list.
    """
    clips, waveforms, failures = [], [], []
    for number, clip in enumerate(row.clips):
        stretch = clip[0].stretch
        try:
            recordings = []
            for stretch in stretches_of(clip[0]):
                recordings.append(read(number, stretch))
        except AudioError as error:
            failures.append(
                Failure(error.uri, error.reason, stretch.offset_s, error.detail, row.index, num_samples=len(clip))
            )
        else:
            waveforms.append(recordings)
            clips.append(clip)
    return clips, waveforms or [[silence]], tuple(failures)


def _tokenise(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], max_tokens: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Token ids and mask [N, T], padded on the right, with the tokenizer's own end token; how many texts were cut."""
    if not texts:
        return np.zeros((0, 1), np.int64), np.zeros((0, 1), np.int64), 0
    if tokenizer.pad_token_id is None:
        raise ValueError("the caption tokenizer has no padding token: set tokenizer.pad_token")
    full = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    batch = tokenizer(
        texts, padding=True, truncation=True, max_length=max_tokens, padding_side="right", return_tensors="np"
    )
    ids, mask = batch["input_ids"].astype(np.int64), batch["attention_mask"].astype(np.int64)
    return ids, mask, sum(length > max_tokens for length in full)
