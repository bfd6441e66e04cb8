"""What requests cost an ingress: run as a program, apart from the tests, so that its memory is its own.

    python costs_child.py MiB

Every shape of `bodies` goes through the ingress' own handlers; the last line of standard output is a JSON object: by
shape, the HTTP status and message, the memory it took beyond its body's bytes and how long the event loop stood still.
"""

from __future__ import annotations

import asyncio
import base64
import json
import resource
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, cast

from fastapi import Request
from serve_toy import wav

from af2_ray.config import Serve
from serve_apps.ingress import Ingress
from serve_apps.schemas import ApiError

CHAT, EMBEDDINGS, LABELS = "chat", "embeddings", "labels"
_CHUNK = 2**16
_NOTHING = ""
_QUESTION = '{"type": "text", "text": "what?"}'
_TEXT, _OTHER, _MESSAGE = '{"type":"text","text":""}', '{"type":"x"}', '{"role":"user","content":"a"}'
_RECORDING = '{"type":"input_audio","input_audio":{"data":"AA==","format":"wav"}}'
_LABEL, _PAIR, _EMPTY, _ESCAPE = '"a"', '"n": 1', '""', "\\"
_ZERO, _OBJECT, _LIST = "0", "{}", "[]"
_QUOTED = "x" * 1000 + _ESCAPE + '"'
_LOW, _HIGH, _LETTER = _ESCAPE + "ude00", _ESCAPE + "ud83d", _ESCAPE + "u0041"


def _chat(content: str, more: str = "") -> str:
    return f'{{"model": "af2", "messages": [{{"role": "user", "content": {content}}}]{more}}}'


def _audio(data: str) -> str:
    return _chat(f'[{{"type": "input_audio", "input_audio": {{"format": "wav", "data": "{data}"}}}}, {_QUESTION}]')


def _url(url: str) -> str:
    return _chat(f'[{{"type": "audio_url", "audio_url": {{"url": "{url}"}}}}, {_QUESTION}]')


def _many(item: str, num_bytes: int, *, between: str = ",") -> str:
    return between.join([item] * (num_bytes // (len(item.encode()) + len(between))))


def _embed(items: str) -> str:
    return f'{{"model": "af2-clap", "input": {items}}}'


def _labels(labels: str, template: str = "a {}") -> str:
    clip = base64.b64encode(wav(0.1)).decode()
    audio = f'{{"type": "input_audio", "input_audio": {{"format": "wav", "data": "{clip}"}}}}'
    texts = f'"candidate_labels": [{labels}], "hypothesis_template": "{template}"'
    return f'{{"model": "af2-clap", "input": {audio}, {texts}}}'


def bodies(size: int) -> Iterator[tuple[str, str, bytes]]:
    """Name, handler and body of each shape, filled up to `size` bytes."""
    fill = size - 4096
    sound = base64.b64encode(wav((fill * 3 // 4) / 32_000)).decode()
    keys = ",".join(f'"k{number:07d}": 0' for number in range(fill // 14))
    chats: dict[str, str | bytes] = {
        "empty strings as parts": _chat(f"[{_many(_EMPTY, fill)}]"),
        "parts of text": _chat(f"[{_many(_TEXT, fill)}]"),
        "parts of other types": _chat(f"[{_many(_OTHER, fill)}]"),
        "numbers as parts": _chat(f"[{_many(_ZERO, fill)}]"),
        "lists as parts": _chat(f"[{_many(_LIST, fill)}]"),
        "recordings": _chat(f"[{_many(_RECORDING, fill)}]"),
        "unknown list of numbers": _chat('"a"', f', "x": [{_many(_ZERO, fill)}]'),
        "unknown list of objects": _chat('"a"', f', "x": [{_many(_OBJECT, fill)}]'),
        "unknown list of lists": _chat('"a"', f', "x": [{_many(_LIST, fill)}]'),
        "unknown object": _chat('"a"', f', "x": {{{keys}}}'),
        "unknown keys": _chat('"a"', f", {keys}"),
        "one key again and again": _chat('"a"', f", {_many(_PAIR, fill)}"),
        "unknown long string": _chat('"a"', f', "model": "{"x" * fill}"'),
        "long key": _chat('"a"', f', "n": 9, "{"x" * fill}": 1'),
        "messages": f'{{"model": "af2", "messages": [{_many(_MESSAGE, fill)}]}}',
        "messages that are numbers": f'{{"model": "af2", "messages": [{_many(_ZERO, fill)}]}}',
        "stop strings": _chat('"a"', f', "stop": [{_many(_EMPTY, fill)}]'),
        "a long stop string": _chat('"a"', f', "stop": "{"x" * fill}"'),
        "a long model": f'{{"model": "{"x" * fill}", "messages": [{{"role": "user", "content": "a"}}]}}',
        "a long role": f'{{"model": "af2", "messages": [{{"role": "{"x" * fill}", "content": "a"}}]}}',
        "a long text": _chat(f'"{"x" * fill}"'),
        "a long text with one wide letter": _chat(f'"{"x" * fill}\U0001f600"'),
        "a long text with one escaped wide letter": _chat(f'"{"x" * fill}{_HIGH + _LOW}"'),
        "quoted marks and one wide letter": _chat(f'"{_QUOTED * (fill // 1002)}\U0001f600"'),
        "marks alone": _chat('"' * fill),
        "a long text of two-byte letters": _chat(f'"{"é" * (fill // 2)}"'),
        "a long text of three-byte letters": _chat(f'"{"中" * (fill // 3)}"'),
        "escapes": _chat(f'"{_many(_LETTER, fill, between=_NOTHING)}"'),
        "escapes of wide letters": _chat(f'"{_many(_HIGH + _LOW, fill, between=_NOTHING)}"'),
        "base64 in small pieces": _audio(_many("AA", fill, between=" ")),
        "base64 of line breaks": _audio(_many("\\n", fill, between="")),
        "base64 with a wide letter": _audio("A" * fill + "\U0001f600"),
        "base64 of nothing known": _audio("A" * (fill - fill % 4)),
        "a long recording": _audio(sound),
        "a long recording by data address": _url("data:audio/wav;base64," + sound),
        "a long https address": _url("https://example.org/" + "a" * fill),
        "a long number": _chat('"a"', f', "n": {"1" * fill}'),
        "a long number for a seed": _chat('"a"', f', "seed": -{"9" * fill}'),
        "a long fraction": _chat('"a"', f', "temperature": 3.{"1" * fill}'),
        "a long exponent": _chat('"a"', f', "temperature": 1e{"9" * fill}'),
        "deep lists": "[" * fill,
        "deep objects": _many('{"a":', fill, between=""),
        "numbers": f"[{_many(_ZERO, fill)}]",
        "blanks": " " * fill,
        "not closed": _chat(f'"{"x" * fill}')[:-3],
        "not UTF-8": b'{"model": "' + b"\xff" * fill,
        "tools": _chat('"a"', f', "tools": [{_many(_OBJECT, fill)}]'),
        "logit biases": _chat('"a"', f', "logit_bias": {{{keys}}}'),
        "a long response format": _chat('"a"', f', "response_format": {{"type": "{"x" * fill}"}}'),
    }
    longs = ",".join(['"' + "x " * (fill // 520) + '"'] * 256)
    embeddings = {
        "empty inputs": _embed(f"[{_many(_EMPTY, fill)}]"),
        "token ids": _embed(f"[{_many(_ZERO, fill)}]"),
        "lists of token ids": _embed(f"[{_many(_LIST, fill)}]"),
        "long inputs": _embed(f"[{longs}]"),
    }
    labels = {
        "a long template": _labels(",".join(['"a"'] * 256), "x" * (fill - 8192) + "{}"),
        "a template of places": _labels('"a"', "{}" * ((fill - 8192) // 2)),
        "a long label": _labels(f'"{"x" * (fill - 8192)}"'),
        "many labels": _labels(_many(_LABEL, fill - 8192)),
    }
    few = 16_000  # of the values that one body may have, with the commas and brackets of their own
    objects = ",".join([_OBJECT] * 2 * few)
    within = {
        "many parts": _chat(f"[{','.join([_EMPTY] * 4 * few)}]"),
        "many parts of text": _chat(f"[{','.join([_TEXT] * few)}]"),
        "many recordings": _chat(f"[{','.join([_RECORDING] * few)}]"),
        "many numbers as parts": _chat(f"[{','.join([_ZERO] * 4 * few)}]"),
        "many unknown objects": _chat('"a"', f', "n": 9, "x": [{objects}]'),
        "many messages": f'{{"model": "af2", "messages": [{_many(_MESSAGE, few * len(_MESSAGE))}]}}',
        "many tools": _chat('"a"', f', "tools": [{objects}]'),
        "many stop strings": _chat('"a"', f', "stop": [{_many(_EMPTY, 12 * few)}]'),
    }
    for handler, shapes in ((CHAT, chats), (CHAT, within), (EMBEDDINGS, embeddings), (LABELS, labels)):
        for name, body in shapes.items():
            yield name, handler, body if isinstance(body, bytes) else body.encode()


def _request(body: bytes) -> Request:
    """A request whose body arrives in chunks of 64 KiB."""
    position = 0

    async def receive() -> dict[str, Any]:
        nonlocal position
        if position >= len(body):
            await asyncio.sleep(3600)  # the client waits for its answer
        chunk = body[position : position + _CHUNK]
        position += len(chunk)
        return {"type": "http.request", "body": chunk, "more_body": position < len(body)}

    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    return Request({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive)


def _status_kib(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


async def _lag(longest: list[float]) -> None:
    """Keep the longest time that the event loop did not come round."""
    while True:
        since = time.perf_counter()
        await asyncio.sleep(0.005)
        longest[0] = max(longest[0], time.perf_counter() - since - 0.005)


async def _measure(handler: Callable[[Request], Awaitable[Any]], body: bytes) -> dict[str, Any]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, longest = _status_kib("VmRSS"), [0.0]
    heart = asyncio.create_task(_lag(longest))
    await asyncio.sleep(0.02)
    status, message = 0, ""
    try:
        await handler(_request(body))
    except ApiError as error:
        status, message = error.status, error.message
    except AttributeError:  # there is no model behind this ingress
        message = "accepted"
    await asyncio.sleep(0.01)
    heart.cancel()
    peak_mib = (_status_kib("VmHWM") - before) / 1024
    return {"status": status, "message": message, "peak_mib": peak_mib, "lag_s": longest[0]}


async def main(mib: int) -> None:
    """Measure all shapes."""
    resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30, 16 * 2**30))
    ingress = Ingress(cast(Any, None), Serve(max_body_mb=mib, max_audio_s=60.0))
    await _measure(ingress.chat, _chat('"a"', ', "n": 9').encode())  # threads and tables that stay
    found = {}
    for name, handler, body in bodies(mib * 2**20):
        found[name] = await _measure(getattr(ingress, handler), body)
    print(json.dumps(found))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
