"""Prompts, special tokens and label masks: `<audio>{prompt}<SEP>{answer}<|endofchunk|>{eos}`.

Prompt and answer are stripped and lower-cased, as in the reference (docs/paper.md, "Text and labels"). Where
the reference drops every label of a sample whose end was truncated away, the answer tokens that are there keep theirs,
and truncations are counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

AUDIO, END_OF_CHUNK, PAD, SEP = SPECIAL_TOKENS = ("<audio>", "<|endofchunk|>", "<|PAD_TOKEN|>", "<SEP>")
EOS = "<|endoftext|>"
IGNORE = -100
WORDS = r" ?\([a-z]\)| ?\w+| ?[^\s\w]+|\s+"
"""What a small LM's tokenizer never merges across: the mark of an option, a word, punctuation, white space."""


@dataclass(frozen=True)
class TextBatch:
    """Tokens of B samples, int64 [B, T] each; `labels` is -100 wherever nothing is learned."""

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    labels: NDArray[np.int64]
    num_truncated: int


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
        raise ValueError(f"the prompt has {placed} {AUDIO} markers for {num_audios} audios: one each, or none at all")
    return text + SEP if placed else AUDIO * num_audios + text + SEP


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
        ending = END_OF_CHUNK + (tokenizer.eos_token or "")
        texts = [text + normalise_text(answer) + ending for text, answer in zip(texts, answers, strict=True)]
    rows: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
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
        labels=answer_labels(input_ids, real, sep_id=sep_id, audio_id=audio_id)
        if answers is not None
        else np.full_like(input_ids, IGNORE),
        num_truncated=sum(len(row) > max_tokens for row in rows),
    )


def answer_labels(
    input_ids: NDArray[np.int64], real: NDArray[np.bool_], *, sep_id: int, audio_id: int
) -> NDArray[np.int64]:
    """Labels [B, T]: the ids after the first `<SEP>` of each row, -100 elsewhere, at padding and at `<audio>`."""
    is_sep = input_ids == sep_id
    after_sep = (np.cumsum(is_sep, axis=1) - is_sep) > 0
    return np.where(after_sep & real & (input_ids != audio_id), input_ids, IGNORE)


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
