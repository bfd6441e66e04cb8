"""Captions that people wrote: what the grammar reads off them, and what it makes of it."""

from __future__ import annotations

import numpy as np
import pytest

from af2_ray.synth.captions.by_grammar import captions_of
from af2_ray.synth.text.grammar import Item
from af2_ray.synth.text.parse import read_caption


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("A dog barks.", [["a dog barks"]]),
        ("A dog barks followed by two people talking", [["a dog barks"], ["two people talking"]]),
        ("a car, and then a horn, then a shout", [["a car"], ["a horn"], ["a shout"]]),
        ("We hear rain while a man speaks", [["a man speaks", "rain"]]),
        ("a bell after a whistle", [["a whistle"], ["a bell"]]),
        ("a bell preceded by a whistle with a drum", [["a drum", "a whistle"], ["a bell"]]),
    ],
)
def test_joins_show_sounds_and_their_order(text: str, groups: list[list[str]]) -> None:
    composition, phrases = read_caption(text)
    assert [[item.label for item in group] for group in composition] == groups
    assert set(phrases) == {label for group in groups for label in group}


def test_attributes_are_read() -> None:
    composition, _ = read_caption("a loud dog then a bell three times before rain getting softer")
    assert composition == ((Item("a dog", "loud"),), (Item("a bell", "3"),), (Item("rain", "softer"),))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("a dog then a dog", "one sound twice"),
        ("a dog then a cat after a bell", "both forwards and backwards"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_caption(text)


@pytest.mark.parametrize("text", ["a loud dog followed by a bell", "a soft rain then a bell then a dog"])
def test_one_loud_sound_alone_is_no_relation_to_change(text: str) -> None:
    """Loud and soft are said of two sounds; the other wrong captions of such a text are made all the same."""
    composition, phrases = read_caption(text)
    others = {label: (label, label) for label in ("a cat", "a horn", "a saw")}
    made = captions_of(composition, others | dict(phrases), [*others, *phrases], 3, 3, np.random.default_rng(0))
    assert all(len(group) == 3 for group in made.negatives)


def test_wrong_captions_differ_in_one_relation_and_belong_to_their_wording() -> None:
    composition, phrases = read_caption("a loud dog followed by a soft bell")
    made = captions_of(composition, phrases, list(phrases), 3, 2, np.random.default_rng(0))
    for text, group in zip((made.caption, *made.paraphrases), made.negatives, strict=True):
        for wrong in group:
            assert sorted(wrong.split()) == sorted(text.split()), (text, wrong)
            assert wrong not in (made.caption, *made.paraphrases)
