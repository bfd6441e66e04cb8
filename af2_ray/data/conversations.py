"""Conversations to samples, in the forms of AF3, OpenAI, ms-swift and LLaMA-Factory.

| form | turns | recordings |
|---|---|---|
| AF3 | `conversations: [{from: human or gpt, value}]` | `sound`: a path or a list; `<sound>`, `<sound-1>` in values |
| OpenAI | `messages: [{role, content: text or parts}]` | parts `audio_url` or `input_audio` of the content |
| ms-swift, LLaMA-Factory | `messages: [{role, content}]` | `audios`: paths; `<audio>` in the content |
| ShareGPT | `conversations: [{from, value}]` | `audios`, as before |

Questions and answers take turns, a question first. A tag says with which question a recording is heard. It becomes an
`<audio>` marker at the question's start, where the server writes it, too; a numbered one within a sentence leaves the
words `sound 2` in its place. Where all recordings come with the first question there is no marker: none means that. A
question at the end is one to be answered. A system turn is refused: the model's folder has the system prompt, so that
what is trained is what is asked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from af2_ray.audio.hear import Stretch
from af2_ray.data.inline_clips import InlineClips
from af2_ray.data.items import TALK_KEYS, sample_of, seconds_of, whole
from af2_ray.data.names import Root
from af2_ray.data.samples import Sample, Turn
from af2_ray.storage.places import shown
from af2_ray.text import AUDIO

_QUESTIONS, _ANSWERS, _SYSTEM = ("human", "user"), ("gpt", "assistant"), ("system", "developer")
_SYSTEM_FAULT = (
    "a system prompt is a setting of the model: write it into the chat template of the model's folder, and leave it "
    "out of the data"
)
_TAG = re.compile(r"<(?:audio|sound)(?:-\d{1,4})?>", re.IGNORECASE)
_APART = re.compile(  # tags at the beginning, or alone on a line
    rf"\A(?:\s*{_TAG.pattern})+\s*|^(?:[ \t]*{_TAG.pattern})+[ \t]*(?:\n|\Z)", re.IGNORECASE | re.MULTILINE
)
_WITHIN = re.compile(rf"[ \t]*{_TAG.pattern}", re.IGNORECASE)


@dataclass(frozen=True)
class _Said:
    """One turn: its text, and the recordings that are parts of it (uris)."""

    is_answer: bool
    text: str
    clips: tuple[str, ...] = ()


def is_conversation(item: Mapping[str, Any]) -> bool:
    """Whether a row is a conversation."""
    return item.get("messages") is not None or item.get("conversations") is not None


def sample_of_conversation(
    item: dict[str, Any], id_: str, root: Root, dataset: str, task: str, inline: InlineClips
) -> Sample:
    """A sample from a conversation's row under NVIDIA's keys (`items.renamed`).

    Args:
        inline: the files of recordings that are in the row itself.

    Raises:
        KeyError, TypeError, ValueError: it cannot be understood; see `items`.
    """
    if item.get("system"):
        raise ValueError(f"key 'system': {_SYSTEM_FAULT}")
    turns = _turns(item, root, inline)
    questions = [turn for turn in turns if not turn.is_answer]
    answers = [turn.text for turn in turns if turn.is_answer] + ([] if turns[-1].is_answer else [""])
    if uris := [clip for turn in questions for clip in turn.clips]:
        if any(item.get(key) for key in ("sound", "audios")):
            raise ValueError("recordings are parts of the messages and listed under a key, too: give them in one way")
        words = [turn.text for turn in questions]
        num_markers = [len(turn.clips) for turn in questions]
    else:
        listed = [root.join(name) for name in _names(item)]
        words, heard = _by_tags([turn.text for turn in questions], len(listed))
        num_markers = [len(places) for places in heard]
        order = [place for places in heard for place in places if place < len(listed)]
        uris = [listed[place] for place in (*order, *(place for place in range(len(listed)) if place not in order))]
    if num_markers[0] == sum(num_markers) == len(uris) and words[0].strip():
        num_markers[0] = 0
    prompts = [AUDIO * count + text for count, text in zip(num_markers, words, strict=True)]
    return _sample(item, uris, prompts, answers, (id_, root, dataset, task))


def _sample(
    item: dict[str, Any],
    uris: Sequence[str],
    prompts: Sequence[str],
    answers: Sequence[str],
    common: tuple[str, Root, str, str],
) -> Sample:
    first, *more = uris or [""]  # none: set aside as an empty name
    offsets, durations = (
        _seconds_of_each(item, key, 1 + len(more), missing)
        for key, missing in (("audio_start", 0.0), ("duration", math.nan))
    )
    facts = {key: value for key, value in item.items() if key not in (*TALK_KEYS, "system")}
    facts |= {"name": "", "prompt": prompts[-1], "output": answers[-1]}
    facts |= {"audio_start": offsets[0], "duration": durations[0]}
    return replace(
        sample_of(facts, *common),
        uri=first,
        history=tuple(Turn(*turn) for turn in zip(prompts[:-1], answers[:-1], strict=True)),
        more_audio=tuple(map(Stretch, more, offsets[1:], durations[1:])),
    )


# --- Turns -------------------------------------------------------------------------------------------------------


def _turns(item: Mapping[str, Any], root: Root, inline: InlineClips) -> list[_Said]:
    key = "messages" if item.get("messages") is not None else "conversations"
    value = item[key]
    if not isinstance(value, list) or not value:
        raise TypeError(f"key {key!r} must be a list of turns, got {shown(repr(value))}")
    turns = []
    for number, turn in enumerate(value, 1):
        try:
            turns.append(_turn(turn, root, inline))
            if turns[-1].is_answer != (number % 2 == 0):
                wanted = "an answer (gpt or assistant)" if number % 2 == 0 else "a question (human or user)"
                raise ValueError(f"expected {wanted}: questions and answers take turns")
        except KeyError as error:
            raise ValueError(f"key {key!r}, turn {number}: key {error.args[0]!r} is missing") from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"key {key!r}, turn {number}: {error}") from error
    return turns


def _turn(turn: Any, root: Root, inline: InlineClips) -> _Said:
    if not isinstance(turn, dict):
        raise TypeError(f"expected an object with role and content (or from and value), got {type(turn).__name__}")
    of_role, of_content = ("from", "value") if turn.get("from") is not None else ("role", "content")
    role, content = turn[of_role], turn[of_content]
    if role in _SYSTEM:
        raise ValueError(_SYSTEM_FAULT)
    if role not in (*_QUESTIONS, *_ANSWERS):
        known = "human or gpt" if of_role == "from" else "user or assistant"
        raise ValueError(f"key {of_role!r} must be {known}, got {shown(repr(role))}")
    if isinstance(content, str):
        return _Said(role in _ANSWERS, whole(content))
    if not isinstance(content, list):
        raise TypeError(f"key {of_content!r} must be a string or a list of parts, got {shown(repr(content))}")
    texts, clips = [], []
    for part in content:
        clip = _clip_of(part, root, inline)
        if clip is None:
            texts.append(whole(part if isinstance(part, str) else part["text"]))
        else:
            clips.append(clip)
    if clips and role in _ANSWERS:
        raise ValueError("an answer is text: it cannot have recordings among its parts")
    return _Said(role in _ANSWERS, "\n".join(texts), tuple(clips))  # joined as the server does it


def _clip_of(part: Any, root: Root, inline: InlineClips) -> str | None:
    """The uri of a part that is a recording; none for text."""
    if isinstance(part, str):
        return None
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return None
    if kind == "audio_url":
        found = part["audio_url"]
        url = found.get("url") if isinstance(found, dict) else found
        if isinstance(url, str):
            return root.join(whole(url))
    if kind == "input_audio":
        found = part["input_audio"]
        if isinstance(found, dict) and isinstance(found.get("data"), str):
            return inline.uri_of(found["data"], str(found.get("format") or "wav"))
    raise ValueError(
        'a part must be {"type": "text", "text": words}, {"type": "audio_url", "audio_url": {"url": name}} or '
        f'{{"type": "input_audio", "input_audio": {{"data": base64, "format": "wav"}}}}, got {shown(repr(part))}'
    )


# --- Recordings --------------------------------------------------------------------------------------------------


def _names(item: Mapping[str, Any]) -> list[str]:
    """The names of a row's recordings, under the first of the keys that it has."""
    key = next((key for key in ("sound", "audios", "name") if item.get(key) is not None), None)
    if key is None:
        return []
    value = [item[key]] if isinstance(item[key], str) else item[key]
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"key {key!r} must be a path or a list of paths, got {shown(repr(item[key]))}")
    return [whole(name) for name in value]


def _by_tags(texts: Sequence[str], num_listed: int) -> tuple[list[str], list[list[int]]]:
    """Words of each question without its tags, and the places in the list of the recordings that it begins with.

    A tag without a number has the next place that is free; past the end of the list where none is.
    """
    placed: list[int] = []
    words, heard = [], []
    for text in texts:
        here: list[int] = []
        for tag in _TAG.findall(text):
            free = (place for place in range(num_listed) if place not in placed)
            place = _number_in(tag) - 1 if "-" in tag else next(free, num_listed)
            if "-" in tag and not 0 <= place < num_listed:
                raise ValueError(f"the tag {tag} names no recording: there are {num_listed} under the row's key")
            if place not in placed or place == num_listed:
                here.append(place)
                placed.append(place)
        words.append(_WITHIN.sub(lambda found: _in_words(found[0], placed), _APART.sub("", text)))
        heard.append(here)
    return words, heard


def _in_words(tag: str, placed: Sequence[int]) -> str:
    """What stays of a tag within a sentence: of a numbered one `sound 2`, by the order in which they are heard."""
    if "-" not in tag or _number_in(tag) - 1 not in placed:
        return ""
    blank, word = tag[: tag.index("<")], tag[tag.index("<") + 1 : tag.index("-")]
    return f"{blank}{word} {1 + placed.index(_number_in(tag) - 1)}"


def _number_in(tag: str) -> int:
    return int(tag.strip()[:-1].rsplit("-", 1)[1])


def _seconds_of_each(item: Mapping[str, Any], key: str, num: int, missing: float) -> list[float]:
    """Seconds of each recording: a list, or a number where there is one recording.

    A number as the duration of several does not say which it is of: the files' headers do.
    """
    value = item.get(key)
    if isinstance(value, list):
        if len(value) != num:
            raise ValueError(f"key {key!r} must have a number for each of {num} recordings, got {len(value)}")
        return [seconds_of({key: one}, key, missing) for one in value]
    seconds = seconds_of(item, key, missing)
    if num > 1 and key == "audio_start" and seconds:
        raise ValueError(
            f"key {key!r} must be a list of {num} numbers, one for each recording, got {shown(repr(value))}"
        )
    return [seconds] if num == 1 else [missing] * num
