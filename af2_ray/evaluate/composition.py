"""Composition: of the captions of two mirrored scenes, which one belongs to which recording?

Mirrored scenes have the same events and differ in one relation (order, number, loudness, place). They are asked about
twice: by their captions, which are all of one form of words, and by their paraphrases, each in words of its own. The
difference is what a model has learned of the form of words instead of what is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from af2_ray.data.samples import CaptionSet
from af2_ray.evaluate.contrast import Vectors
from af2_ray.evaluate.items import ItemResult, clip_result

Pairs = dict[str, list[tuple[int, int]]]
"""Index pairs of mirrored scenes, by the kind of relation that they exchange."""


def mirrored_pairs(captions: Sequence[CaptionSet], scenes: Sequence[Mapping[str, Any]]) -> Pairs:
    """The mirrored scenes whose captions differ, by the scenes' `pair` and the captions' one relation."""
    members: dict[str, list[int]] = {}
    for index, scene in enumerate(scenes):
        if scene.get("pair") not in (None, ""):
            members.setdefault(str(scene["pair"]), []).append(index)
    pairs: Pairs = {}
    for indices in members.values():
        kinds = {kind for index in indices for kind in captions[index].relations}
        if len(indices) == 2 and len(kinds) == 1 and captions[indices[0]].caption != captions[indices[1]].caption:
            pairs.setdefault(kinds.pop(), []).append((indices[0], indices[1]))
    return dict(sorted(pairs.items()))


def score_pairs(
    pairs: Pairs,
    captions: Sequence[CaptionSet],
    audio: Mapping[int, Vectors],
    embed: Callable[[Sequence[str]], Vectors],
) -> tuple[dict[str, dict[str, Any]], list[ItemResult]]:
    """How often each clip of a pair is nearer to its own text than to the other's.

    Args:
        pairs: mirrored scenes by kind (`mirrored_pairs`).
        captions: caption sets that `pairs` counts.
        audio: vectors [J] of the clips that could be read, by index; pairs that lack one are left out.
        embed: function from N texts to vectors [N, J].

    Returns:
        By kind: `pairs`, `accuracy` and `both` by captions (chance 1/2 and 1/4), and, where both scenes have
        paraphrases, `both_reworded` by those. Then the items of `composition`, a pair in one wording each (right if
        both clips find their text), grouped by kind, by wording (captions, paraphrases), and by both.
    """
    readable = {kind: [p for p in found if p[0] in audio and p[1] in audio] for kind, found in pairs.items()}
    needed = [index for found in readable.values() for pair in found for index in pair]
    texts = {text: None for i in needed for text in (captions[i].caption, *captions[i].positives)}
    vectors = dict(zip(texts, embed(list(texts)), strict=True)) if texts else {}
    result, items = {}, []
    for kind, found in readable.items():
        nearer: list[NDArray[np.bool_]] = []
        reworded: list[bool] = []
        for one, two in found:
            nearer.append(_own_is_nearer(audio[one], audio[two], *(vectors[captions[i].caption] for i in (one, two))))
            items.append(_item(captions[one], nearer[-1].all(), kind, "captions"))
            for number, words in enumerate(zip(captions[one].positives, captions[two].positives, strict=False)):
                reworded.append(bool(_own_is_nearer(audio[one], audio[two], *(vectors[text] for text in words)).all()))
                items.append(_item(captions[one], reworded[-1], kind, "paraphrases", part=str(number)))
        if nearer:
            result[kind] = {
                "pairs": len(nearer),
                "accuracy": round(float(np.mean(nearer)), 4),
                "both": round(float(np.mean([pair.all() for pair in nearer])), 4),
            } | ({"both_reworded": round(float(np.mean(reworded)), 4)} if reworded else {})
    return result, items


def _item(clip: CaptionSet, right: bool | np.bool_, kind: str, wording: str, part: str = "") -> ItemResult:
    return clip_result("composition", clip, float(right), kind, wording, f"{kind}, {wording}", part=part)


def _own_is_nearer(first: Vectors, second: Vectors, text: Vectors, other: Vectors) -> NDArray[np.bool_]:
    """Of two clips with a text each: is each clip's own text the nearer one? [2]."""
    return np.array([first @ text > first @ other, second @ other > second @ text])
