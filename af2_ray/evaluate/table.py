"""What a benchmark holds, as read and before any model has seen it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from af2_ray.audio.hear import Stretch
from af2_ray.data.durations import fill_durations
from af2_ray.data.quarantine import Failure
from af2_ray.data.samples import CaptionSet, ItemT, Sample, check_samples
from af2_ray.storage.stores import scratch

WHOLE_S = math.inf
"""The length of a clip where the benchmark gives none: the file's header does."""

Scene = Mapping[str, Any]
"""The truth of a composed scene: a line of `x/test.scenes.jsonl`."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """A clip and its classes."""

    uri: str
    offset_s: float
    duration_s: float
    labels: tuple[str, ...]

    @property
    def stretch(self) -> Stretch:
        return Stretch(self.uri, self.offset_s, self.duration_s)


@dataclass(frozen=True)
class Table:
    """A benchmark's items: questions, caption sets or labelled clips (the other two are empty).

    Attributes:
        uri: name of the file, for messages.
        scenes: truth of each caption set's clip; none where it is not known.
        failures: items that cannot be used, each with its reason.
    """

    uri: str
    questions: Sequence[Sample] = ()
    captions: Sequence[CaptionSet] = ()
    labelled: Sequence[Labelled] = ()
    scenes: Sequence[Scene] | None = None
    failures: Sequence[Failure] = ()


def usable(items: Sequence[ItemT], uri: str) -> tuple[list[ItemT], list[Failure]]:
    """The items of a manifest that can be used, durations filled in, and the others with their reasons."""
    filled, unread = fill_durations(items, uri, fallback=str(scratch("durations")))  # where none can lie beside it
    good, bad = check_samples(filled, unread)
    return list(good), [
        Failure(item.uri, reason, item.offset_s, item.id if isinstance(item, Sample) else "") for item, reason in bad
    ]
