"""The truth of composed scenes, which lies beside their captions and manifests."""

from __future__ import annotations

import json
from collections.abc import Sequence

from af2_ray.data.samples import CaptionSet
from af2_ray.evaluate.table import Scene
from af2_ray.storage.places import locate, open_text


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


def scenes_beside(uri: str, captions: Sequence[CaptionSet]) -> list[Scene] | None:
    """The truth of each caption set's clip; None where no truth lies beside the captions.

    Raises:
        ValueError: the truth cannot be read, or lacks a clip.
    """
    beside = scenes_uri_of(uri)
    fs, path = locate(beside)
    if not uri.endswith(".captions.jsonl") or not fs.exists(path):
        return None
    truth, names = read_scenes(beside), [_base(item.uri) for item in captions]
    if missing := [name for name in names if name not in truth]:
        raise ValueError(f"{beside} has no scene {missing[0]!r}, which {uri} has")
    return [truth[name] for name in names]


def event_labels(scene: Scene) -> frozenset[str]:
    """The labels of a scene's events."""
    return frozenset(str(event["label"]) for event in scene["events"])


def choose_gallery(events: Sequence[frozenset[str]], size: int) -> list[int]:
    """Indices of the first `size` scenes whose event sets differ pairwise."""
    first: dict[frozenset[str], int] = {}
    for index, labels in enumerate(events):
        first.setdefault(labels, index)
    return list(first.values())[:size]


def _base(name: str) -> str:
    return name.rsplit("/", 1)[-1]
