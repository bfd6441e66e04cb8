"""What an AF-CLAP model knows: retrieval, zero-shot classes, and whether it binds sounds to time and attributes.

On scenes whose truth is known the gallery holds scenes that all differ in the set of their events, so that exactly one
caption is right for each and a hit is no luck of wording. Composition is tested apart, on mirrored scenes: the same
events in exchanged order (or number, loudness, place), so only a model that binds events to time and attributes can
tell which of the two captions belongs to which recording. Other captions, and labels, are scored as benchmarks do.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from af2_ray.data.quarantine import Failure
from af2_ray.data.samples import CaptionSet
from af2_ray.evaluate.clap_embed import ClapModel
from af2_ray.evaluate.composition import Pairs, mirrored_pairs, score_pairs
from af2_ray.evaluate.contrast import Vectors, alignment, first_hits, retrieval, uniformity, zero_shot
from af2_ray.evaluate.items import ItemResult, clip_result
from af2_ray.evaluate.scenes import choose_gallery, event_labels
from af2_ray.evaluate.table import Table

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClapScores:
    """What was measured of one benchmark.

    Attributes:
        figures: measures by name, as `metrics.json` has them.
        items: results item by item, of which the measures are means.
        failures: clips that were set aside.
    """

    figures: dict[str, Any]
    items: list[ItemResult]
    failures: list[Failure]


def score_captions(clap: ClapModel, table: Table) -> ClapScores:
    """Retrieval both ways, composition, alignment and uniformity on caption sets.

    Args:
        clap: model and its settings; of `gallery` clips each is asked for by all its captions.
        table: caption sets; their scenes' truth, where it is known, chooses the gallery (each clip asked for by its
            caption alone) and the mirrored pairs, and names the classes.

    Returns:
        Figures: gallery; r1, r5, r10 and map10 of `t2a_` and `a2t_`; t2a_r1_chance; alignment; uniformity (audio,
        text); choice by relation kind of mirrored scenes (see `score_pairs`), order_accuracy and order_pairs of order
        alone; negatives (the caption against its own negatives, see `_against_negatives`); zero_shot with truth.
        Items of `t2a_r1`, `a2t_r1`, `t2a_r1_reworded` (asked for by paraphrases, with truth), `composition`
        (`score_pairs`) and `zero_shot`.

    Raises:
        ValueError: no clip could be read.
    """
    captions, scenes, gallery = table.captions, table.scenes, clap.settings.gallery
    if scenes is None:
        chosen, pairs = list(range(len(captions)))[:gallery], Pairs()
    else:
        chosen = choose_gallery([event_labels(scene) for scene in scenes], gallery or len(scenes))
        pairs = mirrored_pairs(captions, scenes)
    needed = sorted({*chosen, *(index for found in pairs.values() for pair in found for index in pair)})
    found, unread = clap.embed_clips([captions[i] for i in needed])
    audio = {needed[place]: vector for place, vector in found.items()}
    heard = [index for index in chosen if index in audio]
    if gallery and len(chosen) < gallery:
        log.warning("%s: only %d of %d gallery clips, for lack of different ones", table.uri, len(chosen), gallery)
    failures = [*table.failures, *unread]
    _check_any(heard, table.uri, failures)

    figures, items = _retrieval(clap, captions, heard, audio, all_captions=scenes is None)
    choice, pair_items = score_pairs(pairs, captions, audio, clap.embed_texts)
    order = choice.get("order", {"accuracy": None, "pairs": 0})
    figures |= {"order_accuracy": order["accuracy"], "order_pairs": order["pairs"], "choice": choice}
    if negatives := _against_negatives(clap, captions, heard, audio):
        figures["negatives"] = negatives
    items += pair_items
    if scenes is not None:
        labels = [sorted(event_labels(scenes[index])) for index in heard]
        figures["zero_shot"], hits = _classes(clap, np.stack([audio[i] for i in heard]), labels)
        items += [clip_result("zero_shot", captions[i], hit) for i, hit in zip(heard, hits, strict=True)]
    return ClapScores(figures, items, failures)


def score_labels(clap: ClapModel, table: Table) -> ClapScores:
    """Zero-shot classification of labelled clips among all labels of the table (`contrast.zero_shot`).

    Raises:
        ValueError: no clip could be read.
    """
    found, unread = clap.embed_clips(table.labelled)
    failures = [*table.failures, *unread]
    _check_any(found, table.uri, failures)
    clips = [table.labelled[index] for index in found]
    figures, hits = _classes(clap, np.stack(list(found.values())), [clip.labels for clip in clips])
    items = [clip_result("zero_shot", clip, hit, *clip.labels) for clip, hit in zip(clips, hits, strict=True)]
    return ClapScores(figures, items, failures)


def _check_any(readable: Sequence[int] | Mapping[int, Any], uri: str, failures: Sequence[Failure]) -> None:
    if not readable:
        raise ValueError(f"{uri}: no clip could be read; the first fault: {failures[:1]}")


def _retrieval(
    clap: ClapModel, captions: Sequence[CaptionSet], clips: Sequence[int], audio: dict[int, Any], *, all_captions: bool
) -> tuple[dict[str, Any], list[ItemResult]]:
    """Both ways between clips and their captions; a caption that several clips have is right for each of them."""
    own = [list(dict.fromkeys((captions[i].caption, *(captions[i].positives if all_captions else ())))) for i in clips]
    texts = list(dict.fromkeys(text for group in own for text in group))
    place = {text: number for number, text in enumerate(texts)}
    relevant = np.zeros((len(texts), len(clips)), bool)
    for column, group in enumerate(own):
        relevant[[place[text] for text in group], column] = True
    text, heard = clap.embed_texts(texts), np.stack([audio[i] for i in clips])
    similarity = text @ heard.T
    spread = {"audio": uniformity(heard), "text": uniformity(text)}
    figures: dict[str, Any] = {
        "gallery": len(clips),
        "captions": len(texts),
        "t2a_r1_chance": round(float(relevant.mean(axis=1).mean()), 5),
        **{f"t2a_{key}": round(value, 4) for key, value in retrieval(similarity, relevant).items()},
        **{f"a2t_{key}": round(value, 4) for key, value in retrieval(similarity.T, relevant.T).items()},
        "alignment": round(alignment(heard, text[[place[group[0]] for group in own]]), 4),
        "uniformity": {key: None if value is None else round(value, 4) for key, value in spread.items()},
    }
    hits = first_hits(similarity, relevant)
    items = [ItemResult("t2a_r1", query, query, hit) for query, hit in zip(texts, hits, strict=True)]
    hits = first_hits(similarity.T, relevant.T)
    items += [clip_result("a2t_r1", captions[i], hit) for i, hit in zip(clips, hits, strict=True)]
    more = [(text, column) for column, i in enumerate(clips) for text in captions[i].positives]
    if more and not all_captions:
        words, columns = zip(*more, strict=True)
        hits = first_hits(clap.embed_texts(words) @ heard.T, np.eye(len(clips), dtype=bool)[list(columns)])
        figures["t2a_r1_reworded"] = round(float(np.mean(hits)), 4)
        for (query, column), hit in zip(more, hits, strict=True):
            items.append(clip_result("t2a_r1_reworded", captions[clips[column]], hit, part=query))
    return figures, items


def _against_negatives(
    clap: ClapModel, captions: Sequence[CaptionSet], clips: Sequence[int], audio: dict[int, Any]
) -> dict[str, Any]:
    """How often the caption is nearer than its negatives: `each` one, `all` of them; by kind where the sets name it.

    A set names the kind of every negative if `relations` is as long as all its negatives together.
    """
    asked = [index for index in clips if any(captions[index].negatives[:1])]
    if not asked:
        return {}
    texts = [[captions[index].caption, *captions[index].negatives[0]] for index in asked]
    vectors = clap.embed_texts([text for own in texts for text in own])
    better: list[NDArray[np.bool_]] = []
    by_kind: dict[str, list[bool]] = {}
    for index, own in zip(asked, np.split(vectors, np.cumsum([len(own) for own in texts])[:-1]), strict=True):
        scores, item = own @ audio[index], captions[index]
        better.append(scores[0] > scores[1:])
        if len(item.relations) == sum(map(len, item.negatives)):
            for kind, right in zip(item.relations, better[-1].tolist(), strict=False):
                by_kind.setdefault(kind, []).append(right)
    return {
        "clips": len(asked),
        "each": round(float(np.concatenate(better).mean()), 4),
        "all": round(float(np.mean([row.all() for row in better])), 4),
        "by_kind": {kind: round(float(np.mean(right)), 4) for kind, right in sorted(by_kind.items())},
    }


def _classes(clap: ClapModel, audio: Vectors, labels: Sequence[Sequence[str]]) -> tuple[dict[str, Any], list[float]]:
    """`zero_shot` of clips [C, J] among all their labels, and for each clip whether its nearest class is one of its."""
    names = sorted({label for own in labels for label in own})
    similarity = audio @ clap.embed_classes(names).T
    relevant = np.array([[name in own for name in names] for own in labels])
    return zero_shot(similarity, relevant, names), first_hits(similarity, relevant)
