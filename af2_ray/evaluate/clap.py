"""What an AF-CLAP model knows: retrieval, zero-shot classes, and whether it binds sounds to time and attributes.

On scenes whose truth is known the gallery holds scenes that all differ in the set of their events, so that exactly one
caption is right for each and a hit is no luck of wording. Composition is tested apart, on mirrored scenes: the same
events in exchanged order (or number, loudness, place), so only a model that binds events to time and attributes can
tell which of the two captions belongs to which recording. Other captions, and labels, are scored as benchmarks do.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from af2_ray.audio.decode import AudioError, probe
from af2_ray.audio.hear import hear
from af2_ray.data.durations import fill_durations
from af2_ray.data.manifest import read_captions
from af2_ray.data.names import Root
from af2_ray.data.quarantine import Failure
from af2_ray.data.samples import CaptionSet, check_samples
from af2_ray.evaluate.composition import Pairs, mirrored_pairs, score_pairs
from af2_ray.evaluate.contrast import Vectors, alignment, first_hits, retrieval, uniformity, zero_shot
from af2_ray.evaluate.layouts import Labelled, Table, read_csv
from af2_ray.evaluate.marks import Mark, mark_of
from af2_ray.models.afclap import AfClapModel
from af2_ray.storage.places import locate, open_text
from af2_ray.storage.stores import local_model, scratch

log = logging.getLogger(__name__)

Scene = dict[str, Any]

TEMPLATES = ("{}", "the sound of {}", "this is a sound of {}", "a recording of {}")
"""Of a class name; a class is the mean over all of them."""


def read_scenes(scenes_uri: str) -> dict[str, Scene]:
    """The truth of scenes, by file name without folders.

    Raises:
        ValueError: no such file, or a line that is no scene; the message names the line.
    """
    scenes = {}
    try:
        with open_text(scenes_uri) as file:
            for number, line in enumerate(file, 1):
                try:
                    scene = json.loads(line)
                    scenes[_base(str(scene["name"]))] = scene
                except (json.JSONDecodeError, KeyError, TypeError) as error:
                    raise ValueError(f"{scenes_uri}, line {number}: not a scene with a `name`: {error}") from error
    except FileNotFoundError as error:
        raise ValueError(f"{scenes_uri}: no such file; it is written beside the captions") from error
    return scenes


def scenes_uri_of(uri: str) -> str:
    """The truth beside a captions file or a manifest: `x/test.captions.jsonl` -> `x/test.scenes.jsonl`."""
    return uri.removesuffix(".captions.jsonl").removesuffix(".json") + ".scenes.jsonl"


def event_labels(scene: Scene) -> frozenset[str]:
    """The labels of a scene's events."""
    return frozenset(str(event["label"]) for event in scene["events"])


def choose_gallery(events: Sequence[frozenset[str]], size: int) -> list[int]:
    """Indices of the first `size` scenes whose event sets differ pairwise."""
    seen: set[frozenset[str]] = set()
    chosen: list[int] = []
    for index, labels in enumerate(events):
        if len(chosen) < size and labels not in seen:
            seen.add(labels)
            chosen.append(index)
    return chosen


@torch.inference_mode()
def embed_audio(
    model: AfClapModel, clips: Sequence[CaptionSet | Labelled], *, max_windows: int, batch_windows: int = 32
) -> tuple[dict[int, NDArray[np.float32]], list[Failure]]:
    """Unit vectors [J] of the clips that can be read, by index, and the others' faults."""
    vectors: dict[int, NDArray[np.float32]] = {}
    failures: list[Failure] = []
    batch: dict[int, NDArray[np.int16]] = {}

    def flush() -> None:
        waveforms = torch.from_numpy(np.concatenate(list(batch.values()))).to(model.device)
        counts = torch.tensor([len(windows) for windows in batch.values()], device=model.device)
        found = model.get_audio_features(waveforms, counts).float().cpu().numpy()
        vectors.update(zip(batch, found, strict=True))
        batch.clear()

    for index, item in enumerate(clips):
        try:
            stretch = item.stretch
            if not math.isfinite(stretch.duration_s):
                stretch = replace(stretch, duration_s=probe(item.uri))
            windows = hear(stretch, max_windows, short_clips=model.config.short_clips)
        except AudioError as error:
            failures.append(Failure(error.uri, error.reason, item.offset_s, error.detail))
            continue
        if batch and sum(map(len, batch.values())) + len(windows) > batch_windows:
            flush()
        batch[index] = windows
    if batch:
        flush()
    return vectors, failures


@torch.inference_mode()
def embed_texts(
    model: AfClapModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, batch_size: int = 64
) -> NDArray[np.float32]:
    """Unit vectors [N, J] of texts."""
    padding: dict[str, Any] = {"padding": True}
    if model.config.text_pooling == "mean":
        padding = {"padding": "max_length", "max_length": model.config.text_length, "truncation": True}
    vectors = []
    for start in range(0, len(texts), batch_size):
        part = list(texts[start : start + batch_size])
        inputs = tokenizer(part, return_tensors="pt", padding_side="right", **padding).to(model.device)
        vectors.append(model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).float().cpu().numpy())
    return np.concatenate(vectors)


def load_clap(clap_dir: str | Path) -> tuple[AfClapModel, PreTrainedTokenizerBase]:
    """An exported AF-CLAP folder, local or remote, in evaluation mode, on a GPU where there is one; its tokenizer."""
    local = local_model(clap_dir)
    model = AfClapModel.from_pretrained(local).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model, AutoTokenizer.from_pretrained(local)


def evaluate_clap(
    clap_dir: str | Path,
    captions_uri: str,
    *,
    root: str | None = None,
    gallery: int | None = 200,
    max_windows: int = 1,
    batch_windows: int = 32,
    marks: list[Mark] | None = None,
) -> dict[str, Any]:
    """`score_captions` of an exported AF-CLAP folder on captions, with the scenes' truth if it lies beside them."""
    model, tokenizer = load_clap(clap_dir)
    table = read_benchmark(captions_uri, root)
    return score_captions(
        *(model, tokenizer, captions_uri, table),
        gallery=gallery,
        max_windows=max_windows,
        batch_windows=batch_windows,
        marks=marks,
    )


def read_benchmark(uri: str, root: str | None = None) -> Table:
    """Caption sets (`read_captions`), scenes' labels (`x/test.scenes.jsonl`, its clips in `x/test`) or a benchmark's
    CSV (`layouts`); unusable items are among its failures.
    """
    if uri.endswith((".csv", ".tsv")):
        return read_csv(uri, root)
    if uri.endswith(".scenes.jsonl"):
        base, scenes = Root.of(uri, root or uri.removesuffix(".scenes.jsonl")), read_scenes(uri)
        try:
            clips = [
                Labelled(base.join(name), 0.0, float(scene["duration"]), tuple(sorted(event_labels(scene))))
                for name, scene in scenes.items()
            ]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{uri}: a scene needs `duration` and `events` with a `label` each: {error!r}") from error
        return Table([], clips, [])
    filled, unread = fill_durations(read_captions(uri, root), uri, fallback=str(scratch("durations")))
    captions, bad = check_samples(filled, unread)
    return Table(list(captions), [], [Failure(item.uri, reason, item.offset_s) for item, reason in bad])


def score_captions(
    model: AfClapModel,
    tokenizer: PreTrainedTokenizerBase,
    uri: str,
    table: Table,
    *,
    gallery: int | None = None,
    max_windows: int = 1,
    batch_windows: int = 32,
    marks: list[Mark] | None = None,
) -> dict[str, Any]:
    """Retrieval both ways, composition, alignment and uniformity on caption sets.

    Args:
        uri: of the captions; if the scenes' truth lies beside them (`scenes_uri_of`), it chooses the gallery and the
            mirrored pairs, and names the classes.
        gallery: clips in the retrieval; none: all. Without truth each of them is asked for by all its captions.
        marks: takes the items of `composition` (`composition.score_pairs`), `t2a_r1`, `t2a_r1_reworded` (asked for by
            paraphrases, with truth), `a2t_r1` and `zero_shot`.

    Returns:
        gallery; r1, r5, r10 and map10 of `t2a_` and `a2t_`; t2a_r1_chance; alignment; uniformity (audio, text);
        choice by relation kind of mirrored scenes (see `score_pairs`), order_accuracy and order_pairs of order alone;
        negatives (the caption against its own negatives, see `_against_negatives`); zero_shot with truth; failures.
    """
    captions, failures = table.captions, table.failures
    scenes = _scenes_beside(uri, captions)
    if scenes is None:
        chosen, pairs = list(range(len(captions)))[:gallery], Pairs()
    else:
        chosen = choose_gallery([event_labels(scene) for scene in scenes], gallery or len(scenes))
        pairs = mirrored_pairs(captions, scenes)
    needed = sorted({*chosen, *(index for found in pairs.values() for pair in found for index in pair)})
    found, unread = embed_audio(
        model, [captions[i] for i in needed], max_windows=max_windows, batch_windows=batch_windows
    )
    audio = {needed[place]: vector for place, vector in found.items()}
    heard = [index for index in chosen if index in audio]
    if gallery and len(chosen) < gallery:
        log.warning("%s: only %d of %d gallery clips, for lack of different ones", uri, len(chosen), gallery)
    if not heard:
        raise ValueError(f"{uri}: no clip could be read; the first fault: {[*failures, *unread][:1]}")

    marks = [] if marks is None else marks
    result = _retrieval(model, tokenizer, captions, heard, audio, marks, all_captions=scenes is None)
    choice = score_pairs(pairs, captions, audio, lambda texts: embed_texts(model, tokenizer, texts), marks)
    order = choice.get("order", {"accuracy": None, "pairs": 0})
    result |= {"order_accuracy": order["accuracy"], "order_pairs": order["pairs"], "choice": choice}
    if negatives := _against_negatives(model, tokenizer, captions, heard, audio):
        result["negatives"] = negatives
    if scenes is not None:
        labels = [sorted(event_labels(scenes[index])) for index in heard]
        nearest = _class_similarity(model, tokenizer, np.stack([audio[i] for i in heard]), labels, TEMPLATES)
        result["zero_shot"] = zero_shot(*nearest)
        hits = first_hits(nearest[0], np.array([[name in own for name in nearest[2]] for own in labels]))
        marks += [mark_of("zero_shot", captions[i], hit) for i, hit in zip(heard, hits, strict=True)]
    return result | {"failures": failures + unread}


def score_labels(
    model: AfClapModel,
    tokenizer: PreTrainedTokenizerBase,
    table: Table,
    *,
    templates: Sequence[str] = TEMPLATES,
    max_windows: int = 1,
    batch_windows: int = 32,
) -> dict[str, Any]:
    """Zero-shot classification of labelled clips among all labels of the table (`contrast.zero_shot`), and failures."""
    found, unread = embed_audio(model, table.labelled, max_windows=max_windows, batch_windows=batch_windows)
    if not found:
        raise ValueError(f"no clip could be read; the first fault: {[*table.failures, *unread][:1]}")
    labels = [table.labelled[index].labels for index in found]
    result = zero_shot(*_class_similarity(model, tokenizer, np.stack(list(found.values())), labels, templates))
    return result | {"failures": table.failures + unread}


def _retrieval(
    model: AfClapModel,
    tokenizer: PreTrainedTokenizerBase,
    captions: Sequence[CaptionSet],
    clips: Sequence[int],
    audio: dict[int, Any],
    marks: list[Mark],
    *,
    all_captions: bool,
) -> dict[str, Any]:
    """Both ways between clips and their captions; a caption that several clips have is right for each of them."""
    own = [list(dict.fromkeys((captions[i].caption, *(captions[i].positives if all_captions else ())))) for i in clips]
    texts = list(dict.fromkeys(text for group in own for text in group))
    place = {text: number for number, text in enumerate(texts)}
    relevant = np.zeros((len(texts), len(clips)), bool)
    for column, group in enumerate(own):
        relevant[[place[text] for text in group], column] = True
    text, heard = embed_texts(model, tokenizer, texts), np.stack([audio[i] for i in clips])
    similarity = text @ heard.T
    chance = float(relevant.mean(axis=1).mean())
    result: dict[str, Any] = {"gallery": len(clips), "captions": len(texts), "t2a_r1_chance": round(chance, 5)}
    for name, table, right in (("t2a", similarity, relevant), ("a2t", similarity.T, relevant.T)):
        result |= {f"{name}_{key}": round(value, 4) for key, value in retrieval(table, right).items()}
        hits = first_hits(table, right)
        if name == "t2a":
            marks += [Mark("t2a_r1", query, query, hit) for query, hit in zip(texts, hits, strict=True)]
        else:
            marks += [mark_of("a2t_r1", captions[i], hit) for i, hit in zip(clips, hits, strict=True)]
    more = [(text, column) for column, i in enumerate(clips) for text in captions[i].positives]
    if more and not all_captions:
        words, columns = zip(*more, strict=True)
        hits = first_hits(embed_texts(model, tokenizer, words) @ heard.T, np.eye(len(clips), dtype=bool)[list(columns)])
        result["t2a_r1_reworded"] = round(float(np.mean(hits)), 4)
        for (query, column), hit in zip(more, hits, strict=True):
            marks.append(mark_of("t2a_r1_reworded", captions[clips[column]], hit, part=query))
    spread = {"audio": uniformity(heard), "text": uniformity(text)}
    first = text[[place[group[0]] for group in own]]
    return result | {
        "alignment": round(alignment(heard, first), 4),
        "uniformity": {key: None if value is None else round(value, 4) for key, value in spread.items()},
    }


def _against_negatives(
    model: AfClapModel,
    tokenizer: PreTrainedTokenizerBase,
    captions: Sequence[CaptionSet],
    clips: Sequence[int],
    audio: dict[int, Any],
) -> dict[str, Any]:
    """How often the caption is nearer than its negatives: `each` one, `all` of them; by kind where the sets name it.

    A set names the kind of every negative if `relations` is as long as all its negatives together.
    """
    texts: list[str] = []
    rows: list[tuple[int, int, list[str]]] = []
    for index in clips:
        item = captions[index]
        if item.negatives and item.negatives[0]:
            wrong = item.negatives[0]
            named = len(item.relations) == sum(map(len, item.negatives))
            rows.append((index, len(texts), list(item.relations[: len(wrong)]) if named else []))
            texts += [item.caption, *wrong]
    if not rows:
        return {}
    vectors = embed_texts(model, tokenizer, texts)
    each: list[bool] = []
    every: list[bool] = []
    by_kind: dict[str, list[bool]] = {}
    for index, start, kinds in rows:
        scores = vectors[start : start + 1 + len(captions[index].negatives[0])] @ audio[index]
        better = [bool(scores[0] > score) for score in scores[1:]]
        each += better
        every.append(all(better))
        for kind, right in zip(kinds, better, strict=False):
            by_kind.setdefault(kind, []).append(right)
    return {
        "clips": len(rows),
        "each": round(float(np.mean(each)), 4),
        "all": round(float(np.mean(every)), 4),
        "by_kind": {kind: round(float(np.mean(right)), 4) for kind, right in sorted(by_kind.items())},
    }


def _class_similarity(
    model: AfClapModel,
    tokenizer: PreTrainedTokenizerBase,
    audio: Vectors,
    labels: Sequence[Sequence[str]],
    templates: Sequence[str],
) -> tuple[Vectors, Sequence[Sequence[str]], list[str]]:
    """Similarity of clips and classes [C, classes], the clips' labels, and the names of the classes."""
    names = sorted({label for own in labels for label in own})
    classes = np.zeros((len(names), audio.shape[1]), np.float32)
    for template in templates:
        classes += embed_texts(model, tokenizer, [template.format(name) for name in names])
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    return audio @ classes.T, labels, names


def _scenes_beside(uri: str, captions: Sequence[CaptionSet]) -> list[Scene] | None:
    """The truth of each clip; None where no truth lies beside the captions."""
    beside = scenes_uri_of(uri)
    fs, path = locate(beside)
    if not uri.endswith(".captions.jsonl") or not fs.exists(path):
        return None
    truth = read_scenes(beside)
    return [_scene_of(item, truth, uri) for item in captions]


def _base(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def _scene_of(item: CaptionSet, truth: dict[str, Scene], captions_uri: str) -> Scene:
    name = _base(item.uri)
    if name not in truth:
        raise ValueError(f"{scenes_uri_of(captions_uri)} has no scene {name!r}, which {captions_uri} has")
    return truth[name]
