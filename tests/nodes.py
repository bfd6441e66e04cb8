"""Ray nodes on this machine, as processes of their own: a cluster that grows, and loses a node, as a real one does."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil

RAY = str(Path(sys.executable).parent / "ray")


class Nodes:
    """A head, and nodes that come and go. Everything has a port of its own: other clusters have the usual ones."""

    def __init__(self, folder: Path, *, head_cpus: int = 0) -> None:
        self._folder = folder
        self._all: list[subprocess.Popen[bytes]] = []
        port, dashboard = free_ports(2)
        self.gcs, self.address = f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"
        self._start(
            *("--head", f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"),
            *("--disable-usage-stats", f"--temp-dir=/tmp/ray_{os.getpid()}_{port}", f"--num-cpus={head_cpus}"),
        )
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{self.address}/api/version", timeout=2)
                return
            except OSError:
                assert self._all[0].poll() is None, self.log(0)
                time.sleep(0.5)
        raise AssertionError("the head does not come up: " + self.log(0))

    def add(self, *, num_cpus: int, scratch: Path | None = None) -> subprocess.Popen[bytes]:
        """One more node, with its own folder for temporary files if `scratch` is given, once it has joined."""
        more = {} if scratch is None else {"TMPDIR": str(scratch), "RAY_TMPDIR": "/tmp"}
        number, node = len(self._all), self._start(f"--address={self.gcs}", f"--num-cpus={num_cpus}", **more)
        deadline = (
            time.monotonic() + 120
        )  # one after the other: two that start at once can wait for each other for ever
        while "Ray runtime started" not in self.log(number):
            assert node.poll() is None, self.log(number)
            assert time.monotonic() < deadline, self.log(number)
            time.sleep(0.2)
        return node

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """SIGKILL to all of a node's processes at once, as if its power had gone."""
        parent = psutil.Process(node.pid)
        for process in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        node.wait()

    def stop(self) -> None:
        """End what is left, the head last. Nothing of it is kept, and to ask it took half a minute."""
        for node in reversed(self._all):
            if node.poll() is None:
                self.kill(node)

    def submit(
        self, *entrypoint: str, environment: dict[str, str], timeout_s: float = 500, in_image: bool = False
    ) -> Any:
        """`ray job submit` of this project; the finished process.

        Args:
            in_image: the nodes have the code already. Several nodes of one machine share a folder for what a job
                brings along, and each of them clears it for itself, under the feet of the others.
        """
        root = str(Path(__file__).parents[1])
        code = ["--working-dir", root]
        if in_image:
            code = ["--runtime-env-json", json.dumps({"env_vars": {"PYTHONPATH": root}})]
        command = [RAY, "job", "submit", "--address", self.address, *code, "--", *entrypoint]
        deadline = time.monotonic() + 120
        while True:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
            )
            if "No available agent" not in done.stderr or time.monotonic() > deadline:
                return done  # a node's agent comes up some seconds after the head answers
            time.sleep(2)

    def log(self, number: int) -> str:
        """The end of what a node has printed."""
        return (self._folder / f"node_{number}.log").read_text()[-4000:]

    def _start(self, *arguments: str, **more: str) -> subprocess.Popen[bytes]:
        listen, grpc, metrics = free_ports(3)
        command = [
            *(RAY, "start", "--block", *arguments, "--object-store-memory=500000000"),
            *(f"--dashboard-agent-listen-port={listen}", f"--dashboard-agent-grpc-port={grpc}"),
            *(f"--metrics-export-port={metrics}", "--min-worker-port=0", "--max-worker-port=0"),
        ]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | more
        environment["RAY_AUTH_MODE"] = "disabled"  # a token would have to reach the job's client too
        with (self._folder / f"node_{len(self._all)}.log").open("w") as log:
            node = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        self._all.append(node)
        return node


def free_ports(num: int) -> list[int]:
    """Ports of this machine that nothing has."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(num)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
