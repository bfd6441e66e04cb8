"""One replica of AF-CLAP: vectors of texts and recordings, those of several requests in one pass."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from ray import serve

from af2_ray.engine.request import Clip, Embedded, RequestFailure

REQUESTS_PER_PASS = 16
_WAIT_S = 0.01  # for others to share a pass with


class Clap:
    """Embeds texts and clips."""

    def __init__(self, folder: str) -> None:
        from af2_ray.cluster import own_device
        from af2_ray.engine.embedder import Embedder  # loads torch, which the ingress does without

        self._embedder = Embedder.from_pretrained(folder, own_device())

        self._fault = ""

    def check_health(self) -> None:
        """Called by Serve: a replica whose device is lost makes room for another."""
        if self._fault:
            raise RuntimeError(self._fault)

    async def embed(self, items: Sequence[str | Clip]) -> Embedded | RequestFailure:
        """The vectors of a request's items, in order."""
        tokens = await asyncio.to_thread(self._embedder.read, items)  # long texts take seconds
        if isinstance(tokens, RequestFailure):
            return tokens
        embedded: Embedded = await self._pass(items)
        return replace(embedded, prompt_tokens=tokens)

    @serve.batch(max_batch_size=REQUESTS_PER_PASS, batch_wait_timeout_s=_WAIT_S)
    async def _pass(self, requests: list[Sequence[str | Clip]]) -> list[Embedded]:
        from af2_ray.engine.health import is_lost

        try:
            return await asyncio.to_thread(self._embedder, requests)
        except Exception as error:
            if is_lost(error):
                self._fault = f"the device is lost: {error}"[:200]
            raise
