"""A decoding step recorded once and played again: one launch on a GPU in place of a thousand.

A token of a 0.5B model is a thousand small kernels, which a CPU launches in 30 ms and a GPU runs in 4. A recording
(CUDA graph) has fixed shapes and addresses, so it holds for the same rows hearing the same clips, up to a length of
text; when a row comes or goes, the next steps are launched one by one again, until the rows have stayed for a while.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

ROOM = 64
"""Text tokens by which a recording is longer than its longest row, at most."""
STEADY_STEPS = 2
"""Steps launched one by one after a change: a recording costs about as much as one."""

Step = Callable[[Tensor, Tensor, int], Tensor]
"""Tokens [B], the places [B] they take in their rows, and how many places are attended to; logits [B, V]."""


class StepGraph:
    """Plays a step for unchanged rows; records it anew when their text outgrows the recording.

    Args:
        step: function that launches a step on `device`; everything that it reads is at fixed addresses.
        longest: function that gives the text tokens that a row may have.
    """

    def __init__(self, step: Step, device: torch.device, longest: Callable[[], int]) -> None:
        self._step, self._device, self._longest = step, device, longest
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._room = self._steps = 0
        self._works = True

    def forget(self) -> None:
        """Drop the recording: the rows, or the clips that they hear, have changed."""
        self._room = self._steps = 0

    def __call__(self, tokens: Sequence[int], places: Sequence[int]) -> Tensor:
        """Logits [B, V] of one more token of every row; they stand until the next step."""
        self._steps += 1
        length = max(places) + 1
        now, at = (torch.tensor(values, device=self._device) for values in (tokens, places))
        if self._works and self._steps > STEADY_STEPS and length > self._room:
            self._record(now, at, min(self._longest(), -(-length // ROOM) * ROOM))
        if self._graph is None or length > self._room:
            return self._step(now, at, length)
        self._tokens.copy_(now)
        self._places.copy_(at)
        self._graph.replay()
        return self._logits

    def _record(self, tokens: Tensor, places: Tensor, room: int) -> None:
        """Record a step with `room` places; a model that cannot be recorded goes on as it is."""
        self._tokens, self._places = tokens.clone(), places.clone()
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.stream(self._stream):
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    self._logits = self._step(self._tokens, self._places, room)
                finally:
                    graph.capture_end()
        except RuntimeError:
            logger.exception("this model's decoding cannot be recorded; its steps are launched one by one")
            self._works = False
            return
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._graph, self._room = graph, room  # the one before held the pool until now
