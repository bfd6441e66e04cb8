"""A real S3 server for tests: it checks signatures and can be killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

WEED = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
KEY, SECRET, BUCKET = "reader", "reader-secret", "audio"
GRPC = 10_000  # SeaweedFS takes this port above each for gRPC
PORTS = range(20_001, 22_700)  # with the ports above them, neither Ray's workers' nor any a connection is given


class Server:
    """One SeaweedFS process with an S3 port and the bucket `audio`, on a folder that outlives it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ports = _free_ports(4)
        self.url = f"http://127.0.0.1:{self._ports[3]}"
        identity = {"name": KEY, "credentials": [{"accessKey": KEY, "secretKey": SECRET}]}
        identity["actions"] = ["Admin", "Read", "Write", "List"]  # type: ignore[assignment]
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        self._process: subprocess.Popen[bytes] | None = None

    def client(self) -> Any:
        config = Config(retries={"max_attempts": 1}, connect_timeout=2, read_timeout=30)
        keys = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
        return boto3.client("s3", endpoint_url=self.url, config=config, **keys)

    def start(self) -> None:
        master, volume, filer, s3 = self._ports
        command = [
            *(str(WEED), "server", f"-dir={self._folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
            *(f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", "-s3", f"-s3.port={s3}"),
            *(f"-s3.config={self._folder}/s3.json", "-master.volumeSizeLimitMB=64"),
            "-master.electionTimeout=1s",  # of one master: 10 s more for each start after a kill
            "-volume.minFreeSpace=64MiB",  # else a share of the disk: a full one takes no write and says nothing
            *("-s3.port.iceberg=0", "-s3.port.lance=0"),
        ]
        with (self._folder / "weed.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self._folder)
        deadline = time.monotonic() + 120
        while True:
            try:
                self._use()
                return
            except Exception:
                assert self._process.poll() is None, (self._folder / "weed.log").read_text()[-2000:]
                assert time.monotonic() < deadline, "the S3 server does not come up"
                time.sleep(0.5)

    def _use(self) -> None:
        """Make the bucket; a file is written, read, removed: a server that answers may not have its files yet."""
        client, file = self.client(), {"Bucket": BUCKET, "Key": "is-it-up"}
        if BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
            client.create_bucket(Bucket=BUCKET)
        client.put_object(**file, Body=b"yes")
        client.get_object(**file)["Body"].read()
        client.delete_object(**file)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


class Folder:
    """What a test sees of a folder on the server."""

    def __init__(self, server: Server, prefix: str) -> None:
        self._client, self._prefix = server.client(), prefix.rstrip("/") + "/"

    def names(self) -> list[str]:
        """Of all files below, relative to the folder."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=self._prefix)
        return [item["Key"].removeprefix(self._prefix) for page in pages for item in page.get("Contents", [])]

    def read(self, name: str) -> bytes:
        return self._client.get_object(Bucket=BUCKET, Key=self._prefix + name)["Body"].read()

    def steps(self, stage: str) -> list[int]:
        """Of a stage's metrics, as far as they are there."""
        name = f"stages/{stage}/metrics.jsonl"
        return [json.loads(line)["step"] for line in self.read(name).splitlines()] if name in self.names() else []


def _free_ports(count: int) -> list[int]:
    """Ports that are free, and whose gRPC ports are."""
    free: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        if all(_is_free(each) for each in (port, port + GRPC)):
            free.append(port)
        if len(free) == count:
            return free
    raise RuntimeError(f"no {count} free ports in {PORTS}")


def _is_free(port: int) -> bool:
    with socket.socket() as one:
        try:
            one.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
