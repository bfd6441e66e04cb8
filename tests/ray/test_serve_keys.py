"""A server with API keys: nothing is told or done without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import serve_toy

_SERVER = """
import json, sys, urllib.error, urllib.request
import ray
from serve_apps import af2

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
asked = json.load(sys.stdin)
with af2.run_app(sys.argv[1]) as url:
    for path, body, headers in asked:
        data = body and json.dumps(body).encode()
        try:
            with urllib.request.urlopen(urllib.request.Request(url + path, data, headers), timeout=60) as response:
                print(json.dumps([response.status, response.read().decode()]))
        except urllib.error.HTTPError as error:
            print(json.dumps([error.code, error.read().decode()]))
ray.shutdown()
"""
KEY = "sk-right"
REFUSED = {
    "missing_api_key": ({}, {"authorization": KEY}, {"authorization": f"Basic {KEY}"}),
    "invalid_api_key": ({"authorization": "Bearer sk-wrong"}, {"authorization": f"Bearer {KEY}x"}),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> list[tuple[int, str]]:
    """What a server, whose environment names one key, answered to each of `asked()`."""
    folder = serve_toy.export(tmp_path_factory.mktemp("locked"), tiny_tokenizer)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", _SERVER, str(folder)],
        input=json.dumps(asked()),
        env={**os.environ, "AF2_API_KEYS": KEY, "PYTHONPATH": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines() if line.startswith("[")]


def asked() -> list[tuple[str, Any, dict[str, str]]]:
    """Path, body and headers of each request: those that are to be refused, then those with the key."""
    json_type = {"content-type": "application/json"}
    question = serve_toy.chat(serve_toy.wav(1), model="af2") | {"max_tokens": 2}
    paths: list[tuple[str, Any]] = [
        ("/models", None),
        ("/chat/completions", question),
        ("/chat/completions", {"garbage": True}),
        ("/embeddings", {"model": "af2-clap", "input": "a dog"}),
    ]
    refused = [
        (path, body, json_type | headers) for each in REFUSED.values() for headers in each for path, body in paths
    ]
    return [*refused, *((path, body, json_type | {"authorization": f"Bearer {KEY}"}) for path, body in paths)]


def test_without_a_right_key_nothing_is_told(found: list[tuple[int, str]]) -> None:
    codes = [code for code, each in REFUSED.items() for _ in range(4 * len(each))]
    refused = found[: len(codes)]
    assert [status for status, _ in refused] == [401] * len(codes)
    assert [json.loads(body)["error"]["code"] for _, body in refused] == codes
    assert KEY not in str(found)


def test_with_the_key_the_same_requests_are_answered(found: list[tuple[int, str]]) -> None:
    models, answer, garbage, _ = found[-4:]
    assert models[0] == 200
    assert json.loads(models[1])["data"][0]["id"] == "af2"
    assert answer[0] == 200
    assert "choices" in json.loads(answer[1])
    assert 400 <= garbage[0] < 500, "told what is wrong, now that the client may ask"
    assert garbage[0] != 401
