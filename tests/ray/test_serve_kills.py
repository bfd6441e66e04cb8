"""What clients see while parts of the server die or are replaced under them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
import serve_toy

from serve_apps import af2

pytestmark = pytest.mark.slow

OVERRIDES = (
    *("serve.min_replicas=2", "serve.max_replicas=2", "serve.cpus_per_replica=0.5"),
    *("serve.max_new_tokens=64", "serve.max_audio_s=60"),
)
MODEL = "af2-tiny"
NUM_CLIENTS = 12


@pytest.fixture
def url(ray_cluster: Any, tiny_tokenizer: Any, tmp_path: Path) -> Iterator[str]:
    folder = serve_toy.export(tmp_path / "served", tiny_tokenizer)
    with af2.run_app(folder, "tiny", overrides=OVERRIDES) as url:
        yield url


@dataclass
class Clients:
    """Twelve clients who each ask one question over and over: every third wants its answer streamed."""

    url: str
    max_retries: int
    answered: int = 0
    lost: list[str] = field(default_factory=list)
    broken: list[Exception] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def __enter__(self) -> Clients:
        self._client = openai.OpenAI(base_url=self.url, api_key="none", max_retries=self.max_retries, timeout=60)
        self._over, self._lock = threading.Event(), threading.Lock()
        sounds = [serve_toy.wav(2 + n, hz=150.0 * (n + 1)) for n in range(NUM_CLIENTS)]
        self._asked = [serve_toy.chat(sound, model=MODEL) for sound in sounds]
        self._expected = [self._ask(n, stream=False) for n in range(NUM_CLIENTS)]
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(NUM_CLIENTS)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(120)
        self._client.close()

    def _ask(self, number: int, *, stream: bool) -> str:
        answer = self._client.chat.completions.create(**self._asked[number], max_tokens=48, stream=stream)
        if not stream:
            return str(answer.choices[0].message.content)
        # The status is there and so is the first piece: from here on a fault can only be an event, or a cut connection.
        text, ended = "", False
        try:
            for chunk in answer:
                text += chunk.choices[0].delta.content or ""
                ended |= chunk.choices[0].finish_reason is not None
        except openai.APIConnectionError as error:
            raise httpx.RemoteProtocolError("the stream was cut") from error
        if not ended:
            raise httpx.RemoteProtocolError("the stream ended without a reason")
        return text

    def _run(self, number: int) -> None:
        stream = number % 3 == 0
        while not self._over.is_set():
            try:
                text = self._ask(number, stream=stream)
            except openai.APIStatusError as error:
                self.lost.append(f"{error.status_code}: {error.message}")
            except openai.APIConnectionError as error:
                self.lost.append(f"connection: {error!r} {error.__cause__!r}")
            except (openai.APIError, httpx.HTTPError) as error:
                (self.broken if stream else self.lost).append(error)  # type: ignore[arg-type]
            else:
                with self._lock:
                    self.answered += 1
                if text != self._expected[number]:
                    self.wrong.append(text)


def until(true: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it does not come back"
        time.sleep(0.25)


def healthy(url: str) -> bool:
    from ray import serve

    app = serve.status().applications.get("af2")
    if app is None or any(deployment.status != "HEALTHY" for deployment in app.deployments.values()):
        return False
    try:
        return httpx.get(url.removesuffix("/v1") + "/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.mark.parametrize("what", ["Model", "Ingress", "ProxyActor"])
def test_a_killed_process_loses_no_request(url: str, what: str) -> None:
    """kill -9 under 12 clients: a dead model's questions are asked again inside the server, without the client's help.

    Where the process that held the connection itself is gone, OpenAI's client asks again, as it does by default; here
    more often than its two times, for Serve needs some seconds to start a new one.
    """
    with Clients(url, max_retries=0 if what == "Model" else 8) as clients:
        until(lambda: clients.answered >= 2 * NUM_CLIENTS)
        victim = serve_toy.pids(what)[0]
        os.kill(victim, signal.SIGKILL)
        seen = clients.answered
        until(lambda: victim not in serve_toy.pids(what) and healthy(url))
        until(lambda: clients.answered >= seen + 4 * NUM_CLIENTS)
    assert clients.lost == []
    assert clients.wrong == []
    assert len(clients.broken) <= NUM_CLIENTS // 3, clients.broken
    if what == "Model":
        assert all("broke off" in str(error) for error in clients.broken), clients.broken


def test_a_redeployment_loses_no_request(url: str, tmp_path: Path) -> None:
    """The application is replaced while 12 clients ask: the old replicas finish what they have."""
    from ray import serve

    before = set(serve_toy.pids("Model"))
    with Clients(url, max_retries=0) as clients:
        until(lambda: clients.answered >= 2 * NUM_CLIENTS)
        args = {"model": str(tmp_path / "served"), "recipe": "tiny"}
        serve.run(af2.app(args | {"overrides": " ".join((*OVERRIDES, "serve.num_slots=4"))}), name=af2.APP_NAME)
        seen = clients.answered
        until(lambda: clients.answered >= seen + 4 * NUM_CLIENTS)
        assert not before & set(serve_toy.pids("Model"))
    assert (clients.lost, clients.broken, clients.wrong) == ([], [], [])
