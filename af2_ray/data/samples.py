"""What a model learns from: questions about stretches of audio, clips with captions; which of them can be used."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from string import ascii_uppercase
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


def list_options(options: Sequence[str]) -> str:
    """Options as a question lists them after its words: ` (A) dog (B) bell`; at most 26."""
    return "".join(f" ({letter}) {option}" for letter, option in zip(ascii_uppercase, options, strict=False))


Item = Sample | CaptionSet
ItemT = TypeVar("ItemT", bound=Item)
NO_DURATION = "no duration"


def check_samples(
    samples: Sequence[ItemT], unread: Mapping[str, str] = MappingProxyType({})
) -> tuple[Sequence[ItemT], list[tuple[ItemT, str]]]:
    """Part the usable samples from the others, without opening a file.

    Args:
        samples: samples of one manifest.
        unread: reasons why files' durations could not be read, by uri (`durations.fill_durations`).

    Returns:
        The good ones in order, and the bad ones with a short stable reason: those of `storage.NameRefused`, `no
        duration`, `zero duration`, `negative offset`, `empty prompt`, `audio markers` (the prompts place another number
        of recordings than there are, or an answer places one), `empty answer`, `empty caption`, `ragged captions`. Of
        several recordings and turns the first bad one counts.
    """
    if of_columns := getattr(samples, "checked", None):  # a table makes objects of bad samples only
        return of_columns(unread)
    good, bad = [], []
    for sample in samples:
        if reason := _fault(sample):
            bad.append((sample, _reason_unread(sample, unread) if reason == NO_DURATION else reason))
        else:
            good.append(sample)
    return good, bad


def stretches_of(item: Item) -> tuple[Stretch, ...]:
    """All recordings of an item, in order."""
    return item.stretches if isinstance(item, Sample) else (item.stretch,)


def stretch_fault(stretch: Stretch) -> str:
    """Why a recording cannot be used, by its name and seconds alone; empty if it can."""
    if reason := name_fault(stretch.uri):
        return reason
    if not math.isfinite(stretch.duration_s):
        return NO_DURATION
    if stretch.duration_s <= 0:
        return "zero duration"
    return "" if math.isfinite(stretch.offset_s) and stretch.offset_s >= 0 else "negative offset"


def _reason_unread(sample: Item, unread: Mapping[str, str]) -> str:
    """Why the first recording that has no duration has none."""
    uri = next(stretch.uri for stretch in stretches_of(sample) if not math.isfinite(stretch.duration_s))
    return unread.get(uri, NO_DURATION)


def _fault(sample: Item) -> str:
    if reason := next(filter(None, map(stretch_fault, stretches_of(sample))), ""):
        return reason
    if isinstance(sample, Sample):
        return _fault_of_texts(sample)
    if not all(text.strip() for text in (sample.caption, *sample.positives)):
        return "empty caption"
    if sample.negatives and len(sample.negatives) != 1 + len(sample.positives):
        return "ragged captions"
    return ""


def _fault_of_texts(sample: Sample) -> str:
    prompts = [turn.prompt for turn in sample.history] + [sample.prompt]
    answers = [turn.answer for turn in sample.history] + [sample.answer]
    if not all(prompt.strip() for prompt in prompts):
        return "empty prompt"
    num_markers = sum(count_markers(prompt) for prompt in prompts)
    if num_markers not in (0, len(sample.stretches)) or any(map(count_markers, answers)):
        return "audio markers"
    return "" if all(answer.strip() for answer in answers) else "empty answer"


def count_markers(text: str) -> int:
    """Number of `<audio>` markers in a text."""
    return normalise_text(text).count(AUDIO)


def conversation_json(sample: Sample) -> str:
    """History and further recordings of a sample as JSON; empty where it has neither."""
    if not (sample.history or sample.more_audio):
        return ""
    return _conversation_text([[turn.prompt, turn.answer] for turn in sample.history], sample.more_audio)


def _conversation_text(turns: Sequence[Sequence[str]], more_audio: Sequence[Stretch]) -> str:
    audio = [[stretch.uri, stretch.offset_s, stretch.duration_s] for stretch in more_audio]
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
    counts = [count_markers(turn.prompt) for turn in turns]
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


def measured_stretch(stretch: Stretch, known: Mapping[str, float]) -> Stretch:
    """A stretch with a duration: its own, or that of its file (seconds by uri) less its offset."""
    if math.isfinite(stretch.duration_s):
        return stretch
    return replace(stretch, duration_s=known.get(stretch.uri, math.nan) - stretch.offset_s)


def measured_conversation(text: str, known: Mapping[str, float]) -> str:
    """What `conversation_json` wrote, with the durations of its recordings filled in."""
    turns, audio = json.loads(text)
    found = [measured_stretch(Stretch(*stretch), known) for stretch in audio]
    return _conversation_text(turns, found)


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
