"""What a blend holds, before a GPU is asked for: counts, lengths, what cannot be read, what comes twice, what leaks.

A pass over the manifests, and over the headers of the audio files unless that is turned off (a million headers on S3
take hours; a sample of them tells nearly as much). Leakage is judged by file name and stretch; the same recording under
another name is found by `same_recordings`, which reads files.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from types import MappingProxyType
from typing import TypeVar

import numpy as np

from af2_ray.audio.decode import AudioError, file_digest, file_size
from af2_ray.audio.windows import WINDOW_S
from af2_ray.config import Dataset
from af2_ray.data.durations import fill_durations, read_durations
from af2_ray.data.manifest import read_samples
from af2_ray.data.samples import Sample, check_samples
from af2_ray.storage.places import shown

ResultT = TypeVar("ResultT")

HOUR_S = 3600.0
_THREADS = 16  # waiting for a store, or hashing
_MOST_NAMED = 20


@dataclass(frozen=True)
class Survey:
    """One manifest.

    Attributes:
        manifest, split, weight: name of it, `train` or `test`, and its share of the blend.
        num_samples, num_clips, hours: usable samples, their different stretches and those stretches' length.
        duration_s, text_words: length of each clip, and number of words of prompt and answer of each sample.
        set_aside: reasons and counts of samples that cannot be used.
        unreadable: files whose header cannot be read, with the reason.
        num_probed: files whose header was read.
        duplicates: questions that come twice about the same stretch.
        clips: pairs (file name, offset) of the clips.
        remarks: oddities of the manifest itself: keys that come twice, another number of samples than it says,
            recordings that are not heard to their end.
    """

    manifest: str
    split: str
    weight: float
    num_samples: int
    num_clips: int
    hours: float
    duration_s: tuple[float, ...]
    text_words: tuple[int, ...]
    set_aside: dict[str, int]
    unreadable: dict[str, str]
    num_probed: int
    duplicates: tuple[str, ...]
    clips: frozenset[tuple[str, float]]
    remarks: tuple[str, ...] = ()


def survey(
    dataset: Dataset,
    split: str,
    *,
    most_probed: int | None = None,
    max_windows: Mapping[str, int] = MappingProxyType({}),
    seed: int = 0,
) -> Survey:
    """Look at one manifest.

    Args:
        dataset: manifest, root, columns and weight.
        split: `train` or `test`.
        most_probed: number of headers read at most, drawn at random; none: all.
        max_windows: most windows that a stage (or who hears it) takes of a recording, by name; what is longer is
            remarked.
        seed: seed of that draw.

    Raises:
        ValueError: the manifest cannot be read.
    """
    read = read_samples(dataset.manifest, dataset.root, dataset.columns)
    filled, unread = fill_durations(read, dataset.manifest)
    good, bad = check_samples(filled, unread)
    clips = dict.fromkeys(stretch for sample in good for stretch in sample.stretches)
    uris = list(dict.fromkeys(stretch.uri for stretch in clips))
    if most_probed is not None and most_probed < len(uris):
        uris = [uris[i] for i in np.sort(np.random.default_rng(seed).permutation(len(uris))[:most_probed])]
    asked = Counter((s.uri, s.offset_s, s.prompt, s.answer, s.history, s.more_audio) for s in good)
    return Survey(
        manifest=dataset.manifest,
        split=split,
        weight=dataset.weight,
        num_samples=len(good),
        num_clips=len(clips),
        hours=sum(stretch.duration_s for stretch in clips) / HOUR_S,
        duration_s=tuple(stretch.duration_s for stretch in clips),
        text_words=tuple(map(_num_words, good)),
        set_aside=dict(Counter(reason for _, reason in bad)),
        unreadable=read_durations(uris)[1],
        num_probed=len(uris),
        duplicates=tuple(f"{uri}: {prompt}" for (uri, _, prompt, *_), count in asked.items() if count > 1),
        clips=frozenset((_name(stretch.uri), stretch.offset_s) for stretch in clips),
        remarks=(*read.remarks, *_cuts(good, max_windows)),
    )


def longer_than(samples: Iterable[Sample], max_windows: int) -> list[tuple[str, float]]:
    """Recordings that are longer than `max_windows` windows of 10 s hold: name and seconds of each, the longest first.

    What is longer is cut where it is heard (`audio.hear`).
    """
    stretches = {stretch for sample in samples for stretch in sample.stretches if math.isfinite(stretch.duration_s)}
    longer = [(one.id, one.duration_s) for one in stretches if one.num_windows() > max_windows]
    return sorted(longer, key=lambda item: (-item[1], item[0]))


def _cuts(samples: Sequence[Sample], max_windows: Mapping[str, int]) -> Iterator[str]:
    """Who hears the beginning of some recordings alone."""
    for hearer, most in max_windows.items():
        if longer := longer_than(samples, most):
            name, seconds = longer[0]
            yield (
                f"{hearer} hears {most * WINDOW_S} s of a recording, and {len(longer)} are cut there: "
                f"the longest has {seconds:g} s, {shown(name)}"
            )


def _num_words(sample: Sample) -> int:
    texts = (*chain.from_iterable((turn.prompt, turn.answer) for turn in sample.history), sample.prompt, sample.answer)
    return sum(len(text.split()) for text in texts)


def leakage(surveys: Sequence[Survey]) -> list[str]:
    """Clips of a test manifest that a training manifest has too, by the last two parts of their path."""
    trained = {clip: one.manifest for one in surveys if one.split == "train" for clip in one.clips}
    return sorted(
        f"{name} at {offset_s:g} s: in {trained[name, offset_s]} and {one.manifest}"
        for one in surveys
        if one.split != "train"
        for name, offset_s in one.clips
        if (name, offset_s) in trained
    )


def same_recordings(one: Sequence[Sample], other: Sequence[Sample]) -> list[str]:
    """Recordings of `other` that `one` has, too, by the content of their files, whatever their names.

    Files are read where one of the other side has the same size. A recording that was written anew (cut, or in another
    format) is another one. Files that cannot be read are left out: they are set aside for that where they are used.

    Returns:
        A line for each, with the names on both sides.
    """
    sides = [list(dict.fromkeys(s.uri for sample in side for s in sample.stretches)) for side in (one, other)]
    content = contents_of(chain.from_iterable(sides))
    there = {content[uri]: uri for uri in reversed(sides[0]) if uri in content}
    twins = ((uri, there.get(content[uri])) for uri in sides[1] if uri in content)
    return [f"{shown(uri)} is {shown(twin) if twin != uri else 'in both'}" for uri, twin in twins if twin is not None]


def contents_of(uris: Iterable[str]) -> dict[str, str]:
    """What tells the files' contents apart, by uri: equal for equal bytes; files that cannot be read are left out.

    Only files of a size that another has are read.
    """
    uris = list(dict.fromkeys(uris))
    with ThreadPoolExecutor(_THREADS) as pool:
        sizes = dict(zip(uris, pool.map(partial(_read_or_none, file_size), uris), strict=True))
        times = Counter(sizes.values())
        asked = [uri for uri in uris if sizes[uri] is not None and times[sizes[uri]] > 1]
        digests = dict(zip(asked, pool.map(partial(_read_or_none, file_digest), asked), strict=True))
    found = {uri: digests.get(uri, f"the only one of {size} bytes") for uri, size in sizes.items()}
    return {uri: content for uri, content in found.items() if content is not None and sizes[uri] is not None}


def _read_or_none(read: Callable[[str], ResultT], uri: str) -> ResultT | None:
    try:
        return read(uri)
    except AudioError:
        return None


def faults(surveys: Sequence[Survey], max_bad_share: float) -> list[str]:
    """What stands against training on these manifests, a line each; empty: nothing."""
    found = []
    for one in surveys:
        num_bad = sum(one.set_aside.values())
        if num_bad > max_bad_share * max(1, num_bad + one.num_samples):
            reasons = ", ".join(f"{reason} {count}" for reason, count in one.set_aside.items())
            found.append(f"{one.manifest}: {num_bad} unusable samples ({reasons})")
        if len(one.unreadable) > max_bad_share * max(1, one.num_probed):
            uri, reason = next(iter(one.unreadable.items()))
            found.append(
                f"{one.manifest}: {len(one.unreadable)} of {one.num_probed} files unreadable, "
                f"for instance {shown(uri)}: {reason}"
            )
        if one.num_samples == 0:
            found.append(f"{one.manifest}: no usable sample")
    if leaked := leakage(surveys):
        found.append(f"{len(leaked)} test clips are in training too, for instance {leaked[0]}")
    return found


def shorten(lines: Sequence[str], most: int = _MOST_NAMED) -> list[str]:
    """The first lines, and how many more there are."""
    return [*lines[:most], *([f"and {len(lines) - most} more"] if len(lines) > most else [])]


def _name(uri: str) -> str:
    return "/".join(uri.rsplit("/", 2)[-2:])
