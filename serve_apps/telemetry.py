"""What the model's replicas tell Prometheus, and all of it in one place.

Ray exports every metric at each node's own port, with the deployment and the replica as labels; that is what a cluster
scrapes (`cluster/components/monitoring`). `/metrics` of the server gathers the same from all nodes, for whoever has one
address only. Shares follow from counts: cached audio is 1 - af2_windows_encoded / af2_windows_asked.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import aiohttp
import ray
from ray.serve.metrics import Counter, Gauge, Histogram

from af2_ray.engine.request import Answer, Event, Request, RequestFailure

if TYPE_CHECKING:  # its module loads torch, which the ingress does without
    from af2_ray.engine.runner import Runner

logger = logging.getLogger("ray.serve")

_SECONDS = [0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0]
_FAMILIES = ("ray_af2_", "ray_serve_")
_SCRAPE_TIMEOUT_S = 5.0


class Telemetry:
    """The counts and times of one replica, by model name; a request is one answer asked for (`n` asks for several)."""

    def __init__(self, model_name: str, runner: Runner) -> None:
        self._runner = runner

        def counter(name: str, description: str, *more: str) -> Counter:
            made = Counter(f"af2_{name}", description=description, tag_keys=("model", *more))
            made.set_default_tags({"model": model_name})
            return made

        def gauge(name: str, description: str) -> Gauge:
            made = Gauge(f"af2_{name}", description=description, tag_keys=("model",))
            made.set_default_tags({"model": model_name})
            return made

        def histogram(name: str, description: str) -> Histogram:
            made = Histogram(f"af2_{name}", description=description, boundaries=_SECONDS, tag_keys=("model",))
            made.set_default_tags({"model": model_name})  # it keeps the dict, and writes to it
            return made

        self._requests = counter("requests", "requests that ended, by how", "result")
        self._new_tokens = counter("new_tokens", "tokens written")
        self._prompt_tokens = counter("prompt_tokens", "text tokens read")
        self._windows_asked = counter("windows_asked", "10 s windows of audio that answered requests came with")
        self._windows_encoded = counter("windows_encoded", "those that had to be encoded, not kept from before")
        self._first_token = histogram("first_token_seconds", "from a request's arrival at a replica to its first token")
        self._took = histogram("request_seconds", "from a request's arrival at a replica to its end")
        self._running = gauge("running", "answers being written: the batch")
        self._waiting = gauge("waiting", "requests without a slot")
        self._windows = gauge("windows", "10 s windows of requests without an answer")

    def began(self) -> float:
        """A request has come; what `ended` wants back."""
        self.look()
        return time.monotonic()

    def ended(self, since: float, request: Request, last: Event | None) -> None:
        """A request ended with its last event; none: the caller went away."""
        self._took.observe(time.monotonic() - since)
        if isinstance(last, Answer):
            self._requests.inc(tags={"result": last.finish_reason})
            self._first_token.observe(last.first_token_s)
            for count, number in (
                (self._new_tokens, last.completion_tokens),
                (self._prompt_tokens, last.prompt_tokens),
                (self._windows_asked, sum(clip.num_windows for clip in request.clips)),
                (self._windows_encoded, last.encoded_windows),
            ):
                if number:
                    count.inc(number)
        else:
            by_caller = isinstance(last, RequestFailure) and last.by_caller
            self._requests.inc(tags={"result": "cancelled" if last is None else "refused" if by_caller else "failed"})
        self.look()

    def look(self) -> None:
        """What the engine holds at the moment."""
        engine = self._runner.engine
        self._running.set(engine.num_running)
        self._waiting.set(engine.num_waiting)
        self._windows.set(self._runner.num_windows)


async def scrape() -> str:
    """What all live nodes export of this system and of Serve, in Prometheus' text format; a silent node is logged."""
    nodes = await asyncio.to_thread(ray.nodes)
    urls = [
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for node in nodes
        if node["Alive"] and node.get("MetricsExportPort")
    ]
    timeout = aiohttp.ClientTimeout(total=_SCRAPE_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:
        texts = await asyncio.gather(*(_fetch(session, url) for url in urls))
    return merged(texts)


async def _fetch(session: aiohttp.ClientSession, url: str) -> str:
    try:
        async with session.get(url) as response:
            return await response.text()
    except (aiohttp.ClientError, TimeoutError) as error:
        logger.warning("no metrics from %s: %r", url, error)
        return ""


def merged(texts: Iterable[str]) -> str:
    """Several expositions as one: each family once, with the samples of all, as the format demands."""
    families: dict[str, list[str]] = {}
    for text in texts:
        for family, is_sample, line in _lines(text):
            if not family.startswith(_FAMILIES):
                continue
            lines = families.setdefault(family, [])
            if is_sample or line not in lines:
                lines.append(line)
    return "".join(f"{line}\n" for lines in families.values() for line in lines)


def _lines(text: str) -> Iterator[tuple[str, bool, str]]:
    """Each line with its family, and whether it is a sample: samples follow the `# TYPE` of theirs."""
    family = ""
    for line in text.splitlines():
        if line.startswith(("# HELP ", "# TYPE ")):
            family = line.split(" ", 3)[2]
            yield family, False, line
        elif line and not line.startswith("#"):
            yield family, True, line
