"""Prompts, special tokens and label masks: `<audio>{prompt}<SEP>{answer}<|endofchunk|>{eos}`.

Prompt and answer are stripped and lower-cased, as in the reference (docs/paper.md, "Text and labels"). Where
the reference drops every label of a sample whose end was truncated away, the answer tokens that are there keep theirs,
and truncations are counted.

A conversation is written by the chat template of the model folder, in training as by the server: what is learned of
an answer is what follows the very tokens that the server would answer to. What the default template writes is put
together without it, which takes a tenth of the time.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

AUDIO, END_OF_CHUNK, PAD, SEP = SPECIAL_TOKENS = ("<audio>", "<|endofchunk|>", "<|PAD_TOKEN|>", "<SEP>")
EOS = "<|endoftext|>"
IGNORE = -100
_LEADING = re.compile(rf"\s*(?:{AUDIO}\s*)+", re.IGNORECASE)
_MARKERS = "the prompt has {} " + AUDIO + " markers for {} audios: one each, or none at all"
CHAT_TEMPLATE = (
    "{%- set before = namespace(text='') -%}"
    "{%- for message in messages -%}"
    "{%- if message.content is string -%}{%- set text = message.content | trim | lower -%}"
    "{%- else -%}"
    "{%- set texts = message.content | selectattr('type', 'equalto', 'text') | map(attribute='text') -%}"
    "{%- set text = texts | map('trim') | map('lower') | join('\\n') -%}"
    "{%- endif -%}"
    "{%- if message.role == 'assistant' -%}{{ text }}<|endofchunk|>{{ eos_token }}"
    "{%- else -%}"
    "{%- set before.text = (before.text + '\\n' + text) | trim -%}"
    "{%- if message.role == 'user' -%}"
    "{%- if message.content is not string -%}"
    "{%- for part in message.content if part.type in ['audio', 'input_audio', 'audio_url'] -%}<audio>{%- endfor -%}"
    "{%- endif -%}"
    "{{ before.text }}<SEP>{%- set before.text = '' -%}"
    "{%- endif -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
)
"""A conversation as the model was trained: audio markers, question, `<SEP>`, answer, `<|endofchunk|>`, end of text.

A system message's text stands before the next question's, on a line of its own.
"""
TEMPLATE_FILE = "chat_template.jinja"  # of a model folder
_OLD_DEFAULT = "900dafa9fc126ae02be97ec62dcd64405223392bd6fd24ed3c2973c649eae812"
"""SHA-256 of the default template of earlier exports, for which this one is taken: single turns are the same."""
WORDS = r" ?\([a-z]\)| ?\w+| ?[^\s\w]+|\s+"
"""What a small LM's tokenizer never merges across: the mark of an option, a word, punctuation, white space."""


@dataclass(frozen=True)
class TextBatch:
    """Tokens of B samples, int64 [B, T] each; `labels` is -100 wherever nothing is learned."""

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    labels: NDArray[np.int64]
    num_truncated: int


@dataclass(frozen=True, slots=True)
class Message:
    """A message of a conversation.

    Attributes:
        num_audios: number of recordings that come with it. Their markers stand before its text, unless that places
            `<audio>` markers itself.
    """

    role: Literal["system", "user", "assistant"]
    text: str
    num_audios: int = 0


def add_special_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Add the four tokens of the model, in the reference's order, and set the padding token; returns `<audio>`'s id.

    Adding them a second time changes nothing.
    """
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    tokenizer.pad_token = PAD
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    if ids != list(range(ids[0], ids[0] + len(SPECIAL_TOKENS))):
        raise ValueError(f"the tokens {SPECIAL_TOKENS} need consecutive ids in this order, the tokenizer has {ids}")
    return int(ids[0])


def normalise_text(text: str) -> str:
    """Lower-cased and stripped, as every prompt and answer is."""
    return text.lower().strip()


def format_prompt(prompt: str, num_audios: int = 1) -> str:
    """The prompt through `<SEP>`: a marker for each audio first, unless the prompt places its own `<audio>` markers."""
    text = normalise_text(prompt)
    placed = text.count(AUDIO)
    if placed and placed != num_audios:
        raise ValueError(_MARKERS.format(placed, num_audios))
    return text + SEP if placed else AUDIO * num_audios + text + SEP


def without_leading_markers(prompt: str) -> str:
    """The prompt without its `<audio>` markers if all of them stand at its beginning, else as it is."""
    found = _LEADING.match(prompt)
    rest = prompt[found.end() :] if found else prompt
    return prompt if AUDIO in rest.lower() else rest


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[str] | None = None,
    *,
    max_tokens: int = 512,
    num_audios: int | Sequence[int] = 1,
    padding_side: Literal["left", "right"] = "right",
    formatted: bool = False,
) -> TextBatch:
    """Tokenize prompts, with their answers for training or through `<SEP>` for generation (labels all -100).

    Samples over `max_tokens` are cut on the right and counted. Labels are kept from after the first `<SEP>` on, except
    at padding and `<audio>`. Prompts that are `formatted` are whole conversations with their special tokens, as a chat
    template writes them, and stay as they are.
    """
    audios = [num_audios] * len(prompts) if isinstance(num_audios, int) else list(num_audios)
    pairs = zip(prompts, audios, strict=True)
    texts = list(prompts) if formatted else [format_prompt(prompt, count) for prompt, count in pairs]
    if answers is not None:
        texts = [text + _ended(tokenizer, answer) for text, answer in zip(texts, answers, strict=True)]
    batch = _padded(tokenizer, _token_ids(tokenizer, texts), max_tokens, padding_side)
    return batch if answers is not None else replace(batch, labels=np.full_like(batch.labels, IGNORE))


def _padded(
    tokenizer: PreTrainedTokenizerBase, rows: list[list[int]], max_tokens: int, padding_side: Literal["left", "right"]
) -> TextBatch:
    """Rows of ids, cut on the right and padded, with the labels of single turns."""
    lengths = np.array([min(len(row), max_tokens) for row in rows], np.int64)
    width = int(lengths.max(initial=0))
    audio_id, _, pad_id, sep_id = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))

    columns = np.arange(width)
    real = (columns if padding_side == "right" else columns[::-1]) < lengths[:, None]
    input_ids = np.full((len(rows), width), pad_id, np.int64)
    input_ids[real] = [token for row in rows for token in row[:max_tokens]]
    return TextBatch(
        input_ids=input_ids,
        attention_mask=real.astype(np.int64),
        labels=answer_labels(input_ids, real, sep_id=sep_id, audio_id=audio_id),
        num_truncated=sum(len(row) > max_tokens for row in rows),
    )


def _token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    return ids


def _ended(tokenizer: PreTrainedTokenizerBase, answer: str) -> str:
    """An answer as it is learned, with what ends it."""
    return normalise_text(answer) + END_OF_CHUNK + (tokenizer.eos_token or "")


def answer_labels(
    input_ids: NDArray[np.int64], real: NDArray[np.bool_], *, sep_id: int, audio_id: int
) -> NDArray[np.int64]:
    """Labels [B, T]: the ids after the first `<SEP>` of each row, -100 elsewhere, at padding and at `<audio>`."""
    is_sep = input_ids == sep_id
    after_sep = (np.cumsum(is_sep, axis=1) - is_sep) > 0
    return np.where(after_sep & real & (input_ids != audio_id), input_ids, IGNORE)


# --- Conversations -----------------------------------------------------------------------------------------------


def template_of(loaded: Any) -> str:
    """The chat template of the model folder that a tokenizer (or a processor) is from.

    The default is that of a folder without one, of an earlier export, and of a language model alone, whose own template
    knows no `<audio>`.
    """
    found: Any = loaded.chat_template
    if isinstance(found, dict):
        found = found.get("default")
    return known_template(found or "")


@lru_cache(maxsize=64)
def known_template(found: str) -> str:
    """The chat template that a model folder's own stands for (`template_of`); empty: it has none."""
    is_old = hashlib.sha256(found.strip().encode()).hexdigest() == _OLD_DEFAULT
    return CHAT_TEMPLATE if is_old or AUDIO not in found or found.strip() == CHAT_TEMPLATE else found


def is_plain(messages: Sequence[Message], template: str) -> bool:
    """Whether messages are a single turn under the default template, which `format_prompt` writes."""
    if template != CHAT_TEMPLATE or messages[0].role != "user":
        return False
    return len(messages) == 1 or (len(messages) == 2 and messages[1].role == "assistant")


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], template: str | None = None) -> str:
    """A conversation as the model reads it, through its last answer or to where the next one begins.

    Args:
        messages: messages in order, one at least.
        template: chat template; none: the tokenizer's (`template_of`).

    Raises:
        ValueError: markers in a text that are not as many as the message's recordings, or a template that fails.
    """
    template = template or template_of(tokenizer)
    if is_plain(messages, template):
        text = format_prompt(messages[0].text, messages[0].num_audios)
        return text + _ended(tokenizer, messages[1].text) if len(messages) == 2 else text
    if template == CHAT_TEMPLATE:
        return _render_default(tokenizer, messages)
    chat = [{"role": message.role, "content": _content(message)} for message in messages]
    goes_on = messages[-1].role != "assistant"
    try:
        written = tokenizer.apply_chat_template(
            chat, chat_template=template, tokenize=False, add_generation_prompt=goes_on
        )
    except Exception as error:  # a template may raise anything
        raise ValueError(f"the model folder's chat template fails on a conversation ({error}): mend it") from error
    return str(written)


def _render_default(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """What the default template writes."""
    written, before = "", ""
    for message in messages:
        num_markers, text = _parted(message)
        if message.role == "assistant":
            written += _ended(tokenizer, text)
            continue
        before = f"{before}\n{text}".strip()
        if message.role == "user":
            written, before = written + AUDIO * num_markers + before + SEP, ""
    return written


def _content(message: Message) -> str | list[dict[str, str]]:
    """What a chat template gets of a message: its text, or parts if markers go before it."""
    num_markers, text = _parted(message)
    return [*({"type": "audio"} for _ in range(num_markers)), {"type": "text", "text": text}] if num_markers else text


def _parted(message: Message) -> tuple[int, str]:
    """How many markers stand before a message's text, and that text, normalised."""
    text = normalise_text(message.text)
    placed = text.count(AUDIO)
    if placed and message.role == "user" and placed != message.num_audios:
        raise ValueError(_MARKERS.format(placed, message.num_audios))
    text = without_leading_markers(text)
    return (0 if AUDIO in text else message.num_audios), text


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    *,
    max_tokens: int = 512,
    padding_side: Literal["left", "right"] = "right",
    template: str | None = None,
) -> TextBatch:
    """Tokenize conversations: for training those that end with an answer, for generation the others.

    Every answer of a conversation that ends with one is learned, with what ends it, but for `<audio>` markers; of the
    others nothing is. What is over `max_tokens` is cut on the right and counted, as in `encode`.

    Raises:
        ValueError: as `render`, or a template under which a question is read otherwise once it has its answer.
    """
    template = template or template_of(tokenizer)
    rows = _token_ids(tokenizer, [render(tokenizer, messages, template) for messages in conversations])
    batch = _padded(tokenizer, rows, max_tokens, padding_side)
    ids, labels = batch.input_ids, batch.labels
    audio_id = tokenizer.convert_tokens_to_ids(AUDIO)
    for row, messages in enumerate(conversations):
        if is_plain(messages, template) and len(messages) == 2:
            continue
        labels[row] = IGNORE
        length = min(len(rows[row]), max_tokens)
        own, learned = slice(0, length), np.zeros(length, bool)
        if padding_side == "left":
            own = slice(ids.shape[1] - length, None)
        for start, stop in _answer_spans(tokenizer, messages, rows[row], template):
            learned[start:stop] = True
        labels[row, own] = np.where(learned & (ids[row, own] != audio_id), ids[row, own], IGNORE)
    return batch


def _answer_spans(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], ids: list[int], template: str
) -> list[tuple[int, int]]:
    """Where each answer begins and ends in a conversation's ids; nowhere in one that waits for its answer."""
    if messages[-1].role != "assistant":
        return []
    answers = [place for place, message in enumerate(messages) if place and message.role == "assistant"]
    texts = [render(tokenizer, messages[:stop], template) for place in answers for stop in (place, place + 1)]
    parts = _token_ids(tokenizer, texts)
    spans = [(len(before), len(through)) for before, through in zip(parts[::2], parts[1::2], strict=True)]
    if any(ids[: len(part)] != part for part in parts) or any(start >= stop for start, stop in spans):
        raise ValueError(
            "the model folder's chat template writes the beginning of a conversation otherwise when it goes on, or "
            "leaves answers out: what is learned would not be what the server asks. Let it write message by message, "
            "and end what is before an answer with a special token"
        )
    return spans


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens learned from `texts` (normalised), for a small LM.

    Its end-of-sequence token is `<|endoftext|>`, with id 0; the model's special tokens are not in it yet
    (`add_special_tokens`). Every byte is a token, so any text can be written. An option's mark, ` (a)`, is one
    word (`WORDS`): four options are 8 tokens instead of 16, and most of a small corpus' prompts are options.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < 257:
        raise ValueError(f"vocab_size={vocab_size}: a byte-level tokenizer needs 256 bytes and {EOS}, so at least 257")
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((normalise_text(text) for text in texts), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, clean_up_tokenization_spaces=False)
