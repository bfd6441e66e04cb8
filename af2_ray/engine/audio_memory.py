"""Encoded audio, kept for further questions by the SHA-256 of the bytes it came in; the one unused longest goes first.

Two things are kept of a clip: its audio states, and the cross-attention's keys and values made of them (or a prefix).
The states cost a pass of the whole tower and are small; the keys and values cost one product a layer and are 18 times
as large in the 3B model (141 MB for 5 minutes in bf16, against 8). So when memory is short, all keys and values go
before any states do. What a running answer hears is pinned. On a CPU running answers attend to this memory itself: an
answer that begins copies nothing, and answers about one clip share its keys and values. On a GPU they have copies
(`audio_pool`), for which kept keys and values make room.

A recording is somebody's: what nobody has used for a while is forgotten, room or not, and so is what a caller wants
forgotten. Pinned clips go when the last answer that hears them ends.

Memory for keys and values is taken by length buckets, at most half as long again: allocations of few sizes, which
PyTorch's allocator uses again and again.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor


def length_bucket(num: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24 ... that is not below `num`."""
    power = 1 << (num - 1).bit_length()
    return power * 3 // 4 if power >= 4 and power * 3 // 4 >= num else power


def is_of(key: str, names: Iterable[str]) -> bool:
    """Whether a clip is one of the named recordings, or the beginning of one (`KEY:SECONDS`)."""
    return any(key == name or key.startswith(f"{name}:") for name in names)


@dataclass
class KeptClip:
    """Audio states [A, D] of one clip, what the LM hears of it, if that is kept too, and when it was last used."""

    states: Tensor
    num_windows: int
    last_use_s: float
    projected: Tensor | None = None


class AudioMemory:
    """A byte-bounded LRU of clips.

    Args:
        project: function from audio states [A, D], and their number of windows, to what the LM hears of them.
        states_bytes, projected_bytes: bytes of a clip of so many windows.
        limit_bytes: bound of all that is kept; a single request that needs more gets it while nothing else is pinned.
        keep_s: seconds that a clip is kept after its last use; 0: until its last answer ends.
    """

    def __init__(
        self,
        project: Callable[[Tensor, int], Tensor],
        states_bytes: Callable[[int], int],
        projected_bytes: Callable[[int], int],
        limit_bytes: int,
        keep_s: float,
    ) -> None:
        self._project, self._states_bytes, self._projected_bytes = project, states_bytes, projected_bytes
        self._limit, self._keep_s = limit_bytes, keep_s
        self._clips: OrderedDict[str, KeptClip] = OrderedDict()
        self._pins: Counter[str] = Counter()
        self._windows: dict[str, int] = {}  # of what is pinned
        self._pinned_bytes = 0
        self._reserved = 0  # bytes of copies that running answers attend to in place of this memory
        self._forgotten: set[str] = set()  # of what is pinned: goes when it is not any more
        self.hits = self.misses = 0

    def __contains__(self, key: str) -> bool:
        return key in self._clips

    def __len__(self) -> int:
        return len(self._clips)

    @property
    def num_bytes(self) -> int:
        """Bytes that kept clips take, that pinned ones will take, and that are reserved."""
        kept = sum(self._bytes(clip.num_windows, clip.projected is not None) for clip in self._clips.values())
        coming = sum(self._bytes(num, True) for key, num in self._windows.items() if key not in self._clips)
        return kept + coming + self._reserved

    def reserve(self, num_bytes: int) -> None:
        """Count copies that running answers attend to; keys and values go for them, pinned or not, but no states."""
        self._reserved = num_bytes
        if num_bytes:
            self._shrink()

    def has_room(self, clips: Mapping[str, int]) -> bool:
        """Whether clips (key to number of windows) can be pinned beside what is pinned already."""
        new = sum(self._bytes(num, True) for key, num in clips.items() if key not in self._windows)
        return new == 0 or self._pinned_bytes == 0 or self._pinned_bytes + new <= self._limit

    def knows(self, keys: Iterable[str]) -> bool:
        """Whether all these clips are kept, or held for others already."""
        return all(key in self._clips or key in self._windows for key in keys)

    def pin(self, clips: Mapping[str, int]) -> None:
        """Hold clips, there or about to be, until they are unpinned as often."""
        for key, num in clips.items():
            self._pins[key] += 1
            if key not in self._windows:
                self._windows[key] = num
                self._pinned_bytes += self._bytes(num, True)
        self._shrink()

    def forgotten_of(self, keys: Iterable[str]) -> set[str]:
        """Those of pinned clips that go when they are not any more."""
        return self._forgotten.intersection(keys)

    def unpin(self, keys: Iterable[str]) -> None:
        """End one hold of each clip."""
        for key in keys:
            self._pins[key] -= 1
            if self._pins[key]:
                continue
            del self._pins[key]
            self._pinned_bytes -= self._bytes(self._windows.pop(key), True)
            if key in self._forgotten:
                self._forgotten.remove(key)
                self._clips.pop(key, None)
            elif key in self._clips:
                self._clips[key].last_use_s = time.monotonic()
                self._clips.move_to_end(key)
        self._shrink()

    def put(self, key: str, states: Tensor, num_windows: int) -> None:
        """Keep a newly encoded clip."""
        self._clips[key] = KeptClip(states, num_windows, time.monotonic())
        self._shrink()

    def projected(self, key: str) -> Tensor:
        """What the LM hears of a pinned clip that is kept."""
        clip = self._clips[key]
        self._clips.move_to_end(key)
        if clip.projected is None:
            clip.projected = self._project(clip.states, clip.num_windows)
        return clip.projected

    def clear(self) -> None:
        """Forget all that is not pinned."""
        self._clips = OrderedDict((key, clip) for key, clip in self._clips.items() if key in self._pins)

    def forget(self, keys: Iterable[str]) -> int:
        """Forget clips, also those that are `KEY:SECONDS`, the beginning of KEY; how many, pinned ones too."""
        names = tuple(keys)
        found = [key for key in {*self._clips, *self._windows} if is_of(key, names)]
        for key in found:
            if key in self._pins:
                self._forgotten.add(key)
            else:
                del self._clips[key]
        return len(found)

    def forget_old(self) -> None:
        """Forget what was last used too long ago."""
        while (old := self._oldest()) is not None and self._left_s(old) <= 0:
            del self._clips[old]

    def next_old_s(self) -> float | None:
        """Seconds until `forget_old` has something to do; none: nothing is kept that grows old."""
        oldest = self._oldest()
        return None if oldest is None else max(0.0, self._left_s(oldest))

    def _oldest(self) -> str | None:
        """The clip used longest ago; those before it are pinned, as few as there are answers."""
        return next((key for key in self._clips if key not in self._pins), None)

    def _left_s(self, key: str) -> float:
        return self._clips[key].last_use_s + self._keep_s - time.monotonic()

    def _bytes(self, num_windows: int, projected: bool) -> int:
        return self._states_bytes(num_windows) + (self._projected_bytes(num_windows) if projected else 0)

    def _shrink(self) -> None:
        excess = self.num_bytes - self._limit
        if excess <= 0:
            return
        free = [key for key in self._clips if key not in self._pins]
        for key in self._clips if self._reserved else free:
            if excess <= 0:
                return
            clip = self._clips[key]
            if clip.projected is not None:
                clip.projected = None
                excess -= self._projected_bytes(clip.num_windows)
        excess -= self._reserved
        for key in free:
            if excess <= 0:
                return
            excess -= self._states_bytes(self._clips.pop(key).num_windows)
