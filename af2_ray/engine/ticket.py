"""A request on its way through the engine: its text so far, and when it is at its end."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
from transformers import PreTrainedTokenizerBase

from af2_ray.engine.request import Answer, Event, FinishReason, Piece, Request, TokenLogprob
from af2_ray.engine.sampling import Sampler
from af2_ray.engine.text_stream import TextStream

logger = logging.getLogger(__name__)

Emit = Callable[[Event], None]


class Ticket:
    """One request: `emit` gets its pieces, and at last an `Answer` or a `RequestFailure`.

    Attributes:
        ids: tokens of the prompt.
        clips: windows of each distinct clip, by its key.
        since: second at which it came (monotonic clock).
        token: last token written.
        encoded_windows: number of its clips' windows that had to be encoded.
        num_passed: number of requests that went ahead of it while memory had no room for it.
        forgotten: keys of its clips that were forgotten before it was admitted.
    """

    def __init__(
        self, request: Request, emit: Emit, ids: list[int], tokenizer: PreTrainedTokenizerBase, device: torch.device
    ) -> None:
        self.request, self.ids = request, ids
        self.clips = {clip.key: clip.num_windows for clip in request.clips}
        self.since = time.monotonic()
        self.cancelled = False
        self.encoded_windows = self.num_passed = 0
        self.forgotten: set[str] = set()
        self.first_token_s = 0.0
        self.token = 0
        self.num_tokens = 0
        self.sampler = Sampler(request, device)
        self._emit = emit
        self._stream = TextStream(tokenizer, request.stop)
        self._logprobs: list[TokenLogprob] = []

    def cancel(self) -> None:
        """Give the request up, from any thread; its slot is free at the next step."""
        self.cancelled = True

    @property
    def must_go_on(self) -> bool:
        """Whether the answer may not end here by itself."""
        return self.num_tokens < self.request.min_new_tokens

    def take(self, token: int, ended: bool, logprob: TokenLogprob | None = None) -> Answer | None:
        """One more token of the answer; the whole answer if that was the last.

        Args:
            ended: whether this token ends answers.
            logprob: the token's, if the request wants it and it ends nothing.
        """
        self.token = token
        self.num_tokens += 1
        if self.num_tokens == 1:
            self.first_token_s = time.monotonic() - self.since
        logprobs = () if logprob is None else (logprob,)
        self._logprobs += logprobs
        text = self._stream.add(token)
        over = ended or self._stream.stopped or self.num_tokens >= self.request.max_new_tokens
        if over and not self._stream.stopped:
            text += self._stream.end()
        if text or logprobs:
            self.tell(Piece(text, logprobs))
        if not over:
            return None
        reason: FinishReason = "stop" if ended or self._stream.stopped else "length"
        return Answer(
            self._stream.text,
            reason,
            prompt_tokens=len(self.ids),
            completion_tokens=self.num_tokens,
            logprobs=tuple(self._logprobs),
            encoded_windows=self.encoded_windows,
            first_token_s=self.first_token_s,
        )

    def tell(self, event: Event) -> None:
        """Pass an event on; a listener that fails is its owner's trouble, not the batch's."""
        try:
            self._emit(event)
        except Exception:
            logger.exception("the listener of %s failed", self.request.id)
