"""What a model learns from: questions about stretches of audio, clips with captions; which of them can be used."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, TypeVar

from af2_ray.audio.hear import Stretch
from af2_ray.data.names import name_fault
from af2_ray.text import AUDIO, Message, normalise_text, without_leading_markers


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its answer, before another question about the same audio."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One question about one stretch of audio, or the last question of a conversation about one or several.

    Where several recordings are heard, or a conversation's recordings come with later questions, `<audio>` markers in
    the prompts say which turn each belongs to, in order; without any marker all of them belong to the first prompt.
    """

    id: str
    uri: str
    offset_s: float
    duration_s: float
    prompt: str
    answer: str
    task: str
    dataset: str
    skill: str = ""
    options: tuple[str, ...] = ()
    pair: str = ""  # samples of one counterbalanced pair share it
    template: str = ""  # samples asked in the same words share it
    history: tuple[Turn, ...] = ()  # earlier turns, in order; their answers are learned, too
    more_audio: tuple[Stretch, ...] = ()  # the second recording and those after it
    meta: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def stretch(self) -> Stretch:
        return Stretch(self.uri, self.offset_s, self.duration_s)

    @property
    def stretches(self) -> tuple[Stretch, ...]:
        """All recordings of the sample, in order."""
        return (self.stretch, *self.more_audio)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """All questions and answers, in order."""
        return (*self.history, Turn(self.prompt, self.answer))


@dataclass(frozen=True, slots=True)
class CaptionSet:
    """A clip with its caption, M-1 paraphrases, and for each of those M texts N captions that are wrong of it."""

    uri: str
    offset_s: float
    duration_s: float
    caption: str
    positives: tuple[str, ...]
    negatives: tuple[tuple[str, ...], ...]
    relations: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """The clip, as the failures and batches of a run name it."""
        return self.stretch.id

    @property
    def stretch(self) -> Stretch:
        return Stretch(self.uri, self.offset_s, self.duration_s)

    @property
    def stretches(self) -> tuple[Stretch, ...]:
        """The clip alone, as samples have it."""
        return (self.stretch,)


Item = Sample | CaptionSet
ItemT = TypeVar("ItemT", bound=Item)


def check_samples(
    samples: Sequence[ItemT], unread: Mapping[str, str] = MappingProxyType({})
) -> tuple[Sequence[ItemT], list[tuple[ItemT, str]]]:
    """Part the usable samples from the others, without opening a file.

    Args:
        samples: samples of one manifest.
        unread: reasons why files' durations could not be read, by uri (`durations.fill_durations`).

    Returns:
        The good ones in order, and the bad ones with a short stable reason: those of `storage.NameRefused`, `no
        duration`, `zero duration`, `negative offset`, `empty prompt`, `audio markers` (a prompt that places more than
        the one recording), `empty answer`, `empty caption`, `ragged captions`.
    """
    if of_columns := getattr(samples, "checked", None):  # a table makes objects of bad samples only
        return of_columns(unread)
    good, bad = [], []
    for sample in samples:
        reason = _fault(sample)
        if reason:
            bad.append((sample, unread.get(sample.uri, reason) if reason == "no duration" else reason))
        else:
            good.append(sample)
    return good, bad


def _fault(sample: Item) -> str:
    if reason := name_fault(sample.uri):
        return reason
    if not math.isfinite(sample.duration_s):
        return "no duration"
    if sample.duration_s <= 0:
        return "zero duration"
    if not (math.isfinite(sample.offset_s) and sample.offset_s >= 0):
        return "negative offset"
    if isinstance(sample, Sample):
        if not sample.prompt.strip():
            return "empty prompt"
        if normalise_text(sample.prompt).count(AUDIO) > 1:
            return "audio markers"
        return "" if sample.answer.strip() else "empty answer"
    if isinstance(sample, CaptionSet):
        if not all(text.strip() for text in (sample.caption, *sample.positives)):
            return "empty caption"
        if sample.negatives and len(sample.negatives) != 1 + len(sample.positives):
            return "ragged captions"
    return ""


def conversation_json(sample: Sample) -> str:
    """History and further recordings of a sample as JSON; empty where it has neither."""
    if not (sample.history or sample.more_audio):
        return ""
    turns = [[turn.prompt, turn.answer] for turn in sample.history]
    audio = [[stretch.uri, stretch.offset_s, stretch.duration_s] for stretch in sample.more_audio]
    return json.dumps([turns, audio], ensure_ascii=False)


def conversation_of(text: str) -> dict[str, Any]:
    """The fields of a `Sample` that `conversation_json` wrote."""
    turns, audio = json.loads(text) if text else ((), ())
    return {
        "history": tuple(Turn(*turn) for turn in turns),
        "more_audio": tuple(Stretch(*stretch) for stretch in audio),
    }


def messages_of(sample: Sample) -> tuple[Message, ...]:
    """A sample as the messages of a conversation; the last one is its answer.

    Markers at the beginning of a prompt are where those of a message come anyway, so its text goes without them; only a
    single turn about one recording keeps its prompt as it is written, white space behind a marker included.

    Raises:
        ValueError: its prompts place other than one `<audio>` marker a recording.
    """
    turns = sample.turns
    counts = [normalise_text(turn.prompt).count(AUDIO) for turn in turns]
    num = len(sample.stretches)
    if not any(counts):
        counts[0] = num
    elif sum(counts) != num:
        raise ValueError(f"{sample.id}: the prompts have {sum(counts)} {AUDIO} markers for {num} audios: one each")
    if sample.history or sample.more_audio:
        turns = tuple(replace(turn, prompt=without_leading_markers(turn.prompt)) for turn in turns)
    return tuple(
        message
        for turn, count in zip(turns, counts, strict=True)
        for message in (Message("user", turn.prompt, count), Message("assistant", turn.answer))
    )


def fingerprint(samples: Sequence[Item]) -> str:
    """SHA-256 (first 16 hex digits) of what the samples say, in order; a moved corpus keeps its fingerprint."""
    if columns := getattr(samples, "fingerprint", None):  # a table hashes whole columns
        return str(columns())
    digest = hashlib.sha256()
    for sample in samples:
        name = "/".join(sample.uri.rsplit("/", 2)[-2:])
        said: tuple[Any, ...] = (name, sample.offset_s, sample.duration_s)
        if isinstance(sample, Sample):
            said += (sample.id, sample.prompt, sample.answer)
            if sample.history or sample.more_audio:  # other samples keep the fingerprint that they had without them
                said += (conversation_json(sample),)
        elif isinstance(sample, CaptionSet):
            said += (sample.caption, sample.positives, sample.negatives)
        digest.update(json.dumps(said, ensure_ascii=False).encode())
    return digest.hexdigest()[:16]
