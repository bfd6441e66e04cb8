"""Prompts, labels, truncation and the small tokenizer."""

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from af2_ray.text import SPECIAL_TOKENS, add_special_tokens, encode, format_prompt, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer(["which sound is heard? a dog, a bell"] * 5, 320)
    add_special_tokens(tokenizer)
    return tokenizer


def test_format_prompt() -> None:
    assert format_prompt(" What IS it? ") == "<audio>what is it?<SEP>"
    assert format_prompt("Which?", 2) == "<audio><audio>which?<SEP>"
    assert format_prompt("Which?", 0) == "which?<SEP>"
    assert format_prompt("first <audio> then <audio>", 2) == "first <audio> then <audio><SEP>"
    with pytest.raises(ValueError, match="1 <audio> markers for 2 audios"):
        format_prompt("<audio> what?", 2)


def test_a_mark_of_an_option_is_one_token_and_a_word_is_the_same_before_a_comma() -> None:
    small = train_tokenizer(["which? (a) dog (b) bell, dog"] * 9, 320)
    assert small.tokenize("which? (b) bell, dog")[2:] == ["Ġ(b)", "Ġbell", ",", "Ġdog"]
    assert small.decode(small("(c) x (d? ")["input_ids"]) == "(c) x (d? "


def test_special_tokens_have_consecutive_ids_and_are_added_once(tokenizer: PreTrainedTokenizerFast) -> None:
    first = add_special_tokens(tokenizer)
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [first, first + 1, first + 2, first + 3]
    assert len(tokenizer) == first + 4
    assert tokenizer.pad_token == "<|PAD_TOKEN|>"


def test_labels_are_the_answer_its_end_and_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = encode(tokenizer, ["Which sound?", "Is it a very long question, or not?"], ["A Dog", "bell"])
    for row, answer in zip(range(2), ["a dog", "bell"], strict=True):
        kept = batch.labels[row][batch.labels[row] != -100]
        assert tokenizer.decode(kept) == answer + "<|endofchunk|><|endoftext|>"
    assert (batch.labels[batch.attention_mask == 0] == -100).all()
    assert (batch.input_ids[batch.attention_mask == 0] == tokenizer.pad_token_id).all()
    assert batch.num_truncated == 0


def test_truncation_keeps_the_answer_tokens_that_are_there(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = encode(tokenizer, ["what?"], ["a dog and a bell"])
    cut = encode(tokenizer, ["what?"], ["a dog and a bell"], max_tokens=whole.input_ids.shape[1] - 3)
    assert cut.num_truncated == 1
    np.testing.assert_array_equal(cut.labels[0], whole.labels[0, :-3])
    assert (cut.labels != -100).any()


def test_a_cut_before_the_answer_leaves_no_label(tokenizer: PreTrainedTokenizerFast) -> None:
    cut = encode(tokenizer, ["what?"], ["dog"], max_tokens=2)
    assert (cut.labels == -100).all()


def test_generation_prompts_end_at_sep_and_pad_left(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = encode(tokenizer, ["hi", "a longer one"], padding_side="left")
    assert (batch.input_ids[:, -1] == tokenizer.convert_tokens_to_ids("<SEP>")).all()
    assert (batch.labels == -100).all()
    assert batch.attention_mask[0].tolist() == sorted(batch.attention_mask[0].tolist())


def test_an_audio_marker_in_an_answer_is_not_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = encode(tokenizer, ["hi"], ["a <audio> b"])
    assert not (batch.labels == tokenizer.convert_tokens_to_ids("<audio>")).any()


def test_no_samples_give_an_empty_batch(tokenizer: PreTrainedTokenizerFast) -> None:
    assert encode(tokenizer, [], []).input_ids.shape == (0, 0)


def test_small_tokenizer_writes_any_text(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "größe 音 🎧"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id == 0
    with pytest.raises(ValueError, match="at least 257"):
        train_tokenizer(["a"], 100)
