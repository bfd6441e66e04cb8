"""Samples to JSON lines that `manifest.read_samples` reads back to equal samples.

NVIDIA's keys, with two of our own for what those have no word for: `history` (earlier turns) and `more_audio` (the
second recording and those after it).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from af2_ray.audio.hear import Stretch
from af2_ray.data.samples import Sample
from af2_ray.storage.places import write_text

OPTIONAL = ("skill", "pair", "template")


def write_samples(uri: str, samples: Sequence[Sample]) -> None:
    """Write samples as JSON lines to a file or address; what was there is replaced."""
    lines = (json.dumps(sample_row(sample), ensure_ascii=False) for sample in samples)
    write_text(uri, "".join(f"{line}\n" for line in lines))


def sample_row(sample: Sample) -> dict[str, Any]:
    """A sample under the keys of a manifest; what is empty is left out."""
    row: dict[str, Any] = {**dict(sample.meta), "id": sample.id, **_audio_row(sample.stretch)}
    row |= {"prompt": sample.prompt, "output": sample.answer, "task": sample.task, "dataset": sample.dataset}
    row |= {key: value for key in OPTIONAL if (value := getattr(sample, key))}
    if sample.options:
        row["options"] = list(sample.options)
    if sample.history:
        row["history"] = [{"prompt": turn.prompt, "output": turn.answer} for turn in sample.history]
    if sample.more_audio:
        row["more_audio"] = [_audio_row(stretch) for stretch in sample.more_audio]
    return row


def _audio_row(stretch: Stretch) -> dict[str, Any]:
    row: dict[str, Any] = {"name": stretch.uri, "duration": stretch.duration_s}
    return row | ({"audio_start": stretch.offset_s} if stretch.offset_s else {})
