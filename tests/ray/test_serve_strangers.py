"""A server with two keys: what strangers and other tenants can do to its callers, over its own HTTP."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import hashlib
import json
import random
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import numpy as np
import pytest
import reverse_proxy
import serve_toy
from ray import cloudpickle, serve

from af2_ray.engine.request import Answer, Request, RequestFailure
from serve_apps import af2
from serve_apps.replica import Model

MODEL = "af2-tiny"
OVERRIDES = (
    *("serve.max_body_mb=4", "serve.max_audio_s=60", "serve.max_new_tokens=512", "serve.body_timeout_s=20"),
    *("serve.request_timeout_s=60", "serve.answers_per_key=4"),
)
FAULT = "af2_device_fault"


class Watched(Model):
    """A replica that says what it did, and whose device fails in every step while a file is there."""

    def __init__(self, folder: str, settings: Any) -> None:
        super().__init__(folder, settings)
        engine = self._main.runner.engine
        encode = engine._decoder.prefill
        fault = Path(folder).parent / FAULT

        def prefill(*args: Any) -> Any:
            if fault.exists():
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return encode(*args)

        engine._decoder.prefill = prefill  # type: ignore[method-assign]

        self._encoded = 0

    async def answer(self, request: Request) -> Answer | RequestFailure:
        answer = await super().answer(request)
        self._encoded += answer.encoded_windows if isinstance(answer, Answer) else 0
        return answer

    def counts(self) -> tuple[int, int]:
        """Windows encoded and tokens written."""
        return self._encoded, self._main.runner.engine.counts.new_tokens


def counts() -> tuple[int, int]:
    """What the replica says it did."""
    handle = serve.get_deployment_handle("Model", af2.APP_NAME)
    return cast(tuple[int, int], handle.counts.remote().result(timeout_s=60))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    return serve_toy.export(tmp_path_factory.mktemp("open") / "model", tiny_tokenizer)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("sk-ann\nsk-bob\n")
    return file


@pytest.fixture(scope="module")
def url(ray_cluster: Any, folder: Path, keys: Path) -> Iterator[str]:
    import sys

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AF2_API_KEYS_FILE", str(keys))
        patch.setattr(af2, "_MODEL", serve.deployment(name="Model")(Watched))
        with af2.run_app(folder, "tiny", overrides=OVERRIDES) as url:
            yield url
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def send(
    url: str, path: str, body: Any = None, key: str = "sk-ann", method: str | None = None, **headers: str
) -> tuple[int, Any, dict[str, str]]:
    data = None if body is None else json.dumps(body).encode()
    all_headers = {"content-type": "application/json", "authorization": f"Bearer {key}", **headers}
    request = urllib.request.Request(url + path, data, all_headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read()), dict(response.headers)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read()), dict(error.headers)


def ask(url: str, *audios: bytes, key: str = "sk-ann", **more: Any) -> tuple[int, Any]:
    more = {"max_tokens": 2} | more
    return send(url, "/chat/completions", serve_toy.chat(*audios, model=MODEL, **more), key)[:2]


def connected(url: str, body: bytes, sent: int, key: str = "sk-bob", **headers: str) -> socket.socket:
    """A connection that has sent its header and the first `sent` bytes of its body."""
    parts = urlsplit(url)
    connection = socket.create_connection((parts.hostname, parts.port), timeout=60)
    lines = [
        *("POST /v1/chat/completions HTTP/1.1", f"host: {parts.netloc}", f"authorization: Bearer {key}"),
        *("content-type: application/json", f"content-length: {len(body)}"),
        *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()),
    ]
    connection.sendall("\r\n".join([*lines, "", ""]).encode() + body[:sent])
    return connection


def health(url: str) -> float:
    """Seconds until the server said that it is there."""
    since = time.monotonic()
    with urllib.request.urlopen(url.removesuffix("/v1") + "/health", timeout=30) as response:
        assert response.status == 200
    return time.monotonic() - since


@pytest.fixture(params=["Ray's proxy", "nginx"])
def door(request: pytest.FixtureRequest, url: str) -> Iterator[str]:
    """Where callers come in."""
    if request.param != "nginx":
        yield url
        return
    if reverse_proxy.NGINX is None:
        pytest.skip("needs nginx (Debian: nginx-light)")
    with reverse_proxy.started(urlsplit(url).port or 0, ADDRESS_REQUESTS=384) as proxy:
        yield f"http://127.0.0.1:{proxy.port}/v1"


@pytest.mark.slow  # it takes time on an idle machine
def test_idle_uploads_and_stalled_readers_stop_nobody(door: str) -> None:
    """128 uploads of one byte and 128 readers who do not read: others are answered."""
    stream = json.dumps(
        serve_toy.chat(model=MODEL, max_tokens=64, stream=True, logprobs=True, top_logprobs=20, temperature=1)
    ).encode()
    assert ask(door, key="sk-ann")[0] == 200
    with contextlib.ExitStack() as stack:
        for _ in range(128):
            stack.enter_context(connected(door, b"{" * 1000, 1))
            stack.enter_context(connected(door, stream, len(stream)))
        at_once_s = health(door)  # behind the work of 256 requests that have just come
        time.sleep(1)
        health_s, since = health(door), time.monotonic()
        status, reply = ask(door, serve_toy.wav(2), key="sk-ann")
        question_s = time.monotonic() - since
    print(f"health {health_s:.2f} s, at once {at_once_s:.2f} s, question {question_s:.2f} s")
    assert status == 200, reply
    assert health_s < 1
    assert question_s < 5


def auc(positives: list[float], negatives: list[float]) -> float:
    """Share of pairs in which the positive one is smaller."""
    return float(np.mean([[(p < n) + 0.5 * (p == n) for n in negatives] for p in positives]))


@pytest.mark.slow  # it takes time on an idle machine
def test_nobody_learns_whether_another_has_sent_a_recording(url: str) -> None:
    """200 probes: their times say nothing of what the other key has sent, and all of what one's own has."""

    def probe(key: str, clips: list[bytes]) -> list[float]:
        times = []
        for clip in clips:
            since = time.perf_counter()
            assert ask(url, clip, key=key, max_tokens=1)[0] == 200
            times.append(time.perf_counter() - since)
        return times

    def clips(start: int) -> list[bytes]:
        return [serve_toy.wav(20, hz=100.0 + start + number / 10) for number in range(100)]

    heard, others = clips(0), clips(1000)
    probe("sk-ann", heard)
    mixed = [(clip, known) for known, some in ((True, heard), (False, others)) for clip in some]
    random.Random(0).shuffle(mixed)

    def seen_by(key: str) -> float:
        times: dict[bool, list[float]] = {True: [], False: []}
        for clip, known in mixed:
            times[known] += probe(key, [clip])
        return auc(times[True], times[False])

    own, foreign = None, seen_by("sk-bob")
    mixed = [(clip, True) for clip in heard[:50]] + [(clip, False) for clip in clips(2000)[:50]]
    random.Random(1).shuffle(mixed)
    own = seen_by("sk-ann")
    print(f"AUC of 200 probes: {foreign:.2f}; of one's own: {own:.2f}")
    assert own > 0.9, "the probe sees what it looks for"
    assert abs(foreign - 0.5) < 0.1


def test_a_recording_is_forgotten_when_its_owner_says_so(url: str) -> None:
    clip = serve_toy.wav(25, hz=321)
    name = hashlib.sha256(clip).hexdigest()

    def encoded(key: str = "sk-ann") -> int:
        """Windows that a question about the clip had encoded."""
        before = counts()[0]
        assert ask(url, clip, key=key)[0] == 200
        return counts()[0] - before

    assert encoded() == 3
    assert encoded() == 0
    assert encoded("sk-bob") == 3, "another key's is its own"
    assert send(url, f"/audio/{name}", key="sk-bob", method="DELETE")[0] == 200
    assert encoded() == 0, "another's is not touched"
    status, reply, _ = send(url, f"/audio/{name}", method="DELETE")
    assert (status, reply) == (200, {"id": name, "object": "audio.deleted", "deleted": True})
    assert encoded() == 3
    assert send(url, "/audio/nothing", method="DELETE")[0] == 400


def test_a_vanished_caller_costs_at_most_a_second_of_tokens(url: str) -> None:
    """Whatever header it sends; Serve itself has one that keeps its request running."""
    body = json.dumps(serve_toy.chat(serve_toy.wav(2), model=MODEL, max_tokens=512, temperature=1)).encode()

    before, running = counts()[1], []
    for _ in range(8):
        running.append(connected(url, body, len(body), x_request_disconnect_disabled="?1"))
    since = time.monotonic()
    while counts()[1] < before + 40:
        assert time.monotonic() < since + 30
    for connection in running:
        connection.close()
    left = counts()[1]
    time.sleep(1)
    spent, later = counts()[1], (time.sleep(2), counts()[1])[1]
    tokens = {"before they went": left - before, "in the second after": spent - left, "later": later - spent}
    print(f"tokens of 8 callers: {tokens}")
    assert left - before < 8 * 512 / 2, "they were gone before their answers ended"
    assert later == spent


@pytest.mark.slow  # it takes time on an idle machine
def test_one_key_s_flood_does_not_hold_up_another(url: str) -> None:
    alone = [timed(url, "sk-ann") for _ in range(20)]
    with concurrent.futures.ThreadPoolExecutor(13) as pool:
        asked = {"n": 8, "max_tokens": 200, "temperature": 1}
        flood = [pool.submit(ask, url, serve_toy.wav(5), key="sk-bob", **asked) for _ in range(13)]
        time.sleep(1)
        beside = [timed(url, "sk-ann") for _ in range(20)]
        statuses = {each.result()[0] for each in flood}
    p95 = [float(np.percentile(times, 95)) for times in (alone, beside)]
    print(f"p95 alone {p95[0]:.2f} s, beside a flood {p95[1]:.2f} s")
    assert statuses <= {200, 408, 429}
    assert p95[1] < 5


def timed(url: str, key: str) -> float:
    since = time.monotonic()
    status, reply = ask(url, key=key, max_tokens=2)
    assert status == 200, reply
    return time.monotonic() - since


def test_answers_carry_one_request_id(url: str) -> None:
    parts = urlsplit(url)
    for given in ("mine-1", "evil id; drop"):
        with socket.create_connection((parts.hostname, parts.port), timeout=30) as connection:
            head = f"GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization: Bearer sk-ann\r\nx-request-id: {given}\r\n"
            connection.sendall(f"{head}connection: close\r\n\r\n".encode())
            reply = b"".join(iter(lambda connection=connection: connection.recv(65536), b"")).decode().lower()
        assert reply.count("x-request-id") == 1


def test_a_key_is_revoked_while_the_server_runs(url: str, keys: Path) -> None:
    assert send(url, "/models", key="sk-bob")[0] == 200
    keys.write_text("sk-ann\nsk-eve\n")
    time.sleep(1.2)
    assert send(url, "/models", key="sk-bob")[0] == 401
    assert send(url, "/models", key="sk-eve")[0] == 200
    keys.write_text("sk-ann\nsk-bob\n")
    time.sleep(1.2)
    assert send(url, "/models", key="sk-bob")[0] == 200


def test_a_replica_whose_device_fails_is_replaced(url: str, folder: Path) -> None:
    """Every step fails: another replica answers, 20 s later on an idle machine."""
    (before,) = serve_toy.pids("Model")
    fault = folder.parent / FAULT
    fault.touch()
    failed = [ask(url, serve_toy.wav(1)) for _ in range(3)]
    assert all(status in (500, 503) for status, _ in failed), failed
    fault.unlink()
    since = time.monotonic()
    while before in serve_toy.pids("Model") or ask(url, serve_toy.wav(1))[0] != 200:
        assert time.monotonic() < since + 120
        time.sleep(0.5)
    print(f"replaced in {time.monotonic() - since:.1f} s")


def test_a_body_that_is_not_sent_costs_only_its_sender(url: str) -> None:
    """Base64 of nothing, oversized and slow: 4xx each, and the server goes on."""
    big = base64.b64encode(bytes(5 * 2**20)).decode()
    status, reply, _ = send(url, "/chat/completions", {"model": MODEL, "messages": big})
    assert (status, reply["error"]["code"]) == (413, "body_too_large")
    assert ask(url, serve_toy.wav(1))[0] == 200


def test_a_body_without_end_is_cut(url: str) -> None:
    """500 MiB without a stated length, where 4 are allowed: a 413, the server goes on; how much it grew is printed.

    Ray's proxy keeps what comes before the replica has answered: between half and all of it, as fast as it comes.
    """
    parts = urlsplit(url)
    processes = [*serve_toy.processes("ProxyActor"), *serve_toy.processes("Ingress")]
    before = most = sum(each.memory_info().rss for each in processes)
    sent, chunk = 0, b"10000\r\n" + b"x" * 2**16 + b"\r\n"
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as connection:
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer sk-bob\r\n"
        connection.sendall(f"{head}content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n".encode())
        with contextlib.suppress(OSError):
            while sent < 500 * 2**20:
                connection.sendall(chunk)
                sent += 2**16
                if sent % 2**24 == 0:
                    most = max(most, sum(each.memory_info().rss for each in processes))
        with contextlib.suppress(OSError):
            print(connection.recv(200).partition(b"\r\n")[0].decode())
    print(f"{sent / 2**20:.0f} MiB sent, the server grew by {(most - before) / 2**20:.0f} MiB")
    assert ask(url, serve_toy.wav(1))[0] == 200
    assert most - before < 2 * sent
