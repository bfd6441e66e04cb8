"""What a blend holds, before a GPU is asked for: counts, lengths, what cannot be read, what comes twice, what leaks.

A pass over the manifests, and over the headers of the audio files unless that is turned off (a million headers on S3
take hours; a sample of them tells nearly as much). Leakage is judged by file name and stretch: the same recording
under another name is not seen here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from af2_ray.config import Dataset
from af2_ray.data.durations import fill_durations, read_durations
from af2_ray.data.manifest import read_samples
from af2_ray.data.samples import Sample, check_samples
from af2_ray.storage.places import shown

HOUR_S = 3600.0
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
        remarks: oddities of the manifest itself: keys that come twice, another number of samples than it says.
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


def survey(dataset: Dataset, split: str, *, most_probed: int | None = None, seed: int = 0) -> Survey:
    """Look at one manifest.

    Args:
        dataset: manifest, root and weight.
        split: `train` or `test`.
        most_probed: number of headers read at most, drawn at random; none: all.
        seed: seed of that draw.

    Raises:
        ValueError: the manifest cannot be read.
    """
    read = read_samples(dataset.manifest, dataset.root)
    filled, unread = fill_durations(read, dataset.manifest)
    good, bad = check_samples(filled, unread)
    clips = {sample.stretch: sample for sample in good}
    uris = list(dict.fromkeys(sample.uri for sample in good))
    if most_probed is not None and most_probed < len(uris):
        uris = [uris[i] for i in np.sort(np.random.default_rng(seed).permutation(len(uris))[:most_probed])]
    asked = Counter((s.uri, s.offset_s, s.prompt, s.answer) for s in good)
    return Survey(
        manifest=dataset.manifest,
        split=split,
        weight=dataset.weight,
        num_samples=len(good),
        num_clips=len(clips),
        hours=sum(stretch.duration_s for stretch in clips) / HOUR_S,
        duration_s=tuple(stretch.duration_s for stretch in clips),
        text_words=tuple(len(s.prompt.split()) + len(s.answer.split()) for s in good),
        set_aside=dict(Counter(reason for _, reason in bad)),
        unreadable=read_durations(uris)[1],
        num_probed=len(uris),
        duplicates=tuple(f"{uri}: {prompt}" for (uri, _, prompt, _), count in asked.items() if count > 1),
        clips=frozenset((_name(sample), sample.offset_s) for sample in clips.values()),
        remarks=read.remarks,
    )


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


def _name(sample: Sample) -> str:
    return "/".join(sample.uri.rsplit("/", 2)[-2:])
