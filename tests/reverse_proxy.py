"""The project's nginx in front of a server that says what reached it: no Ray, no model."""

from __future__ import annotations

import asyncio
import http.client
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nodes
import uvicorn

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "cluster" / "base" / "proxy"
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
LARGE_BYTES = 4 * 2**20  # more than the sockets between two programs take up
PIECE_S = 0.2
Headers = list[tuple[str, str]]


def wait_until(is_true: Callable[[], bool], timeout_s: float = 10.0) -> float:
    """Seconds until a condition holds."""
    start = time.monotonic()
    while not is_true():
        assert time.monotonic() - start < timeout_s, "never true"
        time.sleep(0.01)
    return time.monotonic() - start


class Upstream:
    """Stands for Ray Serve on a port of 127.0.0.1.

    Attributes:
        seen: path and headers of each request, as they arrived.
        reading: number of requests whose body is on its way.
        answering: number of requests whose answer is.
        vanished: number of callers that left before their answer's end.
    """

    def __init__(self) -> None:
        (self.port,) = nodes.free_ports(1)
        self.seen: list[tuple[str, list[tuple[bytes, bytes]]]] = []
        self.reading = self.answering = self.vanished = 0
        config = uvicorn.Config(
            self._app, port=self.port, interface="asgi3", log_level="error", lifespan="off", timeout_keep_alive=90
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> Upstream:
        self._thread.start()
        wait_until(lambda: self._server.started)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.force_exit = self._server.should_exit = True
        self._thread.join(10)

    def paths(self) -> list[str]:
        """Paths of the requests that arrived."""
        return [path for path, _ in self.seen]

    async def _app(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        self.seen.append((scope["path"], list(scope["headers"])))
        self.reading += 1
        while (message := await receive()).get("more_body"):
            pass
        self.reading -= 1
        if message["type"] == "http.disconnect":
            return
        self.answering += 1
        answer = {"/v1/stream": self._stream, "/v1/wait": self._wait}.get(scope["path"], self._whole)
        try:
            await answer(scope["path"], receive, send)
        finally:
            self.answering -= 1

    async def _whole(self, path: str, receive: Any, send: Any) -> None:
        status = 503 if path == "/v1/restarting" else 200
        headers = [(b"x-request-id", b"of-the-upstream")] + ([(b"retry-after", b"7")] if status == 503 else [])
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": bytes(LARGE_BYTES) if path == "/v1/large" else b"well"})

    async def _stream(self, path: str, receive: Any, send: Any) -> None:
        """Five events, one after the other."""
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        left = asyncio.create_task(receive())
        for number in range(5):
            await send({"type": "http.response.body", "body": b"data: %d\n\n" % number, "more_body": True})
            if (await asyncio.wait([left], timeout=PIECE_S))[0]:
                self.vanished += 1
                return
        left.cancel()
        await send({"type": "http.response.body", "body": b""})

    async def _wait(self, path: str, receive: Any, send: Any) -> None:
        """No answer, until the caller has left."""
        assert (await receive())["type"] == "http.disconnect"
        self.vanished += 1


@dataclass
class Proxy:
    """A running nginx, by its port on 127.0.0.1."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path

    def memory_mb(self) -> float:
        """Resident MiB of all its processes."""
        pid = self.process.pid
        workers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        pages = [int(Path(f"/proc/{each}/statm").read_text().split()[1]) for each in (pid, *workers)]
        return sum(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20

    def connect(self, address: str = "127.0.0.1", *, window: int | None = None) -> socket.socket:
        """A connection from an address of this machine; `window`: bytes that the client's socket takes unread."""
        client = socket.socket()
        if window:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        client.bind((address, 0))
        client.settimeout(10)
        client.connect(("127.0.0.1", self.port))
        return client

    def ask(
        self,
        path: str,
        body: bytes = b"",
        headers: Iterable[tuple[str, str | bytes]] = (),
        *,
        address: str = "127.0.0.1",
    ) -> tuple[int, Headers, bytes]:
        """Status, headers and body of an answer; with a body it is a POST."""
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10, source_address=(address, 0))
        client.putrequest("POST" if body else "GET", path)
        for name, value in [*headers, *([("content-length", str(len(body)))] if body else [])]:
            client.putheader(name, value)
        try:
            client.endheaders(body or None)
            answer = client.getresponse()
            return answer.status, [(name.lower(), value) for name, value in answer.getheaders()], answer.read()
        finally:
            client.close()


@contextmanager
def started(upstream_port: int, **values: object) -> Iterator[Proxy]:
    """The proxy as its pod starts it; `values` are those of start.sh, without `AF2_PROXY_`."""
    port, live = nodes.free_ports(2)
    places = {"LISTEN": f"127.0.0.1:{port}", "LIVE": f"127.0.0.1:{live}", "UPSTREAM": f"127.0.0.1:{upstream_port}"}
    with tempfile.TemporaryDirectory() as folder:  # not pytest's, which no other user may enter
        environment = {
            f"AF2_PROXY_{name}": str(value) for name, value in (places | {"FOLDER": folder} | values).items()
        }
        log = Path(folder) / "log"
        with log.open("a") as file:
            command = ["sh", str(FOLDER / "start.sh")]
            process = subprocess.Popen(command, env=os.environ | environment, stdout=file, stderr=file)
        proxy = Proxy(port, process, log)

        def is_up() -> bool:
            assert process.poll() is None, log.read_text()
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", live)) == 0

        try:
            wait_until(is_up)
            yield proxy
        finally:
            process.terminate()
            process.wait(10)
