"""The door: what callers do to nginx, and what of it reaches the server behind."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest
import reverse_proxy
from reverse_proxy import LARGE_BYTES, PIECE_S, ROOT, Headers, Proxy, Upstream, wait_until

pytestmark = pytest.mark.skipif(reverse_proxy.NGINX is None, reason="needs nginx (Debian: nginx-light)")

UPLOAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n{"
PASSED_ON = {"host", "accept", "authorization", "content-type", "user-agent", "x-forwarded-for", "x-request-id"}
FRAMING = {"content-length"}


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream() as server:
        yield server


@pytest.fixture(scope="module")
def proxy(upstream: Upstream) -> Iterator[Proxy]:
    """As it is deployed."""
    with reverse_proxy.started(upstream.port) as running:
        yield running


@pytest.fixture(scope="module")
def hasty(upstream: Upstream) -> Iterator[Proxy]:
    """With deadlines of a second and four requests an address."""
    seconds = {"HEADER_S": 1, "BODY_S": 1, "SEND_S": 1, "ANSWER_S": 1}
    with reverse_proxy.started(upstream.port, ADDRESS_REQUESTS=4, **seconds) as running:
        yield running


def error_of(answer: tuple[int, Headers, bytes]) -> dict[str, str | None]:
    """The error of an answer, whose shape is checked."""
    _, headers, body = answer
    assert dict(headers)["content-type"] == "application/json"
    error: dict[str, str | None] = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


def seconds_until_closed(client: socket.socket, trickle: bytes = b"") -> float:
    """How long a connection lives that sends a byte each 50 ms."""
    start = time.monotonic()
    with suppress(ConnectionError):
        for byte in trickle:
            client.sendall(bytes([byte]))
            time.sleep(0.05)
        client.recv(1)
    return time.monotonic() - start


# --- Callers that hold the door --------------------------------------------------------------------------------------


def test_idle_uploads_and_stalled_readers_hold_nobody_up(proxy: Proxy, upstream: Upstream) -> None:
    """128 of each, from two addresses, against one more caller."""
    with ExitStack() as stack:
        for _ in range(128):
            stack.enter_context(proxy.connect("127.0.0.2")).sendall(UPLOAD)
            reader = stack.enter_context(proxy.connect("127.0.0.3", window=4096))
            reader.sendall(b"GET /v1/large HTTP/1.1\r\nHost: a\r\n\r\n")
        # The upstream is one thread of this process and writes 512 MiB here; its time is not the proxy's.
        wait_until(lambda: upstream.paths().count("/v1/large") == 128 and upstream.answering == 0)
        start = time.monotonic()
        assert proxy.ask("/health")[0] == 200
        health_s, start = time.monotonic() - start, time.monotonic()
        assert proxy.ask("/v1/chat/completions", b"{}")[0] == 200
        question_s = time.monotonic() - start
        log = proxy.log.read_text()
        print(f"{health_s=:.3f} {question_s=:.3f} memory_mb={proxy.memory_mb():.0f}")
    assert (health_s < 1, question_s < 5) == (True, True)
    assert "/v1/large" not in log, "the readers were still there, and no answer was left in the upstream"
    assert upstream.paths().count("/v1/chat/completions") == 1, "no upload reached it"


def test_uploads_beyond_an_address_s_share_are_refused_and_others_are_not(hasty: Proxy) -> None:
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(hasty.connect("127.0.0.2")).sendall(UPLOAD)
        time.sleep(0.1)
        refused = hasty.ask("/v1/models", address="127.0.0.2")
        assert (refused[0], dict(refused[1])["retry-after"]) == (429, "5")
        assert error_of(refused)["type"] == "rate_limit_error"
        assert hasty.ask("/v1/models")[0] == 200
        assert hasty.ask("/health", address="127.0.0.2")[0] == 200


def test_a_large_upload_costs_the_proxy_no_memory(proxy: Proxy, upstream: Upstream) -> None:
    """500 MiB without a stated length, where 64 are allowed."""
    before, peak, is_done = proxy.memory_mb(), [0.0], threading.Event()

    def watch() -> None:
        while not is_done.wait(0.02):
            peak[0] = max(peak[0], proxy.memory_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    piece = b"100000\r\n" + bytes(2**20) + b"\r\n"
    with proxy.connect() as client:
        client.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(500):
            client.sendall(piece)
        answer = http.client.HTTPResponse(client)
        answer.begin()
        body = answer.read()
    is_done.set()
    watcher.join()
    print(f"memory_mb={before:.0f} peak_mb={peak[0]:.0f}")
    assert error_of((answer.status, [("content-type", "application/json")], body))["code"] == "body_too_large"
    assert answer.status == 413
    assert peak[0] - before < 2 * 64
    assert "/v1/embeddings" not in upstream.paths()


def test_a_body_of_the_largest_size_arrives_whole(proxy: Proxy) -> None:
    assert proxy.ask("/v1/chat/completions", bytes(64 * 2**20))[0] == 200
    assert proxy.ask("/v1/chat/completions", bytes(64 * 2**20 + 1))[0] == 413


@pytest.mark.parametrize("begun", [b"GET /v1/models HTTP/1.1\r\nHost: a\r\nX: ", UPLOAD[: UPLOAD.index(b"Host")]])
def test_a_header_that_trickles_is_cut(hasty: Proxy, begun: bytes) -> None:
    with hasty.connect() as client:
        client.sendall(begun)
        assert 0.8 < seconds_until_closed(client, b"a" * 100) < 3


def test_a_body_that_stops_is_cut_and_never_seen(hasty: Proxy, upstream: Upstream) -> None:
    seen = len(upstream.seen)
    with hasty.connect() as client:
        client.sendall(UPLOAD)
        assert 0.8 < seconds_until_closed(client) < 3
    assert len(upstream.seen) == seen


def test_a_reader_that_stops_is_cut(hasty: Proxy) -> None:
    with hasty.connect(window=4096) as client:
        client.sendall(b"GET /v1/large HTTP/1.1\r\nHost: a\r\n\r\n")
        wait_until(lambda: "/v1/large" in hasty.log.read_text(), 5)
        read = 0
        with suppress(ConnectionError):
            while piece := client.recv(2**16):
                read += len(piece)
    assert read < LARGE_BYTES


@pytest.mark.parametrize("path", ["/health", "/docs"])
def test_where_no_body_is_due_none_is_waited_for(proxy: Proxy, path: str) -> None:
    with proxy.connect() as client:
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n".encode())
        assert client.recv(12) == b"HTTP/1.1 400"


# --- Callers that are well -------------------------------------------------------------------------------------------


def test_pieces_of_a_stream_arrive_one_by_one(proxy: Proxy) -> None:
    client = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=10)
    client.request("POST", "/v1/stream", b"{}")
    answer, start, arrived = client.getresponse(), time.monotonic(), []
    while piece := answer.read1():
        arrived.append((piece, time.monotonic() - start))
    client.close()
    print([f"{seconds:.2f}" for _, seconds in arrived])
    assert [piece for piece, _ in arrived] == [b"data: %d\n\n" % number for number in range(5)]
    assert all(seconds < (number + 1) * PIECE_S for number, (_, seconds) in enumerate(arrived))


@pytest.mark.parametrize("path", ["/v1/wait", "/v1/stream"])
def test_a_caller_that_leaves_is_missed_at_once(proxy: Proxy, upstream: Upstream, path: str) -> None:
    before = upstream.vanished
    with proxy.connect() as client:
        client.sendall(f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{{}}".encode())
        wait_until(lambda: upstream.answering == 1)
        time.sleep(0.1)
        assert upstream.vanished == before
    left_s = wait_until(lambda: upstream.vanished == before + 1)
    print(f"{left_s=:.3f}")
    assert left_s < 1


def test_open_paths(proxy: Proxy, upstream: Upstream) -> None:
    for path in ("/", "/health", "/docs", "/openapi.json", "/v1/models", "/v1/audio/labels?a=b"):
        assert proxy.ask(path)[0] == 200, path


@pytest.mark.parametrize(
    "path",
    [
        *("/metrics", "//metrics", "/%6detrics", "/metrics?/v1/", "/metrics#/../v1/models", "/v1/../metrics"),
        *("/v1/%2e%2e/metrics", "/v1/..%2fmetrics", "/-/routes", "/-/healthz", "//-/routes", "/v1/../-/routes"),
        *("/v1", "/docs/", "/redoc", "/healthz", "/error", "/api/serve/applications/"),
    ],
)
def test_all_else_is_closed(proxy: Proxy, upstream: Upstream, path: str) -> None:
    seen = len(upstream.seen)
    answer = proxy.ask(path)
    assert answer[0] == 404
    error_of(answer)
    assert len(upstream.seen) == seen


# --- Headers ---------------------------------------------------------------------------------------------------------

CONTROL = (
    *("x-request-disconnect-disabled", "x-request-timeout-seconds", "x-session-id"),
    *("serve_multiplexed_model_id", "x-forwarded-proto", "x-forwarded-host", "forwarded", "x-anything-of-tomorrow"),
)


@pytest.mark.parametrize("value", [b"evil", b"?1; evil", b"\xff\xfe evil", b"evil" * 1000])
def test_ray_s_control_headers_never_arrive(proxy: Proxy, upstream: Upstream, value: bytes) -> None:
    spellings = {
        spelling
        for name in (*CONTROL, "x-request-id")
        for turned in (name, name.replace("-", "_"), name.replace("_", "-"))
        for spelling in (turned, turned.upper(), turned.title())
    }
    for spelling in spellings:
        assert proxy.ask("/v1/models", headers=[(spelling, value)])[0] == 200
        _, headers = upstream.seen[-1]
        assert {name.decode() for name, _ in headers} <= PASSED_ON | FRAMING
        assert not [pair for pair in headers if b"evil" in pair[1] and pair != (b"x-request-id", b"evil")]


def test_what_the_server_reads_of_a_request_arrives(proxy: Proxy, upstream: Upstream) -> None:
    given = {"authorization": "Bearer k\xe9y", "content-type": "application/json", "accept": "*/*", "user-agent": "me"}
    proxy.ask("/v1/chat/completions", b"{}", given.items())
    _, headers = upstream.seen[-1]
    assert given.items() <= {name.decode(): value.decode("latin-1") for name, value in headers}.items()
    sources = [path.read_text() for path in (ROOT / "serve_apps").glob("*.py") if path.name != "fetch.py"]
    read = {name.lower() for name in re.findall(r'headers\.get\(\s*"([\w-]+)"', "\n".join(sources))}
    assert "authorization" in read
    assert read <= PASSED_ON | FRAMING, "name the new one in cluster/base/proxy/nginx.conf"


@pytest.mark.parametrize(
    ("given", "is_kept"),
    [
        ([b"My-id_1"], True),
        ([b"a" * 64], True),
        *([([value], False) for value in (b"a" * 65, b"evil id; drop", b"\xff", b"a\tb", b"a" * 6000, b"a.b")]),
        ([], False),
    ],
)
def test_an_answer_has_one_request_id_and_the_server_the_same(
    proxy: Proxy, upstream: Upstream, given: list[bytes], is_kept: bool
) -> None:
    for path in ("/v1/models", "/nowhere"):
        _, headers, _ = proxy.ask(path, headers=[("x-request-id", value) for value in given])
        (found,) = [value for name, value in headers if name == "x-request-id"]
        assert re.fullmatch(r"[A-Za-z0-9_-]{1,64}", found)
        assert (found.encode() in given) == is_kept
        if path != "/nowhere":
            assert [v for name, v in upstream.seen[-1][1] if name == b"x-request-id"] == [found.encode()]


def test_two_request_ids_become_one(proxy: Proxy, upstream: Upstream) -> None:
    _, headers, _ = proxy.ask("/v1/models", headers=[("x-request-id", "a"), ("x-request-id", "b; evil")])
    (found,) = [value for name, value in headers if name == "x-request-id"]
    assert [v for name, v in upstream.seen[-1][1] if name == b"x-request-id"] == [found.encode()]
    assert "evil" not in found


# --- Errors ----------------------------------------------------------------------------------------------------------


def test_errors_of_the_proxy_have_openai_s_shape(proxy: Proxy) -> None:
    long = [("a", "b" * 9000)]
    for answer, status in [
        (proxy.ask("/v1/chat/completions", bytes(65 * 2**20)), 413),
        (proxy.ask("/v1/models", headers=long), 431),
        (proxy.ask("/v1/" + "a" * 9000), 414),
        (proxy.ask("/v1/models", headers=[("content-length", "x")]), 400),
    ]:
        assert answer[0] == status
        assert error_of(answer)["type"] == "invalid_request_error"


def test_a_server_that_is_away_or_late(hasty: Proxy) -> None:
    late = hasty.ask("/v1/wait", b"{}")
    assert (late[0], error_of(late)["code"]) == (504, "timeout")
    (closed,) = reverse_proxy.nodes.free_ports(1)
    with reverse_proxy.started(closed) as alone:
        for path in ("/v1/models", "/health"):
            away = alone.ask(path)
            assert (away[0], error_of(away)["code"], dict(away[1])["retry-after"]) == (502, "unavailable", "5")


def test_errors_of_the_server_stay_as_they_are(proxy: Proxy) -> None:
    status, headers, body = proxy.ask("/v1/restarting", b"{}")
    assert (status, body) == (503, b"well")
    assert [value for name, value in headers if name == "retry-after"] == ["7"]
