"""Retrieval and order choice of an AF-CLAP model on held-out scenes whose truth is known.

The gallery holds scenes that all differ in the set of their events, so that exactly one caption is right for each and a
hit is no luck of wording. Order is tested apart, on mirrored scenes: same events, exchanged order, so only a model that
binds events to time can tell which of the two captions belongs to which recording.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from af2_ray.audio.decode import AudioError
from af2_ray.data.manifest import CaptionSet, check_samples, read_captions
from af2_ray.data.quarantine import Failure
from af2_ray.evaluate.predict import read_windows
from af2_ray.models.afclap import AfClapModel

log = logging.getLogger(__name__)

Scene = dict[str, Any]

_REFERENCE_TOKENS = 77  # converted towers average over this many positions, padding included (GOLDEN: two towers)


def read_scenes(scenes_uri: str) -> dict[str, Scene]:
    """The truth of scenes, by file name without folders.

    Raises:
        ValueError: no such file, or a line that is no scene; the message names the line.
    """
    scenes = {}
    try:
        with fsspec.open(scenes_uri, "rt", encoding="utf-8") as file:
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


def mirrored_pairs(captions: Sequence[CaptionSet], scenes: Sequence[Scene]) -> list[tuple[int, int]]:
    """Index pairs of mirrored scenes that differ in the order of their events, and whose captions differ."""
    members: dict[str, list[int]] = {}
    for index, scene in enumerate(scenes):
        if scene.get("pair") not in (None, ""):
            members.setdefault(str(scene["pair"]), []).append(index)
    return [
        (indices[0], indices[1])
        for indices in members.values()
        if len(indices) == 2
        and all("order" in captions[index].relations for index in indices)
        and captions[indices[0]].caption != captions[indices[1]].caption
    ]


def recall_at(similarity: NDArray[np.float32], k: int) -> float:
    """Share of rows [Q] of `similarity` [Q, Q] whose own column is among the k most similar."""
    own = np.diagonal(similarity)[:, None]
    return float(((similarity > own).sum(axis=1) < k).mean())


@torch.inference_mode()
def embed_audio(
    model: AfClapModel, captions: Sequence[CaptionSet], *, max_windows: int, batch_windows: int = 32
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

    for index, item in enumerate(captions):
        try:
            windows = read_windows(item.uri, item.offset_s, item.duration_s, max_windows=max_windows)
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
        padding = {"padding": "max_length", "max_length": _REFERENCE_TOKENS, "truncation": True}
    vectors = []
    for start in range(0, len(texts), batch_size):
        inputs = tokenizer(list(texts[start : start + batch_size]), return_tensors="pt", **padding).to(model.device)
        vectors.append(model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).float().cpu().numpy())
    return np.concatenate(vectors)


def evaluate_clap(
    clap_dir: str | Path,
    captions_uri: str,
    *,
    root: str | None = None,
    gallery: int = 200,
    max_windows: int = 1,
    batch_windows: int = 32,
) -> dict[str, Any]:
    """Retrieval both ways and order accuracy of an exported AF-CLAP folder.

    Args:
        clap_dir: model and tokenizer.
        captions_uri: caption sets; the scenes' truth lies beside them (`scenes_uri_of`).
        root: folder of the audio; none: the captions' own.
        gallery: scenes in the retrieval, fewer where not so many differ in their events.

    Returns:
        gallery, t2a_r1, t2a_r1_chance, t2a_r5, t2a_r10, a2t_r1, a2t_r5, a2t_r10, order_accuracy (None without
        mirrored scenes), order_pairs, failures (list of Failure).
    """
    model = AfClapModel.from_pretrained(clap_dir).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(clap_dir)
    captions, bad = check_samples(read_captions(captions_uri, root))
    failures = [Failure(item.uri, reason, item.offset_s) for item, reason in bad]
    truth = read_scenes(scenes_uri_of(captions_uri))
    scenes = [_scene_of(item, truth, captions_uri) for item in captions]

    chosen = choose_gallery([event_labels(scene) for scene in scenes], gallery)
    pairs = mirrored_pairs(captions, scenes)
    needed = sorted({*chosen, *(index for pair in pairs for index in pair)})
    audio, unread = embed_audio(
        model, [captions[i] for i in needed], max_windows=max_windows, batch_windows=batch_windows
    )
    audio = {needed[place]: vector for place, vector in audio.items()}
    texts = dict(zip(needed, embed_texts(model, tokenizer, [captions[i].caption for i in needed]), strict=True))
    chosen = [index for index in chosen if index in audio]
    pairs = [pair for pair in pairs if pair[0] in audio and pair[1] in audio]
    if len(chosen) < gallery:
        log.warning("%s: only %d of %d gallery scenes differ in their events", captions_uri, len(chosen), gallery)
    if not chosen:
        raise ValueError(f"{captions_uri}: no scene could be read; the first fault: {[*failures, *unread][:1]}")

    text_to_audio = np.stack([texts[i] for i in chosen]) @ np.stack([audio[i] for i in chosen]).T
    result: dict[str, Any] = {"gallery": len(chosen), "t2a_r1_chance": round(1 / len(chosen), 5)}
    for name, similarity in (("t2a", text_to_audio), ("a2t", text_to_audio.T)):
        result |= {f"{name}_r{k}": round(recall_at(similarity, k), 4) for k in (1, 5, 10)}
    told = [audio[own] @ texts[own] > audio[own] @ texts[other] for pair in pairs for own, other in (pair, pair[::-1])]
    result |= {"order_accuracy": round(float(np.mean(told)), 4) if told else None, "order_pairs": len(pairs)}
    return result | {"failures": failures + unread}


def _base(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def _scene_of(item: CaptionSet, truth: dict[str, Scene], captions_uri: str) -> Scene:
    name = _base(item.uri)
    if name not in truth:
        raise ValueError(f"{scenes_uri_of(captions_uri)} has no scene {name!r}, which {captions_uri} has")
    return truth[name]
