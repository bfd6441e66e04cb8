"""A decoding step recorded once and played again: one launch on a GPU in place of a thousand.

A token of a 0.5B model is a thousand small kernels, which a CPU launches in 30 ms and a GPU runs in 4. A recording
(CUDA graph) has fixed shapes and addresses. What differs from step to step (tokens, lengths, what is heard) therefore
stands in buffers that stay where they are, and a recording belongs to a size: so many rows, so long a text, so much
audio, each rounded up. Answers that start or end only change what the buffers hold; a recording is thrown away when
the buffers move, or when too many sizes were met since it was played.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Protocol

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

MAX_RECORDINGS = 64
"""Recordings that are kept: a few MB of launches each; they share the memory of what they compute."""

Step = Callable[[], Tensor]
"""A step of fixed size over fixed buffers; its result stands until the next step."""


class Recorder(Protocol):
    """What makes recordings."""

    def record(self, step: Step) -> Step:
        """A function that does the same again, with what then is at the addresses that `step` reads and writes now.

        Raises:
            RuntimeError: the step cannot be recorded.
        """

    def forget(self) -> None:
        """None of the recordings is played any more."""


class CudaRecorder:
    """CUDA graphs that share a memory pool: they are played one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self.forget()

    def record(self, step: Step) -> Step:
        """A graph of the kernels that a step launches."""
        graph, now = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        self._stream.wait_stream(now)
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = step()
            finally:
                graph.capture_end()
        now.wait_stream(self._stream)

        def play() -> Tensor:
            graph.replay()
            return result

        return play

    def forget(self) -> None:
        """Take another memory pool: PyTorch refuses one whose graphs are all gone."""
        self._pool = torch.cuda.graph_pool_handle()


def recorder_of(device: torch.device) -> Recorder | None:
    """What records steps on a device; none: they are launched one by one, and cost little more there."""
    return CudaRecorder(device) if device.type == "cuda" else None


class StepGraphs:
    """Plays the recordings of a step, by its size.

    A size is launched kernel by kernel when it is first met, which loads what it needs; the second time it is recorded.

    Attributes:
        num_launched, num_recorded, num_replayed: steps since the start by what became of them.
    """

    def __init__(self, recorder: Recorder, max_recordings: int = MAX_RECORDINGS) -> None:
        self._recorder, self._max = recorder, max_recordings
        self._recordings: OrderedDict[Hashable, Step] = OrderedDict()
        self._met: set[Hashable] = set()
        self.works = True
        """Whether the model can be recorded, as far as is known."""
        self.num_launched = self.num_recorded = self.num_replayed = 0

    @property
    def sizes(self) -> tuple[Hashable, ...]:
        """Of the recordings, the one played last at the end."""
        return tuple(self._recordings)

    def __call__(self, size: Hashable, step: Step) -> Tensor:
        """The result of a step of this size; it stands until the next one."""
        if (recording := self._recordings.get(size)) is not None:
            self._recordings.move_to_end(size)
            self.num_replayed += 1
            return recording()
        if size in self._met and self.works and (recording := self._record(size, step)) is not None:
            self.num_recorded += 1
            return recording()
        self._met.add(size)
        self.num_launched += 1
        return step()

    def forget(self) -> None:
        """Drop the recordings: buffers have moved."""
        self._recordings.clear()
        self._recorder.forget()

    def _record(self, size: Hashable, step: Step) -> Step | None:
        """Keep a recording; none: this model's steps are launched one by one from now on."""
        try:
            recording = self._recorder.record(step)
        except RuntimeError:
            logger.exception("this model's decoding cannot be recorded; its steps are launched one by one")
            self.works = False
            return None
        self._recordings[size] = recording
        if len(self._recordings) > self._max:
            self._recordings.popitem(last=False)
        return recording
